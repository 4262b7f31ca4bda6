// Class ids: brought to the form of swl/backends/protocol.py, checked, weighed and counted, in two stages.

#include "common.cuh"

// Lane 0 of a warp gets the sum of the counts and the first of the bad rows.
__device__ __forceinline__ void combine_ids(double& count, i64& bad) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    count += __shfl_down_sync(ALL_LANES, count, step, 32);
    bad = min_of(bad, __shfl_down_sync(ALL_LANES, bad, step, 32));
  }
}

// Stage one of checking class ids: brings them to the form of swl/backends/protocol.py, gathers the row weights m, and
// leaves for each block Σ m and its first row out of range (N where there is none).
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
