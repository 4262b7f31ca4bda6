// What every kernel shares: arithmetic types, and the two ways to touch global memory.
//
// Global memory is read and written only through load*/store* below. So each access carries its cache hint, is as wide
// as its alignment allows, and can be counted when the kernels run on a CPU.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef long long i64;  // every offset: N·C exceeds 2^31

// An id that was out of range: loss NaN, gradient 0. IGNORED is -1. See swl/backends/protocol.py.
const i64 INVALID = -2;

// ------------------------------------------------------------------------------------------------ arithmetic

// float64 computes in float64, everything else in float32.
template <typename T>
struct AccOf {
  typedef float type;
};
template <>
struct AccOf<double> {
  typedef double type;
};
template <typename T>
using Acc = typename AccOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T, typename U>
struct Same {
  static const bool value = false;
};
template <typename T>
struct Same<T, T> {
  static const bool value = true;
};

// Rounds once, to nearest even.
template <typename T, typename A>
struct Narrow {
  static __device__ __forceinline__ T from(A x) { return (T)x; }
};
template <typename A>
struct Narrow<__half, A> {
  static __device__ __forceinline__ __half from(A x) { return __float2half_rn((float)x); }
};
template <typename A>
struct Narrow<__nv_bfloat16, A> {
  static __device__ __forceinline__ __nv_bfloat16 from(A x) { return __float2bfloat16_rn((float)x); }
};
template <typename T, typename A>
__device__ __forceinline__ T narrow(A x) {
  return Narrow<T, A>::from(x);
}

template <typename A>
__device__ __forceinline__ A infinity() {
  return (A)__int_as_float(0x7f800000);
}
template <typename A>
__device__ __forceinline__ A not_a_number() {
  return (A)__int_as_float(0x7fc00000);
}

// The larger of two numbers; a NaN wins over both. fmaxf would drop it.
template <typename A>
__device__ __forceinline__ A max_or_nan(A a, A b) {
#if __CUDA_ARCH__ >= 800
  if constexpr (Same<A, float>::value) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
  }
#endif
  return (a >= b || a != a) ? a : b;
}

// a·b + c, rounded once: as written, whatever the compiler may contract elsewhere
__device__ __forceinline__ float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma_of(double a, double b, double c) { return fma(a, b, c); }

// exp(u − s) of a difference u of two logits, by one multiplication with log₂e and the card's 2ˣ. Its relative error is
// up to (2·|u − s| + 4)·2⁻²⁴: the difference was rounded by about as much, and what is far below the largest adds as
// little.
const float LOG2_E = 1.4426950408889634f;
__device__ __forceinline__ float exp_of_difference(float u) { return exp2f(u * LOG2_E); }
__device__ __forceinline__ double exp_of_difference(double u) { return exp(u); }
__device__ __forceinline__ float exp_of_difference(float u, float s) { return exp2f(fma_of(u, LOG2_E, -s * LOG2_E)); }
__device__ __forceinline__ double exp_of_difference(double u, double s) { return exp(u - s); }
__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1, x); }
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// ------------------------------------------------------------------------------------------------ global memory

template <int BYTES>
struct WordOf;
template <>
struct WordOf<2> {
  typedef unsigned short type;
};
template <>
struct WordOf<4> {
  typedef unsigned int type;
};
template <>
struct WordOf<8> {
  typedef uint2 type;
};
template <>
struct WordOf<16> {
  typedef uint4 type;
};

// Data of one row, not read again: evict first.
template <typename T>
__device__ __forceinline__ T load(const T* p) {
  typedef typename WordOf<sizeof(T)>::type Word;
  const Word word = __ldcs(reinterpret_cast<const Word*>(p));
  T x;
  memcpy(&x, &word, sizeof(T));
  return x;
}

// Data that every row reads and no kernel writes while it runs (class weights, bias): keep in cache.
template <typename T>
__device__ __forceinline__ T load_shared_by_rows(const T* p) {
  typedef typename WordOf<sizeof(T)>::type Word;
  const Word word = __ldg(reinterpret_cast<const Word*>(p));
  T x;
  memcpy(&x, &word, sizeof(T));
  return x;
}

template <typename T>
__device__ __forceinline__ void store(T* p, T x) {
  typedef typename WordOf<sizeof(T)>::type Word;
  Word word;
  memcpy(&word, &x, sizeof(T));
  __stcs(reinterpret_cast<Word*>(p), word);
}

__device__ __forceinline__ bool is_aligned(const void* p, unsigned bytes) {
  return ((unsigned long long)p & (bytes - 1)) == 0;
}

// ------------------------------------------------------------------------------------------------ within a block

// Shared memory is one dynamic array, so that its size is the host's choice and its place the block's own.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

const unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ i64 min_of(i64 a, i64 b) { return a < b ? a : b; }
