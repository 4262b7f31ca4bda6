"""One pool of ordinary threads for everything that runs in parallel on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Pool:
    """Run a function over ranges; the caller's thread takes the first range itself."""

    def __init__(self) -> None:
        self.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._workers: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)  # the workers stayed with the parent

    def _forget(self) -> None:
        self._workers = None

    def run(self, work: Callable[[int, int], object], n: int) -> None:
        """Call ``work(begin, end)`` for ranges that cover ``[0, n)``, one per thread, and wait for all."""
        parts = min(self.threads, n)
        if parts <= 1:
            work(0, n)
            return
        if self._workers is None:
            self._workers = ThreadPoolExecutor(self.threads - 1, "swl")
        edges = [n * k // parts for k in range(parts + 1)]
        others = [self._workers.submit(work, a, b) for a, b in zip(edges[1:-1], edges[2:], strict=True)]
        work(edges[0], edges[1])
        for other in others:
            other.result()


POOL = Pool()
