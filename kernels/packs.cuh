// Packs of 16 bytes: where those of a row lie, and how they are loaded, stored, widened and rounded.

#pragma once

#include "common.cuh"

// V neighbours of a row. A row need not start on a 16-byte boundary, and C need not be a multiple of V, so the packs of
// a row are laid over it from the last boundary before it; the first and the last may stick out:
//
//     column        -2 -1  0  1  2  3  4  5  6  7  8  9         lead = 2, C = 9, V = 4
//     16 bytes      |pack 0      |pack 1      |pack 2      |
//     loaded as            s  s   one 16 bytes  s  s  s         s: a scalar; nothing outside [0, C) is touched
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T x[V];
};

// Takes the first G elements out of a pack; the others move up. A loop that is not unrolled cannot index registers.
template <int G, typename T, int V>
__device__ __forceinline__ Pack<T, G> take(Pack<T, V>& pack) {
  Pack<T, G> first;
#pragma unroll
  for (int i = 0; i < G; ++i) first.x[i] = pack.x[i];
#pragma unroll
  for (int i = 0; i + G < V; ++i) pack.x[i] = pack.x[i + G];
  return first;
}

// Elements of T in 16 bytes.
template <typename T>
struct Wide {
  static const int N = 16 / sizeof(T);
};

// How many elements before `row` the boundary lies that a row's packs of V are counted from.
template <typename T, int V>
__device__ __forceinline__ int lead_of(const T* row) {
  return V == 1 ? 0 : (int)(((unsigned long long)row % (V * sizeof(T))) / sizeof(T));
}

// All of a pack, widened. A bfloat16 is the upper half of a float.
template <typename T, int V>
__device__ __forceinline__ void widen_all(const Pack<T, V>& pack, Acc<T> (&z)[V]) {
  if constexpr (Same<T, __nv_bfloat16>::value && V % 2 == 0) {
    unsigned pairs[V / 2];
    memcpy(pairs, &pack, sizeof pairs);
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      z[i] = __uint_as_float(pairs[i / 2] << 16);
      z[i + 1] = __uint_as_float(pairs[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = widen(pack.x[i]);
  }
}

// The largest of a pack, NaN if there is one; two at a time where a card can.
template <typename T, int V>
__device__ __forceinline__ Acc<T> largest_of(const Pack<T, V>& pack) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    unsigned pairs[V / 2];
    memcpy(pairs, &pack, sizeof pairs);
#pragma unroll
    for (int i = 1; i < V / 2; ++i) {
      if constexpr (Same<T, __half>::value)
        asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(pairs[0]) : "r"(pairs[i]));
      else
        asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(pairs[0]) : "r"(pairs[i]));
    }
    Pack<T, 2> pair;
    memcpy(&pair, pairs, sizeof pair);
    return max_or_nan(widen(pair.x[0]), widen(pair.x[1]));
  }
#endif
  Acc<T> z[V];
  widen_all(pack, z);
#pragma unroll
  for (int i = 1; i < V; ++i) z[0] = max_or_nan(z[0], z[i]);
  return z[0];
}

// All of a pack, rounded; two at a time where a card can.
template <typename G, int V, typename A>
__device__ __forceinline__ Pack<G, V> narrow_all(const A (&g)[V]) {
  Pack<G, V> pack;
  if constexpr (Same<G, __half>::value && V % 2 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const __half2 pair = __floats2half2_rn((float)g[i], (float)g[i + 1]);
      memcpy(&pack.x[i], &pair, sizeof pair);
    }
  } else if constexpr (Same<G, __nv_bfloat16>::value && V % 2 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn((float)g[i], (float)g[i + 1]);
      memcpy(&pack.x[i], &pair, sizeof pair);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) pack.x[i] = narrow<G>(g[i]);
  }
  return pack;
}

// Where a pack lies: its columns are c, c + 1, …, of which those from c + from to before c + to exist.
struct Span {
  static const bool INSIDE = false;
  i64 c;
  int from, to;
  __device__ __forceinline__ bool has(int i) const { return i >= from && i < to; }
  __device__ __forceinline__ bool whole(int V) const { return from <= 0 && to >= V; }
  __device__ __forceinline__ bool lies_on_16(const void* p) const { return is_aligned(p, 16); }
  __device__ __forceinline__ Span after(int i) const { return Span{c + i, from - i, to - i}; }
};

// The same of a pack that lies inside its row: code that is compiled for it tests nothing, not even whether what belongs
// to its columns lies on a 16-byte boundary as the pack does.
template <bool ON_16>
struct Inside {
  static const bool INSIDE = true;
  i64 c;
  __device__ __forceinline__ bool has(int) const { return true; }
  __device__ __forceinline__ bool whole(int) const { return true; }
  __device__ __forceinline__ bool lies_on_16(const void*) const { return ON_16; }
};

// Packs of a row of C; C below 2^31·V.
template <int V>
__device__ __forceinline__ int packs_of(int lead, i64 C) {
  return (int)((C + lead + V - 1) / V);
}

// Pack j of a row of C.
template <int V>
__device__ __forceinline__ Span span_of(i64 j, int lead, i64 C) {
  const i64 c = j * V - lead;
  return Span{c, c < 0 ? (int)-c : 0, C - c < V ? (int)(C - c) : V};
}

// A pack of a row; `outside` where there is no column. It is one 16-byte load if it lies inside the row, which then is
// aligned by construction (lead_of).
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* row, const Span& at, T outside) {
  Pack<T, V> pack;
  if (at.whole(V)) {
    pack = load(reinterpret_cast<const Pack<T, V>*>(row + at.c));
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) pack.x[i] = at.has(i) ? load(row + at.c + i) : outside;
  }
  return pack;
}

// The packs of a row: `packs` of them, of which those from `first` to before `last` lie inside it.
template <typename T, int V>
struct Packs {
  const T* row;
  i64 C;
  int lead, packs, first, last;
  // Whether the U packs j, j + step, … are all inside.
  template <int U>
  __device__ __forceinline__ bool whole(int j, int step) const {
    return j >= first && j + (U - 1) * step < last;
  }
  __device__ __forceinline__ Span span(int j) const { return span_of<V>(j, lead, C); }
  __device__ __forceinline__ i64 column(int j) const { return (i64)j * V - lead; }
  // Packs up to `end` only.
  __device__ __forceinline__ Packs before(int end) const {
    return Packs{row, C, lead, end < packs ? end : packs, first, end < last ? end : last};
  }
};
template <typename T, int V>
__device__ __forceinline__ Packs<T, V> packs_of_row(const T* row, i64 C) {
  const int lead = lead_of<T, V>(row);
  return Packs<T, V>{row, C, lead, packs_of<V>(lead, C), lead > 0, (int)((C + lead) / V)};
}

const int TURN = 4;  // packs of most turns

// What a thread loads at once: U packs as they lie in memory, unpacked where they are used.
template <typename T, int V, int U>
struct Turn {
  static const int SIZE = U;
  typedef typename WordOf<sizeof(T) * V>::type Word;
  Word words[U];
  __device__ __forceinline__ Pack<T, V> pack(int u) const {
    Pack<T, V> pack;
    memcpy(&pack, &words[u], sizeof pack);
    return pack;
  }
  // A pack at the end; all others move up.
  __device__ __forceinline__ void push(const Pack<T, V>& last) {
#pragma unroll
    for (int u = 0; u + 1 < U; ++u) words[u] = words[u + 1];
    memcpy(&words[U - 1], &last, sizeof last);
  }
  // The first `exist` of the words to a thread's own places, `step` apart, and from there.
  __device__ __forceinline__ void copy_to(Word* place, int step, int exist) const {
    if ((U - 1) * step < exist) {
#pragma unroll
      for (int u = 0; u < U; ++u) place[u * step] = words[u];
    } else {
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (u * step < exist) place[u * step] = words[u];
    }
  }
  __device__ __forceinline__ void copy_from(const Word* place, int step, int exist) {
    if ((U - 1) * step < exist) {
#pragma unroll
      for (int u = 0; u < U; ++u) words[u] = place[u * step];
    } else {
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (u * step < exist) words[u] = place[u * step];
    }
  }
  // The first pack, which goes to the end: U times bring all back to where they were.
  __device__ __forceinline__ Pack<T, V> next() {
    const Pack<T, V> first = pack(0);
    push(first);
    return first;
  }
};

// The packs j, j + step, … of a row; `outside` where there is no column.
template <int U, typename T, int V>
__device__ __forceinline__ Turn<T, V, U> load_turn(const Packs<T, V>& at, int j, int step, T outside) {
  Turn<T, V, U> turn;
  if (at.template whole<U>(j, step)) {
    const Pack<T, V>* from = reinterpret_cast<const Pack<T, V>*>(at.row - at.lead) + j;
#pragma unroll
    for (int u = 0; u < U; ++u, from += step) turn.push(load(from));
  } else {
#pragma unroll 1
    for (int u = 0; u < U; ++u)
      turn.push(load_pack<T, V>(at.row, j + u * step < at.packs ? at.span(j + u * step) : Span{0, 0, 0}, outside));
  }
  return turn;
}

// Calls f(where, pack) for the packs j, j + step, … of a row: `straight`, as if all were inside, unrolled if UNROLL; else
// one by one those that exist, G columns at a time. on_16: see Inside.
template <bool UNROLL, int G, typename T, int V, int U, typename F>
__device__ __forceinline__ void each_pack(
    const Packs<T, V>& at, int j, int step, bool straight, bool on_16, Turn<T, V, U>& turn, const F& f) {
  if constexpr (UNROLL) {
    if (straight && on_16) {
#pragma unroll
      for (int u = 0; u < U; ++u) f(Inside<true>{at.column(j + u * step)}, turn.next());
      return;
    }
    if (straight) {
#pragma unroll
      for (int u = 0; u < U; ++u) f(Inside<false>{at.column(j + u * step)}, turn.next());
      return;
    }
  }
#pragma unroll 1
  for (int u = 0; u < U; ++u) {
    Pack<T, V> pack = turn.next();
    if (j + u * step >= at.packs) continue;
    const Span where = at.span(j + u * step);
#pragma unroll 1
    for (int i = 0; i < V; i += G) {
      const Pack<T, G> group = take<G>(pack);
      f(where.after(i), group);
    }
  }
}

// Writes the columns that exist. `wide`: the packs of `row` are aligned.
template <typename T, int V, typename At>
__device__ __forceinline__ void store_pack(T* row, const At& at, bool wide, const Pack<T, V>& pack) {
  if (wide && at.whole(V)) {
    store(reinterpret_cast<Pack<T, V>*>(row + at.c), pack);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (at.has(i)) store(row + at.c + i, pack.x[i]);
  }
}
