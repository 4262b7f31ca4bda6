"""The kernels' sources, their instances by module, and the options that they are compiled with."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from swl.backends.cupy.plans import KEEP_BLOCK, KEEP_WARP
from swl.backends.cupy.structs import PROBLEM, ROWS_OUT

__all__ = ["C_NAME", "INDEX", "KINDS", "OPTIONS", "SIZE", "instances", "module_source", "read", "source"]


def read(file: str) -> str:
    """Give a file of ``kernels/``."""
    installed, checkout = files("swl") / "kernels", Path(__file__).parents[3] / "kernels"
    return ((installed if installed.is_dir() else checkout) / file).read_text(encoding="utf-8")


def source(name: str) -> str:
    """Give ``kernels/<name>.cu`` with its headers in it: CuPy's disk cache knows a kernel by its text alone."""
    text, header = read(f"{name}.cu"), re.compile(r'^#include "(.+)"$', re.M)
    while found := header.search(text):
        text = text[: found.start()] + read(found[1]) + text[found.end() :]
    return text


def module_source(group: tuple[str, ...]) -> str:
    """Give the source of a module of `instances`: the file, and the checks of the structs that its kernels take."""
    file, *more = group
    return source(file) + "".join(s.check(more[0]) for s in (PROBLEM, ROWS_OUT) if file == "cross_entropy")


OPTIONS = ("-std=c++17", "-fmad=false")
"""Compiler options. No contraction of a·b + c: which ones are contracted differs between kernels of the same code, and
forward, backward and the fused sweep must agree to the bit. CuPy adds ``-ftz=true``: float32 results below the normal numbers
become 0.
"""

# C's name of a dtype
C_NAME = {"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}
SIZE = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}  # bytes
_NARROWER = {"float": ("__half", "__nv_bfloat16")}  # types of gradients, other than their own, that logits may have
KINDS = ("PLAIN", "OPTIONS", "PROBS")  # Kind of problem.cuh; float64 has no PLAIN: its exponentials take many registers
INDEX = {"int32": "int", "int64": "long long"}


def instances() -> dict[tuple[str, ...], tuple[str, ...]]:
    """List every kernel instance that the backend launches, by module: its file, and what tells it from others."""
    groups: dict[tuple[str, ...], tuple[str, ...]] = {}
    for T, size in SIZE.items():
        wide = 16 // size
        for kind in KINDS[T == "double" :]:
            groups["cross_entropy", T, kind] = (
                f"ce_rows<{T}, {kind}, 8, 1, 4>",
                f"ce_rows<{T}, {kind}, 32, {wide}, {KEEP_WARP}>",
                f"ce_rows<{T}, {kind}, 0, {wide}, {KEEP_BLOCK}>",
                f"ce_rows<{T}, {kind}, 0, {wide}, 0>",
                f"ce_partial<{T}, {kind}, {wide}>",
                f"ce_combine<{T}, {kind}>",
                f"ce_backward<{T}, {kind}, 1>",
                f"ce_backward<{T}, {kind}, {wide}>",
            )
            for G in _NARROWER.get(T, ()):  # gradients of a fused head, for products of 16-bit operands
                groups["cross_entropy", T, kind, G] = (
                    f"ce_rows<{T}, {kind}, 8, 1, 4, {G}>",
                    f"ce_rows<{T}, {kind}, 32, {wide}, {KEEP_WARP}, {G}>",
                    f"ce_rows<{T}, {kind}, 0, {wide}, {KEEP_BLOCK}, {G}>",
                    f"ce_backward<{T}, {kind}, 1, {G}>",
                    f"ce_backward<{T}, {kind}, {wide}, {G}>",
                )
        groups["affine", T] = (
            *(f"fill_rows<{T}, {B}>" for B in SIZE),
            f"column_sums<{T}, 1>",
            f"column_sums<{T}, {wide}>",
            f"column_totals<float, {T}>",
            f"column_totals<double, {T}>",
        )
    groups[("class_ids",)] = tuple(
        name
        for index in INDEX.values()
        for name in (f"prepare_ids<{index}, float>", f"prepare_ids<{index}, double>", f"finish_ids<{index}>")
    )
    return groups
