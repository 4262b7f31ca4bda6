// What a loss is asked of rows of logits: the parameters of every kernel, and from them the columns' targets y and
// logits z.

#pragma once

#include "packs.cuh"

// What a kernel is compiled for, added up: what there is to do at every column. What is left out costs no instruction.
enum Kind {
  PLAIN = 0,  // class ids; class weights without smoothing, z-loss and ignored rows are matters of a row
  BIAS = 1,
  TEMPERATURE = 2,
  SOFTCAP = 4,
  SMOOTHING = 8,  // of the target
  WEIGHTS = 16,   // of the classes, at every column: with smoothing or probabilities
  STATS = 32,
  PROBS = 64
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
  A softcap_inverse;                  // 1/κ
  A softcap_rate, softcap_rate_rest;  // 2·log₂e/κ = rate + rest, twice as many digits as A has
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

// Values of the columns of a pack that every row reads, 0 outside: 16 bytes at a time where they lie on a 16-byte
// boundary, which need not be the logits' boundary.
template <typename A, typename At, int V>
__device__ __forceinline__ void load_columns(const A* x_c, const At& at, A (&x)[V]) {
  const int W = Wide<A>::N;
  if (V % W == 0 && at.whole(V) && at.lies_on_16(x_c + at.c)) {
#pragma unroll
    for (int i = 0; i + W <= V; i += W) {
      const Pack<A, W> pack = load_shared_by_rows(reinterpret_cast<const Pack<A, W>*>(x_c + at.c + i));
#pragma unroll
      for (int k = 0; k < W; ++k) x[i + k] = pack.x[k];
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = at.has(i) ? load_shared_by_rows(x_c + at.c + i) : (A)0;
  }
}

// Whether what belongs to the columns of a row's packs lies on 16-byte boundaries as they do.
template <int KIND, typename T, int V>
__device__ __forceinline__ bool columns_on_16(const Problem<T>& p, const Packs<T, V>& at) {
  return !((KIND & BIAS) && !is_aligned(p.bias_c - at.lead, 16)) &&
         !((KIND & WEIGHTS) && !is_aligned(p.weight_c - at.lead, 16));
}

// The same of one row's probabilities, `column` elements apart.
template <typename Q, typename A, typename At, int V>
__device__ __forceinline__ void load_probs(const Q* row, i64 column, const At& at, A (&q)[V]) {
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

template <typename T, typename At, int V>
__device__ __forceinline__ void load_target(const Problem<T>& p, i64 n, const At& at, Acc<T> (&q)[V]) {
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

// y of a pack, without the class id's own share: w·((1−ε)·q + ε/C), or w·ε/C; nothing of use outside the row. Also q
// itself.
template <typename T, int KIND, typename At, int V>
__device__ __forceinline__ void target_pack(
    const Problem<T>& p, i64 n, const At& at, Acc<T> (&y)[V], Acc<T> (&q)[V]) {
  typedef Acc<T> A;
  if (KIND & PROBS) load_target<T>(p, n, at, q);
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = !(KIND & PROBS) ? p.rest : KIND & SMOOTHING ? p.hot * q[i] + p.rest : q[i];
  if (KIND & WEIGHTS) {
    A w[V];
    load_columns(p.weight_c, at, w);
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] *= w[i];
  }
}

// κ·tanh(r/κ) of a = 2·log₂e·|r|/κ, e = 2⁻ᵃ and q = 1/(1 + e): κ·(1 − 2e·q). Where that would have few digits left, below
// |r| = 0.55·κ, r·(1 + s·P(s)) with s = a²: of all polynomials P of degree 3 the one whose largest relative error is the
// least, 0.7·2⁻²⁴.
__device__ __forceinline__ float softcap_of(float softcap, float, float r, float a, float e, float q) {
  const float s = a * a;
  float P = fma_of(s, 3.4213806e-06f, -9.127483e-05f);
  P = fma_of(s, P, 1.9218068e-03f);
  P = fma_of(s, P, -4.0037286e-02f);
  const float low = fma_of(r, s * P, r), high = copysignf(fma_of(-2 * softcap, e * q, softcap), r);
  return a < 1.5869645f ? low : high;
}
__device__ __forceinline__ double softcap_of(double softcap, double inverse, double r, double, double, double) {
  return softcap * tanh(r * inverse);
}

// z of one logit r. With SLOPE also ∂z/∂r = 1 − tanh²(r/κ) = 4·w·(1 − w), w = e·q: near ±κ, 1 − tanh² would have no
// digits left.
template <bool SLOPE, int KIND, typename T>
__device__ __forceinline__ Acc<T> final_logit(const Problem<T>& p, Acc<T> r, Acc<T>& slope) {
  typedef Acc<T> A;
  if (!(KIND & SOFTCAP)) return r;
  const A size = fabs(r), a = size * p.softcap_rate, e = exp2_of(-a), q = reciprocal(1 + e);
  if (SLOPE) {
    // what a was rounded by: at a = 16 it would be 8 units in the last place of e. Of an infinite r it would be NaN
    const A rest = fmin(fma_of(size, p.softcap_rate_rest, fma_of(size, p.softcap_rate, -a)), (A)1), w = e * q;
    slope = w * fma_of(rest, -(A)2.772588722239781, fma_of(w, (A)-4, (A)4));  // 4·(1 − w − rest·ln 2)
  }
  return softcap_of(p.softcap, p.softcap_inverse, r, a, e, q);
}

// z of a pack; −inf, which adds nothing to any sum, outside the row, where that was loaded. With SLOPE also ∂z/∂r, where
// there is a softcap.
template <bool SLOPE, int KIND, typename T, typename At, int V>
__device__ __forceinline__ void final_logits(
    const Problem<T>& p, const At& at, const Pack<T, V>& pack, Acc<T> (&z)[V], Acc<T> (&slope)[V]) {
  typedef Acc<T> A;
  widen_all(pack, z);
  if (KIND & BIAS) {
    A bias[V];
    load_columns(p.bias_c, at, bias);
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] += bias[i];
  }
  if (KIND & TEMPERATURE) {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] *= p.temperature_inverse;
  }
  if (KIND & SOFTCAP) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      z[i] = final_logit<SLOPE, KIND>(p, z[i], slope[i]);
      if (!at.has(i)) z[i] = -infinity<A>();
    }
  }
}

// Columns of a pack that a thread works on at a time: more exponentials in float64 would take more registers than there
// are.
template <typename T, int V>
struct GroupOf {
  static const int N = sizeof(T) == 8 ? 1 : V;
};

// Loops over the packs of a turn are unrolled, but where one pack takes as many registers as there are. A kernel that
// keeps no row loads as many packs at once as it has registers for.
template <typename T, int KIND>
struct Unroll {
  static const bool value = sizeof(T) < 8 && !(KIND & (PROBS | STATS));
  static const int PACKS = !value ? 1 : KIND == PLAIN ? TURN : 2;
};
