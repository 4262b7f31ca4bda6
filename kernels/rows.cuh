// One row, once its sums are known: what is stored of it, and its gradients.

#pragma once

#include "sums.cuh"

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
  id = KIND & PROBS ? 0 : load(p.ids_n + n);
  row.counts = id >= 0;
  m = !row.counts ? (A)0 : !(KIND & PROBS) && p.row_weight_n ? load(p.row_weight_n + n) : (A)1;
  const i64 c = id - p.first_class;
  const bool hit = !(KIND & PROBS) && row.counts && c >= 0 && c < p.C;
  row.hot = hit ? c : -1;
  row.at_hot = hit ? p.hot * m : (A)0;
  return row;
}

// r of the class id of row n.
template <int KIND, typename T>
__device__ __forceinline__ Acc<T> hot_logit(const Problem<T>& p, i64 n, i64 hot) {
  Acc<T> r = widen(load(p.logits_nc + n * p.stride + hot));
  if (KIND & BIAS) r += load_shared_by_rows(p.bias_c + hot);
  return KIND & TEMPERATURE ? r * p.temperature_inverse : r;
}

// ∂L/∂z = (A·p − y) + 2λ·m·(M + S)·p, scaled: where A·p is y, what is left of λ has all its digits.
template <typename A>
__device__ __forceinline__ A gradient_of(const Row<A>& row, A z, A y) {
  const A prob = exp_of_difference(z - row.max, row.log_sum);
  return (row.mass * prob - y + row.pull * prob) * row.scale;
}

// Completes a row whose sums and scale are known: the gradient at its class id, whose logit is r.
template <int KIND, typename T>
__device__ __forceinline__ void close_row(const Problem<T>& p, Row<Acc<T>>& row, Acc<T> r) {
  typedef Acc<T> A;
  if (row.hot < 0) return;
  A y = p.rest, slope = 1;
  if (KIND & WEIGHTS) y *= load_shared_by_rows(p.weight_c + row.hot);
  const A z = final_logit<true, KIND>(p, r, slope);
  row.at_hot = gradient_of(row, z, y + row.at_hot) * slope;
}

template <typename A>
__device__ __forceinline__ A pull_of(A z_loss, A m, A max, A log_sum) {
  return z_loss == 0 ? (A)0 : 2 * z_loss * m * (max + log_sum);  // M and S of a row may be infinite
}

// Stores what a forward sweep leaves of row n, from the sums of all its columns; one thread per row. Also r of its
// class id.
template <typename T, int KIND>
__device__ __forceinline__ Row<Acc<T>> finish(
    const Problem<T>& p, const RowsOut<T>& out, i64 n, const Sums<Acc<T>>& sums, Acc<T>& r) {
  typedef Acc<T> A;
  A m;
  i64 id;
  Row<A> row = open_row<T, KIND>(p, n, m, id);
  const A M = sums.max;
  // Σ exp u is a whole number where all logits are equal, and log rounds once: S is exactly log C
  const A S = M == -infinity<A>() ? not_a_number<A>() : (A)log((double)sums.exp);

  A d = row.counts ? sums.dot : (A)0, mass = row.counts ? sums.mass : (A)0, u_hot = 0;
  if (!(KIND & PROBS) && row.hot >= 0) {
    A slope;
    r = hot_logit<KIND>(p, n, row.hot);
    u_hot = final_logit<false, KIND>(p, r, slope) - M;
    if (row.at_hot != 0) d += row.at_hot * u_hot;
    mass += row.at_hot;
  }
  if (!(KIND & PROBS) && row.counts && !p.weight_c)  // the sum over C equal shares, without its rounding errors
    mass = row.hot >= 0 ? p.mass_hit : p.mass_miss;
  A loss = mass * S - d;
  if (p.z_loss != 0) loss += p.z_loss * m * (M + S) * (M + S);
  const A nan = not_a_number<A>();
  store(out.loss_n + n, row.counts ? loss : id == INVALID ? nan : (A)0);
  store(out.row_max_n + n, M);
  store(out.log_sum_n + n, S);
  store(out.target_dot_n + n, d);
  store(out.mass_n + n, mass);
  if (Wanted<KIND>::stats) {
    const A log_prob = KIND & PROBS ? sums.q_dot - sums.q_mass * S : row.hot >= 0 ? u_hot - S : (A)0;
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

// The gradients of a pack of row n, but for the class id's own share.
template <typename G, typename T, int KIND, typename At, int V>
__device__ __forceinline__ Pack<G, V> gradient(
    const Problem<T>& p, const Row<Acc<T>>& row, i64 n, const At& at, const Pack<T, V>& pack) {
  typedef Acc<T> A;
  if constexpr (V > GroupOf<T, V>::N) {
    Pack<T, V> ring = pack;  // the logits go out at its start, the gradients come in at its end
#pragma unroll 1
    for (int i = 0; i < V; ++i) {
      const Pack<T, 1> one = take<1>(ring);
      ring.x[V - 1] = gradient<G, T, KIND>(p, row, n, at.after(i), one).x[0];
    }
    return ring;
  } else {
    A z[V], slope[V], y[V], q[V];
    final_logits<true, KIND>(p, at, pack, z, slope);
    if (Wanted<KIND>::target) target_pack<T, KIND>(p, n, at, y, q);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      z[i] = Wanted<KIND>::target ? gradient_of(row, z[i], y[i]) : gradient_without_target(row, z[i]);
      if (KIND & SOFTCAP) z[i] *= slope[i];
    }
    return narrow_all<G>(z);
  }
}

// Writes the gradients of a turn of row n; 0 if it does not count. A row past the end has no packs, and is not asked.
template <typename G, typename T, int KIND, int V, int U>
__device__ __forceinline__ void write_turn(const Problem<T>& p, const Row<Acc<T>>& row, i64 n, const Packs<T, V>& at,
    int j, int step, Turn<T, V, U>& turn, G* grad, bool wide) {
  each_pack<Unroll<T, KIND>::value, V>(at, j, step, wide && at.template whole<U>(j, step) && row.counts,
      columns_on_16<KIND>(p, at), turn,
      [&](const auto& where, const Pack<T, V>& pack) {
        const bool inside = where.INSIDE;
        Pack<G, V> grads{};
        if (inside || row.counts) grads = gradient<G, T, KIND>(p, row, n, where, pack);
        store_pack(grad, where, inside || wide, grads);
      });
}

// Writes the gradient at the class id, by the thread that wrote the pack that it is in.
template <typename G, typename T, int V>
__device__ __forceinline__ void write_hot(
    const Row<Acc<T>>& row, const Packs<T, V>& at, int from, int lane, int lanes, G* grad) {
  if (row.hot < 0 || !at.packs) return;  // a row past the end has no packs, and whatever is its hot column
  const int j = (int)((row.hot + at.lead) / V) - from;
  if (j % lanes == lane) store(grad + row.hot, narrow<G>(row.at_hot));
}

// ------------------------------------------------------------------------------------------------ a row on chip

#if __CUDA_ARCH__ < 800  // compute capability 7.5 has half as many threads a processor
#define BLOCKS_OF_512 1
#define BLOCKS_OF_256 3
#else
#define BLOCKS_OF_512 2
#define BLOCKS_OF_256 4
#endif

// What a thread loads of a row at once; with KEEP, as many packs as it keeps.
template <typename T, int KIND, int V, int KEEP>
using RowTurn = Turn<T, V, KEEP || AtOnce<T, KIND>::value ? TURN : Unroll<T, KIND>::PACKS>;

// The turns of `lanes` threads over the packs `from` to before at.packs.
template <bool ONE, typename Packed, typename T, int V>
__device__ __forceinline__ int turns_of(const Packs<T, V>& at, int from, int lanes) {
  const int each = Packed::SIZE * lanes;
  return ONE ? 1 : (at.packs - from + each - 1) / each;
}

// The forward sweep over the packs `from` to before at.packs of row n. With KEEP a thread's first turn stays in `kept`, and
// if it `stages`, the others go there.
template <int KIND, bool ONE, bool KEEP, typename T, int V, typename Packed>
__device__ __forceinline__ Sums<Acc<T>> sweep_forward(const Problem<T>& p, i64 n, const Packs<T, V>& at, int from,
    int lane, int lanes, Packed& kept, bool stages, typename Packed::Word* stage) {
  const int each = Packed::SIZE * lanes, turns = turns_of<ONE, Packed>(at, from, lanes);
  Sums<Acc<T>> sums = nothing<Acc<T>>();
#pragma unroll 1
  for (int k = 0; k < turns; ++k) {
    const int j = from + lane + k * each;
    Packed packed = load_turn<Packed::SIZE>(at, j, lanes, narrow<T>(-infinity<Acc<T>>()));
    absorb_turn<T, KIND>(sums, p, n, at, j, lanes, packed);
    if (KEEP && k == 0) {
      kept = packed;
    } else if (KEEP && stages) {
      packed.copy_to(stage + (j - from - each), lanes, at.packs - j);  // read back by this thread alone
    }
  }
  return sums;
}

// The backward sweep over the same packs, from where they were kept.
template <int KIND, bool ONE, typename G, typename T, int V, typename Packed>
__device__ __forceinline__ void sweep_backward(const Problem<T>& p, const Row<Acc<T>>& row, i64 n,
    const Packs<T, V>& at, int from, int lane, int lanes, Packed& kept, const typename Packed::Word* stage, G* grad) {
  const int each = Packed::SIZE * lanes, turns = turns_of<ONE, Packed>(at, from, lanes);
  const bool wide = lead_of<G, V>(grad) == at.lead;
#pragma unroll 1
  for (int k = 0; k < turns; ++k) {
    const int j = from + lane + k * each;
    if (k > 0) kept.copy_from(stage + (j - from - each), lanes, at.packs - j);
    write_turn<G, T, KIND>(p, row, n, at, j, lanes, kept, grad, wide);
  }
  write_hot<G, T>(row, at, from, lane, lanes, grad);
}
