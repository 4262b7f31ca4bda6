"""Show from the assembly that the inner loops of the kernels are vectors, as wide as the machine's, without any calls.

python bench/assembly.py           # exits with 1 if a loop over vectors calls anything, or if there is none
python bench/assembly.py bfloat16  # those of logits in another dtype
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
import re
import sys
import tempfile
from collections import Counter
from typing import Any, NamedTuple

LABEL = re.compile(r"^(\.LBB\w+):")
JUMP = re.compile(r"^\s+j\w+\s+(\.LBB\w+)")
PACKED = re.compile(r"^\s+v\w+p[sd]\s")  # arithmetic on all lanes, such as vfmadd213ps
ROUNDED = re.compile(r"^\s+vcvt(?:neps2bf16|ps2ph)\s")  # to 16 bit, by one instruction
LIBM = re.compile(r"\$(\w*(?:exp|log|tanh|pow)\w*),")


class Loop(NamedTuple):
    """An innermost loop."""

    instructions: int
    packed: int
    """Of them, arithmetic on vectors."""
    fused: int
    """Of those, multiply-adds."""
    rounded: int
    stores: int
    calls: int


def innermost_loops(assembly: str) -> list[list[str]]:
    """Give the lines of every loop that holds no other: from a label to the jump back to it."""
    lines = assembly.splitlines()
    at = {found[1]: i for i, line in enumerate(lines) if (found := LABEL.match(line))}
    spans = sorted(
        (at[found[1]], i) for i, line in enumerate(lines) if (found := JUMP.match(line)) and at.get(found[1], i) < i
    )
    return [
        lines[a : b + 1]
        for a, b in spans
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)
    ]  # fmt: skip


def describe(lines: list[str], register: str) -> Loop:
    """Count what a loop is made of."""
    instructions = [line for line in lines if re.match(r"^\s+[a-z]", line)]
    packed = [line for line in instructions if PACKED.match(line) and register in line and "mov" not in line.split()[0]]
    stores = [line for line in instructions if re.match(rf"^\s+v?mov\w+\s+%{register}\d+,.*\)", line)]
    calls = [line for line in instructions if re.match(r"^\s+call", line)]
    fused = [line for line in packed if "fmadd" in line or "fmsub" in line or "fnm" in line]
    rounded = [line for line in instructions if ROUNDED.match(line)]
    return Loop(len(instructions), len(packed), len(fused), len(rounded), len(stores), len(calls))


def kernels(dtype: Any) -> dict[str, str]:
    """Compile what a plain loss needs, by calling it, and give the assembly of each kernel."""
    import numpy as np
    from numba.core.dispatcher import Dispatcher

    import swl

    with swl.use_backend("numba"):
        for n, C in ((4, 10_000), (300, 1000)):
            swl.cross_entropy_value_and_grad(np.zeros((n, C), dtype), np.zeros(n, np.int64))
    found: dict[str, str] = {}
    for kernel in gc.get_objects():
        if isinstance(kernel, Dispatcher) and kernel.targetoptions.get("nogil"):  # others are inlined into these
            for number, text in enumerate(kernel.inspect_asm().values()):
                found[f"{kernel.py_func.__name__} {number}"] = text
    return found


def main(dtype: Any) -> int:
    """Print each loop over vectors."""
    if platform.machine() not in ("x86_64", "AMD64"):
        print(f"this reads the assembly of x86-64, not that of {platform.machine()}")
        return 0
    from llvmlite import binding

    features: Any = binding.get_host_cpu_features()
    register = "zmm" if features["avx512f"] else "ymm" if features["avx2"] else "xmm"
    print(f"{binding.get_host_cpu_name()}, widest registers {register}")
    bad = total = 0
    for name, text in kernels(dtype).items():
        loops = [describe(lines, register) for lines in innermost_loops(text)]
        wide = Counter(loop for loop in loops if loop.packed >= loop.instructions / 10)  # others go over rows
        libm = set(LIBM.findall(text))
        bad += sum(loop.calls > 0 for loop in wide.elements()) + len(libm - {"log"})
        total += wide.total()
        print(f"\n{name}: {len(loops)} innermost loops, {wide.total()} of them over vectors; "
              f"of libm, once a row or less: {', '.join(sorted(libm)) or 'nothing'}")  # fmt: skip
        for loop, times in sorted(wide.items(), reverse=True):
            print(f"  {times:2} × {loop.instructions:3} instructions, {loop.packed:2} on {register}, "
                  f"{loop.fused:2} multiply-adds, {loop.rounded:2} roundings, "
                  f"{loop.stores} stores, {loop.calls} calls")  # fmt: skip
    print(f"\n{total} loops over {register}, {bad} calls in them or of other functions of libm")
    return 1 if bad or not total else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder  # kernels that come from disk have no assembly
        name = sys.argv[1] if len(sys.argv) > 1 else "float32"
        sys.exit(main(getattr(importlib.import_module("ml_dtypes"), name) if name == "bfloat16" else name))
