// Softmax cross-entropy: forward, backward, and both in one sweep, for every target and option.
//
// Logits (N, C), r = (logits + bias)/τ, z = κ·tanh(r/κ) or r; a target row y (N, C), most of it implied:
//
//   class id t         y_c = (1−ε)·m·[c = t] + (ε/C)·w_c     m = w_t          hot = 1−ε, rest = ε/C
//   probabilities q    y_c = w_c·((1−ε)·q_c + ε/C)           m = 1
//
//   M = max z    u = z − M    S = log Σ exp u    A = Σ y    d = Σ y·u
//   loss   = A·S − d + λ·m·(M + S)²
//   dloss  = scale·((A·p − y) + 2λ·m·(M + S)·p)·∂z/∂r        p = exp(u − S)      ∂z/∂r = 1 − (z/κ)²
//
// Every kernel is made of three pieces, so that all variants give the same numbers and no option needs a copy:
//   absorb     takes packs of logits into the running sums of a thread (Sums), rescaling them when the maximum grows
//   finish     turns the sums of a whole row into what is stored of it
//   gradient   turns a pack of logits into a pack of gradients
//
//   ce_rows<T, KIND, LANES, V, KEEP>   a row by LANES lanes of a warp, or by a block (LANES = 0): forward, or both
//                                       sweeps with the row kept on chip between them; gradients of type G, by default T
//   ce_partial + ce_combine             a row by several blocks: their sums meet in a second kernel
//   ce_backward                         gradients from M, S and A
//
// Names: logits_nc is a matrix (N, C) of rows `stride` elements apart; loss_n has one value per row.

#include "common.cuh"

// What a kernel is compiled for; what is left out costs no instruction.
enum Kind {
  PLAIN,    // class ids, and nothing that is done to or asked of every column: no bias, smoothing, softcap, temperature, statistics
  OPTIONS,  // class ids, any option
  PROBS     // probabilities, any option
};

const i64 INVALID = -2;  // an id that was out of range: loss NaN, gradient 0. IGNORED is -1. See swl/backends/protocol.py.

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

// z of a group; −inf, which adds nothing to any sum, outside [0, C), where that was loaded. With SLOPE also ∂z/∂r, 1 without a softcap.
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

// ------------------------------------------------------------------------------------------------ running sums

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

// Takes the packs of a turn into the sums. Without options their largest logit comes first, and the sums are rescaled once.
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

// ------------------------------------------------------------------------------------------------ one row

// What the gradient needs of a row; read once per row and handed to all its threads.
template <typename A>
struct Row {
  A max, log_sum;  // M, S
  A mass;          // A
  A pull;          // 2λ·m·(M + S)
  A scale;
  A at_hot;  // the gradient at the class id; before that is known, the class id's own share, (1−ε)·m
  i64 hot;   // the column of the class id; −1 where no column is hit
  bool counts;
};

// The target of row n: everything but the sums.
template <typename T, int KIND>
__device__ __forceinline__ Row<Acc<T>> open_row(const Problem<T>& p, i64 n, Acc<T>& m, i64& id) {
  typedef Acc<T> A;
  Row<A> row;
  id = KIND == PROBS ? 0 : load(p.ids_n + n);
  row.counts = id >= 0;
  m = !row.counts ? (A)0 : KIND != PROBS && p.row_weight_n ? load(p.row_weight_n + n) : (A)1;
  const i64 c = id - p.first_class;
  const bool hit = KIND != PROBS && row.counts && c >= 0 && c < p.C;
  row.hot = hit ? c : -1;
  row.at_hot = hit ? p.hot * m : (A)0;
  return row;
}

// r of the class id of row n.
template <typename T>
__device__ __forceinline__ Acc<T> hot_logit(const Problem<T>& p, i64 n, i64 hot) {
  Acc<T> r = widen(load(p.logits_nc + n * p.stride + hot));
  if (p.bias_c) r += load_shared_by_rows(p.bias_c + hot);
  return r * p.temperature_inverse;
}

// ∂L/∂z = (A·p − y) + 2λ·m·(M + S)·p, scaled: where A·p is y, what is left of λ has all its digits.
template <typename A>
__device__ __forceinline__ A gradient_of(const Row<A>& row, A z, A y) {
  const A prob = exp_of_difference(z - row.max, row.log_sum);
  return (row.mass * prob - y + row.pull * prob) * row.scale;
}

// Completes a row whose sums and scale are known: the gradient at its class id, whose logit is r, and nothing for all of its
// columns if it does not count.
template <typename T>
__device__ __forceinline__ void close_row(const Problem<T>& p, Row<Acc<T>>& row, Acc<T> r) {
  typedef Acc<T> A;
  if (row.hot >= 0) {
    A y = p.rest;
    if (p.weight_c && p.rest != 0) y *= load_shared_by_rows(p.weight_c + row.hot);
    row.at_hot = gradient_of(row, final_logit(p, r), y + row.at_hot);
    if (p.softcap != 0) row.at_hot *= slope_of(p, r);
  }
  if (!row.counts) row.max = row.log_sum = row.mass = row.pull = row.scale = 0;
}

template <typename A>
__device__ __forceinline__ A pull_of(A z_loss, A m, A max, A log_sum) {
  return z_loss == 0 ? (A)0 : 2 * z_loss * m * (max + log_sum);  // M and S of a row may be infinite
}

// Stores what a forward sweep leaves of row n, from the sums of all its columns; one thread per row. Also r of its class id.
template <typename T, int KIND>
__device__ __forceinline__ Row<Acc<T>> finish(
    const Problem<T>& p, const RowsOut<T>& out, const Wanted& want, i64 n, const Sums<Acc<T>>& sums, Acc<T>& r) {
  typedef Acc<T> A;
  A m;
  i64 id;
  Row<A> row = open_row<T, KIND>(p, n, m, id);
  const A M = sums.max;
  // Σ exp u is a whole number where all logits are equal, and log rounds once: S is exactly log C
  const A S = M == -infinity<A>() ? not_a_number<A>() : (A)log((double)sums.exp);

  A d = row.counts ? sums.dot : (A)0, mass = row.counts ? sums.mass : (A)0, u_hot = 0;
  if (KIND != PROBS && row.hot >= 0) {
    r = hot_logit(p, n, row.hot);
    u_hot = final_logit(p, r) - M;
    if (row.at_hot != 0) d += row.at_hot * u_hot;
    mass += row.at_hot;
  }
  if (KIND != PROBS && row.counts && !p.weight_c)  // the sum over C equal shares, without its rounding errors
    mass = row.hot >= 0 ? p.mass_hit : p.mass_miss;
  A loss = mass * S - d;
  if (p.z_loss != 0) loss += p.z_loss * m * (M + S) * (M + S);
  const A nan = not_a_number<A>();
  store(out.loss_n + n, row.counts ? loss : id == INVALID ? nan : (A)0);
  store(out.row_max_n + n, M);
  store(out.log_sum_n + n, S);
  store(out.target_dot_n + n, d);
  store(out.mass_n + n, mass);
  if (want.stats) {
    const A log_prob = KIND == PROBS ? sums.q_dot - sums.q_mass * S : row.hot >= 0 ? u_hot - S : (A)0;
    store(out.entropy_n + n, S - sums.entropy / sums.exp);  // −Σ p·(u − S)
    store(out.log_prob_n + n, id == INVALID ? nan : log_prob);
    store(out.argmax_n + n, sums.at);
  }
  row.max = M;
  row.log_sum = S;
  row.mass = mass;
  row.pull = pull_of(p.z_loss, m, M, S);
  return row;
}

// The same at a column without target, y = 0.
template <typename A>
__device__ __forceinline__ A gradient_without_target(const Row<A>& row, A z) {
  return exp_of_difference(z - row.max, row.log_sum) * ((row.mass + row.pull) * row.scale);
}

// The gradients of a group of row n, but for the class id's own share.
template <typename G, typename T, int KIND, int V>
__device__ __forceinline__ Pack<G, V> gradient_group(
    const Problem<T>& p, const Row<Acc<T>>& row, i64 n, const Span& at, const Pack<T, V>& group) {
  typedef Acc<T> A;
  A z[V], slope[V], y[V], q[V];
  final_logits<true>(p, at, group, z, slope);
  if (KIND == PROBS || p.rest != 0) {
    target_group<T, KIND, V>(p, n, at, y, q);
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = gradient_of(row, z[i], y[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = gradient_without_target(row, z[i]);
  }
  if (p.softcap != 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] *= slope[i];
  }
  return narrow_all<G>(z);
}

// The gradients of a pack of row n, likewise.
template <typename G, typename T, int KIND, int V>
__device__ __forceinline__ Pack<G, V> gradient(
    const Problem<T>& p, const Row<Acc<T>>& row, i64 n, const Span& at, Pack<T, V> pack) {
  if constexpr (KIND == PLAIN) {
    Acc<T> z[V];
    widen_all(pack, z);
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = gradient_without_target(row, z[i]);
    return narrow_all<G>(z);
  } else {
    const int S = Group<T, V>::N;
    Pack<G, V> grads;
#pragma unroll 1
    for (int i = 0; i < V; i += S) {
      const Pack<T, S> group = first_of<S>(pack);
      const Pack<G, S> grad = gradient_group<G, T, KIND, S>(p, row, n, at.after(i), group);
      if constexpr (Same<G, T>::value) {
        turn(pack, grad);  // one ring holds both: two would cost registers
      } else {
        turn(pack, group);
        turn(grads, grad);
      }
    }
    if constexpr (Same<G, T>::value)
      return pack;
    else
      return grads;
  }
}

// Writes the gradients of a turn of row n; a row that does not count has logits of 0, whatever they are, and gradients of 0.
template <typename G, typename T, int KIND, int V, int U>
__device__ __forceinline__ void write_turn(const Problem<T>& p, const Row<Acc<T>>& row, i64 n, const Packs<T, V>& at, int j,
    int step, Turn<T, V, U> turn, G* grad, bool wide) {
  const bool whole = wide && at.template whole<U>(j, step);
  Pack<G, V>* to = reinterpret_cast<Pack<G, V>*>(grad - at.lead) + j;
  if (KIND == PLAIN && whole) {
#pragma unroll
    for (int u = 0; u < U; ++u, to += step) store(to, gradient<G, T, KIND, V>(p, row, n, Span{}, turn.pack(u)));
    return;
  }
#pragma unroll 1
  for (int u = 0; u < U; ++u, to += step) {
    const Pack<T, V> pack = turn.next();
    if (j + u * step >= at.packs) break;
    const Span span = at.span(j + u * step);
    Pack<G, V> grads{};
    if (row.counts) grads = gradient<G, T, KIND, V>(p, row, n, span, pack);
    if (whole)
      store(to, grads);
    else
      store_pack(grad, span, wide, grads);
  }
}

// Writes the gradient at the class id, by the thread that wrote the pack that it is in.
template <typename G, typename T, int V>
__device__ __forceinline__ void write_hot(const Row<Acc<T>>& row, const Packs<T, V>& at, int from, int lane, int lanes, G* grad) {
  if (row.hot < 0 || !at.packs) return;  // a row past the end has no packs, and whatever is its hot column
  const int j = (int)((row.hot + at.lead) / V) - from;
  if (j % lanes == lane) store(grad + row.hot, narrow<G>(row.at_hot));
}

// ------------------------------------------------------------------------------------------------ kernels

#if __CUDA_ARCH__ < 800
#define BLOCKS_OF_512 1  // compute capability 7.5 has half as many threads a processor
#else
#define BLOCKS_OF_512 2
#endif

// A row by LANES lanes of a warp (a power of two up to 32; blockDim.x / LANES rows per block), or by a block (LANES =
// 0). KEEP = 0: forward only. Else both sweeps, or with grad_nc null forward only:
//
//   device memory ──► kept (KEEP packs per lane), then stage ──► gradient ──► device memory
//                         └─► absorb ─► lanes ─► warps ─► finish ─► M, S, A ─┘
//
// kept is a thread's first turn. stage is shared memory, for blocks only; with a grad_nc the row must fit. The gradients of a row
// may lie over its logits, from the row's start: it is on chip before the first of them is written.
template <typename T, int KIND, int LANES, int V, int KEEP, typename G = T>
__global__ void __launch_bounds__(LANES ? 256 : 512, LANES || KEEP ? 1 : BLOCKS_OF_512) ce_rows(const Problem<T> p,
    const RowsOut<T> out, const Acc<T>* row_scale_n, i64 scale_stride, G* grad_nc, i64 grad_stride) {
  typedef Acc<T> A;
  DYNAMIC_SHARED(shared);
  Row<A>* const row_of_block = reinterpret_cast<Row<A>*>(shared);  // 64 bytes
  Sums<A>* const warps = reinterpret_cast<Sums<A>*>(shared + 4);   // 16 of them
  typedef Turn<T, V, KIND == PLAIN || KEEP ? TURN : 1> Packed;
  typename Packed::Word* const stage =
      reinterpret_cast<typename Packed::Word*>(shared + 4 + 16 * sizeof(Sums<A>) / 16);

  const Wanted want = wanted<KIND>(p, out.entropy_n);
  const int lanes = LANES ? LANES : blockDim.x;
  const int lane = threadIdx.x % lanes;
  const i64 n = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / lanes;
  const bool exists = n < p.N;  // rows past the end have no packs, but their lanes take part in the shuffles
  const T* logits = p.logits_nc + (exists ? n : 0) * p.stride;
  const Packs<T, V> row_packs = packs_of_row<T, V>(logits, p.C), at = row_packs.before(exists ? row_packs.packs : 0);
  const int each = Packed::SIZE * lanes;
  const int turns = LANES ? 1 : (at.packs + each - 1) / each;

  Sums<A> sums = nothing<A>();
  Packed kept;
#pragma unroll 1
  for (int k = 0; k < turns; ++k) {
    const int j = lane + k * each;
    Packed packed = load_turn<Packed::SIZE>(at, j, lanes, narrow<T>(-infinity<A>()));
    absorb_turn<T, KIND>(sums, p, want, n, at, j, lanes, packed);
    if (KEEP && k == 0) {
      kept = packed;
    } else if (KEEP && grad_nc) {
#pragma unroll
      for (int u = 0; u < Packed::SIZE; ++u)  // read back by this thread alone
        if (j + u * lanes < at.packs) stage[j + u * lanes - each] = packed.words[u];
    }
  }

  Row<A> row{};
  A r = 0;
  if (LANES) {
    sums = combine_lanes<LANES ? LANES : 32>(sums, want);
    if (lane == 0 && exists) {
      row = finish<T, KIND>(p, out, want, n, sums, r);
      if (grad_nc) {
        row.scale = load(row_scale_n + n * scale_stride);
        close_row(p, row, r);
      }
    }
    if (!grad_nc) return;
    row.max = __shfl_sync(ALL_LANES, row.max, 0, LANES ? LANES : 32);  // from lane 0 of each row
    row.log_sum = __shfl_sync(ALL_LANES, row.log_sum, 0, LANES ? LANES : 32);
    row.mass = __shfl_sync(ALL_LANES, row.mass, 0, LANES ? LANES : 32);
    row.pull = __shfl_sync(ALL_LANES, row.pull, 0, LANES ? LANES : 32);
    row.scale = __shfl_sync(ALL_LANES, row.scale, 0, LANES ? LANES : 32);
    row.at_hot = __shfl_sync(ALL_LANES, row.at_hot, 0, LANES ? LANES : 32);
    row.hot = __shfl_sync(ALL_LANES, row.hot, 0, LANES ? LANES : 32);
    row.counts = __shfl_sync(ALL_LANES, (int)row.counts, 0, LANES ? LANES : 32);
    __syncwarp();  // lane 0 has read logits[hot], which a gradient may overwrite: shuffles do not order memory
  } else {
    sums = combine_block(sums, want, warps);
    if (threadIdx.x == 0) {
      row = finish<T, KIND>(p, out, want, n, sums, r);
      if (KEEP && grad_nc) {
        row.scale = load(row_scale_n + n * scale_stride);
        close_row(p, row, r);
        *row_of_block = row;
      }
    }
    if (!KEEP || !grad_nc) return;
    __syncthreads();  // all read what thread 0 wrote
    row = *row_of_block;
  }

  if (!KEEP) return;
  G* grad = grad_nc + n * grad_stride;
  const bool wide = lead_of<G, V>(grad) == at.lead;
  if (!row.counts) kept = Packed{};
#pragma unroll 1
  for (int k = 0; k < turns; ++k) {
    const int j = lane + k * each;
    if (k > 0 && row.counts) {
#pragma unroll
      for (int u = 0; u < Packed::SIZE; ++u)
        if (j + u * lanes < at.packs) kept.words[u] = stage[j + u * lanes - each];
    }
    write_turn<G, T, KIND>(p, row, n, at, j, lanes, kept, grad, wide);
  }
  write_hot<G, T>(row, at, 0, lane, lanes, grad);
}

// Stage one of a row by gridDim.x / N blocks: block (n, s) sums the packs [s·packs_each, (s + 1)·packs_each) of row n.
template <typename T, int KIND, int V>
__global__ void __launch_bounds__(256, 4)
    ce_partial(const Problem<T> p, i64 splits, i64 packs_each, Acc<T>* sums_ns, i64* at_ns, int stats) {
  typedef Acc<T> A;
  DYNAMIC_SHARED(shared);
  const Wanted want = wanted<KIND>(p, stats ? &p : nullptr);
  const i64 n = blockIdx.x / splits, s = blockIdx.x % splits;
  const T* logits = p.logits_nc + n * p.stride;
  const Packs<T, V> row = packs_of_row<T, V>(logits, p.C);
  const Packs<T, V> at = row.before((int)min_of((s + 1) * packs_each, row.packs));
  typedef Turn<T, V, KIND == PLAIN ? TURN : 1> Packed;
  Sums<A> sums = nothing<A>();
#pragma unroll 1
  for (int j = (int)(s * packs_each) + threadIdx.x; j < at.packs; j += Packed::SIZE * blockDim.x) {
    Packed packed = load_turn<Packed::SIZE>(at, j, blockDim.x, narrow<T>(-infinity<A>()));
    absorb_turn<T, KIND>(sums, p, want, n, at, j, blockDim.x, packed);
  }
  sums = combine_block(sums, want, reinterpret_cast<Sums<A>*>(shared));
  if (threadIdx.x == 0) {
    A* to = sums_ns + (n * splits + s) * SUMS;
    store(to + 0, sums.max);
    store(to + 1, sums.exp);
    store(to + 2, sums.dot);
    store(to + 3, sums.mass);
    store(to + 4, sums.entropy);
    store(to + 5, sums.q_dot);
    store(to + 6, sums.q_mass);
    store(at_ns + n * splits + s, sums.at);
  }
}

// Stage two: a warp per row combines its sums, lane by lane in the order of s, then the lanes.
template <typename T, int KIND>
__global__ void __launch_bounds__(128)
    ce_combine(const Problem<T> p, const RowsOut<T> out, i64 splits, const Acc<T>* sums_ns, const i64* at_ns) {
  typedef Acc<T> A;
  const Wanted want = wanted<KIND>(p, out.entropy_n);
  const int lane = threadIdx.x % 32;
  const i64 n = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  Sums<A> sums = nothing<A>();
  if (n < p.N) {
    for (i64 s = lane; s < splits; s += 32) {
      const A* from = sums_ns + (n * splits + s) * SUMS;
      sums = combine(sums, Sums<A>{load(from + 0), load(from + 1), load(from + 2), load(from + 3), load(from + 4),
                               load(from + 5), load(from + 6), load(at_ns + n * splits + s)});
    }
  }
  sums = combine_lanes<32>(sums, want);
  A r;
  if (lane == 0 && n < p.N) finish<T, KIND>(p, out, want, n, sums, r);
}

// Gradients from M, S and A. A block is blockDim.x / lanes rows of `lanes` threads, a power of two; a thread writes up
// to `each` packs, `lanes` apart; block b of a group of rows is its tile b % tiles.
//
// Gradients shorter than logits may lie over them, from the row's start. Then there is one tile, and its turns go up the
// row together, so that what they write lies below what is still to be read:
//
//   logits (4 bytes)    |turn 0        |turn 1        |turn 2        |
//   gradients (2 bytes) |0     |1     |2     |                          turn 2 is written when all have read it
template <typename T, int KIND, int V, typename G = T>
__global__ void __launch_bounds__(256, 4)
    ce_backward(const Problem<T> p, const Acc<T>* row_max_n, const Acc<T>* log_sum_n, const Acc<T>* mass_n,
        const Acc<T>* row_scale_n, i64 scale_stride, G* grad_nc, i64 grad_stride, int lanes, int each, i64 tiles) {
  typedef Acc<T> A;
  DYNAMIC_SHARED(shared);
  Row<A>* const rows = reinterpret_cast<Row<A>*>(shared);  // one per row of the block
  const int per_block = blockDim.x / lanes, r = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const i64 first = blockIdx.x / tiles * per_block, tile = blockIdx.x % tiles;
  if ((int)threadIdx.x < per_block && first + threadIdx.x < p.N) {
    const i64 n = first + threadIdx.x;
    A m;
    i64 id;
    Row<A> row = open_row<T, KIND>(p, n, m, id);
    row.max = load(row_max_n + n);
    row.log_sum = load(log_sum_n + n);
    row.mass = load(mass_n + n);
    row.pull = pull_of(p.z_loss, m, row.max, row.log_sum);
    row.scale = load(row_scale_n + n * scale_stride);
    const int pack = (int)((row.hot + lead_of<T, V>(p.logits_nc + n * p.stride)) / V);
    if (pack / (lanes * each) != tile) row.hot = -1;  // another block writes there, perhaps over its logit
    close_row(p, row, row.hot >= 0 ? hot_logit(p, n, row.hot) : (A)0);
    rows[threadIdx.x] = row;
  }
  __syncthreads();  // a row's threads read what one thread wrote
  const i64 n = first + r;
  const bool exists = n < p.N;  // rows past the end have no packs, but their threads wait with the others
  const Row<A>& row = rows[r];
  const T* logits = p.logits_nc + (exists ? n : 0) * p.stride;
  G* grad = grad_nc + (exists ? n : 0) * grad_stride;
  const Packs<T, V> row_packs = packs_of_row<T, V>(logits, p.C), at = row_packs.before(exists ? row_packs.packs : 0);
  const bool wide = lead_of<G, V>(grad) == at.lead;
  typedef Turn<T, V, KIND == PLAIN ? TURN : 1> Packed;
#pragma unroll 1
  for (int k = 0; k < each; k += Packed::SIZE) {
    const int j = (int)min_of((tile * each + k) * lanes + lane, at.packs);
    Packed packed{};  // a row that does not count is not read
    if (row.counts) packed = load_turn<Packed::SIZE>(at, j, lanes, narrow<T>(-infinity<A>()));
    if (sizeof(G) < sizeof(T)) __syncthreads();  // the logits of this turn are read before gradients go over them
    write_turn<G, T, KIND>(p, row, n, at, j, lanes, packed, grad, wide);
  }
  write_hot<G, T>(row, at, (int)(tile * each * lanes), lane, lanes, grad);
}

// ------------------------------------------------------------------------------------------------ class ids

// Lane 0 of a warp gets the sum of the counts and the first of the bad rows.
__device__ __forceinline__ void combine_ids(double& count, i64& bad) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    count += __shfl_down_sync(ALL_LANES, count, step, 32);
    bad = min_of(bad, __shfl_down_sync(ALL_LANES, bad, step, 32));
  }
}

// Stage one of checking class ids: brings them to the form of swl/backends/protocol.py, gathers the row weights m, and leaves for
// each block Σ m and its first row out of range (N where there is none).
template <typename I, typename A>
__global__ void __launch_bounds__(256) prepare_ids(const I* ids_in, i64 ids_stride, i64 N, i64 n_classes,
    i64 ignore_index, const A* weight_c, i64* ids_n, A* row_weight_n, double* count_b, i64* bad_b) {
  DYNAMIC_SHARED(shared);
  double* const counts = reinterpret_cast<double*>(shared);  // one per warp
  i64* const bads = reinterpret_cast<i64*>(counts + blockDim.x / 32);
  double count = 0;
  i64 bad = N;
  for (i64 n = (i64)blockIdx.x * blockDim.x + threadIdx.x; n < N; n += (i64)gridDim.x * blockDim.x) {
    i64 id = load(ids_in + n * ids_stride);
    if (id == ignore_index) {
      id = -1;
    } else if (id < 0 || id >= n_classes) {
      id = INVALID;
      bad = min_of(bad, n);
    }
    const A m = id < 0 ? (A)0 : weight_c ? load_shared_by_rows(weight_c + id) : (A)1;
    store(ids_n + n, id);
    if (weight_c) store(row_weight_n + n, m);
    count += m;
  }
  combine_ids(count, bad);
  if (threadIdx.x % 32 == 0) {
    counts[threadIdx.x / 32] = count;
    bads[threadIdx.x / 32] = bad;
  }
  __syncthreads();  // thread 0 reads what each warp wrote
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < (int)blockDim.x / 32; ++warp) {
    count += counts[warp];
    bad = min_of(bad, bads[warp]);
  }
  store(count_b + blockIdx.x, count);
  store(bad_b + blockIdx.x, bad);
}

// Stage two, one warp: Σ m in a fixed order, and the first bad row of all. error_5 = {set, row, id, n_classes,
// ignore_index} keeps the first error until the host has read it; the integer atomic lets one of several streams have
// it.
template <typename I>
__global__ void __launch_bounds__(32) finish_ids(const I* ids_in, i64 ids_stride, i64 N, i64 n_classes,
    i64 ignore_index, i64 blocks, const double* count_b, const i64* bad_b, double* count, unsigned long long* error_5) {
  double total = 0;
  i64 bad = N;
  for (i64 b = threadIdx.x; b < blocks; b += 32) {
    total += load(count_b + b);
    bad = min_of(bad, load(bad_b + b));
  }
  combine_ids(total, bad);
  if (threadIdx.x != 0) return;
  store(count, total);
  if (bad < N && atomicCAS(error_5, 0ull, 1ull) == 0ull) {
    store(error_5 + 1, (unsigned long long)bad);
    store(error_5 + 2, (unsigned long long)(i64)load(ids_in + bad * ids_stride));
    store(error_5 + 3, (unsigned long long)n_classes);
    store(error_5 + 4, (unsigned long long)ignore_index);
  }
}
