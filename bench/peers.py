"""Cross-entropy on the CPU beside its peers and beside a copy of the logits: ``python bench/peers.py [--plot FILE]``.

Contenders that are called in turn disturb each other through threads that go on spinning, so each is measured in blocks: a
pause, one call that does not count, four that do, then the next contender; several rounds; medians. The copy, by two threads
into memory that is there already, is the floor: one read and one write of each logit. Everything goes through the public
functions, on float32 logits and int64 ids.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import swl
from swl.backends._threads import POOL

SHAPES = [(512, 50257), (2048, 32000), (64, 128256), (4096, 1000), (128, 10)]
FORWARD, BOTH = "forward", "forward + backward"
Call = Callable[[], Any]


def blocks(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Measure the median seconds of a call of each contender."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.05)
            repeat = 1
            start = time.perf_counter()
            call()
            if time.perf_counter() - start < 1e-3:
                repeat = 200  # of calls this short, the clock sees many
            for _ in range(4):
                start = time.perf_counter()
                for _ in range(repeat):
                    call()
                times[name].append((time.perf_counter() - start) / repeat)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def swl_calls(z: Any, t: Any) -> dict[str, Call]:
    """Give swl itself (into a given array, into a new one, forward only) and the floor."""
    out, copied = np.empty_like(z), np.empty_like(z)
    return {
        "copy": lambda: POOL.run(lambda a, b: np.copyto(copied[a:b], z[a:b]), len(z)),
        "swl, out=": lambda: swl.cross_entropy_value_and_grad(z, t, out=out),
        "swl, new": lambda: swl.cross_entropy_value_and_grad(z, t),
        "swl, forward": lambda: swl.cross_entropy(z, t),
    }


def torch_calls(z: Any, t: Any, compiled: bool) -> dict[str, Call]:
    """Give PyTorch eager and compiled, if it is installed."""
    try:
        import torch
    except ImportError:
        return {}
    F = torch.nn.functional
    torch.set_num_threads(POOL.threads)
    zt, tt = torch.from_numpy(z).requires_grad_(), torch.from_numpy(t)

    def both(loss: Any) -> Call:
        def call() -> None:
            zt.grad = None
            loss(zt, tt).backward()

        return call

    def forward() -> None:
        with torch.inference_mode():
            F.cross_entropy(zt, tt)

    calls = {"torch": both(F.cross_entropy), "torch, forward": forward}
    if compiled:
        calls["torch.compile"] = both(torch.compile(F.cross_entropy, dynamic=False))
    return calls


def jax_calls(z: Any, t: Any) -> dict[str, Call]:
    """Give JAX jit, if it is installed."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return {}

    def loss(z: Any, t: Any) -> Any:
        u = z - jax.lax.stop_gradient(z.max(axis=1, keepdims=True))
        at = jnp.take_along_axis(u, t[:, None], axis=1)[:, 0]
        return (jnp.log(jnp.exp(u).sum(axis=1)) - at).mean()

    both = jax.jit(jax.value_and_grad(loss))
    zj, tj = jnp.asarray(z), jnp.asarray(t)
    return {"JAX jit": lambda: jax.block_until_ready(both(zj, tj))}


def numpy_calls(z: Any, t: Any) -> dict[str, Call]:
    """Give the two lines of the book, done right, by hand."""

    def both() -> Any:
        u = z - z.max(axis=1, keepdims=True)
        p = np.exp(u)
        s = p.sum(axis=1, keepdims=True)
        loss = (np.log(s[:, 0]) - u[np.arange(len(z)), t]).mean()
        p /= s
        p[np.arange(len(z)), t] -= 1
        p /= len(z)
        return loss, p

    return {"NumPy": both}


def measure(N: int, C: int, rounds: int, peers: bool) -> dict[str, float]:
    """Measure the median seconds of every contender on one shape, after a check that they agree."""
    rng = np.random.default_rng(0)
    z, t = rng.standard_normal((N, C), np.float32), rng.integers(0, C, N)
    calls = swl_calls(z, t)
    with swl.use_backend("numba"):
        want = numpy_calls(z, t)["NumPy"]()
        loss, grad = swl.cross_entropy_value_and_grad(z, t)
        if not (abs(loss - want[0]) <= 1e-5 * want[0] and np.abs(grad - want[1]).max() <= 1e-5 / N):
            raise AssertionError(f"swl computes something else at {N} x {C}")
        if peers:
            calls |= torch_calls(z, t, compiled=N * C > 10_000) | jax_calls(z, t) | numpy_calls(z, t)
        return blocks(calls, rounds)


def table(results: dict[tuple[int, int], dict[str, float]]) -> str:
    """Print times in ms, and what they are of swl's own, as Markdown."""
    names = list(dict.fromkeys(name for times in results.values() for name in times))
    lines = ["| N × C | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for (N, C), times in results.items():
        cells = []
        for name in names:
            if name not in times:
                cells.append("")
                continue
            own = times["swl, forward" if name.endswith("forward") else "swl, out="]
            ratio = f" ({times[name] / own:.2f}×)" if not name.startswith("swl") else ""
            cells.append(f"{times[name] * 1e3:.3g}{ratio}")
        lines.append(f"| {N} × {C} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(file: str, rounds: int) -> None:
    """Draw time per logit over C at 2^24 logits, the floor among the contenders."""
    from matplotlib.figure import Figure

    sizes = [10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000]
    series: dict[str, list[tuple[int, float]]] = {}
    for C in sizes:
        N = max(1, 2**24 // C)
        for name, seconds in measure(N, C, rounds, peers=True).items():
            if not name.endswith("forward"):
                series.setdefault(name, []).append((C, seconds / (N * C) * 1e9))
        print(f"C = {C} done", file=sys.stderr)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="classes C, at 2²⁴ logits", ylabel="ns per logit, forward + backward")
    for name, points in series.items():
        style = {"color": "black", "linestyle": "--"} if name == "copy" else {"marker": "o", "markersize": 3}
        axes.loglog(*zip(*points, strict=True), label="copy of the logits" if name == "copy" else name, **style)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="swl and the copy only")
    parser.add_argument("--plot", metavar="FILE", help="draw time per logit over C instead")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.plot, arguments.rounds)
        return
    results = {}
    for N, C in SHAPES:
        results[N, C] = measure(N, C, arguments.rounds, peers=not arguments.no_peers)
        print(f"{N} x {C} done", file=sys.stderr)
    print("Milliseconds, and in brackets as a multiple of swl's own (forward beside forward).\n")
    print(table(results))


if __name__ == "__main__":
    main()
