// CUDA C++ for g++: the fake NVRTC includes it before every source.

#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fake_abi.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __constant__ static
#define __shared__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define __CUDACC_VER_MAJOR__ 13

// One copy in each library of kernels, set by fake_enter
#ifdef FAKE_THREADS
static thread_local FakeBlock* fake_block;
#else
static FakeBlock* fake_block;
#endif
#define threadIdx (fake_block->thread->index)
#define blockIdx (fake_block->index)
#define blockDim (fake_block->size)
#define gridDim (fake_block->grid)
#define warpSize 32
#define DYNAMIC_SHARED(name) uint4* const name = reinterpret_cast<uint4*>(fake_block->shared)

struct uint2 { unsigned x, y; };
struct int2 { int x, y; };
struct float2 { float x, y; };
struct double2 { double x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

// ------------------------------------------------------------------------------------------------ barriers, shuffles

#define __syncthreads() fake_block->barrier(__LINE__)
#define __cluster_barrier_arrive()
#define __cluster_barrier_wait() fake_block->barrier_of_cluster(__LINE__)
inline void* __cluster_map_shared_rank(void* p, unsigned rank) {
  return fake_block->cluster[rank] + ((unsigned char*)p - fake_block->shared);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Threads meet in a shuffle only if they are at the same one: its line and its numbers are the tag.
template <typename T> T fake_exchange(unsigned mask, T value, int from, int width, int step, int line) {
  static_assert(sizeof(T) <= 8, "CUDA shuffles 4 and 8 bytes");
  if (width < 1 || width > 32 || (width & (width - 1))) fake_block->fault("a shuffle of a width that is no power of two");
  T result;
  const unsigned long long tag = (unsigned long long)line << 16 | (unsigned)step << 8 | (unsigned)width;
  fake_block->exchange(&value, sizeof value, from, tag, &result, mask);
  return result;
}
inline int fake_lane() { return fake_block->thread->number % 32; }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  int none = 0;
  fake_block->exchange(&none, sizeof none, fake_lane(), (unsigned long long)line << 16 | 0xffff, &none, mask);
}
template <typename T> T __shfl_sync(unsigned mask, T v, int source, int width = 32, int line = __builtin_LINE()) {
  return fake_exchange(mask, v, fake_lane() / width * width + source % width, width, 0, line);
}
template <typename T> T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, int line = __builtin_LINE()) {
  const int lane = fake_lane();
  return fake_exchange(mask, v, lane % width + (int)d < width ? lane + (int)d : lane, width, d, line);
}
template <typename T> T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, int line = __builtin_LINE()) {
  const int lane = fake_lane();
  return fake_exchange(mask, v, lane % width >= (int)d ? lane - (int)d : lane, width, d, line);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, int line = __builtin_LINE()) {
  const int lane = fake_lane();
  return fake_exchange(mask, v, (lane ^ bits) / width == lane / width ? lane ^ bits : lane, width, bits, line);
}

// Threads of a block take turns, so these are atomic.
template <typename T> T atomicCAS(T* p, T compare, T v) {
  __atomic_compare_exchange_n(p, &compare, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return compare;
}
template <typename T> T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
template <typename T> T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
template <typename T> T atomicMax(T* p, T v) { T old = *p; if (v > old) *p = v; return old; }
template <typename T> T atomicMin(T* p, T v) { T old = *p; if (v < old) *p = v; return old; }

// ------------------------------------------------------------------------------------------------ global memory

template <typename W> void fake_touch(const W* p, bool write) {
  if ((uintptr_t)p % sizeof(W)) fake_block->fault("misaligned address");
  if (fake_block->legal && !fake_block->legal(p, sizeof(W))) fake_block->fault("illegal address outside of the arrays");
  FakeTraffic* traffic = fake_block->traffic;
  (write ? traffic->written : traffic->read) += sizeof(W);
  (sizeof(W) == 16 ? traffic->wide : traffic->narrow) += 1;
}
template <typename W> W __ldcs(const W* p) { fake_touch(p, false); W x; memcpy(&x, p, sizeof x); return x; }
template <typename W> W __ldg(const W* p) { fake_touch(p, false); W x; memcpy(&x, p, sizeof x); return x; }
template <typename W> void __stcs(W* p, W x) { fake_touch(p, true); memcpy(p, &x, sizeof x); }

// ------------------------------------------------------------------------------------------------ arithmetic

inline float __uint_as_float(unsigned b) { float f; memcpy(&f, &b, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned b; memcpy(&b, &f, 4); return b; }
inline float __int_as_float(int b) { return __uint_as_float((unsigned)b); }
inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
inline double __longlong_as_double(long long b) { double d; memcpy(&d, &b, 8); return d; }
inline long long __double_as_longlong(double d) { long long b; memcpy(&b, &d, 8); return b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }

struct __half { unsigned short x; };
struct __half_raw { unsigned short x; };
inline float __half2float(__half h) { _Float16 v; memcpy(&v, &h.x, 2); return (float)v; }
inline __half __float2half_rn(float f) { _Float16 v = (_Float16)f; __half h; memcpy(&h.x, &v, 2); return h; }
inline __half __float2half(float f) { return __float2half_rn(f); }
struct half {  // what CuPy makes its float16 of
  __half d;
  half() {}
  half(float v) : d(__float2half_rn(v)) {}
  explicit half(const __half_raw& v) { d.x = v.x; }
  template <typename T, typename = typename std::enable_if<std::is_arithmetic<T>::value>::type>
  explicit half(T v) : half((float)v) {}
  operator float() const { return __half2float(d); }
  operator __half_raw() const { return {d.x}; }
};
struct __nv_bfloat16 {
  unsigned short x;
  __nv_bfloat16() = default;
  __nv_bfloat16(float f) {
    const unsigned b = __float_as_uint(f);
    x = f != f ? 0x7fff : (unsigned short)((b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
  operator float() const { return __uint_as_float((unsigned)x << 16); }
};
struct __half2 { __half x, y; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline float __bfloat162float(__nv_bfloat16 h) { return (float)h; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.x; }
inline unsigned short __half_as_ushort(const half& h) { return h.d.x; }
inline half __ushort_as_half(unsigned short v) { half h; h.d.x = v; return h; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { __nv_bfloat16 h; h.x = v; return h; }
inline bool __hisnan(__nv_bfloat16 h) { return (h.x & 0x7fff) > 0x7f80; }
inline int __hisinf(__nv_bfloat16 h) { return (h.x & 0x7fff) == 0x7f80; }
inline bool __hisnan(const half& h) { return (h.d.x & 0x7fff) > 0x7c00; }
inline int __hisinf(const half& h) { return (h.d.x & 0x7fff) == 0x7c00; }

// What CUDA has in the global namespace, for two types that differ too
using std::isnan; using std::isinf; using std::isfinite; using std::signbit; using std::abs; using std::min;
using std::max; using std::fma; using std::pow; using std::exp; using std::log; using std::sqrt; using std::tanh;
using std::fmod; using std::floor; using std::ceil; using std::copysign; using std::hypot; using std::sin;
using std::cos; using std::tan; using std::log1p; using std::expm1; using std::log2; using std::log10;
using std::atan2; using std::atan; using std::asin; using std::acos; using std::sinh; using std::cosh;
using std::fabs; using std::fmin; using std::rint; using std::trunc; using std::frexp; using std::ldexp; using std::exp2;
#define FAKE_OF_TWO(name, comparison)                                                                               \
  template <typename A, typename B,                                                                                  \
      typename = typename std::enable_if<!std::is_same<A, B>::value && std::is_arithmetic<A>::value &&               \
                                         std::is_arithmetic<B>::value>::type>                                        \
  auto name(A a, B b) {                                                                                              \
    typedef typename std::common_type<A, B>::type C;                                                                 \
    return (C)a comparison(C) b ? (C)a : (C)b;                                                                       \
  }
FAKE_OF_TWO(max, >)
FAKE_OF_TWO(min, <)
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float rsqrt(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }

// ------------------------------------------------------------------------------------------------ parameters

// The type of a parameter in text: i int, l 64 bits, u unsigned 64 bits, f float, d double, h __half, b bfloat16, v void;
// p before what a pointer points to; {size;letters@offset,…} of a struct; ? anything else.
template <typename T> std::string fake_letter();

struct FakeAny {
  template <typename T> operator T() const;
};
template <typename S, typename N, typename = void> struct FakeTakes : std::false_type {};
template <typename S, size_t... I>
struct FakeTakes<S, std::index_sequence<I...>, std::void_t<decltype(S{((void)I, FakeAny{})...})>> : std::true_type {};
template <typename S, size_t N = 48> constexpr size_t fake_fields() {  // the members of a plain struct
  if constexpr (FakeTakes<S, std::make_index_sequence<N>>::value || N == 0) return N;
  else return fake_fields<S, N - 1>();
}
template <typename S> struct FakeMember {
  const char* base;
  std::string* text;
  template <typename... M> void operator()(M&... member) const { (one(member), ...); }
  template <typename M> void one(M& member) const {
    *text += fake_letter<M>() + "@" + std::to_string((const char*)&member - base) + ",";
  }
};
#include "fake_members.h"  // fake_members(s, f): calls f with all members of s; written by build.py

template <typename T> std::string fake_letter() {
  typedef typename std::remove_cv<T>::type U;
  if constexpr (std::is_pointer<U>::value) return "p" + fake_letter<typename std::remove_pointer<U>::type>();
  else if constexpr (std::is_same<U, int>::value) return "i";
  else if constexpr (std::is_same<U, long long>::value) return "l";
  else if constexpr (std::is_same<U, unsigned long long>::value) return "u";
  else if constexpr (std::is_same<U, float>::value) return "f";
  else if constexpr (std::is_same<U, double>::value) return "d";
  else if constexpr (std::is_same<U, __half>::value) return "h";
  else if constexpr (std::is_same<U, __nv_bfloat16>::value) return "b";
  else if constexpr (std::is_void<U>::value) return "v";
  else if constexpr (std::is_aggregate<U>::value && fake_fields<U>() > 0) {
    alignas(U) static char memory[sizeof(U)];
    std::string text = "{" + std::to_string(sizeof(U)) + ";";
    fake_members<fake_fields<U>()>(*(U*)memory, FakeMember<U>{memory, &text});
    return text + "}";
  } else return "?";
}

template <typename... A> struct FakeCall {
  static constexpr int sizes[sizeof...(A) + 1] = {(int)sizeof(A)..., 0};
  template <size_t... I> static void apply(void (*f)(A...), void** a, std::index_sequence<I...>) {
    f(*(typename std::remove_const<A>::type*)a[I]...);
  }
  static void call(void* f, void** a) { apply((void (*)(A...))f, a, std::index_sequence_for<A...>()); }
};
template <typename... A> FakeKernel fake_kernel(const char* name, void (*f)(A...), int cluster) {
  static const std::string signature = [] {
    std::string text;
    ((text += fake_letter<A>() + " "), ...);
    return text;
  }();
  return {name, &FakeCall<A...>::call, (void*)f, (int)sizeof...(A), FakeCall<A...>::sizes, signature.c_str(), cluster};
}
extern "C" __attribute__((visibility("default"), used)) void fake_enter(FakeBlock* b) { fake_block = b; }
