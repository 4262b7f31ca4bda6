// CUDA C on a CPU: enough of the language for kernels/*.cu to compile as C++, and a scheduler that runs their blocks.
//
// Three ways to run a launch (`Mode`):
//   FORWARD, REVERSE   each CUDA thread of a block is a fiber; a fiber runs until it waits at a barrier or shuffle, then
//                      the next one runs, by rising or falling thread number. Blocks come one after the other, by rising
//                      or falling number. Code with a missing barrier gives different numbers in the two orders.
//   THREADS            each CUDA thread of every block is an operating-system thread, all at the same time: for
//                      ThreadSanitizer. (Built with -DSHIM_THREADS, because shared state is then kept per thread.)
// A barrier or shuffle that not all threads reach, or reach at different places, ends the launch with an error.
//
// Global memory is touched through __ldcs, __ldg and __stcs only. They check alignment and count bytes.

#pragma once

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <new>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) uint4* const name = reinterpret_cast<uint4*>(shim::self->block->shared)

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint3 { unsigned x, y, z; };

// ------------------------------------------------------------------------------------------------ 16-bit storage

struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };

inline float shim_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t shim_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

inline float __bfloat162float(__nv_bfloat16 x) { return shim_float((uint32_t)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = shim_bits(x);
  if (x != x) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { _Float16 h; memcpy(&h, &x.bits, 2); return (float)h; }
inline __half __float2half_rn(float x) { const _Float16 h = (_Float16)x; __half r; memcpy(&r.bits, &h, 2); return r; }
inline float __int_as_float(int bits) { return shim_float((uint32_t)bits); }

// ------------------------------------------------------------------------------------------------ scheduler

namespace shim {

enum Mode { FORWARD = 0, REVERSE = 1, THREADS = 2 };

// What a launch reports back; the layout is known to launch.py.
struct Report {
  int64_t bytes_read, bytes_written;
  int64_t wide_accesses, narrow_accesses;  // 16 bytes; less
  char error[256];
};

struct Warp {
  int arrived = 0, generation = 0;
  unsigned long long tag = 0;
  alignas(16) unsigned char values[2][32][16];
};

struct Block {
  uint3 index, size, grid;
  unsigned char* shared;
  int n_threads, arrived = 0, generation = 0, line = 0;
  Warp warps[32];
  Report* report;
#ifdef SHIM_THREADS
  pthread_barrier_t barrier, warp_barriers[32];
#endif
};

struct Thread {
  uint3 index;
  int number;
  Block* block;
  const char* waits_at = nullptr;  // name of the barrier or shuffle
  bool done = true;
  int shuffles = 0;
  jmp_buf where;
  ucontext_t context;
};

extern thread_local Thread* self;

[[noreturn]] void fail(const char* format, ...);
void yield();  // let the other fibers run
extern thread_local bool progress;

}  // namespace shim

#define threadIdx (shim::self->index)
#define blockIdx (shim::self->block->index)
#define blockDim (shim::self->block->size)
#define gridDim (shim::self->block->grid)

// ------------------------------------------------------------------------------------------------ barriers, shuffles

#ifdef SHIM_THREADS

#ifdef __SANITIZE_THREAD__
extern "C" void AnnotateIgnoreSyncBegin(const char*, int), AnnotateIgnoreSyncEnd(const char*, int);
extern "C" void AnnotateIgnoreReadsBegin(const char*, int), AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int), AnnotateIgnoreWritesEnd(const char*, int);
#define SHIM_ANNOTATE(what) Annotate##what(__FILE__, __LINE__)
#else
#define SHIM_ANNOTATE(what)
#endif

inline void shim_syncthreads(int) { pthread_barrier_wait(&shim::self->block->barrier); }

// Waits for the warp without ordering its memory: a shuffle does not, and ThreadSanitizer is to see that.
struct Unordered {
  Unordered() { SHIM_ANNOTATE(IgnoreSyncBegin), SHIM_ANNOTATE(IgnoreReadsBegin), SHIM_ANNOTATE(IgnoreWritesBegin); }
  ~Unordered() { SHIM_ANNOTATE(IgnoreWritesEnd), SHIM_ANNOTATE(IgnoreReadsEnd), SHIM_ANNOTATE(IgnoreSyncEnd); }
};

template <typename T> T shim_exchange(T value, int from, unsigned long long) {
  const Unordered unordered;
  shim::Thread* t = shim::self;
  const int warp = t->number / 32, turn = t->shuffles++ & 1;  // two buffers by turns: one wait orders a turn
  auto& values = t->block->warps[warp].values[turn];
  memcpy(values[t->number % 32], &value, sizeof(T));
  pthread_barrier_wait(&t->block->warp_barriers[warp]);
  memcpy(&value, values[from], sizeof(T));
  return value;
}

inline void shim_syncwarp(int) {
  pthread_barrier_wait(&shim::self->block->warp_barriers[shim::self->number / 32]);
}

#else

inline void shim_syncthreads(int line) {
  shim::Thread* t = shim::self;
  shim::Block* b = t->block;
  if (b->arrived == 0) b->line = line;
  if (b->line != line) shim::fail("divergent __syncthreads(): lines %d and %d", b->line, line);
  const int generation = b->generation;
  shim::progress = true;
  if (++b->arrived == b->n_threads) {
    b->arrived = 0;
    ++b->generation;
    return;
  }
  t->waits_at = "__syncthreads()";
  while (b->generation == generation) shim::yield();
  t->waits_at = nullptr;
  shim::progress = true;
}

template <typename T> T shim_exchange(T value, int from, unsigned long long tag) {
  static_assert(sizeof(T) <= 8, "CUDA shuffles 4 and 8 bytes");
  shim::Thread* t = shim::self;
  shim::Warp& warp = t->block->warps[t->number / 32];
  const int generation = warp.generation, lane = t->number % 32;
  if (warp.arrived == 0) warp.tag = tag;
  if (warp.tag != tag) shim::fail("divergent shuffle: line %d meets line %d", (int)(warp.tag >> 16), (int)(tag >> 16));
  memcpy(warp.values[generation & 1][lane], &value, sizeof(T));
  shim::progress = true;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    t->waits_at = "__shfl_sync";
    while (warp.generation == generation) shim::yield();
    t->waits_at = nullptr;
    shim::progress = true;
  }
  memcpy(&value, warp.values[generation & 1][from], sizeof(T));
  return value;
}

inline void shim_syncwarp(int line) { shim_exchange(0, 0, (unsigned long long)line << 16 | 0xffff); }

#endif

#define __syncthreads() shim_syncthreads(__LINE__)
#define __syncwarp() shim_syncwarp(__LINE__)

inline int shim_lane(unsigned mask, int width) {
  if (mask != 0xffffffffu) shim::fail("a shuffle of less than a warp is not emulated");
  if (width < 1 || width > 32 || (width & (width - 1))) shim::fail("shuffle width %d", width);
  return shim::self->number % 32;
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32, int line = __builtin_LINE()) {
  const int lane = shim_lane(mask, width), from = lane + (int)step;
  const bool inside = lane % width + (int)step < width;
  return shim_exchange(value, inside ? from : lane, (unsigned long long)line << 16 | step << 8 | (unsigned)width);
}
template <typename T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int lane = shim_lane(mask, width);
  return shim_exchange(value, lane / width * width + source % width, (unsigned long long)line << 16 | (unsigned)width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  const int lane = shim_lane(mask, width);
  return shim_exchange(value, (lane ^ bits) / width == lane / width ? lane ^ bits : lane,
                       (unsigned long long)line << 16 | (unsigned)bits << 8 | (unsigned)width);
}

inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long compare, unsigned long long value) {
  __atomic_compare_exchange_n(p, &compare, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return compare;
}

// ------------------------------------------------------------------------------------------------ global memory

template <typename W> inline void shim_touch(const W* p, bool write) {
  if ((uintptr_t)p % sizeof(W)) shim::fail("%d-byte access at a misaligned address", (int)sizeof(W));
#ifndef SHIM_THREADS
  shim::Report* report = shim::self->block->report;
  (write ? report->bytes_written : report->bytes_read) += sizeof(W);
  (sizeof(W) == 16 ? report->wide_accesses : report->narrow_accesses) += 1;
#endif
}
template <typename W> inline W __ldcs(const W* p) { shim_touch(p, false); W x; memcpy(&x, p, sizeof(W)); return x; }
template <typename W> inline W __ldg(const W* p) { shim_touch(p, false); W x; memcpy(&x, p, sizeof(W)); return x; }
template <typename W> inline void __stcs(W* p, W x) { shim_touch(p, true); memcpy(p, &x, sizeof(W)); }

// ------------------------------------------------------------------------------------------------ launching

namespace shim {

// A kernel's parameter types as one letter each, for launch.py: p pointer, i int, l 64-bit, f float, d double; after p
// the letter of what it points to (h __half, b bfloat16, u unsigned 64-bit, v void); s and its size for a struct.
template <typename T> std::string letter() {
  typedef typename std::remove_cv<T>::type U;
  if (std::is_pointer<U>::value) return "p" + letter<typename std::remove_pointer<U>::type>();
  if (std::is_same<U, int>::value) return "i";
  if (std::is_same<U, long long>::value) return "l";
  if (std::is_same<U, unsigned long long>::value) return "u";
  if (std::is_same<U, float>::value) return "f";
  if (std::is_same<U, double>::value) return "d";
  if (std::is_same<U, __half>::value) return "h";
  if (std::is_same<U, __nv_bfloat16>::value) return "b";
  if (std::is_void<U>::value) return "v";
  if constexpr (std::is_class<U>::value) return "s" + std::to_string(sizeof(U));
  return "?";
}

struct Kernel {
  std::string signature;
  void (*call)(void (*)(), void** args);
  void (*function)();
};

template <typename... Args> struct Caller {
  template <size_t... I> static void apply(void (*f)(Args...), void** args, std::index_sequence<I...>) {
    f(*(typename std::remove_cv<Args>::type*)args[I]...);
  }
  static void call(void (*f)(), void** args) {
    apply(reinterpret_cast<void (*)(Args...)>(f), args, std::index_sequence_for<Args...>());
  }
};

template <typename... Args> Kernel kernel(void (*f)(Args...)) {
  std::string signature;
  for (const std::string& one : {letter<Args>()...}) signature += one + " ";
  return Kernel{signature, &Caller<Args...>::call, reinterpret_cast<void (*)()>(f)};
}

extern const std::vector<Kernel> kernels;  // defined by the generated file

}  // namespace shim
