"""Break the kernels or the host code in one place at a time, and see whether the tests notice.

    python tests/cuda/mutants.py            prints the table of docs/cuda.md; fails if a mutant survives
    python tests/cuda/mutants.py 3 17       only these
    python tests/cuda/mutants.py --tests-pass 3 17      where it is known that the tests pass without a mutant

A mutant is a piece of a file replaced. It is killed by the first test that fails on it, on real CuPy over the fake driver;
a kernel's, if no order of fibers shows it, by ThreadSanitizer with all blocks running at the same time.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import multiprocessing
import multiprocessing.pool
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fakecuda
import numba  # noqa: F401 - once, for all processes that are forked
import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "cuda"), str(ROOT / "tests"), str(ROOT)]

KERNELS = tuple(sorted(path.stem for path in (ROOT / "kernels").iterdir()))
TESTS = {
    "sweep": "test_kernels.py -k 'every_branch and float32'",
    "float64": "test_kernels.py -k 'every_branch and float64'",
    "softcap": "test_kernels.py -k slope_have",
    "ids": "test_kernels.py -k class_ids",
    "affine": "test_kernels.py -k column_sums",
    "offset": "test_kernels.py -k offsets",
    "digits": "test_kernels.py -k digits",
    "shard": "test_kernels.py -k shard",
    "far": "test_arguments.py -k far_apart",
    "strides": "test_arguments.py -k any_strides",
    "edges": "test_arguments.py -k edges",
    "top": "test_arguments.py -k rounded",
    "limits": "test_arguments.py -k legal",
    "order": "test_arguments.py -k 'record or check_waits'",
    "ends": "test_arguments.py -k ends_of",
    "race": "test_sanitizers.py -k two_streams",
    "options": "test_compile.py -k options",
    "devices": "test_devices.py",
    "affine_all": "test_devices.py -k affine",
    "traffic": "test_traffic.py",
    "graphs": "test_fake.py",
    "products": "test_cublas.py",
}
"""Which tests a mutant is shown to, by the last word of its line."""


class Mutant(NamedTuple):
    what: str
    file: str  # of kernels/, or a module of swl
    old: str
    new: str
    tests: str = "sweep"
    place: int | None = None  # which of several that read the same; None: all

    def replaced(self, text: str) -> str:
        """Return the text with the piece replaced."""
        if self.old not in text:
            raise ValueError(f"not in the source: {self.old}")
        if self.place is None:
            return text.replace(self.old, self.new)
        before = self.old.join(text.split(self.old)[: self.place + 1])
        return before + self.new + text[len(before) + len(self.old) :]


BY_HAND = (
    Mutant(
        "no barrier before warp 0 reads the other warps' sums",
        "sums",
        "  __syncthreads();  // warp 0 reads",
        "  // warp 0 reads",
    ),
    Mutant(
        "no barrier before all read the row", "cross_entropy", "    __syncthreads();  // all read", "    // all read"
    ),
    Mutant(
        "no barrier before the backward kernel reads its rows",
        "cross_entropy",
        "  __syncthreads();  // a row's threads",
        "  // a row's threads",
    ),
    Mutant(
        "16-bit gradients go over logits that others have still to read",
        "cross_entropy",
        "    if (sizeof(G) < sizeof(T)) __syncthreads();",
        "    ",
    ),
    Mutant(
        "no barrier before thread 0 counts class ids",
        "class_ids",
        "  __syncthreads();  // thread 0 reads",
        "  // thread 0 reads",
        "ids",
    ),
    Mutant(
        "no barrier before block 0 of a cluster reads the others' sums",
        "clusters",
        "  cluster_barrier();  // block 0",
        "  // block 0",
    ),
    Mutant(
        "no barrier before the blocks of a cluster read the row",
        "clusters",
        "  cluster_barrier();  // all read",
        "  // all read",
    ),
    Mutant("the last block's sums are left out", "clusters", "b = 1; b < CLUSTER;", "b = 1; b < CLUSTER - 1;"),
    Mutant("the last block is not given the row", "clusters", "b = 0; b < CLUSTER;", "b = 0; b < CLUSTER - 1;"),
    Mutant("every block of a cluster stores the row", "clusters", "if (rank == 0 && threadIdx", "if (threadIdx"),
    Mutant(
        "a block writes the class id's gradient that is not in its part",
        "clusters",
        "if (hot < from || hot >= at.packs) row.hot = -1;",
        "",
    ),
    Mutant(
        "a block's part ends a pack late",
        "clusters",
        "(int)((rank + 1) * packs_each)",
        "(int)((rank + 1) * packs_each + 1)",
    ),
    Mutant(
        "the stage begins at the row, not at the part",
        "rows",
        "packed.copy_to(stage + (j - from - each)",
        "packed.copy_to(stage + (j - each)",
    ),
    Mutant(
        "a cluster's last packs belong to no block",
        "swl.backends.cupy.plans",
        "each = -(-packs // CLUSTER)",
        "each = packs // CLUSTER",
    ),
    Mutant(
        "clusters where the device has none",
        "swl.backends.cupy.plans",
        "if limits.clusters and fill",
        "if fill",
    ),
    Mutant("no barrier in the column sums", "affine", "  __syncthreads();  // row 0", "  // row 0", "affine"),
    Mutant(
        "a barrier that only some threads reach",
        "sums",
        "  if (lane == 0) warps[warp] = sums;",
        "  if (lane == 0) { warps[warp] = sums; __syncthreads(); }",
    ),
    Mutant(
        "shuffles over half the lanes of a row",
        "sums",
        "other.exp = __shfl_down_sync(ALL_LANES, sums.exp, step, LANES)",
        "other.exp = __shfl_down_sync(ALL_LANES, sums.exp, step, LANES / 2)",
    ),
    Mutant(
        "the row's pull taken from lane 0 of the warp, not of the row",
        "cross_entropy",
        "__shfl_sync(ALL_LANES, row.pull, 0, LANES ? LANES : 32)",
        "__shfl_sync(ALL_LANES, row.pull, 0, 32)",
    ),
    Mutant(
        "the reduction starts a step too low",
        "sums",
        "for (int step = LANES / 2; step > 0; step /= 2) {\n    Sums",
        "for (int step = LANES / 4; step > 0; step /= 2) {\n    Sums",
    ),
    Mutant(
        "the last warp's sums are left out",
        "sums",
        "lane < (int)(blockDim.x / 32) ? warps[lane]",
        "lane < (int)(blockDim.x / 32) - 1 ? warps[lane]",
    ),
    Mutant(
        "no rescale when the maximum grows",
        "sums",
        "          rescale<KIND>(sums, max);",
        "          sums.max = max;",
    ),
    Mutant(
        "the exponentials are rescaled, the dot product is not",
        "sums",
        "if (Wanted<KIND>::target && sums.mass != 0) sums.dot += sums.mass * shift;",
        "",
    ),
    Mutant(
        "entropy rescaled without its shift",
        "sums",
        "factor * (sums.entropy + shift * sums.exp)",
        "factor * sums.entropy",
    ),
    Mutant(
        "one of two sums is not rescaled when they meet",
        "sums",
        "  rescale<KIND>(a, max);\n  rescale<KIND>(b, max);",
        "  rescale<KIND>(b, max);",
    ),
    Mutant("the maximum drops NaN", "common", "(a >= b || a != a) ? a : b", "a >= b ? a : (b == b ? b : a)"),
    Mutant("the tail is one column short", "packs", "C - c < V ? (int)(C - c) : V", "C - c < V ? (int)(C - c) - 1 : V"),
    Mutant("the head begins one column late", "packs", "c < 0 ? (int)-c : 0", "c < 0 ? (int)-c + 1 : 0"),
    Mutant(
        "packs laid from the row's start, wherever it lies",
        "packs",
        "return V == 1 ? 0 : (int)(((unsigned long long)row % (V * sizeof(T))) / sizeof(T));",
        "return 0;",
    ),
    Mutant(
        "16-byte stores although the gradient lies off the logits' boundary",
        "cross_entropy",
        "const bool wide = lead_of<G, V>(grad) == at.lead;",
        "const bool wide = true;",
    ),
    Mutant(
        "the last pack of a row is not counted",
        "packs",
        "return (int)((C + lead + V - 1) / V);",
        "return (int)((C + lead) / V);",
    ),
    Mutant(
        "the staged row is read one thread off",
        "packs",
        "words[u] = place[u * step];",
        "words[u] = place[u * step + (threadIdx.x % 2 ? -1 : 1)];",
    ),
    Mutant("a turn is not brought back", "packs", "    memcpy(&words[U - 1], &last, sizeof last);\n", ""),
    Mutant("columns that are taken out of a pack stay in it", "packs", "pack.x[i] = pack.x[i + G];", ";", "float64"),
    Mutant(
        "the sums are not rescaled to the largest of a turn",
        "sums",
        "    rescale<KIND>(sums, max_or_nan(sums.max, max));",
        "    sums.max = max_or_nan(sums.max, max);",
    ),
    Mutant(
        "the largest of a pack is not its last",
        "packs",
        "for (int i = 1; i < V; ++i) z[0]",
        "for (int i = 1; i < V - 1; ++i) z[0]",
    ),
    Mutant(
        "columns beside a row count",
        "cross_entropy",
        "narrow<T>(-infinity<A>()));\n    absorb",
        "narrow<T>((A)0));\n    absorb",
    ),
    Mutant(
        "a pack that sticks out of its row is loaded whole",
        "packs",
        "j + (U - 1) * step < last;",
        "j + (U - 1) * step <= last;",
    ),
    Mutant(
        "the gradient at the class id is written by another thread",
        "rows",
        "if (j % lanes == lane) store",
        "if ((j + 1) % lanes == lane) store",
    ),
    Mutant(
        "the gradient at the class id is written by every tile",
        "cross_entropy",
        "if (pack / (lanes * each) != tile) row.hot = -1;",
        "",
    ),
    Mutant(
        "the row's offset in 32 bits",
        "cross_entropy",
        "const T* logits = p.logits_nc + (exists ? n : 0) * p.stride;",
        "const T* logits = p.logits_nc + (int)((exists ? n : 0) * p.stride);",
        "offset",
    ),
    Mutant(
        "an ignored row has a loss",
        "rows",
        "row.counts ? loss : id == INVALID ? nan : (A)0",
        "id == INVALID ? nan : loss",
    ),
    Mutant(
        "an ignored row has a gradient where its packs are whole",
        "rows",
        "at.template whole<U>(j, step) && row.counts,",
        "at.template whole<U>(j, step),",
    ),
    Mutant(
        "an ignored row has a gradient",
        "rows",
        "if (inside || row.counts) grads",
        "grads",
    ),
    Mutant(
        "an ignored row is read by ce_backward",
        "cross_entropy",
        "    if (at.packs > 0 && row.counts) packed = load_turn",
        "    packed = load_turn",
        "traffic",
    ),
    Mutant("an invalid id passes silently", "rows", "id == INVALID ? nan : (A)0", "(A)0"),
    Mutant(
        "smoothing mass is not multiplied by the class weight",
        "problem",
        "y[i] *= w[i];",
        "y[i] *= 1;",
    ),
    Mutant(
        "smoothing leaves the class id's share whole",
        "rows",
        "row.at_hot = hit ? p.hot * m : (A)0;",
        "row.at_hot = hit ? m : (A)0;",
    ),
    Mutant(
        "class ids of a shard without its offset",
        "rows",
        "const i64 c = id - p.first_class;",
        "const i64 c = id;",
        "shard",
    ),
    Mutant(
        "an unguarded target",
        "rows",
        "const bool hit = !(KIND & PROBS) && row.counts && c >= 0 && c < p.C;",
        "const bool hit = !(KIND & PROBS) && row.counts;",
        "shard",
    ),
    Mutant(
        "a masked class with mass 0 makes the dot product NaN",
        "sums",
        "if (!(KIND & (PROBS | WEIGHTS)) || y[i] != 0) sums.dot",
        "sums.dot",
    ),
    Mutant("no slope of the softcap", "rows", "z[i] *= slope[i];", ";"),
    Mutant("no slope at the class id", "rows", "y + row.at_hot) * slope;", "y + row.at_hot);"),
    Mutant(
        "no smoothing at the class id", "rows", "gradient_of(row, z, y + row.at_hot)", "gradient_of(row, z, row.at_hot)"
    ),
    Mutant(
        "the slope of a saturated softcap from 1 − tanh²",
        "problem",
        "slope = w * fma_of(rest, -(A)2.772588722239781, fma_of(w, (A)-4, (A)4));",
        "slope = 1 - (1 - 2 * w) * (1 - 2 * w);",
        "digits",
    ),
    Mutant(
        "the softcap's exponent as it was rounded",
        "problem",
        "fma_of(rest, -(A)2.772588722239781, fma_of(w, (A)-4, (A)4))",
        "fma_of(w, (A)-4, (A)4)",
        "digits",
    ),
    Mutant(
        "the slope of an infinite logit under a softcap is NaN",
        "problem",
        "fmin(fma_of(size, p.softcap_rate_rest, fma_of(size, p.softcap_rate, -a)), (A)1)",
        "fma_of(size, p.softcap_rate_rest, fma_of(size, p.softcap_rate, -a))",
        "softcap",
    ),
    Mutant(
        "a softcap near 0 without its polynomial",
        "problem",
        "return a < 1.5869645f ? low : high;",
        "return high;",
        "softcap",
    ),
    Mutant(
        "the bias is loaded 16 bytes at a time wherever it lies",
        "problem",
        "return !((KIND & BIAS) && !is_aligned(p.bias_c - at.lead, 16)) &&",
        "return",
    ),
    Mutant(
        "z-loss is added to the mass before the target is taken off",
        "rows",
        "(row.mass * prob - y + row.pull * prob)",
        "((row.mass + row.pull) * prob - y)",
        "digits",
    ),
    Mutant(
        "no order between lane 0's look at the hot logit and the gradient over it",
        "cross_entropy",
        "    __syncwarp();  // lane 0",
        "    // lane 0",
    ),
    Mutant(
        "z-loss missing from the gradient",
        "rows",
        "return z_loss == 0 ? (A)0 : 2 * z_loss * m * (max + log_sum);",
        "return 0;",
    ),
    Mutant(
        "the bias of the neighbouring class",
        "problem",
        "z[i] += bias[i];",
        "z[i] += bias[(i + 1) % V];",
    ),
    Mutant(
        "stage two leaves out the last block's sums",
        "cross_entropy",
        "for (i64 s = lane; s < splits; s += 32)",
        "for (i64 s = lane; s < splits - 1; s += 32)",
    ),
    Mutant(
        "stage two combines without rescaling",
        "cross_entropy",
        "      sums = combine<KIND>(sums, Sums<A>{load(from + 0), load(from + 1),",
        "      sums = combine<KIND>(sums, Sums<A>{sums.max, load(from + 1),",
    ),
    Mutant(
        "blocks of a row overlap by a pack",
        "cross_entropy",
        "min_of((s + 1) * packs_each, row.packs)",
        "min_of((s + 1) * packs_each + 1, row.packs)",
    ),
    Mutant(
        "blocks add to one another's sums",
        "cross_entropy",
        "store(to + 1, sums.exp);",
        "store(to + 1 - s * SUMS, load(to + 1 - s * SUMS) + sums.exp);",
    ),
    Mutant(
        "two blocks write the sums of the same columns",
        "affine",
        "store(partial_sk + blockIdx.y * K + at.c + i, total);",
        "store(partial_sk + at.c + i, total);",
        "affine",
    ),
    Mutant(
        "the last rows of a stripe are not added",
        "affine",
        "n < last; n += blockDim.y",
        "n + 1 < last; n += blockDim.y",
        "affine",
    ),
    Mutant(
        "gradients of W are overwritten, not added to",
        "affine",
        "if (accumulate) total +=",
        "if (false) total +=",
        "affine",
    ),
    Mutant(
        "the bias begins one column late",
        "affine",
        "load_shared_by_rows(b_k + at.c + i)",
        "load_shared_by_rows(b_k + (at.c + i + 1) % K)",
        "affine",
    ),
    Mutant(
        "an id equal to the number of classes is let through",
        "class_ids",
        "id < 0 || id >= n_classes",
        "id < 0 || id > n_classes",
        "ids",
    ),
    Mutant(
        "the last bad row is reported, not the first",
        "class_ids",
        "      bad = min_of(bad, n);",
        "      bad = n;",
        "ids",
    ),
    Mutant(
        "the weight of an ignored row counts",
        "class_ids",
        "const A m = id < 0 ? (A)0 : weight_c",
        "const A m = weight_c && id == -1 ? weight_c[0] : id < 0 ? (A)0 : weight_c",
        "ids",
    ),
    Mutant(
        "a later error replaces the first",
        "class_ids",
        "atomicCAS(error_5, 0ull, 1ull) == 0ull",
        "(atomicCAS(error_5, 0ull, 1ull), true)",
        "ids",
    ),
    Mutant(
        "a thread's row beside the block's shared row",
        "cross_entropy",
        "    rows[threadIdx.x] = row;",
        "    rows[0] = row;",
    ),
    Mutant(
        "rows of logits in 32 bits: ce_rows",
        "cross_entropy",
        "shuffles\n  const T* logits = p.logits_nc + (exists ? n : 0) * p.stride;",
        "shuffles\n  const T* logits = p.logits_nc + (int)((exists ? n : 0) * p.stride);",
        "far",
    ),
    Mutant(
        "rows of logits in 32 bits: ce_backward",
        "cross_entropy",
        "rows[r];\n  const T* logits = p.logits_nc + (exists ? n : 0) * p.stride;",
        "rows[r];\n  const T* logits = p.logits_nc + (int)((exists ? n : 0) * p.stride);",
        "far",
    ),
    Mutant(
        "rows of logits in 32 bits: ce_partial",
        "cross_entropy",
        "p.logits_nc + n * p.stride;",
        "p.logits_nc + (int)(n * p.stride);",
        "far",
    ),
    Mutant(
        "rows of gradients in 32 bits: ce_rows",
        "cross_entropy",
        "grad_nc + n * grad_stride);",
        "grad_nc + (int)(n * grad_stride));",
        "far",
    ),
    Mutant(
        "rows of logits in 32 bits: ce_cluster",
        "clusters",
        "p.logits_nc + n * p.stride,",
        "p.logits_nc + (int)(n * p.stride),",
        "far",
    ),
    Mutant(
        "rows of gradients in 32 bits: ce_cluster",
        "clusters",
        "grad_nc + n * grad_stride);",
        "grad_nc + (int)(n * grad_stride));",
        "far",
    ),
    Mutant(
        "rows of gradients in 32 bits: ce_backward",
        "cross_entropy",
        "grad_nc + (exists ? n : 0) * grad_stride;",
        "grad_nc + (int)((exists ? n : 0) * grad_stride);",
        "far",
    ),
    Mutant(
        "rows of probabilities in 32 bits",
        "problem",
        "n * p.probs_row * bytes;",
        "(int)(n * p.probs_row * bytes);",
        "far",
    ),
    Mutant(
        "columns of probabilities in 32 bits",
        "problem",
        "load(row + (at.c + i) * column)",
        "load(row + (int)((at.c + i) * column))",
        "far",
    ),
    Mutant(
        "factors of rows in 32 bits: a warp",
        "cross_entropy",
        "if (grad_nc) {\n        row.scale = load(row_scale_n + n * scale_stride);",
        "if (grad_nc) {\n        row.scale = load(row_scale_n + (int)(n * scale_stride));",
        "far",
    ),
    Mutant(
        "factors of rows in 32 bits: a block",
        "cross_entropy",
        "(KEEP && grad_nc) {\n        row.scale = load(row_scale_n + n * scale_stride);",
        "(KEEP && grad_nc) {\n        row.scale = load(row_scale_n + (int)(n * scale_stride));",
        "far",
    ),
    Mutant(
        "factors of rows in 32 bits: ce_backward",
        "cross_entropy",
        "row.scale = load(row_scale_n + n * scale_stride);\n    const int pack",
        "row.scale = load(row_scale_n + (int)(n * scale_stride));\n    const int pack",
        "far",
    ),
    Mutant(
        "class ids in 32 bits: prepare_ids",
        "class_ids",
        "ids_in + n * ids_stride",
        "ids_in + (int)(n * ids_stride)",
        "far",
    ),
    Mutant(
        "class ids in 32 bits: finish_ids",
        "class_ids",
        "ids_in + bad * ids_stride",
        "ids_in + (int)(bad * ids_stride)",
        "far",
    ),
    Mutant("rows of y in 32 bits", "affine", "y_nk + n * stride", "y_nk + (int)(n * stride)", "far"),
    Mutant("rows of dy in 32 bits", "affine", "dy_nk + n * stride", "dy_nk + (int)(n * stride)", "far"),
    Mutant("db in 32 bits", "affine", "db_k + k * stride", "db_k + (int)(k * stride)", "far"),
    Mutant(
        "entropy where a rescaled sum is 0 · −∞",
        "sums",
        "factor == 0 ? factor : factor *",
        "factor *",
        "edges",
    ),
    Mutant(
        "a row of −∞ has sums of NaN",
        "sums",
        "const A from = sums.max == -infinity<A>() ? (A)0 : sums.max;",
        "const A from = sums.max;",
        "edges",
    ),
    Mutant(
        "entropy of a class without probability",
        "sums",
        "if (Wanted<KIND>::stats && e != 0) sums.entropy",
        "if (Wanted<KIND>::stats) sums.entropy",
        "edges",
    ),
    Mutant("argmax is the last of equals", "sums", "(z == than && c < at)", "(z == than && c > at)", "edges"),
    Mutant(
        "float16 saturates",
        "packs",
        "__floats2half2_rn((float)g[i], (float)g[i + 1])",
        "__floats2half2_rn((float)g[i], (float)g[i + 1] > 65504 ? 65504.0f : (float)g[i + 1])",
        "top",
    ),
    Mutant(
        "bfloat16 saturates",
        "packs",
        "__floats2bfloat162_rn((float)g[i], (float)g[i + 1])",
        "__floats2bfloat162_rn((float)g[i], (float)g[i + 1] > 3.38e38f ? 3.38e38f : (float)g[i + 1])",
        "top",
    ),
    Mutant(
        "the record is claimed by a look and a write",
        "class_ids",
        "atomicCAS(error_5, 0ull, 1ull) == 0ull",
        "load(error_5) == 0ull && (store(error_5, 1ull), true)",
        "race",
    ),
    Mutant(
        "contraction is allowed",
        "swl.backends.cupy.compilation",
        '("-std=c++17", "-fmad=false")',
        '("-std=c++17",)',
        "options",
    ),
    Mutant(
        "factors of rows taken as dense",
        "swl.backends.cupy.cross_entropy",
        "row_scale.strides[0] // row_scale.itemsize",
        "1",
        "far",
    ),
    Mutant(
        "ids taken as dense: prepare_ids",
        "swl.backends.cupy.cross_entropy",
        "i64(ids.strides[0] // ids.itemsize)",
        "i64(1)",
        "strides",
    ),
    Mutant("db taken as dense", "swl.backends.cupy.affine", "i64(out.strides[0] // out.itemsize)", "i64(1)", "far"),
    Mutant(
        "probabilities taken as dense",
        "swl.backends.cupy.cross_entropy",
        "row, column = (s // probs.itemsize for s in probs.strides)",
        "row, column = probs.shape[1], 1",
        "strides",
    ),
    Mutant(
        "a bias taken as dense",
        "swl.backends.cupy.affine",
        "self.xp.ascontiguousarray(b), i64(N)",
        "b, i64(N)",
        "strides",
    ),
    Mutant(
        "logits taken as dense",
        "swl.backends.cupy.cross_entropy",
        "logits if rows_are_dense(logits) else xp.ascontiguousarray(logits)",
        "logits",
        "strides",
        0,
    ),
    Mutant(
        "gradients taken as dense",
        "swl.backends.cupy.cross_entropy",
        "dense_out = out if rows_are_dense(out) else self.empty(out.shape, out.dtype)",
        "dense_out = out",
        "strides",
    ),
    Mutant(
        "as many blocks as rows in grid.y",
        "swl.backends.cupy.affine",
        "min(N, 16 * self._device(out).limits.processors)",
        "N",
        "limits",
    ),
    Mutant(
        "as many stripes as it takes in grid.y",
        "swl.backends.cupy.affine",
        "stripes = min(max(1, min(-(-4 * device.limits.processors // across), N // 64)), 65535)",
        "stripes = max(1, N // 64)",
        "limits",
    ),
    Mutant(
        "a new record is not waited for",
        "swl.backends.cupy.launching",
        "            xp.cuda.get_current_stream().synchronize()  # once",
        "            # once",
        "order",
    ),
    Mutant(
        "a check waits for no other stream",
        "swl.backends.cupy.backend",
        "                on.synchronize()\n                found",
        "                found",
        "order",
    ),
    Mutant(
        "an emptied record is not waited for",
        "swl.backends.cupy.backend",
        "device.error.fill(0)\n                    on.synchronize()",
        "device.error.fill(0)",
        "order",
    ),
    Mutant(
        "a record is never emptied",
        "swl.backends.cupy.backend",
        "                    device.error.fill(0)\n",
        "",
        "order",
    ),
    Mutant(
        "ids of uint64 wrap around",
        "swl.backends.cupy.cross_entropy",
        "if ids.dtype == np.uint64:",
        "if False:",
        "ends",
    ),
    Mutant(
        "ids of int32 are taken for int64",
        "swl.backends.cupy.compilation",
        'INDEX = {"int32": "int",',
        'INDEX = {"int32": "long long",',
        "ids",
    ),
    Mutant(
        "no scope",
        "swl.backends.cupy.backend",
        "        return here if stream is None else _on(here, self._stream(stream, here))",
        "        return _on(self.xp.cuda.Device(), self.xp.cuda.get_current_stream())",
        "devices",
    ),
    Mutant(
        "no device guard",
        "swl.backends.cupy.backend",
        "here = self.xp.cuda.Device() if found is None else found[1]",
        "here = self.xp.cuda.Device()",
        "devices",
    ),
    Mutant(
        "the stream that is given is not used",
        "swl.backends.cupy.backend",
        "here if stream is None else",
        "here if True else",
        "devices",
    ),
    Mutant(
        "the stream is entered on the device that is current",
        "swl.backends.cupy.backend",
        "    with device, stream:",
        "    with stream:",
        "devices",
    ),
    Mutant(
        "a stream of another device is taken",
        "swl.backends.cupy.backend",
        "if stream.device_id not in (-1, device.id):",
        "if False:",
        "devices",
    ),
    Mutant(
        "arrays on two devices are taken", "swl.backends.cupy.backend", "device.id != found[1].id", "False", "devices"
    ),
    Mutant(
        "an interface's array is copied to the current device",
        "swl.backends.cupy.backend",
        "with self._device_of(x):  #",
        "if True:  #",
        "graphs",
    ),
    Mutant(
        "an object's stream is not waited for",
        "swl.backends.cupy.backend",
        "here.wait_event(xp.cuda.Stream.from_external(x).record())",
        "pass",
        "graphs",
    ),
    Mutant(
        "the host waits for an object's stream",
        "swl.backends.cupy.backend",
        '.pop("stream", None)',
        '.get("stream", None)',
        "graphs",
    ),
    Mutant(
        "dtypes are converted on the current device",
        "swl.backends.cupy.backend",
        "        with x.device:\n            return x.astype(dtype)",
        "        return x.astype(dtype)",
        "devices",
    ),
    Mutant(
        "a wait within a sweep",
        "swl.backends.cupy.cross_entropy",
        "        rows, outputs = self._rows(logits, stats)\n        N, C",
        "        rows, outputs = self._rows(logits, stats)\n        xp.cuda.Device().synchronize()\n        N, C",
        "graphs",
    ),
    Mutant(
        "a copy from the host within a sweep",
        "swl.backends.cupy.cross_entropy",
        "        rows, outputs = self._rows(logits, stats)\n        N, C",
        "        rows, outputs = self._rows(logits, stats)\n        xp.array([0.0, 1.0])\n        N, C",
        "graphs",
    ),
    Mutant(
        "a product that cannot be captured",
        "swl.backends.cupy.affine",
        "except NotImplementedError:",
        "except ZeroDivisionError:",
        "graphs",
    ),
    Mutant(
        "a captured product goes to the default stream",
        "swl.backends.cupy.products",
        "(handle, stream))",
        "(handle, 0))",
        "graphs",
    ),
    Mutant(
        "parts of 16-bit products are added in 16 bits",
        "swl.backends.cupy.affine",
        "cublas.setMathMode(handle, mode | _DISALLOW_REDUCED_PRECISION_REDUCTION)",
        "pass",
        "products",
    ),
    Mutant(
        "the math mode is not given back",
        "swl.backends.cupy.affine",
        "            cublas.setMathMode(handle, mode)\n",
        "            pass\n",
        "products",
    ),
    Mutant(
        "TF32 for whoever did not ask for it",
        "swl.backends.cupy.affine",
        "asked = dtype == np.float32 and self.xp._core.get_compute_type(dtype) == _CUPY_TF32",
        "asked = True",
        "products",
    ),
    Mutant("products overwrite the bias", "swl.backends.cupy.affine", "one if add else zero", "zero", "affine_all"),
    Mutant(
        "a struct's fields in each other's place",
        "swl.backends.cupy.structs",
        '"hot": "A",\n        "rest": "A",',
        '"rest": "A",\n        "hot": "A",',
        "sweep",
    ),
    Mutant(
        "no room for staged rows is asked for",
        "swl.backends.cupy.launching",
        "found.max_dynamic_shared_size_bytes = device.limits.shared",
        "pass",
        "traffic",
    ),
    Mutant(
        "shared memory for one row of a block",
        "swl.backends.cupy.cross_entropy",
        "shared=ROW_BYTES * (256 // lanes)",
        "shared=ROW_BYTES",
        "sweep",
    ),
    Mutant(
        "16-byte loads of columns wherever they lie",
        "swl.backends.cupy.affine",
        "        if x.data.ptr % 16 or (N > 1 and x.strides[0] % 16):\n            V = 1\n",
        "",
        "affine",
    ),
    Mutant("state is read on the current device's stream", "swl.ops.arrays", "with x.device:", "if True:", "graphs"),
    Mutant(
        "tensors are not worked on on torch's stream",
        "swl.torch._bridge",
        "self.backend.scope(stream)",
        "self.backend.scope()",
        "devices",
    ),
)


IDLE = "with backend.scope(gamma=gamma, beta=beta):"
"""Does no work on the arrays of a device, and what it refuses is refused without it."""


def _scopes() -> Iterator[Mutant]:
    """Every entry into `Backend.scope` in turn left out, and every stream that is handed to it."""
    for file in sorted((ROOT / "swl" / "ops").glob("*.py")) + sorted((ROOT / "swl" / "nn").glob("*.py")):
        module, text = ".".join(file.relative_to(ROOT).with_suffix("").parts), file.read_text(encoding="utf-8")
        lines = re.findall(r"^ +with (?:\S+\.)?_?scope\(.*\):$", text, re.M)
        for line in dict.fromkeys(line for line in lines if line.strip() != IDLE):
            entered = re.sub("with .*", "if True:", line)
            for place in range(lines.count(line)):
                what = f"{line.strip().removesuffix(':')}, place {place + 1}"
                yield Mutant(f"no {what}", module, line, entered, "devices", place)
                if "(stream, " in line:
                    yield Mutant(
                        f"no stream {what}", module, line, line.replace("(stream, ", "(None, "), "devices", place
                    )


MUTANTS = (*BY_HAND, *_scopes())


class _Broken(importlib.machinery.SourceFileLoader):
    """Loads a module with a piece of its text replaced."""

    def __init__(self, mutant: Mutant, file: str) -> None:
        super().__init__(mutant.file, file)
        self.mutant = mutant

    def path_stats(self, path: Any) -> Any:
        raise OSError("its bytecode is not to be kept")

    def source_to_code(self, data: Any, path: Any, **more: Any) -> Any:
        return super().source_to_code(self.mutant.replaced(data.decode()).encode(), path, **more)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.mutant.file:
            return None
        file = str(ROOT / name.replace(".", "/")) + ".py"
        return importlib.util.spec_from_file_location(name, file, loader=_Broken(self.mutant, file))


class _Killer:
    """Notes the first test that fails, and what it says."""

    said = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.said:
            test = report.nodeid.split("::")[-1].split("[")[0].removeprefix("test_").replace("_", " ")
            crash = getattr(report.longrepr, "reprcrash", None)
            words = crash.message if crash else str(report.longrepr)
            self.said = f"{test}: {' '.join(words.removeprefix('AssertionError: ').split())[:60]}"


def verdict(mutant: Mutant) -> str:
    """Return the test that kills a mutant and what it says, or an empty string if it survives."""
    if mutant.file not in KERNELS:
        sys.meta_path.insert(0, _Finder(mutant))
    backend = importlib.import_module("swl.backends.cupy.backend")
    if mutant.file in KERNELS:
        compilation = importlib.import_module("swl.backends.cupy.compilation")
        original = compilation.read
        compilation.read = lambda file: (
            mutant.replaced(original(file)) if file.startswith(f"{mutant.file}.") else original(file)
        )
    killer = _Killer()
    file, *words = shlex.split(TESTS[mutant.tests])
    command = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", str(ROOT / "tests" / "cuda" / file), *words]
    os.environ["PYTEST_ADDOPTS"] = ""  # other processes of pytest would test what is not broken
    status = pytest.main(command, plugins=[killer])
    if status not in (0, 1):
        raise RuntimeError(f"pytest ended with {status}")
    return killer.said or (_races(backend) if mutant.file in KERNELS and mutant.tests == "sweep" else "")


def _races(backend: Any) -> str:
    """Return what ThreadSanitizer says of the float32 kernels."""
    import branches
    import fake
    import recording

    with recording.recording() as made:
        for case in branches.cases(branches.DTYPES[:1]):
            with branches.small_device(case.processors, case.shared, case.clusters):
                branches.run(case, backend.CupyBackend(fake.cupy()))
    for names, source in made.sources.items():
        complaint = recording.replay(source, names, made.records[names], recording.THREAD)
        if complaint:
            return f"ThreadSanitizer: {' '.join(complaint.split())[:60]}"
    return ""


def _in_a_process(mutant: Mutant) -> str:
    """Judge a mutant in a process of its own: it may write anywhere."""
    parent, child = multiprocessing.get_context("fork").Pipe(duplex=False)

    def judge() -> None:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
            try:
                child.send(verdict(mutant))
            except Exception as error:
                child.send(f"error: {error!r}")

    process = multiprocessing.get_context("fork").Process(target=judge)
    process.start()
    child.close()
    try:
        said = parent.recv() if parent.poll(300) else "error: no end"
    except EOFError:
        process.join()
        said = f"crash: signal {-process.exitcode}" if process.exitcode < 0 else f"error: exit {process.exitcode}"
    process.kill()
    process.join()
    return said


def main(chosen: list[int], tests_pass: bool) -> int:
    """Print the table; return the number of survivors."""
    if reason := fakecuda.install() or fakecuda.missing():
        sys.exit(reason)
    importlib.import_module("cupy")
    numbers = chosen or list(range(len(MUTANTS)))
    with multiprocessing.pool.ThreadPool(2) as pool:
        intact = [Mutant("", "swl.errors", "", "", tests) for tests in {MUTANTS[i].tests for i in numbers}]
        if not tests_pass and any(said := pool.map(_in_a_process, intact, chunksize=1)):
            sys.exit(f"without a mutant, too: {said}")
        verdicts = pool.map(_in_a_process, [MUTANTS[i] for i in numbers], chunksize=1)
    print("| # | mutant | in | killed by |\n|---|---|---|---|")
    survivors = 0
    for number, said in zip(numbers, verdicts, strict=True):
        mutant = MUTANTS[number]
        survivors += not said or said.startswith("error")
        print(f"| {number} | {mutant.what} | {mutant.file} | {(said or 'SURVIVES').replace('|', '/')} |")
    print(f"\n{len(numbers) - survivors} of {len(numbers)} killed")
    return survivors


if __name__ == "__main__":
    sys.exit(main([int(a) for a in sys.argv[1:] if a.isdigit()], "--tests-pass" in sys.argv) != 0)
