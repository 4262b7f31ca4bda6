"""One pool of ordinary threads for everything that runs in parallel on the CPU, kernels and matrix products alike."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

__all__ = ["POOL", "set_num_threads"]


def _available() -> int:
    """Count the processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Run a function over ranges; the caller's thread takes the first range itself.

    Work never waits for other work of the pool, so any number of Python threads may use it at once.
    """

    def __init__(self) -> None:
        self.threads = _available()
        self._workers: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)  # the workers stayed with the parent

    def _forget(self) -> None:
        self._workers = None

    def resize(self, threads: int) -> None:
        """Use this many threads from now on."""
        workers, self._workers, self.threads = self._workers, None, threads
        if workers is not None:
            workers.shutdown(wait=False)

    def run(self, work: Callable[[int, int], object], n: int) -> None:
        """Call ``work(begin, end)`` for ranges that cover ``[0, n)``, one per thread, and wait for all."""
        parts = min(self.threads, n)
        if parts <= 1:
            work(0, n)
            return
        edges = [n * k // parts for k in range(parts + 1)]
        others = [self._submit(work, a, b) for a, b in itertools.pairwise(edges[1:])]
        try:
            work(edges[0], edges[1])
        finally:
            wait(others)  # what they write to must outlive them
        for other in others:
            other.result()

    def _submit(self, work: Callable[[int, int], object], begin: int, end: int) -> Future[object]:
        while True:
            workers = self._workers
            if workers is None:
                workers = self._workers = ThreadPoolExecutor(max(1, self.threads - 1), "swl")
            try:
                return workers.submit(work, begin, end)
            except RuntimeError:  # another thread has resized the pool in between
                if workers is self._workers:
                    raise


POOL = Pool()


def set_num_threads(n: int | None = None) -> None:
    """Set the number of threads that the Numba backend uses; None for all processors this process may run on.

    Results are the same, to the last bit, for any number.

    Raises
    ------
    TypeError, ValueError
        If `n` is not a positive integer.

    Examples
    --------
    >>> import swl
    >>> swl.set_num_threads(1)
    >>> swl.set_num_threads()
    """
    if n is None:
        n = _available()
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an integer above 0 or None, got {n!r}")
    if n < 1:
        raise ValueError(f"n must be above 0, got {n}")
    POOL.resize(n)
