// A program that repeats recorded launches, for the sanitizers.
//
//   replay LIBRARY FILE REVERSE    runs every launch of FILE, in memory of exactly the recorded size, and compares the bytes
//
// FILE, as written by recording.py, is a sequence of 64-bit numbers and bytes; for each record
//   regions, for each of them: offset in 16 bytes, size, contents before, contents after;
//   launches, for each of them: kernel, grid and block, bytes of shared memory; arguments, for each of them: size, bytes,
//   pointers in them, for each of those: where it lies, and (region << 40 | offset) or −1 for one to nothing.
//
// The launches of a record run one after the other as the fake driver runs them; or, built with -DFAKE_THREADS for
// ThreadSanitizer, all at the same time, each CUDA thread of every block as a thread of the system.

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#ifndef FAKE_THREADS
#include "driver/scheduler.cpp"
#else
#include "driver/scheduler.h"

extern "C" void AnnotateIgnoreSyncBegin(const char*, int), AnnotateIgnoreSyncEnd(const char*, int);
extern "C" void AnnotateIgnoreReadsBegin(const char*, int), AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int), AnnotateIgnoreWritesEnd(const char*, int);
#define ANNOTATE(what) Annotate##what(__FILE__, __LINE__)

struct Meeting {  // of the threads of a block
  int n_warps;
  pthread_barrier_t all, warps[32];
  unsigned char values[32][2][32][16];  // by turns: one wait orders a turn
};

struct Cluster {  // of blocks
  pthread_barrier_t all;
  std::vector<Meeting*> meetings;
  unsigned char* shared[8];
};

struct OnThread {
  FakeBlock block;
  FakeThread thread;
  FakeTraffic traffic;
  Meeting* meeting;
  Cluster* cluster;
  const fake::Launch* launch;
  void** args;
  int turn;
};
static thread_local OnThread* self;

static void fault(const char* what) {
  fprintf(stderr, "%s: %s\n", self->launch->kernel->name, what);
  _Exit(3);
}
static void barrier(int) { pthread_barrier_wait(&self->meeting->all); }
static void barrier_of_cluster(int) { pthread_barrier_wait(&self->cluster->all); }
static void exchange(const void* mine, int size, int from, unsigned long long tag, void* result, unsigned mask) {
  const int warp = self->thread.number / 32;
  pthread_barrier_t* const together = &self->meeting->warps[warp];
  if (mask != ~0u) fault("a shuffle of less than a warp");
  if ((tag & 0xffff) == 0xffff) {  // __syncwarp
    pthread_barrier_wait(together);
    return;
  }
  // waits for the warp without ordering its memory: a shuffle does not, and ThreadSanitizer is to see that
  ANNOTATE(IgnoreSyncBegin), ANNOTATE(IgnoreReadsBegin), ANNOTATE(IgnoreWritesBegin);
  auto& values = self->meeting->values[warp][self->turn++ & 1];
  memcpy(values[self->thread.number % 32], mine, size);
  pthread_barrier_wait(together);
  memcpy(result, values[from], size);
  ANNOTATE(IgnoreWritesEnd), ANNOTATE(IgnoreReadsEnd), ANNOTATE(IgnoreSyncEnd);
}

static void* work(void* argument) {
  self = (OnThread*)argument;
  self->launch->enter(&self->block);
  self->launch->kernel->call(self->launch->kernel->function, self->args);
  return nullptr;
}

static void start(fake::Launch& launch, void** args, std::vector<pthread_t>& ids, std::vector<Cluster*>& clusters) {
  const unsigned *g = launch.grid, *b = launch.block, n = b[0] * b[1] * b[2], of_cluster = launch.kernel->cluster;
  for (unsigned k = 0; k < g[0] * g[1] * g[2]; ++k) {
    Meeting* const meeting = new Meeting;
    if (k % of_cluster == 0) {
      clusters.push_back(new Cluster);
      pthread_barrier_init(&clusters.back()->all, nullptr, n * of_cluster);
    }
    Cluster* const cluster = clusters.back();
    cluster->meetings.push_back(meeting);
    unsigned char* const shared = new (std::align_val_t(16)) unsigned char[launch.shared];
    memset(shared, 0xff, launch.shared);
    cluster->shared[k % of_cluster] = shared;
    pthread_barrier_init(&meeting->all, nullptr, n);
    meeting->n_warps = n / 32;
    for (unsigned w = 0; w < n / 32; ++w) pthread_barrier_init(&meeting->warps[w], nullptr, 32);
    for (unsigned i = 0; i < n; ++i) {
      OnThread* t = new OnThread{{{k % g[0], k / g[0] % g[1], k / g[0] / g[1]}, {b[0], b[1], b[2]}, {g[0], g[1], g[2]}},
          {{i % b[0], i / b[0] % b[1], i / b[0] / b[1]}, (int)i}, {}, meeting, cluster, &launch, args};
      t->block.shared = shared, t->block.thread = &t->thread, t->block.traffic = &t->traffic;
      t->block.cluster = cluster->shared, t->block.barrier_of_cluster = barrier_of_cluster;
      t->block.barrier = barrier, t->block.exchange = exchange, t->block.fault = fault, t->block.legal = launch.legal;
      ids.emplace_back();
      if (pthread_create(&ids.back(), nullptr, work, t)) _Exit(4);
    }
  }
}
#endif

struct Region {
  unsigned char* base;   // as malloc gave it
  unsigned char* start;  // with the recorded offset from a 16-byte boundary; it ends where the allocation ends
  int64_t size;
  std::vector<unsigned char> after;
};
static std::vector<Region> regions;
static FILE* file;

// AddressSanitizer cannot mark the bytes before a start that is no multiple of 8.
static bool legal(const void* p, int size) {
  for (const Region& region : regions)
    if (p >= region.start && (unsigned char*)p + size <= region.start + region.size) return true;
  return false;
}

static int64_t number() {
  int64_t value;
  if (fread(&value, 8, 1, file) != 1) _Exit(2);
  return value;
}
static std::vector<unsigned char> bytes(int64_t size) {
  std::vector<unsigned char> data(size);
  if (size && fread(data.data(), 1, size, file) != (size_t)size) _Exit(2);
  return data;
}

struct Call {
  fake::Launch launch;
  std::vector<std::vector<unsigned char>> values;
  std::vector<void*> args;
};

int main(int, char** argv) {
  void* const library = dlopen(argv[1], RTLD_NOW);
  file = fopen(argv[2], "rb");
  if (!library || !file) return fprintf(stderr, "%s\n", dlerror()), 2;
  const FakeKernel* const kernels = ((const FakeKernel* (*)())dlsym(library, "fake_kernels"))();
  const auto enter = (void (*)(FakeBlock*))dlsym(library, "fake_enter");
  const bool fibers = ((int*)dlsym(library, "fake_flags"))[0];
  bool wrong = false;
  for (int64_t n; fread(&n, 8, 1, file) == 1;) {
    regions.resize(n);
    for (Region& region : regions) {
      const int64_t offset = number();
      region.base = (unsigned char*)malloc(offset + (region.size = number()));
      region.start = region.base + offset;
      memcpy(region.start, bytes(region.size).data(), region.size);
      region.after = bytes(number());
    }
    std::vector<Call> calls(number());
    for (Call& call : calls) {
      unsigned* const b = call.launch.block;
      call.launch = {&kernels[number()], enter, fibers, true};
      for (unsigned* size : {call.launch.grid, b})
        for (int i = 0; i < 3; ++i) size[i] = (unsigned)number();
      call.launch.shared = (unsigned)number();
      call.launch.reverse = atoi(argv[3]);
      call.launch.legal = legal;
      call.values.resize(number());
      for (auto& value : call.values) {
        value = bytes(number());
        for (int64_t k = number(); k > 0; --k) {
          const int64_t at = number(), place = number();
          const void* pointer = place < 0 ? nullptr : regions[place >> 40].start + (place & ((1ll << 40) - 1));
          memcpy(value.data() + at, &pointer, 8);
        }
        call.args.push_back(value.data());
      }
    }
#ifdef FAKE_THREADS
    std::vector<pthread_t> ids;
    std::vector<Cluster*> clusters;
    for (Call& call : calls) start(call.launch, call.args.data(), ids, clusters);
    for (pthread_t id : ids) pthread_join(id, nullptr);
    for (Cluster* cluster : clusters) {
      for (Meeting* meeting : cluster->meetings) {
        pthread_barrier_destroy(&meeting->all);
        for (int w = 0; w < meeting->n_warps; ++w) pthread_barrier_destroy(&meeting->warps[w]);
        delete meeting;
      }
      pthread_barrier_destroy(&cluster->all);
      delete cluster;
    }
#else
    for (Call& call : calls) {
      const std::string broken = fake::run(call.launch, call.args.data());
      if (!broken.empty()) wrong = true, fprintf(stderr, "%s\n", broken.c_str());
    }
#endif
    for (Region& region : regions) {
      if (region.after.size() && memcmp(region.start, region.after.data(), region.after.size()))
        wrong = true, fprintf(stderr, "%s: wrong result\n", calls[0].launch.kernel->name);
      free(region.base);
    }
  }
  fflush(stderr);
  _Exit(wrong);
}
