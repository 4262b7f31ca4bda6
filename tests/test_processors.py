"""Kernels for other processors than this one: they convert numbers to the same bits, and call nothing that is not linked.

`NUMBA_CPU_NAME=generic` compiles for what every processor of this kind has, as on clusters of mixed machines; a Haswell has AVX2
and F16C, and no AVX-512. The tests of this file run here, and once more in a process that is told so.
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import BFLOAT16, FLOATS, Case, random_ids, random_logits, random_probabilities
from test_cross_entropy import check

import swl

HERE = os.environ.get("NUMBA_CPU_NAME")
"""The processor that this process compiles for, if not its own."""

LINKED = {"log", "logf", "fma", "fmaf", "memset", "memcpy", "memmove"}
"""What kernels may call of libc and libm, to which Python itself is linked."""
OF_NUMBA = re.compile(r"_?Py|_?NRT_|_?numba_|_ZN")
CALLED = re.compile(r"^\s*(?:movabsq\s+\$|callq?\s+|jmp\s+|bl\s+)([A-Za-z_][\w.$]*)", re.MULTILINE)


def convert(source: Any, dtype: Any) -> Any:
    target = np.empty((1, source.size), dtype)
    source = source.reshape(1, -1)
    source.flags.writeable = False
    importlib.import_module("swl.backends.numba.kernels").convert(source, target)
    return target[0]


def test_every_half_becomes_the_single_of_the_same_value() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    want = halves.view(np.float16).astype(np.float32)
    bits = want.view(np.uint32) | np.where(np.isnan(want), np.uint32(0x00400000), np.uint32(0))  # a NaN becomes quiet
    np.testing.assert_array_equal(convert(halves, np.float32).view(np.uint32), bits)


def test_singles_become_the_nearest_half() -> None:
    """At every half, at every tie between two and on both sides of it, and at random bits."""
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves[-1] = 65536  # where the next one would be; from the tie before it on, inf
    ties = (halves[:-1] + halves[1:]) / 2
    beside = [np.nextafter(ties, np.float32(to)) for to in (0, np.inf)]
    random = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, np.uint32).view(np.float32)
    special = np.array([0.0, 1e-45, 1e-38, 3e38, np.inf, np.nan], np.float32)
    signalling = np.array([0x7F800001, 0x7FBFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    x = np.concatenate([halves, ties, *beside, special, signalling, random])
    x = np.concatenate([x, (x.view(np.uint32) ^ np.uint32(1 << 31)).view(np.float32)])
    with np.errstate(all="ignore"):
        want = x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    nan = (bits >> 16 & 0x8000 | 0x7E00 | bits >> 13 & 0x3FF).astype(np.uint16)
    np.testing.assert_array_equal(convert(x, np.uint16), np.where(np.isnan(x), nan, want))


def test_singles_become_the_nearest_bfloat16() -> None:
    """At every bfloat16 and NaN, at every tie between two, on both sides of them, and at random bits.

    In order, so that vectors are all normal, all subnormal or all NaN; mixed; and a subnormal number alone in each lane.
    """
    rng = np.random.default_rng(0)
    lower = np.concatenate([[0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], rng.integers(0, 1 << 16, 26)])
    every = (np.arange(1 << 16)[:, None] << 16 | lower).ravel()
    alone = [np.diag(np.full(64, n)).ravel() for n in (0x00000001, 0x00018000, 0x007FFFFF, 0x80400001)]
    bits = np.concatenate([every, rng.permutation(every), *alone]).astype(np.uint32)
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        want = np.where(np.isnan(x), bits >> 16 | 0x40, x.astype(BFLOAT16).view(np.uint16))  # a NaN becomes quiet
    got = convert(x, np.int16).view(np.uint16)
    np.testing.assert_array_equal(got, want)
    back = convert(got.view(np.int16), np.float32)
    np.testing.assert_array_equal(back.view(np.uint32), got.astype(np.uint32) << 16)


@pytest.mark.parametrize("kind", ["ids", "probabilities"])
@pytest.mark.parametrize("C", [1, 3, 10, 31, 300, 1025])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_losses_of_every_dtype(host_backend: Any, dtype: Any, C: int, kind: str) -> None:
    rng = np.random.default_rng(C)
    logits = random_logits(rng, (7, C), dtype, 5.0)
    target = (
        random_ids(rng, (7,), C, np.dtype(np.int64), 0.2, -100)
        if kind == "ids"
        else random_probabilities(rng, (7,), C, dtype)
    )
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}):
        case = Case(logits, target, options=options)
        z, t, options, dout = case.on(host_backend)
        check(host_backend, case, *swl.cross_entropy_value_and_grad(z, t, dout=dout, **options))


if HERE is None:
    OTHERS = ["generic"] if platform.machine() not in ("x86_64", "AMD64") else ["generic", "haswell"]

    @pytest.mark.parametrize("processor", OTHERS)
    def test_all_of_this_holds_on_another_processor(processor: str, tmp_path: Path) -> None:
        env = {**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CACHE_DIR": str(tmp_path), "PYTEST_ADDOPTS": ""}
        env["PYTHONPATH"] = os.pathsep.join((str(Path(swl.__file__).parents[1]), env.get("PYTHONPATH", "")))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr

else:

    def test_kernels_call_nothing_that_may_not_be_linked() -> None:
        """Of all that the tests above have compiled; kernels that come from disk have no assembly."""
        from numba.core.dispatcher import Dispatcher

        found: set[str] = set()
        for kernel in gc.get_objects():
            if isinstance(kernel, Dispatcher) and kernel.targetoptions.get("nogil"):  # others are inlined into these
                for text in kernel.inspect_asm().values():
                    found |= set(CALLED.findall(text))
        called = {name for name in found if not OF_NUMBA.match(name)}
        assert "log" in called  # or the pattern reads another kind of assembly
        assert called - LINKED == set()
