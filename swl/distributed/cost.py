"""What a step of a class-parallel head costs a rank: work, bytes sent, messages, memory and time (docs/scale.md).

With R·K ranks, R groups of rows and K shards of the classes, a rank has ``n = N/R`` rows and ``c = C/K`` classes::

    flops     6·n·D·c                    three products; four where the budget is less than a few rows of the shard
    logits    n·c                        exponentials, losses and gradients of that many numbers
    bytes     2·(K−1)/K·4·n·(4 + D)      M, S, d, A and dx over the shards; independent of C
            + 2·(R−1)/R·4·D·c            dW over the groups of rows
    memory    2·D·c numbers + the budget W, dW

    seconds   flops/F + logits/E + bytes/B + collectives·L
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swl.distributed.comm import BLOCK, gather_numbers, sum_in_order
from swl.distributed.head import ClassParallelHead
from swl.ops.chunks import DEFAULT_BUDGET, plan
from swl.typing import Comm

__all__ = ["DEVICES", "Machine", "Measured", "Step", "agreement_bytes", "calibrate", "measure", "step_bytes"]


def agreement_bytes(P: int) -> int:
    """Bytes a rank sends so that all know that they are about to do the same."""
    return 17 * (P - 1)


def step_bytes(N: int, D: int, P: int, *, itemsize: int = 4, weighted: bool = False) -> float:
    """Bytes a rank sends in a step of the head, on average over the ranks; the number of classes plays no part.

    M, S, d and A of each row, and ``dx``, cross the network twice, save a P-th::

        2·(P − 1)/P · itemsize · N·(4 + D)        and one number more per row with class weights
    """
    return 2 * (P - 1) * itemsize * N * (4 + D + weighted) / P


class Machine(NamedTuple):
    """What one rank can do while the others do the same."""

    flops: float
    """F: of matrix products, per second."""
    logits: float
    """E: exponentials, losses and gradients, per second."""
    bandwidth: float
    """B: bytes sent per second in a collective."""
    latency: float
    """L: seconds of an all-to-all or all-gather of nothing."""


LOGIT_BYTES = 20
"""Bytes of device memory that a logit moves on its way to loss and gradient, float32."""


def _device(flops: float, memory: float) -> tuple[float, float]:
    """F and E of a device: its float32 products as they are, and the logits that its memory can move."""
    return flops, memory / LOGIT_BYTES


DEVICES = {
    "A100": _device(19.5e12, 2.039e12),
    "H100": _device(67e12, 3.35e12),
    "B200": _device(75e12, 8e12),
}
"""F and E by name, of the data sheets of the SXM boards with 80 GB (A100, H100) and of the HGX B200: peaks of float32 without
tensor cores, which are the products' default, and of the memory. A run reaches a part of either."""


class Step(NamedTuple):
    """A step of ClassParallelHead on a grid of ranks, in float32."""

    N: int
    """Rows of the whole batch."""
    D: int
    C: int
    """Classes of all ranks."""
    ranks: int
    class_parallel: int
    memory_budget: int = DEFAULT_BUDGET

    @property
    def groups(self) -> int:
        """Groups of ranks with different rows."""
        return self.ranks // self.class_parallel

    @property
    def rows(self) -> int:
        """Rows of a rank."""
        return -(-self.N // self.groups)

    @property
    def classes(self) -> int:
        """Classes of a rank."""
        return -(-self.C // self.class_parallel)

    @property
    def _plan(self) -> Any:
        return plan(self.rows, self.D, self.classes, memory_budget=self.memory_budget)

    @property
    def flops(self) -> int:
        """Floating-point operations of the products of a rank."""
        return int(self._plan.flops)

    @property
    def logits(self) -> int:
        """Logits of a rank."""
        return self.rows * self.classes

    @property
    def bytes_sent(self) -> float:
        """Bytes a rank sends."""
        over_classes = step_bytes(self.rows, self.D, self.class_parallel) + agreement_bytes(self.class_parallel)
        return over_classes + 2 * (self.groups - 1) / self.groups * 4 * (self.D + 1) * self.classes

    @property
    def collectives(self) -> int:
        """Collectives a rank takes part in, one after the other."""
        count = 0
        if self.class_parallel > 1:
            chunks = -(-self.rows // self._plan.rows)
            count += 1 + 2 * chunks + 2 * -(-4 * self.rows * self.D // BLOCK)
        return count + (2 if self.groups > 1 else 0)

    @property
    def memory(self) -> int:
        """Bytes of a rank: W, its gradient, and the working memory."""
        return 2 * 4 * (self.D + 1) * self.classes + int(self._plan.bytes)

    def times(self, machine: Machine) -> dict[str, float]:
        """Seconds of the parts of the step."""
        return {
            "products": self.flops / machine.flops,
            "softmax": self.logits / machine.logits,
            "bytes": self.bytes_sent / machine.bandwidth,
            "latency": self.collectives * machine.latency,
        }

    def seconds(self, machine: Machine) -> float:
        """Time of the step, nothing overlapped."""
        return sum(self.times(machine).values())

    def table(self, machine: Machine) -> Iterator[tuple[str, str]]:
        """Give what `swl plan` prints."""
        yield "a rank has", f"{self.rows:,} rows and {self.classes:,} classes"
        yield "memory", f"{self.memory / 2**20:,.1f} MiB: W, dW and {self._plan.bytes / 2**20:,.1f} MiB of work"
        yield "work", f"{self.flops / 1e9:,.1f} Gflop, {self.logits / 1e6:,.1f} million logits"
        yield "network", f"{self.bytes_sent / 1e6:,.3f} MB sent in {self.collectives} collectives"
        parts = self.times(machine)
        whole = ", ".join(f"{name} {seconds * 1e3:,.3g}" for name, seconds in parts.items())
        yield "time", f"{self.seconds(machine) * 1e3:,.3g} ms: {whole}"


class Measured(NamedTuple):
    """A step as it ran."""

    seconds: float
    """The slowest rank's time, in the best of the steps: neighbours on the machine only add to it."""
    memory: int
    """The largest peak over the ranks, above what was there before W; 0 where the system does not tell."""


def measure(comm: Comm, step: Step, repeats: int = 7) -> Measured:
    """Run a step with all ranks of `comm` sharing the classes; random inputs.

    Parameters
    ----------
    comm : communicator of ``step.ranks`` ranks
    step : Step
        With as many shards as ranks.
    repeats : int
        Steps that are timed, after one that is not.
    """
    if (step.ranks, step.class_parallel) != (comm.size, comm.size):
        raise ValueError(f"measure needs {comm.size} ranks and shards, as there are, got {step}")
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((step.N, step.D), dtype=np.float32), rng.integers(0, step.C, step.N)
    small = ClassParallelHead.init(comm, step.D, comm.size * 16)
    small.forward_backward(x, t % small.C)  # compiles, and brings in what every step needs
    before = _reset_peak()
    head = ClassParallelHead.init(comm, step.D, step.C, memory_budget=step.memory_budget)
    head.forward_backward(x, t)
    peak = _status("VmHWM") - before
    seconds = _best(comm, lambda: head.forward_backward(x, t), repeats)
    return Measured(seconds, int(gather_numbers(comm, peak).max()) if before else 0)


def calibrate(comm: Comm) -> Machine:
    """Measure the constants of the model on the ranks of `comm`, all working at once; takes a few seconds."""
    rows, classes = 256, 16384  # logits of 16 MiB: beyond the caches, as those of a step that is worth spreading
    times = {}
    for D in (8, 256):
        step = Step(rows, D, classes * comm.size, comm.size, comm.size)
        times[D] = measure(comm, step), step
    (few, a), (many, b) = times[8], times[256]
    latency = _best(comm, lambda: comm.Allgather(np.zeros(1), np.empty(comm.size))) if comm.size > 1 else 0.0
    big = np.zeros(2**20, np.float32)
    sent = 2 * (comm.size - 1) / comm.size * big.nbytes
    blocks = 2 * -(-big.nbytes // BLOCK)
    took = _best(comm, lambda: sum_in_order(comm, np, big))
    bandwidth = sent / max(took - blocks * latency, 1e-9) if comm.size > 1 else np.inf

    def local(measured: Measured, step: Step) -> float:
        return measured.seconds - step.bytes_sent / bandwidth - step.collectives * latency

    # two equations: flops/F + logits/E is the local time
    flops = (b.flops - a.flops) / max(local(many, b) - local(few, a), 1e-9)
    logits = a.logits / max(local(few, a) - a.flops / flops, 1e-9)
    return Machine(float(flops), float(logits), float(bandwidth), float(latency))


def _slowest(comm: Comm, work: Callable[[], object]) -> float:
    gather_numbers(comm, 0.0)  # all begin together
    begin = time.perf_counter()
    work()
    return float(gather_numbers(comm, time.perf_counter() - begin).max())


def _best(comm: Comm, work: Callable[[], object], repeats: int = 7) -> float:
    return min(_slowest(comm, work) for _ in range(repeats))


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def _reset_peak() -> int:
    """Let the peak of the process begin anew; gives its memory now, or 0 where that cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status("VmRSS")
