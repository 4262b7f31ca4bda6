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

// Which of the sums anyone asks for; the same for all threads.
struct Wanted {
  bool target, stats;
};
template <int KIND, typename T>
__device__ __forceinline__ Wanted wanted(const Problem<T>& p, const void* entropy_n) {
  if (KIND == PLAIN) return Wanted{false, false};
  return Wanted{KIND == PROBS || p.rest != 0, entropy_n != nullptr};
}

// Moves the sums to a maximum at least as large: with s = old − new ≤ 0, Σ exp(u + s) and Σ y·(u + s).
template <typename A>
__device__ __forceinline__ void rescale(Sums<A>& sums, A max) {
  if (sums.max == max) return;
  if (sums.max != -infinity<A>()) {  // else all sums are 0, or −inf for a target at −inf, and stay so
    const A shift = sums.max - max, factor = exp_of_difference(shift);
    sums.entropy = factor == 0 ? factor : factor * (sums.entropy + shift * sums.exp);
    sums.exp *= factor;
    if (sums.mass != 0) sums.dot += sums.mass * shift;
    if (sums.q_mass != 0) sums.q_dot += sums.q_mass * shift;
  }
  sums.max = max;
}

// argmax as NumPy has it: the first of equals, and the first NaN before all numbers.
template <typename A>
__device__ __forceinline__ bool comes_first(A z, i64 c, A than, i64 at) {
  if (z != z) return than == than || c < at;
  return z > than || (z == than && c < at);
}

// Takes a group of columns into the sums.
template <typename T, int KIND, int V>
__device__ __forceinline__ void absorb_group(
    Sums<Acc<T>>& sums, const Problem<T>& p, const Wanted& want, i64 n, const Span& at, const Pack<T, V>& group) {
  typedef Acc<T> A;
  A z[V], slope[V];
  final_logits<false>(p, at, group, z, slope);
  A max = sums.max;
  if (want.stats) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (at.has(i) && comes_first(z[i], at.c + i, max, sums.at)) sums.at = at.c + i;
      max = max_or_nan(max, z[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) max = max_or_nan(max, z[i]);
  }
  rescale(sums, max);
  const A from = max == -infinity<A>() ? (A)0 : max;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const A u = z[i] - from, e = exp_of_difference(u);
    sums.exp += e;
    if (want.stats && e != 0) sums.entropy += e * u;
  }
  if (want.target) {
    A y[V], q[V];
    target_group<T, KIND, V>(p, n, at, y, q);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A u = z[i] - from;
      if (y[i] != 0) sums.dot += y[i] * u;  // a class without mass adds nothing even at u = −inf
      sums.mass += y[i];
      if (KIND == PROBS && want.stats) {
        if (q[i] != 0) sums.q_dot += q[i] * u;
        sums.q_mass += q[i];
      }
    }
  }
}

// Takes a pack into the sums, group by group. The pack is turned once round, by reference: a copy would cost registers.
template <typename T, int KIND, int V>
__device__ __forceinline__ void absorb(
    Sums<Acc<T>>& sums, const Problem<T>& p, const Wanted& want, i64 n, const Span& at, Pack<T, V>& pack) {
  const int G = Group<T, V>::N;
#pragma unroll 1
  for (int i = 0; i < V; i += G) {
    const Pack<T, G> group = first_of<G>(pack);
    absorb_group<T, KIND, G>(sums, p, want, n, at.after(i), group);
    turn(pack, group);
  }
}

// Takes the packs of a turn into the sums. Without options their largest logit comes first, and the sums are rescaled
// once.
template <typename T, int KIND, int V, int U>
__device__ __forceinline__ void absorb_turn(Sums<Acc<T>>& sums, const Problem<T>& p, const Wanted& want, i64 n,
    const Packs<T, V>& at, int j, int step, Turn<T, V, U>& turn) {
  typedef Acc<T> A;
  if constexpr (KIND == PLAIN) {
    A max = sums.max, z[V];
#pragma unroll
    for (int u = 0; u < U; ++u) max = max_or_nan(max, largest_of(turn.pack(u)));
    const A from = max == -infinity<A>() ? (A)0 : max;
    sums.exp *= exp_of_difference(sums.max - from);
    sums.max = max;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      widen_all(turn.pack(u), z);
#pragma unroll
      for (int i = 0; i < V; ++i) sums.exp += exp_of_difference(z[i] - from);
    }
  } else {
#pragma unroll 1
    for (int u = 0; u < U; ++u) {
      Pack<T, V> pack = turn.next();
      if (j + u * step < at.packs) absorb<T, KIND, V>(sums, p, want, n, at.span(j + u * step), pack);
    }
  }
}

// The sums over the columns of both.
template <typename A>
__device__ __forceinline__ Sums<A> combine(Sums<A> a, Sums<A> b) {
  if (comes_first(b.max, b.at, a.max, a.at)) a.at = b.at;
  const A max = max_or_nan(a.max, b.max);
  rescale(a, max);
  rescale(b, max);
  return Sums<A>{max, a.exp + b.exp, a.dot + b.dot, a.mass + b.mass, a.entropy + b.entropy, a.q_dot + b.q_dot,
      a.q_mass + b.q_mass, a.at};
}

// Lane 0 of every LANES lanes gets their sums, in a fixed order; all lanes of the warp take part.
template <int LANES, typename A>
__device__ __forceinline__ Sums<A> combine_lanes(Sums<A> sums, const Wanted& want) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) {
    Sums<A> other = nothing<A>();
    other.max = __shfl_down_sync(ALL_LANES, sums.max, step, LANES);
    other.exp = __shfl_down_sync(ALL_LANES, sums.exp, step, LANES);
    if (want.target) {
      other.dot = __shfl_down_sync(ALL_LANES, sums.dot, step, LANES);
      other.mass = __shfl_down_sync(ALL_LANES, sums.mass, step, LANES);
    }
    if (want.stats) {
      other.entropy = __shfl_down_sync(ALL_LANES, sums.entropy, step, LANES);
      other.q_dot = __shfl_down_sync(ALL_LANES, sums.q_dot, step, LANES);
      other.q_mass = __shfl_down_sync(ALL_LANES, sums.q_mass, step, LANES);
      other.at = __shfl_down_sync(ALL_LANES, sums.at, step, LANES);
    }
    sums = combine(sums, other);
  }
  return sums;
}

// Thread 0 gets the sums of the block. warps: shared memory for one Sums per warp.
template <typename A>
__device__ __forceinline__ Sums<A> combine_block(Sums<A> sums, const Wanted& want, Sums<A>* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sums = combine_lanes<32>(sums, want);
  if (lane == 0) warps[warp] = sums;
  __syncthreads();  // warp 0 reads what the others wrote
  if (warp == 0) {
    sums = lane < (int)(blockDim.x / 32) ? warps[lane] : nothing<A>();
    sums = combine_lanes<32>(sums, want);
  }
  return sums;
}
