"""The kernels' sources, their instances by module, and the options that they are compiled with."""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from pathlib import Path

from swl.backends.cupy.plans import KEEP_BLOCK, KEEP_WARP
from swl.backends.cupy.structs import PROBLEM, ROWS_OUT

__all__ = [
    "C_NAME",
    "INDEX",
    "KINDS",
    "NARROWER",
    "OPTIONS",
    "SIZE",
    "instances",
    "kind",
    "module_of",
    "module_source",
    "read",
    "source",
]


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
    return source(file) + "".join(
        s.check(more[0]) for s in (PROBLEM, ROWS_OUT) if file in ("cross_entropy", "clusters")
    )


OPTIONS = ("-std=c++17", "-fmad=false")
"""Compiler options. No contraction of a·b + c: which ones are contracted differs between kernels of the same code, and
forward, backward and the fused sweep must agree to the bit. CuPy adds ``-ftz=true``: float32 results below the normal numbers
become 0.
"""

# C's name of a dtype
C_NAME = {"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}
SIZE = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}  # bytes
NARROWER = {"float": ("__half", "__nv_bfloat16")}  # types of gradients, other than their own, that logits may have
KINDS = ("BIAS", "TEMPERATURE", "SOFTCAP", "SMOOTHING", "WEIGHTS", "STATS", "PROBS")  # Kind of problem.cuh, but PLAIN
INDEX = {"int32": "int", "int64": "long long"}


@functools.cache
def kind(*options: str) -> str:
    """Give the template argument of a kernel for these `KINDS` of work at every column."""
    return " + ".join(option for option in KINDS if option in options) or "PLAIN"


def instances(group: tuple[str, ...]) -> tuple[str, ...]:
    """List the kernels of a module: ("cross_entropy" or "clusters", type, kind[, type of gradients]), ("affine", type) or
    ("class_ids",).
    """
    file, T, KIND, G, *_ = *group, "", "", ""
    if file == "class_ids":
        return tuple(
            name
            for index in INDEX.values()
            for name in (f"prepare_ids<{index}, float>", f"prepare_ids<{index}, double>", f"finish_ids<{index}>")
        )
    wide = 16 // SIZE[T]
    if file == "affine":
        return (
            *(f"fill_rows<{T}, {B}>" for B in SIZE),
            f"column_sums<{T}, 1>",
            f"column_sums<{T}, {wide}>",
            f"column_totals<float, {T}>",
            f"column_totals<double, {T}>",
        )
    more = f", {G}" if G else ""
    if file == "clusters":
        both_sweeps = f"ce_cluster<{T}, {KIND}, {wide}, {KEEP_BLOCK}{more}>"
        return (both_sweeps,) if G else (both_sweeps, f"ce_cluster<{T}, {KIND}, {wide}, 0>")
    both = (  # sweeps
        f"ce_rows<{T}, {KIND}, 8, 1, 4{more}>",
        f"ce_rows<{T}, {KIND}, 32, {wide}, {KEEP_WARP}{more}>",
        f"ce_rows<{T}, {KIND}, 0, {wide}, {KEEP_BLOCK}{more}>",
        f"ce_backward<{T}, {KIND}, 1{more}>",
        f"ce_backward<{T}, {KIND}, {wide}{more}>",
    )
    if G:
        return both
    return (
        *both,
        f"ce_rows<{T}, {KIND}, 0, {wide}, 0>",
        f"ce_partial<{T}, {KIND}, {wide}>",
        f"ce_combine<{T}, {KIND}>",
    )


def module_of(name: str) -> tuple[str, ...]:
    """Give the module that a kernel is in: one for each type of logits, kind and type of gradients."""
    kernel, arguments = name.removesuffix(">").split("<")
    T, *more = arguments.split(", ")
    if kernel.startswith("ce_"):
        narrower = more[-1:] if more[-1] in SIZE else []
        return ("clusters" if kernel == "ce_cluster" else "cross_entropy", T, more[0], *narrower)
    if kernel.endswith("_ids"):
        return ("class_ids",)
    return ("affine", more[0] if kernel == "column_totals" else T)
