"""Programs that let signal handlers run amid swl's own lines; `test_interrupts` runs each in a process of its own.

Run one with ``python tests/interrupted.py NAME``.
"""

from __future__ import annotations

import dis
import faulthandler
import gc
import itertools
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any

import numpy as np

import swl
from swl.backends.host import blas, memory, threads
from swl.backends.host.threads import POOL
from swl.backends.numba import products
from swl.backends.numba.products import product

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((300, 1000), np.float32)  # a gradient of more than 1 MiB, in several ranges
IDS = RNG.integers(0, 1000, 300)
A, B = RNG.standard_normal((200, 70)), RNG.standard_normal((70, 300))
FILES = {module.__file__ for module in (blas, memory, threads)}

products.LARGE = 0  # every product is shared out
products._suits = lambda m, n, k: False  # and multiplied by BLAS, held to one thread


def loss() -> bytes:
    value, gradient = swl.cross_entropy_value_and_grad(LOGITS, IDS)
    return bytes(np.asarray(value).tobytes() + gradient.tobytes())


def multiplied() -> bytes:
    out = np.empty((200, 300))
    product(A, B, out)
    return out.tobytes()


def resized() -> bytes:
    swl.set_num_threads(5 - POOL.threads)  # 2 and 3 in turn
    return b""


def emptied() -> bytes:
    swl.empty_cache()
    return bytes(min(swl.memory_use()) < 0)


CALLS: tuple[Callable[[], bytes], ...] = (loss, multiplied, resized, emptied)


def setting() -> int:
    found = blas.control()
    return 0 if found is None else found.get()


class Expected:
    """Makes all calls, and knows what they gave before anything came in between."""

    def __init__(self) -> None:
        swl.set_num_threads(2)
        self.results = [call() for call in CALLS]
        self.setting, self.in_use = setting(), swl.memory_use().in_use
        faulthandler.dump_traceback_later(200, exit=True)  # all is compiled: so long lasts only what hangs

    def check(self) -> None:
        for call, result in zip(CALLS, self.results, strict=True):
            assert call() == result, call.__name__

    def check_all(self) -> None:
        """Look at what is kept between calls, too."""
        gc.collect()
        assert setting() == self.setting
        assert swl.memory_use().in_use == self.in_use
        self.check()


def handled_everywhere() -> None:
    """Let a handler that makes all calls run before each instruction of each call, locks held or not."""
    expected, count = Expected(), 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            expected.check()
        return trace

    sys.settrace(trace)
    expected.check()
    sys.settrace(None)
    expected.check_all()
    print("handlers", count)


def handled_at_random(seconds: float = 5) -> None:
    """Let a real signal's handler make all calls, again and again after a short while."""
    expected, count, rng = Expected(), 0, random.Random(0)
    end = time.monotonic() + seconds

    def handler(*_: Any) -> None:
        nonlocal count
        count += 1
        expected.check()
        if time.monotonic() < end:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-3)
    while time.monotonic() < end:
        expected.check()
    signal.setitimer(signal.ITIMER_REAL, 0)
    expected.check_all()
    print("handlers", count)


class Interrupt(BaseException):
    """What a handler raises."""


def _places(code: CodeType) -> set[int]:
    """Find the instructions at which a handler may raise: after a call or the start of a function, and at a jump back."""
    ranges = dis._parse_exception_table(code)  # type: ignore[attr-defined]

    def guard(at: int) -> Any:
        return next((r.target for r in ranges if r.start <= at < r.end), None)

    places = set()
    for a, b in itertools.pairwise(dis.get_instructions(code)):
        if "JUMP_BACKWARD" in a.opname:
            places.add(a.offset)
        elif a.opname.startswith(("CALL", "RESUME")) and guard(a.offset) == guard(b.offset):
            places.add(b.offset)  # what it raises there is caught by whatever catches at the instruction before
    return places


def _interrupted_at(call: Callable[[], object], step: int) -> bool:
    """Interrupt a call at the given one of all places it passes; False if it does not come so far."""
    places: dict[CodeType, set[int]] = {}

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal step
        code = frame.f_code
        if code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if code not in places:
            places[code] = _places(code)
        if event == "opcode" and frame.f_lasti in places[code]:
            step -= 1
            if step < 0:
                sys.settrace(None)
                raise Interrupt
        return trace

    with suppress(Interrupt):
        sys.settrace(trace)
        call()
    sys.settrace(None)
    return step < 0


def _shared_out(begun: list[int], ended: list[int]) -> Callable[[], None]:
    def work(begin: int, end: int) -> None:
        begun.append(begin)
        time.sleep(0.001)
        ended.append(begin)

    return lambda: POOL.run(work, 6)


def raised_everywhere() -> None:
    """Let a handler raise wherever the interpreter may run it amid swl's own lines."""
    sys.unraisablehook = lambda unraisable: None  # in a finaliser an interrupt is lost
    expected, total = Expected(), 0
    for call in CALLS:
        steps = itertools.takewhile(lambda step, call=call: _interrupted_at(call, step), itertools.count())  # type: ignore[misc]
        for _ in steps:
            expected.check_all()
            total += 1
    begun: list[int] = []
    ended: list[int] = []
    for step in itertools.count():
        begun.clear()
        ended.clear()
        if not _interrupted_at(_shared_out(begun, ended), step):
            break
        assert sorted(begun) == sorted(ended), step
        expected.check_all()
        total += 1
    print("interrupts", total)


def _until(seconds: float) -> Iterator[int]:
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())


def raised_at_random(seconds: float = 5) -> None:
    """Let real interrupts end calls at any time, some in bursts; then nothing is written to `out` any more."""
    expected, count, rng = Expected(), 0, random.Random(0)
    z = np.tile(LOGITS, (8, 1))
    t, out = np.tile(IDS, 8), np.empty_like(z)

    def handler(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is swl.cross_entropy_value_and_grad.__code__:
                raise Interrupt
            frame = frame.f_back

    signal.signal(signal.SIGALRM, handler)
    for _ in _until(seconds):
        out[:] = 7
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3), rng.choice((1e-2, 1e-4)))
        with suppress(Interrupt):
            while True:
                swl.cross_entropy_value_and_grad(z, t, out=out)
        signal.setitimer(signal.ITIMER_REAL, 0)
        left = out.copy()
        time.sleep(0.003)
        assert (out == left).all(), count
        count += 1
    expected.check_all()
    print("interrupts", count)


if __name__ == "__main__":
    with swl.use_backend("numba"):
        globals()[sys.argv[1]]()
