"""Bytes that the kernels read and write for each logit, counted by the fake driver.

    python tests/cuda/traffic.py            prints the table of docs/cuda.md; fails if a limit is exceeded

One read of a logit is its size in bytes. The floor is one read for the forward sweep; one read and one write for the
backward sweep, and for both at once where a row stays on chip.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import branches
import fake
import fakecuda
import ml_dtypes
import numpy as np
from fakecuda import strict

from swl.backends.cupy.backend import CupyBackend
from swl.backends.protocol import Target

H100, A100, A10 = 227 * 1024, 163 * 1024, 99 * 1024  # bytes of shared memory that one block may have


class Row(NamedTuple):
    """One line of the table, and the most that it may read and write."""

    variant: str
    dtype: str
    C: int
    shared: int
    clusters: bool
    sweeps: str
    reads: float
    writes: float
    most_reads: float
    most_writes: float

    def ok(self) -> bool:
        return self.reads <= self.most_reads and self.writes <= self.most_writes


# C, dtype, rows, multiprocessors (few rows are split where 3·N ≤ this), shared memory of the device, whether it has clusters
SHAPES = (
    (10, np.float32, 256, 132, H100, True),
    (500, np.float32, 8, 132, H100, True),
    (1000, np.float32, 8, 3, H100, True),
    (32000, np.float32, 2, 3, H100, True),
    (32000, np.float32, 2, 3, A10, False),
    (49500, np.float32, 2, 3, A100, False),
    (66000, np.float32, 2, 3, H100, True),
    (128256, np.float32, 2, 3, A100, False),
    (128256, np.float32, 2, 3, H100, True),
    (262144, np.float32, 2, 3, H100, True),
    (50257, ml_dtypes.bfloat16, 2, 3, H100, True),
    (50257, ml_dtypes.bfloat16, 2, 3, A10, False),
    (99000, ml_dtypes.bfloat16, 2, 3, A100, False),
    (128256, ml_dtypes.bfloat16, 2, 3, H100, True),
    (262144, ml_dtypes.bfloat16, 2, 3, H100, True),
    (262144, np.float16, 2, 3, H100, True),
    (128256, np.float32, 2, 16, H100, True),
    (1000000, np.float32, 1, 132, H100, True),
)


def count(call: Callable[[], Any]) -> tuple[list[str], int, int]:
    """Give the kernels that a call launches, and the bytes that they read and write."""
    names: list[str] = []

    def observe(launch: strict.Launch) -> None:
        if launch.done:
            names.append(launch.name.split("<")[0].removeprefix("ce_"))

    device = fake.cupy().cuda.Device()
    device.synchronize()
    fakecuda.traffic()
    strict.observers.append(observe)
    try:
        call()
    finally:
        strict.observers.remove(observe)
    device.synchronize()
    moved = fakecuda.traffic()
    return names, moved.bytes_read, moved.bytes_written


def measure_shape(C: int, scalar: Any, N: int, processors: int, shared: int, clusters: bool) -> Iterator[Row]:
    """Run a shape forward, backward and both, and count."""
    dtype = np.dtype(scalar)
    with branches.small_device(processors, shared, clusters):
        backend = CupyBackend(fake.cupy())
        logits = backend.asarray(np.random.default_rng(0).normal(size=(N, C)).astype(dtype))
        ids, _, _ = backend.prepare_ids(backend.asarray(np.arange(N) % C), C, -100, None)
        target, scale = Target(ids=ids), backend.asarray(np.ones(1, np.float32))
        grad = backend.empty((N, C), dtype)
        rows = backend.cross_entropy_forward(logits, target, False)
        calls: dict[str, Callable[[], Any]] = {
            "forward": lambda: backend.cross_entropy_forward(logits, target, False),
            "backward": lambda: backend.cross_entropy_backward(logits, target, rows, scale, grad),
            "both": lambda: backend.cross_entropy_forward_backward(logits, target, scale, grad, False),
        }
        for sweeps, call in calls.items():
            names, *moved = count(call)
            read, written = (n / (N * C * dtype.itemsize) for n in moved)
            reads = 1 if sweeps != "both" or names in (["rows"], ["cluster"]) else 2  # of each logit
            # in a short row what is moved once per row weighs much: id, M, S, A, scale, and the class id's column once more
            short = C < 100
            yield Row(
                " + ".join(names),
                dtype.name,
                C,
                shared,
                clusters,
                sweeps,
                read,
                written,
                1.75 if short else 1.02 if reads == 1 else 2.05,
                (sweeps != "forward") + (0.6 if short else 0.02),
            )


def measure() -> list[Row]:
    """Measure every shape."""
    return [row for shape in SHAPES for row in measure_shape(*shape)]


def main() -> int:
    if reason := fake.register():
        sys.exit(reason)
    fake.cupy()  # loads the fake driver
    table = measure()
    print("| classes | logits | shared memory, clusters | sweep | kernels | reads | at most | writes | at most |")
    print("|--:|---|--:|---|---|--:|--:|--:|--:|")
    for row in table:
        device = f"{row.shared // 1024} KiB{', yes' * row.clusters}"
        print(
            f"| {row.C} | {row.dtype} | {device} | {row.sweeps} | {row.variant} | {row.reads:.4f} "
            f"| {row.most_reads:.2f} | {row.writes:.4f} | {row.most_writes:.2f} |{'' if row.ok() else ' TOO MUCH |'}"
        )
    return sum(not row.ok() for row in table)


if __name__ == "__main__":
    sys.exit(main() != 0)
