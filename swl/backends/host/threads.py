"""One pool of ordinary threads for everything that runs in parallel on the CPU, kernels and matrix products alike."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock, Thread, get_native_id

__all__ = ["POOL", "set_num_threads"]

PIECES = 8
"""Ranges for each thread, at most: who wakes up late, or shares a processor, takes fewer of them."""


def _available() -> int:
    """Count the processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Job:
    """Ranges of one piece of work, from which each thread that has time takes the next."""

    __slots__ = ("_left", "_lock", "_ranges", "done", "error", "work")

    def __init__(self, work: Callable[[int, int], object], ranges: deque[tuple[int, int]]) -> None:
        self.work: Callable[[int, int], object] | None = work
        self._ranges, self._left = ranges, len(ranges)
        self._lock = Lock()
        self.done = Lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Work until no range is left to take; the last one to finish its own releases `done`."""
        while True:
            try:
                begin, end = self._ranges.popleft()
            except IndexError:
                return
            try:
                if self.error is None and self.work is not None:
                    self.work(begin, end)
            except BaseException as error:  # raised again by the caller
                self.error = error
            with self._lock:
                self._left -= 1
                last = not self._left
            if last:
                self.done.release()


def _find_current_processor() -> Callable[[], int] | None:
    """Give what tells on which processor the calling thread runs, where threads can be kept off it; else None."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    return getattr(ctypes.PyDLL(None), "sched_getcpu", None)


_current_processor = _find_current_processor()


class Pool:
    """Run a function over ranges; the caller's own thread works too, and waits only for ranges that others have begun.

    So any number of Python threads may use it at once.
    """

    def __init__(self) -> None:
        self.threads = _available()
        self._jobs: SimpleQueue[_Job | None] | None = None
        self._starting = Lock()
        self._workers: list[tuple[int, set[int]]] = []  # their names to the system, and where they may run
        self._kept_off: int | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)  # the workers stayed with the parent

    def _forget(self) -> None:
        self._jobs, self._starting, self._workers = None, Lock(), []

    def resize(self, threads: int) -> None:
        """Use this many threads from now on."""
        with self._starting:
            jobs, workers = self._jobs, self.threads - 1
            self._jobs, self._workers, self.threads = None, [], threads
        if jobs is not None:
            for _ in range(workers):
                jobs.put(None)

    def run(self, work: Callable[[int, int], object], n: int, grain: int = 1) -> None:
        """Call ``work(begin, end)`` for ranges that cover ``[0, n)``, and wait for all; below `grain` they are not cut."""
        threads = self.threads
        parts = min(n // grain, PIECES * threads)
        if threads == 1 or parts <= 1:
            work(0, n)
            return
        edges = [n * k // parts for k in range(parts + 1)]
        job = _Job(work, deque(itertools.pairwise(edges)))
        jobs = self._jobs or self._started()
        self._keep_off()
        for _ in range(min(threads, parts) - 1):
            jobs.put(job)
        job.run()
        job.done.acquire()
        job.work = None  # a thread that comes late finds the job in the queue, and must not find its arrays alive
        error, job.error = job.error, None  # its traceback leads to the job: a circle, and the arrays in it
        if error is not None:
            try:
                raise error
            finally:
                del error

    def _keep_off(self) -> None:
        """Bar the workers from the caller's processor.

        A scheduler may wake a thread where its waker runs, though another processor is idle, and leave it there for
        milliseconds: the two then take turns (docs/performance.md).
        """
        if _current_processor is None:
            return
        here = _current_processor()
        if here == self._kept_off:
            return
        self._kept_off = here
        for worker, processors in self._workers:
            if others := processors - {here}:
                with suppress(OSError):  # the thread has ended, or may not be moved
                    os.sched_setaffinity(worker, others)

    def _serve(self, jobs: SimpleQueue[_Job | None], workers: list[tuple[int, set[int]]]) -> None:
        if _current_processor is not None:
            workers.append((get_native_id(), os.sched_getaffinity(0)))
            self._kept_off = None
        while (job := jobs.get()) is not None:
            job.run()
            del job  # and with it what the work refers to

    def _started(self) -> SimpleQueue[_Job | None]:
        with self._starting:
            if self._jobs is None:
                self._jobs = SimpleQueue()
                for i in range(self.threads - 1):
                    arguments = self._jobs, self._workers
                    Thread(target=self._serve, args=arguments, name=f"swl-{i + 1}", daemon=True).start()
            return self._jobs


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
