#include "scheduler.h"

#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

namespace fake {

static FakeBlock block_of(const Launch& launch, unsigned long long number) {
  const unsigned *g = launch.grid, *b = launch.block;
  FakeBlock block{};
  block.index = {(unsigned)(number % g[0]), (unsigned)(number / g[0] % g[1]), (unsigned)(number / g[0] / g[1])};
  block.size = {b[0], b[1], b[2]};
  block.grid = {g[0], g[1], g[2]};
  return block;
}

static void place(FakeThread* thread, int number, const unsigned* b) {
  thread->number = number;
  thread->index = {number % b[0], number / b[0] % b[1], number / b[0] / b[1]};
}

// Exactly as large as asked for, so that AddressSanitizer sees an access beyond it; poisoned with NaN.
static unsigned char* shared_memory(unsigned size) {
  void* memory = nullptr;
  if (size && posix_memalign(&memory, 128, size)) abort();
  return (unsigned char*)memory;
}

}  // namespace fake

// ------------------------------------------------------------------------------------------------ fibers

extern "C" void fake_switch(void** save, void* to);
asm(R"(
.text
.globl fake_switch
.hidden fake_switch
fake_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace fake {

struct Fiber : FakeThread {
  int rank;  // of its block in the cluster
  void* stack_pointer;
  char* stack;
  bool done, started;
};

struct Warp {
  unsigned arrived;
  int generation;
  unsigned long long tag;
  unsigned char values[2][32][16];  // by turns: one wait orders a turn
};

// Threads that wait for each other: a block's, or a cluster's.
struct Meeting {
  int arrived, generation, alive, line;
  void wait(int at_line, int all, const char* divergent);
};

const size_t STACK = 256 << 10;
const int CLUSTER = 8, FIBERS = CLUSTER * 1024;  // at most
static Fiber* fibers;
static Fiber* running;
static void* scheduler_stack_pointer;
static FakeBlock blocks[CLUSTER];
static unsigned char* shared[CLUSTER];
static Warp warps[CLUSTER][32];
static Meeting of_block[CLUSTER], of_cluster;
static int n_threads, n_blocks;  // of a block, of a cluster
static bool progress;
static Launch* launch;
static void** launch_args;
static sigjmp_buf escape;
static volatile sig_atomic_t in_kernel;
static std::string broken;

static void yield() { fake_switch(&running->stack_pointer, scheduler_stack_pointer); }

static void fault(const char* what) {
  char where[100];
  const FakeBlock& block = blocks[running ? running->rank : 0];
  snprintf(where, sizeof where, " in block (%u, %u, %u), thread %d", block.index.x, block.index.y, block.index.z,
      block.thread ? block.thread->number : -1);
  broken = std::string(launch->kernel->name) + ": " + what + where;
  siglongjmp(escape, 1);
}

void Meeting::wait(int at_line, int all, const char* divergent) {
  if (!arrived) line = at_line;
  if (line != at_line) fault(divergent);
  const int mine = generation;
  ++arrived;
  progress = true;
  while (generation == mine) {
    if (arrived >= (launch->strict ? all : alive)) {
      arrived = 0;
      ++generation;
      progress = true;
      break;
    }
    yield();
  }
}

static void barrier(int line) { of_block[running->rank].wait(line, n_threads, "divergent __syncthreads()"); }
static void barrier_of_cluster(int line) {
  of_cluster.wait(line, n_threads * n_blocks, "a divergent barrier of a cluster");
}

static void exchange(const void* mine, int size, int from, unsigned long long tag, void* result, unsigned mask) {
  Warp& warp = warps[running->rank][running->number / 32];
  const int lane = running->number % 32, before = warp.generation;
  if (mask != ~0u) fault("a shuffle of less than a warp");
  if (n_threads % 32) fault("a shuffle where warps are not full");
  if (!warp.arrived) warp.tag = tag;
  if (warp.tag != tag) fault("divergent shuffle");
  memcpy(warp.values[before & 1][lane], mine, size);
  warp.arrived |= 1u << lane;
  progress = true;
  if (warp.arrived == ~0u) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    while (warp.generation == before) yield();
    progress = true;
  }
  memcpy(result, warp.values[before & 1][from], size);
}

static void fiber_main() {
  for (;;) {
    launch->kernel->call(launch->kernel->function, launch_args);
    running->done = true;
    --of_block[running->rank].alive;
    --of_cluster.alive;
    progress = true;
    yield();
  }
}

static void reset(Fiber* fiber) {
  void** top = (void**)(fiber->stack + STACK - 64);
  *--top = nullptr;  // so that the stack is aligned at fiber_main
  *--top = (void*)fiber_main;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->stack_pointer = top;
  fiber->started = true;
}

static void make_fibers() {
  fibers = new Fiber[FIBERS]();
  for (int i = 0; i < FIBERS; ++i)
    fibers[i].stack =
        (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void run_fibers() {
  const int all = n_threads * n_blocks;
  memset(warps, 0, n_blocks * sizeof warps[0]);
  for (int rank = 0; rank < n_blocks; ++rank) of_block[rank] = {0, 0, n_threads};
  of_cluster = {0, 0, all};
  for (int i = 0; i < all; ++i) {
    if (!fibers[i].started || !fibers[i].done) reset(&fibers[i]);
    place(&fibers[i], i % n_threads, launch->block);
    fibers[i].rank = i / n_threads;
    fibers[i].done = false;
  }
  while (of_cluster.alive > 0) {
    progress = false;
    for (int k = 0; k < all; ++k) {
      Fiber* fiber = &fibers[launch->reverse ? all - 1 - k : k];
      if (fiber->done) continue;
      running = fiber;
      blocks[fiber->rank].thread = fiber;
      if (n_blocks > 1) launch->enter(&blocks[fiber->rank]);
      fake_switch(&scheduler_stack_pointer, fiber->stack_pointer);
    }
    if (of_cluster.alive && !progress) fault("not all threads reach a barrier or shuffle");
  }
}

static void run_one_by_one() {  // no thread waits for another
  FakeThread thread;
  blocks[0].thread = &thread;
  running = nullptr;
  for (int i = 0; i < n_threads; ++i) {
    place(&thread, launch->reverse ? n_threads - 1 - i : i, launch->block);
    launch->kernel->call(launch->kernel->function, launch_args);
  }
}

static void on_bad_address(int signal_, siginfo_t* info, void*) {
  signal(signal_, SIG_DFL);  // of the host itself: as without the fake
  if (!in_kernel) return;
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, signal_);
  sigprocmask(SIG_UNBLOCK, &set, nullptr);
  char text[64];
  snprintf(text, sizeof text, "illegal address %p", info->si_addr);
  fault(text);
}

struct CatchBadAddresses {
  struct sigaction before[2];
  CatchBadAddresses() {
    static void* stack = nullptr;
    if (!stack) {
      stack_t own{};
      own.ss_sp = stack = malloc(own.ss_size = 1 << 16);
      sigaltstack(&own, nullptr);
    }
    struct sigaction action{};
    action.sa_sigaction = on_bad_address;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before[0]);
    sigaction(SIGBUS, &action, &before[1]);
    in_kernel = 1;
  }
  ~CatchBadAddresses() {
    in_kernel = 0;
    sigaction(SIGSEGV, &before[0], nullptr);
    sigaction(SIGBUS, &before[1], nullptr);
  }
};

std::string run(Launch& this_launch, void** args) {
  launch = &this_launch;
  launch_args = args;
  n_threads = launch->block[0] * launch->block[1] * launch->block[2];
  broken.clear();
  if (!fibers) make_fibers();
  const CatchBadAddresses caught;
  n_blocks = launch->kernel->cluster;
  for (int rank = 0; rank < n_blocks; ++rank) shared[rank] = shared_memory(launch->shared);
  const unsigned long long clusters = (unsigned long long)launch->grid[0] * launch->grid[1] * launch->grid[2] / n_blocks;
  if (sigsetjmp(escape, 1) == 0) {
    for (unsigned long long k = 0; k < clusters; ++k) {
      const unsigned long long first = (launch->reverse ? clusters - 1 - k : k) * n_blocks;
      for (int rank = 0; rank < n_blocks; ++rank) {
        blocks[rank] = block_of(*launch, first + rank);
        blocks[rank].shared = shared[rank];
        blocks[rank].cluster = shared;
        blocks[rank].traffic = &launch->traffic;
        blocks[rank].barrier = barrier;
        blocks[rank].barrier_of_cluster = barrier_of_cluster;
        blocks[rank].exchange = exchange;
        blocks[rank].fault = fault;
        blocks[rank].legal = launch->legal;
        if (launch->shared) memset(shared[rank], 0xff, launch->shared);
      }
      launch->enter(&blocks[0]);
      if (launch->fibers)
        run_fibers();
      else
        run_one_by_one();
    }
  } else {
    for (int i = 0; i < FIBERS; ++i) fibers[i].started = false;
  }
  for (int rank = 0; rank < n_blocks; ++rank) free(shared[rank]);
  return broken;
}

}  // namespace fake
