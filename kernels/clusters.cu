// Cross-entropy of rows that one block cannot hold: a cluster of blocks, each with its part of the row on chip (compute
// capability 9.0 and later). The mathematics and the names are those of cross_entropy.cu.

#include "rows.cuh"

const int CLUSTER = 8;  // blocks; the most that every device with clusters has

// All threads of the cluster wait for each other, and see what the others wrote before.
__device__ __forceinline__ void cluster_barrier() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// The shared memory of another block of the cluster, at the place that p has in the block's own. The other block must have
// started, and must not end before it was used.
template <typename T>
__device__ __forceinline__ T* of_block(T* p, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(p, rank));
}

// A row by a cluster of blocks of 256 threads: forward, or with KEEP both sweeps. Block b of a row has the packs
// [b·packs_each, (b + 1)·packs_each). Block 0 adds up the sums of all, in their order, and hands the row to all.
//
//   device memory ──► kept, stage of each block ──────────────► gradient ──► device memory
//                       └─► absorb ─► part ─► block 0: finish ─► row ─┘
//
// The gradients of a row may lie over its logits: all of it is on chip before the first of them is written.
template <typename T, int KIND, int V, int KEEP, typename G = T>
__global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(256, KEEP ? 2 : BLOCKS_OF_256)
    ce_cluster(const Problem<T> p, const RowsOut<T> out, i64 packs_each, const Acc<T>* row_scale_n, i64 scale_stride,
        G* grad_nc, i64 grad_stride) {
  typedef Acc<T> A;
  typedef RowTurn<T, KIND, V, KEEP> Packed;
  DYNAMIC_SHARED(shared);
  Row<A>* const row_of_block = reinterpret_cast<Row<A>*>(shared);  // 64 bytes
  Sums<A>* const warps = reinterpret_cast<Sums<A>*>(shared + 4);   // 8 of them
  Sums<A>* const part = warps + 8;                                 // the sums of the block
  typename Packed::Word* const stage = reinterpret_cast<typename Packed::Word*>(shared + 4 + 16 * sizeof(Sums<A>) / 16);

  const int rank = blockIdx.x % CLUSTER, from = (int)(rank * packs_each);
  const i64 n = blockIdx.x / CLUSTER;
  const Packs<T, V> row_packs = packs_of_row<T, V>(p.logits_nc + n * p.stride, p.C),
                    at = row_packs.before((int)((rank + 1) * packs_each));
  Packed kept;
  Sums<A> sums =
      sweep_forward<KIND, false, KEEP != 0>(p, n, at, from, threadIdx.x, blockDim.x, kept, true, stage);
  sums = combine_block<KIND>(sums, warps);
  if (threadIdx.x == 0) *part = sums;
  cluster_barrier();  // block 0 reads what the others wrote
  if (rank == 0 && threadIdx.x == 0) {
    for (int b = 1; b < CLUSTER; ++b) sums = combine<KIND>(sums, *of_block(part, b));
    A r = 0;
    Row<A> row = finish<T, KIND>(p, out, n, sums, r);
    if (KEEP) {
      row.scale = load(row_scale_n + n * scale_stride);
      close_row<KIND>(p, row, r);
      for (int b = 0; b < CLUSTER; ++b) *of_block(row_of_block, b) = row;
    }
  }
  cluster_barrier();  // all read the row that block 0 wrote; no part is given up before block 0 has read it
  if (!KEEP) return;
  Row<A> row = *row_of_block;
  const i64 hot = (row.hot + at.lead) / V;  // the pack that the class id is in
  if (hot < from || hot >= at.packs) row.hot = -1;
  sweep_backward<KIND, false>(p, row, n, at, from, threadIdx.x, blockDim.x, kept, stage, grad_nc + n * grad_stride);
}
