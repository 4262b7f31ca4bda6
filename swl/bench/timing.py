"""Contenders, and how they are measured: in blocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import swl
from swl.backends import host_backend

__all__ = ["Call", "Case", "Contender", "measure"]

Call = Callable[[], Any]

PAUSE, LONGEST_PAUSE = 0.05, 0.4
"""Seconds between blocks: until the threads of the last contender sleep. Those of NumPy's OpenBLAS spin for 0.13 s."""
PER_BLOCK = 4
"""Measured calls of a block, after one that does not count."""
SHORT, REPEAT = 1e-3, 200
"""Calls that take fewer seconds are measured so many at a time: of one, the clock sees too little."""
LONG = 3.0
"""Seconds that one contender may take in all; further rounds pass over it."""


class Contender(NamedTuple):
    """Something to be timed."""

    call: Call
    """Gives arrays to be checked, a tuple; or None."""
    before: Call | None = None
    """What to do, untimed, right before each call."""
    enter: Call | None = None
    """What to do, untimed, before each block."""


class Case(NamedTuple):
    """One comparison."""

    title: str
    group: str
    names: tuple[str, ...]
    """All contenders there may be; those that cannot run here are left out."""
    build: Callable[[], tuple[dict[str, Contender], tuple[Any, ...], float]]
    """Make the contenders, what they shall compute, and the error that is allowed as a part of the largest number."""
    own: str = "swl"
    """The contender whose time the others are a multiple of."""
    floor: str | None = None
    """The contender that does nothing but what must be done."""


def to_host(x: Any) -> Any:
    """Bring an array of any library to NumPy, its 16-bit numbers to float32."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if x.element_size() == 2 else x).numpy()
    x = np.asarray(x.get() if hasattr(x, "get") else x)
    return x.astype(np.float32) if x.itemsize == 2 else x


def check(name: str, got: Any, expected: tuple[Any, ...], tolerance: float) -> None:
    """Raise an AssertionError unless the arrays are what they should be."""
    for found, want in zip(got, expected, strict=True):
        found, want = np.atleast_1d(to_host(found)), np.atleast_1d(want)
        legal = tolerance * np.abs(want).max()
        for a, b in zip(
            np.array_split(found, 16), np.array_split(want, 16), strict=True
        ):  # temporaries that fit the caches
            if not (np.abs(a - b) <= legal).all():  # a NaN is an error too
                raise AssertionError(
                    f"{name} computes something else: off by {np.abs(a - b).max():.2g}, legal {legal:.2g}"
                )


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of single calls of every contender that can run here, after a check of what it computes."""
    with swl.use_backend(host_backend()):
        contenders, expected, tolerance = case.build()
        for name, contender in contenders.items():
            if contender.enter is not None:
                contender.enter()
            got = contender.call()
            if got is not None:
                check(f"{name}, {case.title}", got, expected, tolerance)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        spent = dict.fromkeys(contenders, 0.0)
        del expected
        for _ in range(rounds):
            for name, contender in contenders.items():
                if spent[name] < LONG:
                    begin = time.perf_counter()
                    times[name] += block(contender)
                    spent[name] += time.perf_counter() - begin
    return times


def block(contender: Contender) -> list[float]:
    """Measure one contender: a pause, a call that does not count, some that do."""
    call, before, enter = contender
    settle()
    if enter is not None:
        enter()
    once = timed(call, before)
    if before is not None:
        return [timed(call, before) for _ in range(PER_BLOCK if once > SHORT else 10 * PER_BLOCK)]
    if once > 0.3:
        return [timed(call, None)]
    if once > SHORT:
        return [timed(call, None) for _ in range(PER_BLOCK)]
    return [timed(call, None, REPEAT) for _ in range(PER_BLOCK)]


def settle() -> None:
    """Wait until no thread of this process spins any more."""
    end = time.perf_counter() + LONGEST_PAUSE
    busy = PAUSE
    while busy > PAUSE / 5 and time.perf_counter() < end:
        begin = time.process_time()
        time.sleep(PAUSE)
        busy = time.process_time() - begin


def timed(call: Call, before: Call | None, repeat: int = 1) -> float:
    """Time a call, or the mean of several."""
    if before is not None:
        before()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def median(seconds: list[float]) -> float:
    """Give the median."""
    return statistics.median(seconds)
