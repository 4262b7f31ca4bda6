// The forward sweep: the running sums of a thread over its columns, and how sums meet within a warp and a block.

#pragma once

#include "problem.cuh"

const int SUMS = 7;  // fields of Sums that ce_partial stores in the arithmetic type; then the class

// Sums over the columns seen so far, relative to the largest logit seen so far (to 0 as long as all were −inf).
template <typename A>
struct Sums {
  A max;      // M
  A exp;      // Σ exp u
  A dot;      // Σ y·u          dot and mass without the class id's own share
  A mass;     // Σ y
  A entropy;  // Σ exp(u)·u     only with stats
  A q_dot;    // Σ q·u          only with stats, probabilities
  A q_mass;   // Σ q
  i64 at;     // the first class of the largest logit; only with stats
};

template <typename A>
__device__ __forceinline__ Sums<A> nothing() {
  return Sums<A>{-infinity<A>(), 0, 0, 0, 0, 0, 0, 0x7fffffffffffffffll};
}

// Which of the sums anyone asks for.
template <int KIND>
struct Wanted {
  static const bool target = (KIND & (SMOOTHING | PROBS)) != 0, stats = (KIND & STATS) != 0;
};

// Moves the sums to a maximum at least as large: with s = old − new ≤ 0, Σ exp(u + s) and Σ y·(u + s).
template <int KIND, typename A>
__device__ __forceinline__ void rescale(Sums<A>& sums, A max) {
  if (sizeof(A) == 8 && sums.max == max) return;
  const A shift = sums.max - (max == -infinity<A>() ? (A)0 : max), factor = exp_of_difference(shift);
  if (Wanted<KIND>::stats) sums.entropy = factor == 0 ? factor : factor * (sums.entropy + shift * sums.exp);
  sums.exp *= factor;
  if (Wanted<KIND>::target && sums.mass != 0) sums.dot += sums.mass * shift;  // 0·∞ before the first logit
  if (Wanted<KIND>::stats && sums.q_mass != 0) sums.q_dot += sums.q_mass * shift;
  sums.max = max;
}

// argmax as NumPy has it: the first of equals, and the first NaN before all numbers.
template <typename A>
__device__ __forceinline__ bool comes_first(A z, i64 c, A than, i64 at) {
  if (z != z) return than == than || c < at;
  return z > than || (z == than && c < at);
}

// Takes a pack of logits z, none larger than the maximum, into the sums.
template <typename T, int KIND, typename At, int V>
__device__ __forceinline__ void absorb(
    Sums<Acc<T>>& sums, const Problem<T>& p, i64 n, const At& at, const Acc<T> (&z)[V]) {
  typedef Acc<T> A;
  const A from = sums.max == -infinity<A>() ? (A)0 : sums.max;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const A u = z[i] - from, e = exp_of_difference(u);
    sums.exp += e;
    if (Wanted<KIND>::stats && e != 0) sums.entropy += e * u;
  }
  if (!Wanted<KIND>::target) return;
  A y[V], q[V];
  target_pack<T, KIND>(p, n, at, y, q);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (!at.has(i)) continue;
    const A u = z[i] - from;
    // a class without mass adds nothing even at u = −inf
    if (!(KIND & (PROBS | WEIGHTS)) || y[i] != 0) sums.dot = fma_of(y[i], u, sums.dot);
    sums.mass += y[i];
    if ((KIND & PROBS) && Wanted<KIND>::stats) {
      if (q[i] != 0) sums.q_dot = fma_of(q[i], u, sums.q_dot);
      sums.q_mass += q[i];
    }
  }
}

// Whether the largest final logit of a turn is known from the logits as they were loaded.
template <typename T, int KIND>
struct AtOnce {
  static const bool value = Unroll<T, KIND>::value && !(KIND & (BIAS | SOFTCAP | WEIGHTS));
};

// Takes the packs of a turn into the sums. They are rescaled to the largest logit of the turn where that is known from
// the logits as they were loaded; else to that of each pack.
template <typename T, int KIND, int V, int U>
__device__ __forceinline__ void absorb_turn(Sums<Acc<T>>& sums, const Problem<T>& p, i64 n, const Packs<T, V>& at, int j,
    int step, Turn<T, V, U>& turn) {
  typedef Acc<T> A;
  if (AtOnce<T, KIND>::value) {
    A max = -infinity<A>();
#pragma unroll
    for (int u = 0; u < U; ++u) max = max_or_nan(max, largest_of(turn.pack(u)));
    if (KIND & TEMPERATURE) max *= p.temperature_inverse;
    rescale<KIND>(sums, max_or_nan(sums.max, max));
  }
  const int G = GroupOf<T, V>::N;
  // −inf, which was loaded for columns outside the row, is no option's matter but in PLAIN
  each_pack<Unroll<T, KIND>::value, G>(at, j, step, KIND == PLAIN || at.template whole<U>(j, step),
      columns_on_16<KIND>(p, at), turn,
      [&](const auto& where, const auto& pack) {
        A z[G], slope[G];
        final_logits<false, KIND>(p, where, pack, z, slope);
        if (!AtOnce<T, KIND>::value) {
          A max = sums.max;
#pragma unroll
          for (int i = 0; i < G; ++i) {
            if (Wanted<KIND>::stats && where.has(i) && comes_first(z[i], where.c + i, max, sums.at))
              sums.at = where.c + i;
            max = max_or_nan(max, z[i]);
          }
          rescale<KIND>(sums, max);
        }
        absorb<T, KIND>(sums, p, n, where, z);
      });
}

// The sums over the columns of both.
template <int KIND, typename A>
__device__ __forceinline__ Sums<A> combine(Sums<A> a, Sums<A> b) {
  if (comes_first(b.max, b.at, a.max, a.at)) a.at = b.at;
  const A max = max_or_nan(a.max, b.max);
  rescale<KIND>(a, max);
  rescale<KIND>(b, max);
  return Sums<A>{max, a.exp + b.exp, a.dot + b.dot, a.mass + b.mass, a.entropy + b.entropy, a.q_dot + b.q_dot,
      a.q_mass + b.q_mass, a.at};
}

// Lane 0 of every LANES lanes gets their sums, in a fixed order; all lanes of the warp take part.
template <int LANES, int KIND, typename A>
__device__ __forceinline__ Sums<A> combine_lanes(Sums<A> sums) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) {
    Sums<A> other = nothing<A>();
    other.max = __shfl_down_sync(ALL_LANES, sums.max, step, LANES);
    other.exp = __shfl_down_sync(ALL_LANES, sums.exp, step, LANES);
    if (Wanted<KIND>::target) {
      other.dot = __shfl_down_sync(ALL_LANES, sums.dot, step, LANES);
      other.mass = __shfl_down_sync(ALL_LANES, sums.mass, step, LANES);
    }
    if (Wanted<KIND>::stats) {
      other.entropy = __shfl_down_sync(ALL_LANES, sums.entropy, step, LANES);
      other.q_dot = __shfl_down_sync(ALL_LANES, sums.q_dot, step, LANES);
      other.q_mass = __shfl_down_sync(ALL_LANES, sums.q_mass, step, LANES);
      other.at = __shfl_down_sync(ALL_LANES, sums.at, step, LANES);
    }
    sums = combine<KIND>(sums, other);
  }
  return sums;
}

// Thread 0 gets the sums of the block. warps: shared memory for one Sums per warp.
template <int KIND, typename A>
__device__ __forceinline__ Sums<A> combine_block(Sums<A> sums, Sums<A>* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sums = combine_lanes<32, KIND>(sums);
  if (lane == 0) warps[warp] = sums;
  __syncthreads();  // warp 0 reads what the others wrote
  if (warp == 0) {
    sums = lane < (int)(blockDim.x / 32) ? warps[lane] : nothing<A>();
    sums = combine_lanes<32, KIND>(sums);
  }
  return sums;
}
