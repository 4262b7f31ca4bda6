// What a loss is asked of rows of logits: the parameters of every kernel, and from them the columns' targets y and
// logits z.

#pragma once

#include "packs.cuh"

// What a kernel is compiled for; what is left out costs no instruction.
enum Kind {
  PLAIN,    // class ids; nothing at every column: no bias, smoothing, softcap, temperature, statistics
  OPTIONS,  // class ids, any option
  PROBS     // probabilities, any option
};

// What is asked of all rows; the first parameter of every kernel. A pointer is null where the option is off. The host
// fills this and RowsOut by their fields' names, and compiles in a check that it lays them out as the compiler does.
template <typename T>
struct Problem {
  typedef Acc<T> A;
  const T* logits_nc;
  i64 stride;
  i64 N, C;
  const i64* ids_n;      // class ids, or
  const void* probs_nc;  // probabilities, of type probs_type and any strides
  int probs_type;        // 0 float, 1 double, 2 __half, 3 __nv_bfloat16
  i64 probs_row, probs_column;
  const A* weight_c;      // w
  const A* row_weight_n;  // m of class ids
  const A* bias_c;
  A hot, rest, softcap, z_loss, temperature_inverse;
  A softcap_inverse, softcap_inverse_rest;  // 1/κ = inverse + rest, twice as many digits as A has
  A mass_hit, mass_miss;  // A of a class id without weights that hits a column, and of one that does not
  i64 first_class;        // the class id of column 0
};

// Where a forward sweep leaves a row; the last three are null unless they were asked for.
template <typename T>
struct RowsOut {
  typedef Acc<T> A;
  A *loss_n, *row_max_n, *log_sum_n, *target_dot_n, *mass_n;
  A *entropy_n, *log_prob_n;
  i64* argmax_n;
};

// ------------------------------------------------------------------------------------------------ targets and logits

// Columns that a thread works on at a time: 8 of them, or 2 in float64, would not leave it enough registers.
template <typename T, int V>
struct Group {
  static const int N = sizeof(T) == 8 ? 1 : V < 4 ? V : 4;
};

template <typename Q, typename A, int V>
__device__ __forceinline__ void load_probs(const Q* row, i64 column, const Span& at, A (&q)[V]) {
  // 16 bytes at a time where they are neighbours on a 16-byte boundary, which need not be the logits' boundary
  const int W = V < Wide<Q>::N ? V : Wide<Q>::N;
  if (column == 1 && at.whole(V) && is_aligned(row + at.c, W * sizeof(Q))) {
#pragma unroll
    for (int i = 0; i < V; i += W) {
      const Pack<Q, W> pack = load(reinterpret_cast<const Pack<Q, W>*>(row + at.c + i));
#pragma unroll
      for (int k = 0; k < W; ++k) q[i + k] = (A)widen(pack.x[k]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) q[i] = at.has(i) ? (A)widen(load(row + (at.c + i) * column)) : (A)0;
  }
}

template <typename T, int V>
__device__ __forceinline__ void load_target(const Problem<T>& p, i64 n, const Span& at, Acc<T> (&q)[V]) {
  const int bytes = p.probs_type == 0 ? 4 : p.probs_type == 1 ? 8 : 2;
  const void* row = (const char*)p.probs_nc + n * p.probs_row * bytes;
  if (p.probs_type == 0)
    load_probs((const float*)row, p.probs_column, at, q);
  else if (p.probs_type == 1)
    load_probs((const double*)row, p.probs_column, at, q);
  else if (p.probs_type == 2)
    load_probs((const __half*)row, p.probs_column, at, q);
  else
    load_probs((const __nv_bfloat16*)row, p.probs_column, at, q);
}

// y of a group, without the class id's own share: w·((1−ε)·q + ε/C), or w·ε/C; 0 outside [0, C). Also q itself.
template <typename T, int KIND, int V>
__device__ __forceinline__ void target_group(
    const Problem<T>& p, i64 n, const Span& at, Acc<T> (&y)[V], Acc<T> (&q)[V]) {
  typedef Acc<T> A;
#pragma unroll
  for (int i = 0; i < V; ++i) q[i] = 0;
  if (KIND == PROBS) load_target<T, V>(p, n, at, q);
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = !at.has(i) ? (A)0 : KIND == PROBS ? p.hot * q[i] + p.rest : p.rest;
  if (p.weight_c && (KIND == PROBS || p.rest != 0)) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (at.has(i)) y[i] *= load_shared_by_rows(p.weight_c + at.c + i);
  }
}

// z of one logit.
template <typename T>
__device__ __forceinline__ Acc<T> final_logit(const Problem<T>& p, Acc<T> r) {
  return p.softcap == 0 ? r : p.softcap * tanh_of(r * p.softcap_inverse);
}

// ∂z/∂r = 1 − tanh²(r/κ) = 4e/(1 + e)² with e = exp(−2|r|/κ): near ±κ, 1 − tanh² would have no digits left.
template <typename T>
__device__ __forceinline__ Acc<T> slope_of(const Problem<T>& p, Acc<T> r) {
  typedef Acc<T> A;
  const A twice = r < 0 ? -2 * r : 2 * r;
  const A a = twice * p.softcap_inverse;
  A e = exp_of(-a);
  // what the product and 1/κ were rounded by: at a = 16 it would be 8 units in the last place of e
  if (e != 0) e -= e * (fma_of(twice, p.softcap_inverse, -a) + twice * p.softcap_inverse_rest);
  return 4 * e / fma_of(e, 2 + e, (A)1);
}

// z of a group; −inf, which adds nothing to any sum, outside [0, C), where that was loaded. With SLOPE also ∂z/∂r, 1
// without a softcap.
template <bool SLOPE, typename T, int V>
__device__ __forceinline__ void final_logits(
    const Problem<T>& p, const Span& at, const Pack<T, V>& pack, Acc<T> (&z)[V], Acc<T> (&slope)[V]) {
  typedef Acc<T> A;
#pragma unroll
  for (int i = 0; i < V; ++i) z[i] = widen(pack.x[i]);
  if (p.bias_c) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (at.has(i)) z[i] += load_shared_by_rows(p.bias_c + at.c + i);
  }
  if (p.softcap != 0 || p.temperature_inverse != 1) {
#pragma unroll 1  // V copies of tanh side by side would not leave the rest enough registers
    for (int i = 0; i < V; ++i) {
      const A r = z[0] * p.temperature_inverse;
      const A capped = final_logit(p, r), steep = SLOPE && p.softcap != 0 ? slope_of(p, r) : (A)1;
#pragma unroll
      for (int k = 1; k < V; ++k) z[k - 1] = z[k], slope[k - 1] = slope[k];
      z[V - 1] = capped, slope[V - 1] = steep;
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (!at.has(i)) z[i] = -infinity<A>();  // what was loaded for it, but a softcap
  }
}
