"""Measure on a card: each sweep against a copy within the device, and the head against its three bare products and torch.

    python tests/cuda/bandwidth.py OUT.json            writes what is measured, as it is measured
    python tests/cuda/bandwidth.py OUT.json --fake     small shapes on the fake driver: shows only that this runs

A copy reads and writes each byte once, so it is what the memory gives. A sweep's share of that is of the bytes that it cannot do
without: one read of the logits for the loss, one read and one write for the gradient, and for both at once.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import swl
from swl.backends.protocol import Target

ROUNDS = 9
SHAPES = (
    (8192, 32000, "float32"),
    (8192, 32000, "bfloat16"),
    (8192, 50257, "float16"),
    (4096, 128256, "bfloat16"),
    (4096, 128256, "float32"),
    (262144, 1000, "float32"),
    (1 << 22, 10, "float32"),
    (16, 1000000, "float32"),
)
HEADS = ((4096, 768, 50257, "bfloat16"), (8192, 4096, 128256, "bfloat16"), (2048, 1024, 32000, "float32"))
TINY = ((8, 1000, "float32"), (8, 1000, "bfloat16")), ((8, 16, 100, "bfloat16"),)


class Result(NamedTuple):
    """One measurement: the median of seconds, and what they are to be compared with."""

    what: str
    seconds: float
    of: str
    share: float  # of the bandwidth of a copy; or how many times the time of `of`


def seconds_of(xp: Any, call: Callable[[], object]) -> float:
    """Return the median time of a call on the current stream, by events."""
    for _ in range(2):
        call()
    times = []
    for _ in range(ROUNDS):
        begin, end = xp.cuda.Event(), xp.cuda.Event()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(xp.cuda.get_elapsed_time(begin, end) / 1e3)
    return statistics.median(times)


def logits_of(backend: Any, N: int, C: int, dtype: Any) -> Any:
    """Make logits on the device; rows repeat."""
    rows = min(N, max(1, (1 << 24) // C))
    some = backend.asarray(np.random.default_rng(0).standard_normal((rows, C), np.float32).astype(dtype))
    logits = backend.empty((N, C), dtype)
    for n in range(0, N, rows):
        logits[n : n + rows] = some[: N - n]
    return logits


def sweeps(backend: Any, N: int, C: int, name: str) -> Iterator[Result]:
    """Measure each sweep over class ids, as a share of the bandwidth of a copy of the same logits."""
    xp, dtype = backend.xp, np.dtype(getattr(ml_dtypes, name, name))
    logits, out = logits_of(backend, N, C, dtype), backend.empty((N, C), dtype)
    ids, _, _ = backend.prepare_ids(backend.asarray(np.arange(N) * 7 % C), C, -100, None)
    target, scale = Target(ids=ids), backend.asarray(np.ones(1, np.float32))
    rows = backend.cross_entropy_forward(logits, target, False)
    copy = seconds_of(xp, lambda: xp.copyto(out, logits))
    yield Result(f"{N} × {C}, {name}: copy", copy, "copy", 1.0)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "forward": (1, lambda: backend.cross_entropy_forward(logits, target, False)),
        "backward": (2, lambda: backend.cross_entropy_backward(logits, target, rows, scale, out)),
        "both": (2, lambda: backend.cross_entropy_forward_backward(logits, target, scale, out, False)),
    }
    for sweep, (passes, call) in calls.items():
        spent = seconds_of(xp, call)
        yield Result(f"{N} × {C}, {name}: {sweep}", spent, "copy", passes / 2 * copy / spent)


def heads(backend: Any, N: int, D: int, C: int, name: str) -> Iterator[Result]:
    """Measure the fused head, value and gradients, as a multiple of three bare products, by swl and by torch."""
    xp, dtype = backend.xp, np.dtype(getattr(ml_dtypes, name, name))
    x, W = logits_of(backend, N, D, dtype), logits_of(backend, D, C, dtype)
    dx, dW, ids = backend.empty(x.shape, dtype), backend.empty(W.shape, dtype), backend.asarray(np.arange(N) % C)
    some = backend.empty((min(N, 1024), C), dtype)

    def products() -> None:
        for n in range(0, N, len(some)):
            rows = slice(n, n + len(some))
            part = some[: len(x[rows])]
            backend.affine_forward(x[rows], W, None, part)
            backend.affine_backward(part, x[rows], W, dx[rows], dW, None)

    bare = seconds_of(xp, products)
    what = f"{N} × {D} × {C}, {name}"
    yield Result(f"{what}: three products", bare, "three products", 1.0)
    spent = seconds_of(xp, lambda: swl.linear_cross_entropy_value_and_grad(x, W, ids, backend=backend.name))
    yield Result(f"{what}: swl", spent, "three products", spent / bare)
    yield from torch_heads(what, bare, x, W, ids)


def torch_heads(what: str, bare: float, x: Any, W: Any, ids: Any) -> Iterator[Result]:
    """Measure torch on the same numbers, if there is a torch for this card."""
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    dtype = getattr(torch, x.dtype.name)
    tensors = [torch.from_numpy(a.get().astype(np.float32)).to("cuda", dtype).requires_grad_() for a in (x, W.T)]
    target = torch.from_numpy(ids.get()).cuda()
    calls = {"torch": lambda: torch.nn.functional.cross_entropy(tensors[0] @ tensors[1].T, target).backward()}
    own = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if own is not None:
        calls["torch, linear_cross_entropy"] = lambda: own(*tensors, target).backward()
    for name, call in calls.items():
        times = []
        try:
            for _ in range(ROUNDS + 2):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                call()
                torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
        except torch.OutOfMemoryError:
            yield Result(f"{what}: {name}, out of memory", float("nan"), "three products", float("nan"))
            continue
        spent = statistics.median(times[2:])
        yield Result(f"{what}: {name}", spent, "three products", spent / bare)


def table(results: list[dict[str, Any]]) -> str:
    """Write results as a table of Markdown."""
    lines = ["| what | ms | compared with | |", "|---|--:|---|--:|"]
    for r in results:
        share = f"{r['share']:.0%} of its bandwidth" if r["of"] == "copy" else f"{r['share']:.2f}×"
        lines.append(f"| {r['what']} | {1e3 * r['seconds']:.3f} | {r['of']} | {share} |")
    return "\n".join(lines)


def main(out: str, fake_driver: bool) -> int:
    """Measure, and write the results after each one."""
    if fake_driver:
        import fake

        if reason := fake.register():
            sys.exit(reason)
    backend = swl.backends.get("cupy-fake" if fake_driver else "cupy")
    shapes, of_heads = TINY if fake_driver else (SHAPES, HEADS)
    results: list[dict[str, Any]] = []
    for found in (*(sweeps(backend, *shape) for shape in shapes), *(heads(backend, *shape) for shape in of_heads)):
        for result in found:
            results.append(result._asdict())
            Path(out).write_text(json.dumps({"card": backend.info(), "results": results}, indent=1) + "\n")
        backend.xp.get_default_memory_pool().free_all_blocks()
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--fake" in sys.argv))
