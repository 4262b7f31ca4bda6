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
//   ce_rows<T, KIND, LANES, V, KEEP>    a row by LANES lanes of a warp, or by a block (LANES = 0): forward, or both
//                                       sweeps with the row kept on chip between them; gradients of type G (or T)
//   ce_cluster (clusters.cu)            a row by a cluster of blocks, kept on chip between them
//   ce_partial + ce_combine             a row by several blocks: their sums meet in a second kernel
//   ce_backward                         gradients from M, S and A
//
// Names: logits_nc is a matrix (N, C) of rows `stride` elements apart; loss_n has one value per row.

#include "rows.cuh"

// A row by LANES lanes of a warp (a power of two up to 32; blockDim.x / LANES rows per block), or by a block (LANES =
// 0). KEEP = 0: forward only. Else both sweeps, or with grad_nc null forward only:
//
//   device memory ──► kept (KEEP packs per lane), then stage ──► gradient ──► device memory
//                         └─► absorb ─► lanes ─► warps ─► finish ─► M, S, A ─┘
//
// kept is a thread's first turn. stage is shared memory, for blocks only; with a grad_nc the row must fit. The
// gradients of a row may lie over its logits, from the row's start: it is on chip before the first of them is written.
template <typename T, int KIND, int LANES, int V, int KEEP, typename G = T>
__global__ void __launch_bounds__(LANES ? 256 : 512, LANES || KEEP ? 1 : BLOCKS_OF_512) ce_rows(const Problem<T> p,
    const RowsOut<T> out, const Acc<T>* row_scale_n, i64 scale_stride, G* grad_nc, i64 grad_stride) {
  typedef Acc<T> A;
  DYNAMIC_SHARED(shared);
  Row<A>* const row_of_block = reinterpret_cast<Row<A>*>(shared);  // 64 bytes
  Sums<A>* const warps = reinterpret_cast<Sums<A>*>(shared + 4);   // 16 of them
  typedef RowTurn<T, KIND, V, KEEP> Packed;
  typename Packed::Word* const stage = reinterpret_cast<typename Packed::Word*>(shared + 4 + 16 * sizeof(Sums<A>) / 16);

  const int lanes = LANES ? LANES : blockDim.x;
  const int lane = LANES ? threadIdx.x % (LANES ? LANES : 1) : threadIdx.x;
  const i64 n = LANES ? ((i64)blockIdx.x * blockDim.x + threadIdx.x) / LANES : blockIdx.x;
  const bool exists = n < p.N;  // rows past the end have no packs, but their lanes take part in the shuffles
  const T* logits = p.logits_nc + (exists ? n : 0) * p.stride;
  const Packs<T, V> row_packs = packs_of_row<T, V>(logits, p.C), at = row_packs.before(exists ? row_packs.packs : 0);
  Packed kept;
  Sums<A> sums = sweep_forward<KIND, LANES != 0, KEEP != 0>(p, n, at, 0, lane, lanes, kept, grad_nc != nullptr, stage);

  Row<A> row{};
  A r = 0;
  if (LANES) {
    sums = combine_lanes<LANES ? LANES : 32, KIND>(sums);
    if (lane == 0 && exists) {
      row = finish<T, KIND>(p, out, n, sums, r);
      if (grad_nc) {
        row.scale = load(row_scale_n + n * scale_stride);
        close_row<KIND>(p, row, r);
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
    sums = combine_block<KIND>(sums, warps);
    if (threadIdx.x == 0) {
      row = finish<T, KIND>(p, out, n, sums, r);
      if (KEEP && grad_nc) {
        row.scale = load(row_scale_n + n * scale_stride);
        close_row<KIND>(p, row, r);
        *row_of_block = row;
      }
    }
    if (!KEEP || !grad_nc) return;
    __syncthreads();  // all read what thread 0 wrote
    row = *row_of_block;
  }

  if (!KEEP) return;
  sweep_backward<KIND, LANES != 0>(p, row, n, at, 0, lane, lanes, kept, stage, grad_nc + n * grad_stride);
}

// Stage one of a row by gridDim.x / N blocks: block (n, s) sums the packs [s·packs_each, (s + 1)·packs_each) of row n.
template <typename T, int KIND, int V>
__global__ void __launch_bounds__(256, BLOCKS_OF_256)
    ce_partial(const Problem<T> p, i64 splits, i64 packs_each, Acc<T>* sums_ns, i64* at_ns) {
  typedef Acc<T> A;
  DYNAMIC_SHARED(shared);
  const i64 n = blockIdx.x / splits, s = blockIdx.x % splits;
  const T* logits = p.logits_nc + n * p.stride;
  const Packs<T, V> row = packs_of_row<T, V>(logits, p.C);
  const Packs<T, V> at = row.before((int)min_of((s + 1) * packs_each, row.packs));
  typedef Turn<T, V, Unroll<T, KIND>::PACKS> Packed;
  Sums<A> sums = nothing<A>();
#pragma unroll 1
  for (int j = (int)(s * packs_each) + threadIdx.x; j < at.packs; j += Packed::SIZE * blockDim.x) {
    Packed packed = load_turn<Packed::SIZE>(at, j, blockDim.x, narrow<T>(-infinity<A>()));
    absorb_turn<T, KIND>(sums, p, n, at, j, blockDim.x, packed);
  }
  sums = combine_block<KIND>(sums, reinterpret_cast<Sums<A>*>(shared));
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
  const int lane = threadIdx.x % 32;
  const i64 n = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  Sums<A> sums = nothing<A>();
  if (n < p.N) {
    for (i64 s = lane; s < splits; s += 32) {
      const A* from = sums_ns + (n * splits + s) * SUMS;
      sums = combine<KIND>(sums, Sums<A>{load(from + 0), load(from + 1), load(from + 2), load(from + 3), load(from + 4),
                               load(from + 5), load(from + 6), load(at_ns + n * splits + s)});
    }
  }
  sums = combine_lanes<32, KIND>(sums);
  A r;
  if (lane == 0 && n < p.N) finish<T, KIND>(p, out, n, sums, r);
}

// Gradients from M, S and A. A block is blockDim.x / lanes rows of `lanes` threads, a power of two; a thread writes up
// to `each` packs, `lanes` apart; block b of a group of rows is its tile b % tiles.
//
// Gradients shorter than logits may lie over them, from the row's start. Then there is one tile, and its turns go up
// the row together, so that what they write lies below what is still to be read:
//
//   logits (4 bytes)    |turn 0        |turn 1        |turn 2        |
//   gradients (2 bytes) |0     |1     |2     |                          turn 2 is written when all have read it
template <typename T, int KIND, int V, typename G = T>
__global__ void __launch_bounds__(256, BLOCKS_OF_256)
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
    close_row<KIND>(p, row, row.hot >= 0 ? hot_logit<KIND>(p, n, row.hot) : (A)0);
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
  typedef Turn<T, V, sizeof(T) == 2 && (KIND & (SOFTCAP | WEIGHTS)) ? 1 : Unroll<T, KIND>::PACKS> Packed;
#pragma unroll 1
  for (int k = 0; k < each; k += Packed::SIZE) {
    const int j = (int)min_of((tile * each + k) * lanes + lane, at.packs);
    Packed packed{};  // a row that does not count is not read
    if (at.packs > 0 && row.counts) packed = load_turn<Packed::SIZE>(at, j, lanes, narrow<T>(-infinity<A>()));
    if (sizeof(G) < sizeof(T)) __syncthreads();  // the logits of this turn are read before gradients go over them
    write_turn<G, T, KIND>(p, row, n, at, j, lanes, packed, grad, wide);
  }
  write_hot<G, T>(row, at, (int)(tile * each * lanes), lane, lanes, grad);
}
