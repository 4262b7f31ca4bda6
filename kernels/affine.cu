// The parts of an affine map that cuBLAS has not: rows preset to the bias, and column sums for db.
//
//   y = x·W + b      the product adds to rows that hold b already (gemm with beta = 1), so a 16-bit y is rounded once
//   db_k = Σ_n dy_nk
//
// Names: y_nk is a matrix (N, K) of rows `stride` elements apart.

#include "packs.cuh"

// y_nk[n, k] = b_k[k]. A thread writes one pack in each of the rows n, n + gridDim.y, …
template <typename T, typename B>
__global__ void __launch_bounds__(256) fill_rows(T* y_nk, i64 stride, const B* b_k, i64 N, i64 K) {
  const int V = Wide<T>::N;
  const i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  for (i64 n = blockIdx.y; n < N; n += gridDim.y) {
    T* row = y_nk + n * stride;
    const Span at = span_of<V>(j, lead_of<T, V>(row), K);
    if (at.c >= K) continue;
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i)
      pack.x[i] = narrow<T>(at.has(i) ? widen(load_shared_by_rows(b_k + at.c + i)) : Acc<B>(0));
    store_pack(row, at, true, pack);
  }
}

// Stage one: partial_sk[s, k] = Σ of the rows [s·rows, (s + 1)·rows) of dy_nk. A block has 32 lanes side by side, each
// with V columns, and blockDim.y rows at a time. V = 1, or 16 bytes where the host found every row aligned.
//
//     lane 0    1    2  …        each thread sums its column pack over rows y, y + blockDim.y, …;
//   y=0 [V]  [V]  [V]            then the blockDim.y sums of a column are added in the order of y.
//   y=1 [V]  [V]  [V]
template <typename T, int V>
__global__ void __launch_bounds__(256)
    column_sums(const T* dy_nk, i64 stride, i64 N, i64 K, i64 rows, Acc<T>* partial_sk) {
  typedef Acc<T> A;
  DYNAMIC_SHARED(shared);
  A* sums = reinterpret_cast<A*>(shared);  // (blockDim.y, V, 32): neighbouring lanes in neighbouring banks
  const Span at = span_of<V>((i64)blockIdx.x * 32 + threadIdx.x, 0, K);
  const i64 first = blockIdx.y * rows, last = min_of(first + rows, N);
  A sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = 0;
  if (at.c < K) {
    for (i64 n = first + threadIdx.y; n < last; n += blockDim.y) {
      const Pack<T, V> pack = load_pack<T, V>(dy_nk + n * stride, at, narrow<T>((A)0));
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += widen(pack.x[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) sums[(threadIdx.y * V + i) * 32 + threadIdx.x] = sum[i];
  __syncthreads();  // row 0 of the block adds what the other rows wrote
  if (threadIdx.y != 0) return;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    A total = 0;
    for (int y = 0; y < (int)blockDim.y; ++y) total += sums[(y * V + i) * 32 + threadIdx.x];
    if (at.has(i)) store(partial_sk + blockIdx.y * K + at.c + i, total);
  }
}

// Stage two: db_k[k] = Σ_s partial_sk[s, k], in the order of s; `accumulate`: added to what db_k holds.
template <typename A, typename T>
__global__ void __launch_bounds__(256)
    column_totals(const A* partial_sk, i64 S, i64 K, T* db_k, i64 stride, int accumulate) {
  const i64 k = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= K) return;
  A total = 0;
  for (i64 s = 0; s < S; ++s) total += load(partial_sk + s * K + k);
  if (accumulate) total += (A)widen(load(db_k + k * stride));
  store(db_k + k * stride, narrow<T>(total));
}
