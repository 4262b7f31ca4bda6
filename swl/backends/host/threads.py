"""One pool of ordinary threads for everything that runs in parallel on the CPU, kernels and matrix products alike.

A signal handler may run between any two lines of the caller, call swl again, and raise. So nothing here holds a lock: what
threads share are queues, sets and counters whose single operations are atomic, and every line leaves them consistent.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from swl.backends.host.limits import OWN, Threads, default_threads, processors

__all__ = ["POOL", "get_num_threads", "set_num_threads"]

PIECES = 8
"""Ranges for each thread, at most: who wakes up late, or shares a processor, takes fewer of them."""


SET = "set_num_threads"
"""The source of a number that the user has set."""


class _Job:
    """Ranges of one piece of work, from which each thread that has time takes the next."""

    __slots__ = ("_at_work", "_begun", "_edges", "_left", "_next", "error", "parts", "work")

    def __init__(self, work: Callable[[int, int], object], n: int, parts: int) -> None:
        self.work = work
        self.parts = parts
        self._edges = [n * k // parts for k in range(parts + 1)]
        self._next = itertools.count()
        self._begun = False  # every range: who comes late need not look
        self._at_work: set[int] = set()  # threads of the pool that may have begun a range
        self._left: SimpleQueue[None] = SimpleQueue()
        self.error: BaseException | None = None

    def work_off(self) -> None:
        """Work until no range is left to begin; who has taken one and sees `parts` at 0 drops it, so only errors set that."""
        while (part := next(self._next)) < self.parts:
            self.work(self._edges[part], self._edges[part + 1])
        self._begun = True

    def assist(self) -> None:
        """Do so on a thread of the pool; an error ends the job, and is kept for the caller."""
        if self._begun:
            return
        me = _thread.get_ident()
        self._at_work.add(me)  # before a range is begun: who finds none left and nobody at work is done
        try:
            self.work_off()
        except BaseException as error:
            self.parts = 0
            self.error = error
        finally:
            self._at_work.discard(me)
            self._left.put(None)

    def wait(self) -> None:
        """Wait for the threads of the pool that are at work."""
        while self._at_work:
            self._left.get()

    def uninterrupted(self) -> Callable[[], object]:
        """Return what also waits for them, in one call in C: no signal handler runs before it is over."""
        naps = map(_nap, itertools.repeat(100))
        return functools.partial(all, zip(iter(self._at_work.__len__, 0), naps, strict=False))


def _find_nap() -> Callable[[int], object]:
    """Return the function that sleeps for some microseconds; unlike `time.sleep`, it leaves signals to its caller."""
    return ctypes.CDLL(None).usleep if os.name == "posix" else lambda _: time.sleep(0)


_nap = _find_nap()


def _find_current_processor() -> Callable[[], int] | None:
    """Return the function that tells on which processor the calling thread runs; None where threads cannot be kept off it."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    return getattr(ctypes.PyDLL(None), "sched_getcpu", None)


_current_processor = _find_current_processor()


class _Crew:
    """The threads of a pool of one size, with the queue from which they take jobs."""

    def __init__(self, granted: Threads) -> None:
        self.granted = granted
        self.threads = granted.number
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.workers: list[int] = []  # their names to the system
        self._started: list[int] = []
        self._placed: tuple[int, set[int], int] | None = None

    def recruit(self) -> int:
        """Start the threads that are missing, as many as the system grants, and count all."""
        with suppress(RuntimeError, MemoryError):  # the system grants no more; later calls try again
            while len(self._started) < self.threads - 1:
                # unlike Thread.start, this waits for nothing and holds no lock
                self._started.append(_thread.start_new_thread(self._serve, ()))
        return len(self._started)

    def _serve(self) -> None:
        self.workers.append(_thread.get_native_id())
        while (job := self.jobs.get()) is not None:
            job.assist()
            del job  # and with it what the work refers to
        self.jobs.put(None)  # for the next of them

    def dismiss(self) -> None:
        """Let the threads end once they have done what was handed out before."""
        self.jobs.put(None)

    def keep_off(self) -> None:
        """Let the threads run where the caller may run, but not on the processor where it does.

        A scheduler may wake a thread where its waker runs, though another processor is idle, and leave it there for
        milliseconds: the two then take turns (docs/performance.md).
        """
        if _current_processor is None:
            return
        here, allowed = _current_processor(), os.sched_getaffinity(0)
        place = here, allowed, len(self.workers)
        if place == self._placed:
            return
        self._placed = place
        for worker in self.workers.copy():
            with suppress(OSError):  # the thread has ended, or may not be moved
                os.sched_setaffinity(worker, allowed - {here} or allowed)


class Pool:
    """Run a function over ranges; the caller's own thread works too, and waits only for ranges that others have begun.

    So any number of Python threads may use it at once.
    """

    def __init__(self) -> None:
        self._current: dict[None, _Crew] = {}  # one, from the first use on
        self._crews: set[_Crew] = set()  # it, and those still to be dismissed
        self._limits: dict[str, Callable[[], int]] = {"processors": processors}  # which may have become fewer
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)  # the threads stayed with the parent

    def _forget(self) -> None:
        granted, self._current = self._current and self._crew.granted, {}
        self._crews = set()
        if granted:
            self.resize(*granted)

    @property
    def _crew(self) -> _Crew:
        crew = self._current.get(None)
        if crew is None:  # of several threads that come first, one has its way
            crew = self._current.setdefault(None, _Crew(default_threads()))
            self._crews.add(crew)
        return crew

    def limit(self, source: str, number: Callable[[], int]) -> None:
        """Let another program in this process limit the threads, unless the user has set their number."""
        self._limits = {**self._limits, source: number}  # another thread may be going through the old one

    @property
    def granted(self) -> Threads:
        """How many threads there are, the caller's own among them, and who says so."""
        granted = self._crew.granted
        if granted.source in (SET, OWN):
            return granted
        found = (Threads(number(), source) for source, number in self._limits.items())
        return min(granted, *found, key=lambda threads: threads.number)

    @property
    def threads(self) -> int:
        """The number of threads, the caller's own among them."""
        return self.granted.number

    def resize(self, threads: int, source: str = SET) -> None:
        """Use this many threads from now on."""
        crew = _Crew(Threads(threads, source))
        self._current[None] = crew
        self._crews.add(crew)
        for crew in self._crews.copy():
            if crew is not self._crew:  # it may be ours, where another thread or a signal handler came after us
                crew.dismiss()
                self._crews.discard(crew)

    def run(self, work: Callable[[int, int], object], n: int, grain: int = 1) -> None:
        """Call ``work(begin, end)`` for ranges that cover ``[0, n)``, and wait for all; below `grain` they are not cut.

        Where an error or an interrupt ends the work early, nobody is at work any more when it reaches the caller.
        """
        crew = self._crew
        threads = 1 if crew.threads == 1 or n // grain <= 1 else self.threads
        if threads == 1:
            work(0, n)
            return
        parts = min(n // grain, PIECES * threads)
        job = _Job(work, n, parts)
        wait = job.uninterrupted()
        try:
            helpers = min(crew.recruit(), threads - 1, parts - 1)
            crew.keep_off()
            for _ in range(helpers):
                crew.jobs.put(job)
            job.work_off()
            job.wait()
        except BaseException:
            job.parts = 0  # nobody begins another range
            wait()
            raise
        finally:
            del job.work  # a thread that comes late finds the job in the queue, and must not find its arrays alive
            error, job.error = job.error, None  # its traceback leads to the job: a circle, and the arrays in it
        if error is not None:
            try:
                raise error
            finally:
                del error


POOL = Pool()


def set_num_threads(n: int | None = None) -> None:
    """Set the number of threads that the Numba backend uses; None for what the process starts with.

    That is ``SWL_NUM_THREADS`` where the environment has it, or else the least of: the processors this process may run on, the
    CPU quota of its control groups, ``OMP_NUM_THREADS``, ``NUMBA_NUM_THREADS`` and ``OPENBLAS_NUM_THREADS``. In the second case
    processors that are taken away later count too, and once `swl.torch` is imported ``torch.get_num_threads()``. Results are the
    same, to the last bit, for any number.

    Raises
    ------
    TypeError, ValueError
        If `n` is not a positive integer; for None, if ``SWL_NUM_THREADS`` is not.

    Examples
    --------
    >>> import swl
    >>> swl.set_num_threads(1)
    >>> swl.set_num_threads()
    """
    if n is None:
        POOL.resize(*default_threads())
        return
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an integer above 0 or None, got {n!r}")
    if n < 1:
        raise ValueError(f"n must be above 0, got {n}")
    POOL.resize(n)


def get_num_threads() -> int:
    """Return the number of threads that the Numba backend uses, the caller's own among them."""
    return POOL.threads
