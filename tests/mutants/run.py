"""Break the CPU kernels, a line at a time, and show that the suite sees it: ``python tests/mutants/run.py [NAME...]``.

Every mutant is a copy of the package in a folder of its own, with its own Numba cache, in which one line is replaced;
then the tests that should notice run over the `numba` backend. A line that is not found exactly once is an error, and
so is a selection of tests that fails without the mutation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "swl/backends/numba/kernels.py"
ROWS = "swl/backends/numba/rows.py"
FEW = "swl/backends/numba/few_classes.py"
VIEWS = "swl/backends/numba/simd/views.py"
CONVERSIONS = "swl/backends/numba/simd/conversions.py"
GEMM = "swl/backends/numba/gemm.py"
TILE = "swl/backends/numba/gemm_tile.py"
PRODUCTS = "swl/backends/numba/products.py"


class Mutant(NamedTuple):
    name: str
    file: str
    line: str  # as it stands in the file, without indentation
    instead: str
    tests: str  # files and `-k` words, separated by a colon


MUTANTS = [
    Mutant(
        "wrong maximum: the last vector's only",
        ROWS,
        "return maximum(top, z), total, dots, masses",
        "return maximum(splat(low), z), total, dots, masses",
        "test_cross_entropy.py:one_huge_logit",
    ),
    Mutant(
        "missing rescale of the running sum",
        ROWS,
        "s *= exp_of(M - new)",
        "s *= scalar(zero, 1)",
        "test_cross_entropy.py:longer_than_any_block and float32 and 16385 and ids",
    ),
    Mutant(
        "missing shift of the running dot product",
        ROWS,
        "d += A * (M - new)",
        "d += zero",
        "test_cross_entropy.py:longer_than_any_block and float32 and 16385 and probabilities",
    ),
    Mutant(
        "tail off by one: its last class is not summed",
        ROWS,
        "sums = _add_up(row, extras, full, stop, low, splat(base), exps, sums)",
        "sums = _add_up(row, extras, full, stop - 1, low, splat(base), exps, sums)",
        "test_laws.py:exactly_log_c and float32",
    ),
    Mutant(
        "tail off by one: its last gradient is not written",
        ROWS,
        "store_tail(out, full, stop - full, g)",
        "store_tail(out, full, stop - full - 1, g)",
        "test_laws.py:exactly_log_c and float32",
    ),
    Mutant(
        "ignored row counted by the sweep",
        KERNELS,
        "counts = ids[n] != IGNORED",
        "counts = ids[n] != IGNORED - 1",
        "test_laws.py:ignored_row_counts_for_nothing and float32",
    ),
    Mutant(
        "ignored row counted by the mean",
        KERNELS,
        "clean[n] = IGNORED",
        "clean[n], count = IGNORED, count + 1",
        "test_laws.py:mean_divides_by_the_weights or micro_batches",
    ),
    Mutant(
        "smoothing mass left out of A",
        KERNELS,
        "A = scalar(zero, rest * C + (hot if hit >= 0 else 0.0))  # exactly 1 over all classes",
        "A = scalar(zero, hot if hit >= 0 else 0.0)",
        "test_cross_entropy.py:longer_than_any_block and float32 and 8191 and ids",
    ),
    Mutant(
        "smoothing mass spread without the class weights",
        ROWS,
        "y = y * _at(extras.weight, j, stop, zero)",
        "y = y * splat(scalar(zero, 1))",
        "test_laws.py:smoothing_mass",
    ),
    Mutant(
        "weight left out of the denominator",
        KERNELS,
        "m = weight[t] if weight.size else 1.0",
        "m = 1.0",
        "test_laws.py:smoothing_mass or mean_divides_by_the_weights",
    ),
    Mutant(
        "dout dropped",
        KERNELS,
        "scale = row_scale[n * scale_step]",
        "scale = scalar(zero, 1)",
        "test_cpu_kernels.py:few_classes",
    ),
    Mutant(
        "dout of the first row for all",
        KERNELS,
        "scale_step = 1 if row_scale.size > 1 else 0",
        "scale_step = 0",
        "test_cpu_kernels.py:few_classes",
    ),
    Mutant(
        "softcap without its slope",
        ROWS,
        "g = g * _slope(_raw_at(row, extras, j, stop, low), extras)",
        "g = g * splat(scalar(low, 1))",
        "test_shards.py:a_bias_is_added and float32",
    ),
    Mutant(
        "the softcap's slope with the rounding of its quotient",
        ROWS,
        "e = e - zero_where_zero(e, e * (missing * splat(scalar(k, 2) / k)))  # at |r| = ∞ the product is NaN, and e is 0",
        "e = e - zero * missing",
        "test_laws.py:keeps_its_digits",
    ),
    Mutant(
        "z-loss added to A before y is taken away",
        ROWS,
        "g = fma(z, e, fma(mass, e, minus_y)) * scale",
        "g = fma(mass + z, e, minus_y) * scale",
        "test_laws.py:one_class_is_right",
    ),
    Mutant(
        "few classes: z-loss added to A before y is taken away",
        FEW,
        "return ((mass * p - y_hit) + z * p) * item(room, SCALE * step + i)",
        "return ((mass + z) * p - y_hit) * item(room, SCALE * step + i)",
        "test_laws.py:one_class_is_right",
    ),
    Mutant(
        "z-loss without its factor 2",
        KERNELS,
        "return scalar(lam, 2) * lam * m * (M + S) if lam > 0 else scalar(lam, 0)",
        "return lam * m * (M + S) if lam > 0 else scalar(lam, 0)",
        "test_laws.py:z_loss_by_hand",
    ),
    Mutant(
        "a masked class poisons the dot product",
        ROWS,
        "dots = dots + zero_where_zero(y, y * u)",
        "dots = dots + y * u",
        "test_laws.py:masked_class_without_target_mass and float32-probabilities",
    ),
    Mutant(
        "a block of masked classes gives NaN",
        ROWS,
        "base = zero  # −inf only adds exp(−inf) = 0",
        "base = low",
        "test_laws.py:a_whole_block_of_masks",
    ),
    Mutant(
        "the factor of the first block for all",
        ROWS,
        "k = factor_of(item(factors, start // BLOCK), pull)",
        "k = factor_of(item(factors, 0), pull)",
        "test_cross_entropy.py:longer_than_any_block and float32 and 16385 and ids",
    ),
    Mutant(
        "row offsets of 32 bits",
        VIEWS,
        "return _row(context, builder, array_type.dtype, builder.gep(view.data, [builder.mul(index, shape[-1])]), shape[-1])",
        "return _row(context, builder, array_type.dtype, builder.gep(view.data, [builder.zext(builder.trunc("
        "builder.mul(index, shape[-1]), type(I64)(32)), I64)]), shape[-1])",
        "test_cpu_kernels.py:offsets_past",
    ),
    Mutant(
        "class ids counted from 0 in every shard",
        KERNELS,
        "hit = ids[n] - first_class",
        "hit = ids[n]",
        "test_shards.py:combine_to_the_whole",
    ),
    Mutant(
        "negative class ids let through",
        KERNELS,
        "elif 0 <= t < n_classes:",
        "elif t < n_classes:",
        "test_bad_input.py:a_class_id_out_of_range and int64",
    ),
    Mutant(
        "entropy with the wrong sign",
        KERNELS,
        "rows[ENTROPY, n], rows[LOG_PROB, n] = S - expected, dot - mass * S if mass != 0 else zero",
        "rows[ENTROPY, n], rows[LOG_PROB, n] = S + expected, dot - mass * S if mass != 0 else zero",
        "test_cross_entropy.py:longer_than_any_block and float32 and 8191 and ids",
    ),
    Mutant(
        "a block far above the running maximum is not summed again",
        ROWS,
        "if new > base + scalar(low, SLACK):",
        "if new > base + scalar(low, 1e30):",
        "test_cpu_kernels.py:maximum_may_stand_anywhere",
    ),
    Mutant(
        "a block's sum keeps the base it was summed relative to",
        ROWS,
        "total *= exp_of(base - M)",
        "total *= scalar(zero, 1)",
        "test_cpu_kernels.py:maximum_may_stand_anywhere",
    ),
    Mutant(
        "a block's dot product keeps the base it was summed relative to",
        ROWS,
        "dot += mass * (base - M)",
        "dot += zero",
        "test_cpu_kernels.py:maximum_may_stand_anywhere",
    ),
    Mutant(
        "few classes: the last one is left out of the maximum and the sum",
        FEW,
        "z = gather(group, c, C, count, low)",
        "z = gather(group, min(c, max(C - 2, 0)), C, count, low)",
        "test_cpu_kernels.py:few_classes",
    ),
    Mutant(
        "few classes: the last row of a vector is not written",
        FEW,
        "scatter(group, j, C, count, product_from(load(room, (EXPS + j) * step, low), c, least))",
        "scatter(group, j, C, count - 1, product_from(load(room, (EXPS + j) * step, low), c, least))",
        "test_cpu_kernels.py:few_classes",
    ),
    Mutant(
        "few classes: an ignored row gets a gradient",
        KERNELS,
        "if ids[n] == IGNORED:",
        "if ids[n] == IGNORED - 1:",
        "test_cpu_kernels.py:few_classes",
    ),
    Mutant(
        "few classes: dout of the first row for all",
        KERNELS,
        "set_item(room, SCALE * step + i, row_scale[n * per_row])",
        "set_item(room, SCALE * step + i, row_scale[0])",
        "test_cpu_kernels.py:few_classes",
    ),
    Mutant(
        "the small way divides by all rows",
        KERNELS,
        "scale[0] = 1.0 / count if count > 0 else 0.0",
        "scale[0] = 1.0 / N",
        "test_cpu_kernels.py:small_way",
    ),
    Mutant(
        "few classes: too little scratch is asked for",
        FEW,
        "return step * (EXPS + 2 * C)",
        "return step * (EXPS + 2 * C - 1)",
        "test_scratch.py:beside",
    ),
    Mutant(
        "a kernel's scratch is its own",
        KERNELS,
        "rows, loss = carray(address_in(room, at_rows), (5, N), room.dtype), carray(address_in(room, at_rows), N, room.dtype)",
        "rows = np.empty((5, N), room.dtype); loss = rows[0]",
        "test_scratch.py:allocate_nothing",
    ),
    Mutant(
        "product: the first part of the inner axis adds to what was there",
        GEMM,
        "adds = add or k0 > 0",
        "adds = True",
        "test_products.py:wherever_they_lie",
    ),
    Mutant(
        "product: the last steps of the inner axis are left out",
        GEMM,
        "steps = ((deep + unit - 1) // unit + UNROLL - 1) // UNROLL * UNROLL",
        "steps = max(UNROLL, (deep + unit - 1) // unit // UNROLL * UNROLL)",
        "test_products.py:wherever_they_lie",
    ),
    Mutant(
        "product: the second block of rows is written over the first",
        GEMM,
        "place, step = y + (m0 + r0) * y_rows + n0 * size, y_rows",
        "place, step = y + r0 * y_rows + n0 * size, y_rows",
        "test_products.py:more_rows_than_a_block",
    ),
    Mutant(
        "product: a tile that reaches beyond the result is written whole",
        GEMM,
        "whole = r0 + ROWS <= rows and columns == width and not (ends and k0 == 0)",
        "whole = columns == width and not (ends and k0 == 0)",
        "test_products.py:wherever_they_lie",
    ),
    Mutant(
        "product: lines beyond the matrix are read",
        GEMM,
        "put_step(panel, like, s + j * step, along, k - j * unit if line < n else 0, p + j * width * size)",
        "put_step(panel, like, s + j * step, along, k - j * unit, p + j * width * size)",
        "test_products.py:nothing_beside",
    ),
    Mutant(
        "product: what a square leaves over is not transposed",
        GEMM,
        "for j in range(done if line < full * width else 0, deep):",
        "for j in range(0 if line >= full * width else done, done if line < full * width else deep):",
        "test_products.py:wherever_they_lie",
    ),
    Mutant(
        "product: a tile overwrites where it should add",
        TILE,
        "value = builder.fadd(builder.load(pointer, align=size), sums[r, v]) if adds else sums[r, v]",
        "value = sums[r, v]",
        "test_products.py:long_sums or wherever_they_lie",
    ),
    Mutant(  # where the processor has vcvtneps2bf16; elsewhere nothing runs it
        "bfloat16: subnormal numbers of a vector's second register are rounded to 0",
        CONVERSIONS,
        "found = builder.bitcast(reduce(builder.or_, classes), ir.IntType(REGISTER))",
        "found = builder.bitcast(classes[0], ir.IntType(REGISTER))",
        "test_processors.py:nearest_bfloat16",
    ),
    Mutant(
        "the least exponential with a normal gradient is not raised by its own rounding",
        ROWS,
        "tiny = scalar(k, np.finfo(k).tiny * (1 + 2 * np.finfo(k).eps))",
        "tiny = scalar(k, np.finfo(k).tiny)",
        "test_cpu_kernels.py:no_subnormal_gradient",
    ),
    Mutant(
        "product: of a pair that is cut off at the end of the inner axis the second number is read",
        TILE,
        'with builder.if_then(builder.icmp_signed(">", here, _I64(1))):',
        'with builder.if_then(builder.icmp_signed(">", here, _I64(0))):',
        "test_products.py:wherever_they_lie or nothing_beside",
    ),
    Mutant(
        "product: a result of 16 bit is rounded without its earlier parts",
        GEMM,
        "to, to_step = place, step",
        "to, to_step = edge, width * size",
        "test_products.py:rounded_once",
    ),
    Mutant(
        "product: parts share a column",
        PRODUCTS,
        "begin, end = (total * edge // parts // unit * unit for edge in (i, i + 1))",
        "begin, end = total * i // parts // unit * unit, total * (i + 1) // parts // unit * unit + 1",
        "test_products.py:all_sizes",
    ),
    Mutant(
        "product: 16-bit results are not added to what is there",
        PRODUCTS,
        "y += _acc(here)",
        "y += 0 * _acc(here)",
        "test_products.py:all_sizes",
    ),
]


def replace(file: Path, line: str, instead: str) -> None:
    """Replace the one line that reads `line`, keeping its indentation."""
    lines = file.read_text().splitlines()
    found = [i for i, text in enumerate(lines) if text.strip() == line]
    if len(found) != 1:
        raise SystemExit(f"{file.name} has {len(found)} lines that read {line!r}; bring the list of mutants up to date")
    text = lines[found[0]]
    lines[found[0]] = text[: len(text) - len(text.lstrip())] + instead
    file.write_text("\n".join(lines) + "\n")


def copy_package(source: Path, folder: Path) -> None:
    """Copy what the tests of the CPU kernels need."""
    leave_out = shutil.ignore_patterns("__pycache__", "cuda", "mutants")
    for name in ("swl", "kernels", "tests"):
        shutil.copytree(source / name, folder / name, ignore=leave_out)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(source / name, folder)


def run(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """Run a selection of tests in a copy of the package."""
    file, _, words = tests.partition(":")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, f"tests/{file}", "-k", f"({words}) and not (numpy or cupy)"],
        cwd=folder,
        env={
            **os.environ,
            **{"NUMBA_CACHE_DIR": str(folder / "numba"), "PYTHONPATH": str(folder), "CI": "true", "PYTEST_ADDOPTS": ""},
        },
        capture_output=True,
        text=True,
        check=False,
    )


def check_selections(original: Path, mutants: list[Mutant]) -> None:
    """Hold every mutant's line to be there, and every selection of tests to pass on the kernels as they are."""
    for mutant in mutants:
        file = original / mutant.file
        text = file.read_text()
        replace(file, mutant.line, mutant.instead)
        file.write_text(text)
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        result = run(original, tests)
        if result.returncode:
            raise SystemExit(f"{tests} fails without a mutation:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")


def survives(original: Path, mutant: Mutant) -> bool:
    """Tell whether the tests pass on the mutant; a crash is a way of failing."""
    with tempfile.TemporaryDirectory() as name:
        copy_package(original, Path(name))
        replace(Path(name) / mutant.file, mutant.line, mutant.instead)
        result = run(Path(name), mutant.tests)
    broken = [word for word in ("TypingError", "LoweringError", "NameError", "SyntaxError") if word in result.stdout]
    if result.returncode > 1 or broken:
        raise SystemExit(f"the mutant {mutant} does not run:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    return result.returncode == 0


def main(names: list[str]) -> int:
    """Run the mutants whose names contain one of `names`, or all; return the number that survive."""
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    if not chosen:
        raise SystemExit(f"no mutant is called {names}")
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        original = Path(name)
        copy_package(ROOT, original)
        check_selections(original, chosen)
        print(f"the tests of {len(chosen)} mutants pass on the kernels as they are", flush=True)
        for mutant in chosen:
            start = time.perf_counter()
            alive = survives(original, mutant)
            survivors += alive
            verdict = "SURVIVES" if alive else "killed"
            print(f"{verdict:8} {time.perf_counter() - start:4.0f} s  {mutant.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
