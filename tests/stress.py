"""Call everything on the CPU at once, from a seed, under faults: ``python tests/stress.py --minutes 10 [--seed 7]``.

A run is made of rounds. Each is a process of its own with an environment of its own, in which several threads play a deck of
calls over and over while

- a timer's signals call swl from their handler, or raise KeyboardInterrupt in the call that they meet;
- threads fork (where BLAS has no threads of its own), start and end, change `set_num_threads`, hold large results, empty the pool;
- in some rounds kernels on disk are damaged or cannot be kept, memory is short, or threads cannot be started.

The first result of each call is held to the float64 oracle within the tolerances of the test-suite, every later one to the first's
bits. Whatever a caller still holds must stay as it is, `out` after an interrupt too. A round that ends by a signal or does not end
is a failure. The exit status is 1 if there was any, and what to type to see it again is printed with it.
"""

from __future__ import annotations

import argparse
import contextvars
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # a checkout that is not installed

import oracle  # noqa: E402
from cases import CONTIGUOUS, FLOATS, LAYOUTS, Case, acc_dtype, cases, place, random_ids, random_logits  # noqa: E402
from test_affine import affine_cases  # noqa: E402
from test_cross_entropy import check as check_loss  # noqa: E402
from test_fused import ALL, Head, heads  # noqa: E402
from test_fused import check as check_head  # noqa: E402

import swl  # noqa: E402

SECONDS = 8.0
"""A round plays for so long."""
HANG = 120.0
"""And has so long to end; compiling counts."""
MIB = 1 << 20
KINDS = ("plain", "plain", "damaged kernels", "plain", "short of memory", "plain", "short of threads", "no cache")
"""Kinds of rounds, in turn; the first fills the folder of kernels that those after it have."""
ROUNDS = 1000
"""Rounds of a seed, at most."""


class Host:
    """What the test-suite's checks ask of a backend, for arrays that are NumPy's."""

    is_host = True
    numpy = staticmethod(np.asarray)

    @staticmethod
    def array(x: Any, dtype: Any = None, *, writeable: bool = False) -> Any:
        x = np.array(x, dtype)
        x.flags.writeable = writeable
        return x


# ------------------------------------------------------------------------------------------------ calls


@dataclass
class Call:
    """A call of swl, the same at each time: `compute` appends to its argument what the caller gave it to write to."""

    case: int
    name: str
    compute: Callable[[list[Any]], dict[str, Any]]
    check: Callable[[dict[str, Any]], None]
    first: Any = None  # the bits of the first result, once it is known to be right


def drawn(strategy: Any, case: int) -> Any:
    """Draw from one of the test-suite's strategies."""
    found = []

    @hypothesis.seed(case)
    @hypothesis.settings(database=None, deadline=None, max_examples=5, phases=[hypothesis.Phase.generate],
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(strategy)
    def draw(x: Any) -> None:
        found.append(x)

    draw()
    return found[-1]  # the first is always the simplest


def wide(case: int) -> Case:
    """Draw logits that several threads share, that come from the pool, or that the kernels of few classes take."""
    r, rng = random.Random(f"{case} how"), np.random.default_rng(case)
    shape = r.choice([(1500, 64), (1500, 48), (300, 1000), (4000, 10), (40, 8000), (3, 90_000)])
    dtype = r.choice(FLOATS[:2] * 2 + FLOATS)
    options: dict[str, Any] = {"reduction": r.choice(["mean", "sum"])}
    for name, value in [("label_smoothing", 0.1), ("z_loss", 1e-3), ("softcap", 30.0), ("weight", None)]:
        if r.random() < 0.3:
            options[name] = rng.random(shape[1]).astype(acc_dtype(dtype)) if value is None else value
    target = random_ids(rng, shape[:1], shape[1], np.dtype(np.int64), 0.1, -100)
    return Case(random_logits(rng, shape, dtype, 3.0), target, CONTIGUOUS, options)


def loss_call(case: int, which: Case) -> Call:
    r = random.Random(f"{case} how")
    torch_too = "torch" in sys.modules and which.layout is CONTIGUOUS and which.dtype in FLOATS[:2]
    plain = which.logits.ndim == 2 and which.target.ndim == 1 and which.target.dtype == np.int64
    hows = ["function", "function", "out", "in place", "two sweeps", "one sweep"]
    how = r.choice(hows + ["torch"] * 3 * (torch_too and plain and which.dout == 1 and "weight" not in which.options))
    which.options["backend"] = backend = r.choice(["numba", "numba", "numba", "numpy"])
    logits, target, options, dout = which.on(Host)

    def compute(mine: list[Any]) -> dict[str, Any]:
        if how == "torch":
            import torch

            z = torch.tensor(which.logits, requires_grad=True)
            with swl.use_backend(backend):
                named = {key: value for key, value in options.items() if key != "backend"}
                loss = swl.torch.cross_entropy(z, torch.from_numpy(which.target), **named)
                loss.backward()
            return {"loss": loss.detach().numpy(), "grad": z.grad.numpy()}
        if how.endswith("sweeps"):
            layer = swl.SoftmaxWithLoss(**options)
            return {"loss": layer.forward(logits, target), "grad": layer.backward(dout)}
        if how == "one sweep":
            return dict(
                zip(
                    ("loss", "grad"), swl.SoftmaxWithLoss(**options).forward_backward(logits, target, dout), strict=True
                )
            )
        z, out = logits, None
        if how != "function":
            start = which.logits if how == "in place" else np.full_like(which.logits, np.nan)
            out = place(Host, start, which.layout, writeable=True)
            z = out if how == "in place" else z
            mine.append(out)
        loss, grad, stats = swl.cross_entropy_value_and_grad(z, target, dout=dout, out=out, stats=True, **options)
        return {"loss": loss, "grad": grad, **stats._asdict()}

    def check(got: dict[str, Any]) -> None:
        asked = Case(which.logits, which.target, which.layout, {**which.options}, which.dout)
        del asked.options["backend"]
        check_loss(Host, asked, got["loss"], got["grad"], SimpleNamespace(**got) if "argmax" in got else None)

    shown = {key: value if np.isscalar(value) else "..." for key, value in which.options.items()}
    name = f"cross_entropy on {backend}, {how}, {which.dtype} {which.logits.shape} {which.layout} {shown}"
    return Call(case, name, compute, check)


def head_call(case: int) -> Call:
    head: Head = drawn(heads(), case)
    r = random.Random(f"{case} how")
    how = r.choice(["function", "two sweeps", "one sweep"])
    arrays, options, dout = head.on(Host)
    options["backend"] = r.choice(["numba", "numba", "numpy"])
    x, W, target, b = arrays

    def compute(mine: list[Any]) -> dict[str, Any]:
        if how == "function":
            loss, gradients, stats = swl.linear_cross_entropy_value_and_grad(*arrays, dout=dout, stats=True, **options)
            return {"loss": loss, **dict(zip(ALL, gradients, strict=True)), **stats._asdict()}
        layer = swl.AffineSoftmaxWithLoss(W, b, **options)
        if how == "one sweep":
            loss, dx = layer.forward_backward(x, target, dout)
        else:
            loss, dx = layer.forward(x, target), layer.backward(dout)
        return {"loss": loss, "dx": dx, "dW": layer.dW, "db": layer.db}

    def check(got: dict[str, Any]) -> None:
        stats = SimpleNamespace(**got) if "argmax" in got else None
        check_head(Host, head, ALL, got["loss"], [got[name] for name in ALL], stats)

    name = f"linear_cross_entropy on {options['backend']}, {how}, {head.loss.dtype} {head.x.shape}·{head.W.shape}"
    return Call(case, name, compute, check)


def affine_call(case: int) -> Call:
    r, rng = random.Random(f"{case} how"), np.random.default_rng(case)
    if r.random() < 0.5:
        x, W, b, dout, layouts = drawn(affine_cases(), case)
    else:  # large enough to be shared out
        dtype, layouts = r.choice(FLOATS), [CONTIGUOUS, r.choice(LAYOUTS[:2]), CONTIGUOUS]
        x, W, b, dout = (rng.standard_normal(s).astype(dtype) for s in [(2048, 33), (33, 1030), (1030,), (2048, 1030)])
    args = x.reshape(-1, len(W)) if x.size else x.reshape(0, len(W)), W, b, dout.reshape(-1, W.shape[1])
    xs, Ws, dys = (place(Host, a, layout) for a, layout in zip((x, W, dout), layouts, strict=True))
    backend, names = r.choice(["numba", "numpy"]), oracle.AffineAnswer._fields

    def compute(mine: list[Any]) -> dict[str, Any]:
        with swl.use_backend(backend):
            return dict(zip(names, (swl.affine(xs, Ws, b), *swl.affine_backward(dys, xs, Ws)), strict=True))

    def check(got: dict[str, Any]) -> None:
        want, scale = oracle.affine(*args), oracle.affine_scale(*args)
        for name in names:
            ideal, size = (getattr(a, name).reshape(got[name].shape) for a in (want, scale))
            oracle.assert_close(name, got[name], ideal, size, acc_dtype(x.dtype), x.dtype)

    return Call(case, f"affine on {backend}, {x.dtype} {x.shape}·{W.shape}", compute, check)


def net_call(case: int) -> Call:
    """A network of whole numbers up to its logits, so that no rounding decides where the rectifier bends; and one step of SGD."""
    r, rng = random.Random(f"{case} how"), np.random.default_rng(case)
    N, D, H, C = r.choice([(5, 4, 3, 2), (64, 20, 30, 10), (1000, 16, 32, 300)])
    x, W1, b1, W2, b2 = (rng.integers(-3, 4, s).astype(np.float32) for s in [(N, D), (D, H), H, (H, C), C])
    W2 /= 64
    t = rng.integers(0, C, N)
    backend = r.choice(["numba", "numpy"])  # a signal handler's own choice, whatever was active where it came

    def compute(mine: list[Any]) -> dict[str, Any]:
        with swl.use_backend(backend):
            net = swl.Sequential(
                swl.Affine(W1.copy(), b1.copy()), swl.ReLU(), swl.Affine(W2.copy(), b2.copy()), swl.SoftmaxWithLoss()
            )
            loss, _ = net.forward_backward(x, t)
            swl.SGD(lr=0.5).update(net.parameters(), net.gradients())
        return {"loss": loss, **net.gradients(), **{f"new {name}": p for name, p in net.parameters().items()}}

    def check(got: dict[str, Any]) -> None:
        h = oracle.affine(x, W1, b1, np.zeros((N, H))).y
        a = np.maximum(h, 0)
        top = oracle.cross_entropy(oracle.affine(a, W2, b2, np.zeros((N, C))).y, t)
        second = oracle.affine(a, W2, b2, top.grad)
        first = oracle.affine(x, W1, b1, second.dx * (h > 0))
        want = {"loss": top.loss, "0.W": first.dW, "0.b": first.db, "2.W": second.dW, "2.b": second.db}
        for name, p in [("0.W", W1), ("0.b", b1), ("2.W", W2), ("2.b", b2)]:
            want[f"new {name}"] = p - 0.5 * want[name]
        for name, ideal in want.items():
            np.testing.assert_allclose(got[name], ideal, rtol=1e-3, atol=1e-4, err_msg=name)

    return Call(case, f"Sequential and SGD on {backend}, {(N, D, H, C)}", compute, check)


def adam_call(case: int) -> Call:
    r, rng = random.Random(f"{case} how"), np.random.default_rng(case)
    start, grads = rng.standard_normal(r.choice([3, 5000])), rng.standard_normal((3, 1))
    dtype = r.choice(FLOATS[:2])

    def compute(mine: list[Any]) -> dict[str, Any]:
        p, optimizer = start.astype(dtype), swl.AdamW(lr=0.1)
        for g in grads:
            optimizer.update([p], [np.broadcast_to(g, p.shape).astype(dtype)])
        return {"p": p}

    def check(got: dict[str, Any]) -> None:
        p, m, s = start, 0.0, 0.0
        for k, g in enumerate(grads, 1):
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
            p = p - 0.1 * (m / (1 - 0.9**k) / (np.sqrt(s / (1 - 0.999**k)) + 1e-8) + 0.01 * p)
        np.testing.assert_allclose(got["p"], p, rtol=1e-4, atol=1e-5)

    return Call(case, f"AdamW, {dtype} {start.shape}", compute, check)


def large_call(case: int) -> Call:
    """Equal logits: any size has its answer in closed form."""
    r = random.Random(f"{case} how")
    C, dtype = r.choice([1024, 50_000]), r.choice(FLOATS[:2])
    N = r.randint(2, 48) * MIB // (C * dtype.itemsize)
    logits, t = np.zeros((N, C), dtype), np.arange(N) % C

    def compute(mine: list[Any]) -> dict[str, Any]:
        loss, grad = swl.cross_entropy_value_and_grad(logits, t, backend="numba", reduction="sum")
        return {"loss": loss, "grad": grad}

    def check(got: dict[str, Any]) -> None:
        np.testing.assert_allclose(got["loss"], N * np.log(C), rtol=1e-5)
        assert abs(got["grad"][np.arange(N), t] - (1 / C - 1)).max() < 1e-6
        got["grad"][np.arange(N), t] = 1 / C
        assert abs(got["grad"] * C - 1).max() < 1e-5

    return Call(case, f"cross_entropy on numba of equal logits, {dtype} {logits.shape}", compute, check)


CALLS: list[tuple[Callable[[int], Call], int]] = [
    (lambda case: loss_call(case, drawn(cases(), case)), 5),
    (lambda case: loss_call(case, wide(case)), 5),
    (head_call, 4),
    (affine_call, 2),
    (net_call, 1),
    (adam_call, 1),
    (large_call, 2),
]


def call_of(case: int) -> Call:
    (make,) = random.Random(case).choices(*zip(*CALLS, strict=True))
    return make(case)


def bits(arrays: Any) -> tuple[Any, ...]:
    """Sum up the bits of arrays; a NaN is like any other."""

    def one(x: Any) -> int:
        x = np.ascontiguousarray(x)
        if x.nbytes < MIB and np.isnan(x).any():
            x = np.where(np.isnan(x), x.dtype.type(np.nan), x)
        return zlib.crc32(x.reshape(-1).view(np.uint8))

    return tuple(
        None if x is None else (x.dtype, x.shape, one(x)) for x in map(np.asarray, arrays) if x.dtype != object
    )


# ------------------------------------------------------------------------------------------------ one round

# A fork amid another thread's product in OpenBLAS's own threads hangs parent or child, with NumPy alone too.
FORKABLE = os.environ.get("OPENBLAS_NUM_THREADS") == "1"


class Round:
    """Play a deck of calls in this process."""

    def __init__(self, number: int, kind: str, seconds: float, board: Path) -> None:
        self.number, self.kind = number, kind
        self.until = time.monotonic() + seconds
        self.now = np.memmap(
            board, np.int64, "r+"
        )  # the case in each thread, to be read by whoever finds this process dead
        self.counts = [Counter() for _ in self.now]
        self.failures: list[str] = []
        self.warm: list[Call] = []  # known to be right, hence compiled
        size = {"damaged kernels": 5, "no cache": 2}.get(kind, 16)
        self.deck = [call_of(100 * number + i) for i in range(size)]
        self.armed = False  # whether a signal may interrupt what the main thread does
        self.random = random.Random(number)

    def play(self, call: Call, slot: int, mine: list[Any] | None = None) -> dict[str, Any]:
        """Make a call, and compare."""
        before, self.now[slot] = self.now[slot], call.case
        got: dict[str, Any] = contextvars.copy_context().run(call.compute, [] if mine is None else mine)
        self.compare(call, slot, got)
        self.now[slot] = before
        return got

    def compare(self, call: Call, slot: int, got: dict[str, Any]) -> None:
        self.counts[slot][f"calls: {call.name.split()[0].rstrip(',')}"] += 1
        found = bits(got.values())
        if call.first is None:
            call.check({name: x if x is None else np.array(x) for name, x in got.items()})
            call.first = found
            self.warm.append(call)
        elif found != call.first:
            call.check(got)
            others = [name for name, now, was in zip(got, found, call.first, strict=True) if now != was]
            raise AssertionError(f"other bits than the same call gave before: {', '.join(others)}")
        self.counts[slot]["results compared"] += len(found)

    def failed(self, call: Call | None, when: str = "") -> None:
        lines = traceback.format_exc().strip().splitlines()
        about = f"case {call.case}: {call.name}" if call else "no case"
        self.failures.append("\n".join([f"{about}{when}", *(f"    {line}" for line in lines[-12:])]))

    def alive(self) -> bool:
        return time.monotonic() < self.until and not self.failures

    def run(self) -> None:
        faulthandler.enable()
        faulthandler.dump_traceback_later(self.until - time.monotonic() + HANG, exit=True)
        if self.kind == "short of threads":
            self.refuse_threads()
        if self.kind == "short of memory":
            self.short_of_memory()
        else:
            self.crowd()
        print(json.dumps({"counts": sum(self.counts, Counter()), "failures": self.failures}))

    # -------------------------------------------------------------------------------------------- what threads do

    def crowd(self) -> None:
        """Play on several threads, this one among them, which signals meet."""
        sys.unraisablehook = lambda _: None  # an interrupt in a finaliser
        signal.signal(signal.SIGALRM, self.on_signal)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        threads: dict[int, threading.Thread] = {}
        width = self.random.randint(1, len(self.now) - 2)
        batches = 0
        acting = self.acting(0)
        while self.alive():
            for slot in range(1, width + 1):
                if slot not in threads or not threads[slot].is_alive():
                    threads[slot] = threading.Thread(target=self.batch, args=(slot, batches), daemon=True)
                    threads[slot].start()
                    batches += 1
            next(acting)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for thread in threads.values():
            thread.join()
        self.counts[0]["threads started"] += batches

    def batch(self, slot: int, number: int) -> None:
        for _, step in zip(range(200), self.acting(slot, number), strict=False):
            if not self.alive():
                return
            del step

    def acting(self, slot: int, number: int = -1) -> Iterator[None]:
        """Do one thing after the other; what is held on the way must stay as it is."""
        r, count = random.Random(f"{self.number} {number}"), self.counts[slot]
        held: list[tuple[Call, str, Any, Any]] = []
        while True:
            call = r.choice(self.deck)
            chance, mine, result = r.random(), [], {}
            try:
                if slot == 0 and call.first is not None and chance < 0.5:
                    result = self.interruptible(call, mine)
                elif chance < 0.94 or not self.warm:
                    result = self.play(call, slot)
                elif chance < 0.96 and FORKABLE:
                    self.fork(r.choices(self.warm, k=3), slot)
                elif chance < 0.98:
                    swl.set_num_threads(r.randint(1, 6))
                    count["thread counts set"] += 1
                else:
                    swl.empty_cache()
                    count["pools emptied"] += 1
                if r.random() < 0.2:
                    large = ((name, x) for name, x in result.items() if isinstance(x, np.ndarray))
                    held += [(call, f" {name} held", x, bits([x])) for name, x in large]
                held += [(call, " out after an interrupt", x, bits([x])) for x in mine]
                while len(held) > r.choice([4, 12]):
                    call, name, x, was = held.pop(r.randrange(len(held)))
                    assert bits([x]) == was, f"{name} has changed"
                    count["results compared"] += 1
            except BaseException:
                self.failed(call)
            yield

    def interruptible(self, call: Call, mine: list[Any]) -> dict[str, Any]:
        """Play on the main thread; in `mine` is left what was to be written to if a signal has interrupted it."""
        result: dict[str, Any] = {}
        try:
            self.armed = True
            result = self.play(call, 0, mine)
            self.armed = False
            mine.clear()
        except KeyboardInterrupt:
            self.counts[0]["interrupts"] += 1
        finally:
            self.armed = False
        return result

    def on_signal(self, number: int, frame: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            if self.armed and self.random.random() < 0.5:
                self.armed = False
                raise KeyboardInterrupt
            was, self.armed = self.armed, False
            self.counts[-1]["signals handled"] += 1
            if self.warm:
                call = self.random.choice(self.warm)
                try:
                    if "torch" not in call.name:
                        self.play(call, -1)
                except BaseException:
                    self.failed(call, ", in a signal handler")
            self.armed = was
        finally:
            if self.alive():
                signal.setitimer(signal.ITIMER_REAL, self.random.uniform(0.0005, 0.02))

    def fork(self, calls: list[Call], slot: int) -> None:
        """Fork amid whatever the other threads do; the child makes some calls."""
        calls = [call for call in calls if "torch" not in call.name]  # OpenMP's threads do not live through a fork
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                faulthandler.register(signal.SIGALRM, chain=True)
                signal.alarm(60)
                for call in calls:
                    self.play(call, slot)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        self.counts[slot]["forks"] += 1
        _, status = os.waitpid(child, 0)
        ended = how_it_ended(os.waitstatus_to_exitcode(status))
        assert status == 0, f"a forked child {ended} amid the cases {[call.case for call in calls]}"

    # -------------------------------------------------------------------------------------------- what is short

    def refuse_threads(self) -> None:
        """Let most of the pool's threads not start, as under RLIMIT_NPROC, which the superuser is not held to."""
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith("swl") and random.random() < 0.7:
                self.counts[-2]["threads refused"] += 1
                raise RuntimeError("can't start new thread")
            start(thread)

        threading.Thread.start = refuse  # type: ignore[method-assign]

    def short_of_memory(self) -> None:
        """A call that runs out of memory must do so with an empty pool too, and the next ones must be right."""
        self.deck += [large_call(100 * self.number + 50 + i) for i in range(6)]
        for call in self.deck:
            try:
                self.play(call, 0)
            except BaseException:
                self.failed(call)
        held: list[Any] = []
        while self.alive():
            call, held = self.random.choice(self.deck), held[-self.random.randint(0, 2) :]
            limit = status_bytes("VmSize") + self.random.randint(8, 160) * MIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
            got = None
            try:
                got = call.compute([])
            except MemoryError:
                self.counts[0]["memory errors"] += 1
                swl.empty_cache()
                with suppress(MemoryError):
                    call.compute([])
                    if "on numba" in call.name:  # the other backend allocates past the pool
                        self.failures.append(f"case {call.case}: {call.name} ran out of memory that the pool had free")
            except BaseException:
                self.failed(call, ", short of memory")
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            if got is not None:
                held.append(got)
                try:
                    self.compare(call, 0, got)
                except AssertionError:
                    self.failed(call, ", short of memory")


def status_bytes(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


# ------------------------------------------------------------------------------------------------ all rounds


def how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def damage(folder: Path, r: random.Random, counts: Counter[str]) -> None:
    """Do harm to some of the files of a folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
    for file in r.sample(files, min(12, len(files))):
        content, how = bytearray(file.read_bytes()), r.choice(["bits flipped", "cut short", "pages zeroed"])
        at = r.randrange(len(content))
        if how == "bits flipped":
            for _ in range(r.randint(1, 3)):
                content[r.randrange(len(content))] ^= 1 << r.randrange(8)
        elif how == "cut short":
            del content[at:]
        else:
            content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        file.write_bytes(content)
        counts[f"files with {how}"] += 1


def one_round(number: int, cache: Path, seconds: float, counts: Counter[str]) -> list[str]:
    """Run a round in a process of its own; give its failures."""
    r = random.Random(number)
    kind = KINDS[number % ROUNDS % len(KINDS)]
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "SWL_BACKEND": r.choice(["numba", "numba", "numpy", ""])}
    if r.random() < 0.7 or kind == "short of memory":
        env["MALLOC_ARENA_MAX"] = "1"
    if r.random() < 0.7:
        env["MALLOC_PERTURB_"] = "165"
    for name in ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        env[name] = r.choice("124")
    with_torch = r.random() < 0.3 and kind in ("plain", "short of threads") and find_spec("torch") is not None
    counts[f"rounds: {kind}"] += 1
    with tempfile.TemporaryDirectory(prefix="swl-stress-") as name:
        work = Path(name)
        if kind == "damaged kernels":
            env["NUMBA_CACHE_DIR"] = str(shutil.copytree(cache, work / "kernels"))
            damage(work / "kernels", r, counts)
        elif kind == "no cache":
            (work / "kernels").touch()
            env["NUMBA_CACHE_DIR"] = str(work / "kernels" / "below")
        board = work / "board"
        board.write_bytes(bytes(8 * (2 + r.randint(2, 6))))
        command = [
            sys.executable,
            __file__,
            "--play",
            str(number),
            kind,
            str(seconds),
            str(board),
            str(int(with_torch)),
        ]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, err = process.communicate(timeout=seconds + 2 * HANG)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        found = []
        if process.returncode == 0:
            report = json.loads(out.splitlines()[-1])
            counts.update(report["counts"])
            found = report["failures"]
        if process.returncode or found:
            ended = "hung" if "Timeout (" in err or process.returncode == -9 else how_it_ended(process.returncode)
            counts["rounds that hung" if ended == "hung" else "rounds that died"] += process.returncode != 0
            counts["wrong"] += len(found)
            under = " ".join(f"{key}={env[key]}" for key in env if os.environ.get(key) != env[key])
            playing = [str(case) for case in np.fromfile(board, np.int64) if case]
            head = f"round {number} ({kind}) {ended}; amid the cases {', '.join(playing)}; under {under}"
            found = ["\n".join([head, *found, *(f"  | {line}" for line in err.splitlines()[-60:])])]
        return found


def alone(case: int) -> None:
    """Make one call in a process that does nothing else."""
    call = call_of(case)
    print(f"case {case}: {call.name}")
    for _ in range(3):
        got = call.compute([])
        call.check({name: x if x is None else np.array(x) for name, x in got.items()})
        assert call.first in (None, bits(got.values())), "other bits than the same call gave before"
        call.first = bits(got.values())
    print("right, three times")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to go on (default: 1)")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(10**6), help="of all rounds (default: a random one)"
    )
    parser.add_argument("--cache", type=Path, help="folder for compiled kernels, kept (default: one that is not)")
    parser.add_argument("--round", type=int, help="only this round, again and again until it fails")
    parser.add_argument("--case", type=int, help="only this call, in a process that does nothing else")
    parser.add_argument("--play", nargs=5, help=argparse.SUPPRESS)  # what the process of a round is called with
    asked = parser.parse_args()
    if asked.case is not None:
        alone(asked.case)
        return 0
    if asked.play:
        number, kind, seconds, board, with_torch = asked.play
        if int(with_torch):
            import swl.torch  # noqa: F401
        Round(int(number), kind, float(seconds), Path(board)).run()
        return 0
    print(f"seed {asked.seed}, for {asked.minutes:g} minutes", flush=True)
    start, counts, n_failures = time.monotonic(), Counter[str](), 0
    left = lambda: 60 * asked.minutes - (time.monotonic() - start)  # noqa: E731
    with tempfile.TemporaryDirectory(prefix="swl-stress-") as folder:
        first = asked.seed * ROUNDS if asked.round is None else asked.round // ROUNDS * ROUNDS
        numbers = range(first, first + ROUNDS) if asked.round is None else chain([first], repeat(asked.round))
        for number in numbers:
            if left() <= 0:
                break
            for failure in one_round(number, asked.cache or Path(folder), max(1.0, min(SECONDS, left())), counts):
                n_failures += 1
                print(f"\nFAILED after {time.monotonic() - start:.0f} s: {failure}")
                print(f"again: python tests/stress.py --round {number}; one call alone: --case ...", flush=True)
    print(f"\nseed {asked.seed}, {time.monotonic() - start:.0f} s")
    for name, n in sorted(counts.items()):
        print(f"{n:>10,} {name}")
    calls = sum(n for name, n in counts.items() if name.startswith("calls: "))
    print(
        f"{calls:,} calls, {counts['results compared']:,} results compared: {counts['wrong']} wrong, "
        f"{counts['rounds that hung']} hangs, {counts['rounds that died']} crashes"
    )
    return int(n_failures > 0)


if __name__ == "__main__":
    sys.exit(main())
