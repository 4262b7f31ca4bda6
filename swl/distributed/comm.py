"""What the distributed heads need of a communicator: sums in the order of the ranks, agreement, and a loud end.

A sum over P ranks is an all-to-all, after which every rank adds up its own P-th of the numbers in the order of the
ranks, and an all-gather: ``2·(P − 1)/P`` times the array are sent by each rank, as by the best reductions, and the bits
are the same on all ranks and in every run, which MPI does not promise of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from swl.backends.host.blas import control
from swl.backends.host.threads import POOL
from swl.distributed.watch import Watcher
from swl.ops.arrays import to_numpy
from swl.typing import Array, Comm

__all__ = ["Alone", "Counted", "Grid", "agree", "in_blocks", "run", "sum_in_order"]

BLOCK = 4 * 2**20
"""Bytes that are summed at a time: the extra memory of a sum. Larger ones are no faster (docs/scale.md)."""


class Grid(NamedTuple):
    """Ranks in a table: a row of it shares a part of the batch, a column a part of the classes."""

    data: Any
    """Communicator of the ranks with the same classes and different rows of the batch."""
    classes: Any
    """Communicator of the ranks with the same rows of the batch and different classes."""
    world: Any
    """Communicator of all of them."""

    @classmethod
    def of(cls, comm: Comm, class_parallel: int) -> Grid:
        """Arrange the ranks of `comm`, neighbours in the same row.

        Parameters
        ----------
        comm : mpi4py.MPI.Comm
        class_parallel : int
            Ranks that the classes are spread over; it must divide the number of ranks.

        Raises
        ------
        ValueError
            If it does not divide it.
        """
        if class_parallel < 1 or comm.size % class_parallel:
            raise ValueError(f"class_parallel must divide the number of ranks, {comm.size}, got {class_parallel}")
        row, column = divmod(comm.rank, class_parallel)
        return cls(comm.Split(column, row), comm.Split(row, column), comm)


class Counted:
    """A communicator that counts the bytes this rank sends to others and the collectives it takes part in.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, or the `transport` of a head or of DataParallel
        NCCL sends past the communicator of the ranks, so only its transport can be counted.

    Attributes
    ----------
    sent, calls : int
        Bytes, and collectives. Of a broadcast the root counts the bytes once.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.sent = self.calls = 0

    def _count(self, n_bytes: int) -> None:
        self.sent += n_bytes
        self.calls += 1

    def Allgather(self, send: Array, recv: Array) -> None:  # noqa: N802 - mpi4py's names
        """Count what goes to every other rank."""
        self._count(send.nbytes * (self.size - 1))
        self.comm.Allgather(send, recv)

    def Allgatherv(self, send: Array, recv: Array) -> None:  # noqa: N802
        """Count what goes to every other rank."""
        buffer, (counts, _) = recv
        self._count(int(counts[self.rank]) * buffer.itemsize * (self.size - 1))
        self.comm.Allgatherv(send, recv)

    def Alltoallv(self, send: Array, recv: Array) -> None:  # noqa: N802
        """Count all blocks but this rank's own."""
        buffer, (counts, _) = send
        self._count((sum(map(int, counts)) - int(counts[self.rank])) * buffer.itemsize)
        self.comm.Alltoallv(send, recv)

    def Ialltoallv(self, send: Array, recv: Array) -> Any:  # noqa: N802
        """Count as `Alltoallv`."""
        buffer, (counts, _) = send
        self._count((sum(map(int, counts)) - int(counts[self.rank])) * buffer.itemsize)
        return self.comm.Ialltoallv(send, recv)

    def Iallgatherv(self, send: Array, recv: Array) -> Any:  # noqa: N802
        """Count as `Allgatherv`."""
        buffer, (counts, _) = recv
        self._count(int(counts[self.rank]) * buffer.itemsize * (self.size - 1))
        return self.comm.Iallgatherv(send, recv)

    def Bcast(self, buffer: Array, root: int) -> None:  # noqa: N802
        """Count on the root."""
        self._count(buffer.nbytes if self.rank == root else 0)
        self.comm.Bcast(buffer, root)

    def __getattr__(self, name: str) -> Any:
        """Refuse what would not be counted."""
        # objects travel only where an error is reported, or something is set up
        if name in ("allgather", "bcast", "Get_rank", "Get_size", "Abort"):
            return getattr(self.comm, name)
        raise AttributeError(f"Counted does not count {name!r}")


class Alone:
    """The communicator of one process, for what it can do without MPI."""

    rank, size = 0, 1

    def Allgather(self, send: Array, recv: Array) -> None:  # noqa: N802 - mpi4py's name
        """Copy what this process has to where that of all of them is expected."""
        np.asarray(recv).reshape(-1)[...] = np.asarray(send).reshape(-1)

    def allgather(self, value: Any) -> list[Any]:
        """Return the list of this process's value alone."""
        return [value]

    def bcast(self, value: Any, root: int = 0) -> Any:
        """Return the value itself."""
        return value


def in_blocks(n: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``[0, n)`` into as many ranges, whose lengths differ by one at most."""
    edges = [n * k // parts for k in range(parts + 1)]
    return list(pairwise(edges))


def exchange(comm: Comm, xp: Any, rows: Array, work: Callable[[Array], Array]) -> Any:
    """Share out the last axis, let each rank `work` on its part of all ranks' arrays, and gather the results.

    Parameters
    ----------
    comm : communicator of P ranks, or transport of arrays of a device (`swl.distributed.transport`)
    xp : numpy or cupy
    rows : array, shape (k, n)
        The same shape on all ranks.
    work : callable
        Takes an array (P, k, n_part), in the order of the ranks, and gives one (j, n_part) of the same dtype.

    Returns
    -------
    array, shape (j, n)
    """
    k, n = rows.shape
    cuts = in_blocks(n, comm.size)
    sizes = np.array([b - a for a, b in cuts])
    mine = int(sizes[comm.rank])
    send = xp.concatenate([rows[:, a:b].ravel() for a, b in cuts])
    recv = xp.empty((comm.size, k, mine), rows.dtype)
    comm.Alltoallv([send, block_layout(k * sizes)], [recv, block_layout(np.full(comm.size, k * mine))])
    done = xp.ascontiguousarray(work(recv))
    j = done.shape[0]
    flat = xp.empty(j * n, rows.dtype)
    comm.Allgatherv(done, [flat, block_layout(j * sizes)])
    pieces = [flat[j * a : j * b].reshape(j, b - a) for a, b in cuts]
    return xp.concatenate(pieces, axis=1)


def block_layout(counts: Any) -> tuple[Any, Any]:
    """Give counts and offsets of blocks that lie one after the other, as MPI takes them."""
    return counts, np.concatenate(([0], np.cumsum(counts)[:-1]))


def sum_in_order(comm: Comm, xp: Any, x: Array) -> None:
    """Replace a contiguous array by its sum over the ranks, formed in their order, a block at a time.

    The result is bitwise the same on all ranks. Extra memory is `BLOCK` bytes. `comm` and `xp` are as for `exchange`.
    """
    if comm.size == 1:
        return
    if not x.flags.c_contiguous:
        raise ValueError("sum_in_order needs a contiguous array")
    flat = x.reshape(-1)
    step = max(comm.size, BLOCK // x.itemsize)
    for start in range(0, flat.size, step):
        block = flat[start : start + step]
        sizes = np.array([b - a for a, b in in_blocks(block.size, comm.size)])
        recv = xp.empty((comm.size, int(sizes[comm.rank])), x.dtype)
        comm.Alltoallv([block, block_layout(sizes)], [recv, block_layout(np.full(comm.size, recv.shape[1]))])
        comm.Allgatherv(ordered_sum(recv), [block, block_layout(sizes)])


def gather_values(comm: Comm, xp: Any, value: Any) -> Any:
    """Gather one number of each rank, a 0-d array of the device: shape (P,), float64."""
    found = xp.empty(comm.size, np.float64)
    comm.Allgatherv(xp.asarray(value, np.float64).reshape(1), [found, block_layout(np.ones(comm.size, int))])
    return found


def as_numpy(x: Array) -> Array:
    """Give a NumPy array: the same one, or a copy of a device array."""
    return x if isinstance(x, np.ndarray) else to_numpy(x)


def ordered_sum(parts: Any) -> Array:
    """``((parts[0] + parts[1]) + parts[2]) + …``, in the memory of the first."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def gather_numbers(comm: Comm, *numbers: float) -> Any:
    """Gather a few float64 of each rank: shape (P, len(numbers))."""
    found = np.empty((comm.size, len(numbers)))
    comm.Allgather(np.array(numbers, dtype=np.float64), found)
    return found


# ------------------------------------------------------------------------------------------------ agreement


def agree(comm: Comm, what: str, describe: Callable[[], str]) -> None:
    """Make sure that all ranks are about to do the same, before anything large is exchanged; 17 bytes per rank.

    Parameters
    ----------
    comm : communicator
    what : str
        What it is about, for the message.
    describe : callable
        Does this rank's checks and gives a description that must be the same on all ranks; what it raises is raised
        on all ranks.

    Raises
    ------
    ValueError
        If descriptions differ, naming them by rank.
    RuntimeError
        If `describe` raised on another rank, naming rank and cause. The rank itself raises what it was.
    """
    error: Exception | None = None
    try:
        text = describe()
    except Exception as raised:
        error, text = raised, f"{type(raised).__name__}: {raised}"
    mine = np.frombuffer(bytes([error is not None]) + hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint8)
    all_of_them = np.empty((comm.size, mine.size), np.uint8)
    comm.Allgather(mine, all_of_them)
    failed = np.flatnonzero(all_of_them[:, 0])
    if not failed.size and (all_of_them == all_of_them[0]).all():
        return
    texts = comm.allgather(text)
    if error is not None:
        error.add_note(f"raised on rank {comm.rank} of {comm.size}")
        raise error
    if failed.size:
        raise RuntimeError(f"{what}: rank {failed[0]} of {comm.size} failed: {texts[failed[0]]}")
    other = next(rank for rank, found in enumerate(texts) if found != texts[0])
    raise ValueError(f"{what}: ranks disagree. Rank 0 has {texts[0]}; rank {other} has {texts[other]}")


def from_rank_0(comm: Comm, make: Callable[[], Any]) -> Any:
    """Let rank 0 make something that can be pickled, and give it to all ranks; what it raises is raised on all."""
    made, error = None, None
    if comm.rank == 0:
        try:
            made = make()
        except Exception as raised:
            error = raised
    made, error = comm.bcast((made, error), 0)
    if error is not None:
        raise error
    return made


# ------------------------------------------------------------------------------------------------ start and end


@contextlib.contextmanager
def run() -> Iterator[Comm]:
    """Give the communicator of all ranks; what is raised within the block on one rank ends all of them.

    A message names the rank and the cause, and ``MPI_Abort`` then ends the job, because the other ranks may wait for
    this one in a collective for ever. An exit with a status other than 0 is such an end too. A rank that is killed from
    outside is named by a small process that watches it; ``mpiexec`` gives the signal and ends the others.

    Ranks that may all run on the same processors divide them: each takes its share of threads, instead of all
    (`share_processors`).

    Raises
    ------
    swl.BackendUnavailable
        If mpi4py or its MPI is not there.

    Examples
    --------
    >>> from swl import distributed
    >>> with distributed.run() as comm:
    ...     print(comm.rank, comm.size)
    0 1
    """
    comm = world()
    shared = importlib.import_module("mpi4py.MPI").COMM_TYPE_SHARED
    watcher = Watcher(comm, shared)
    try:
        with share_processors(comm.Split_type(shared)):
            yield comm
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if comm.size == 1 or status in (None, 0):
            watcher.dismiss()
            raise
        if isinstance(error, SystemExit):
            text = f"exit status {status}"
        else:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
        watcher.silence()
        print(f"swl: rank {comm.rank} of {comm.size} failed: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        time.sleep(1)  # mpiexec drops what it has not read yet when a job aborts
        comm.Abort(status if isinstance(status, int) else 1)
    watcher.dismiss()


@contextlib.contextmanager
def share_processors(machine: Any) -> Iterator[None]:
    """Let ranks that may run on the same processors have a share of the threads each, of swl's pool and of NumPy's BLAS.

    Nothing is changed for a rank that ``mpiexec`` has bound to processors of its own, for another number of threads than
    that of the processors, set by `swl.set_num_threads`, nor for BLAS where an environment variable says how many.

    Parameters
    ----------
    machine : communicator
        The ranks of this machine.
    """
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    ranks = machine.allgather(here).count(here)
    share, before = max(1, len(here) // ranks), POOL.granted
    said = any(os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    blas = None if said else control()
    blas_before = share if blas is None else blas.get()
    with contextlib.ExitStack() as undo:
        if before.number == len(here) != share:
            undo.callback(POOL.resize, *before)
            POOL.resize(share)
        if blas is not None and blas_before > share:
            undo.callback(blas.set, blas_before)
            blas.set(share)
        yield


def world() -> Any:
    """Give ``MPI.COMM_WORLD``; the first call starts MPI."""
    from swl.errors import BackendUnavailable

    try:
        return importlib.import_module("mpi4py.MPI").COMM_WORLD
    except ModuleNotFoundError:
        raise BackendUnavailable("swl.distributed needs mpi4py and an MPI: pip install mpi4py mpich") from None
    except (ImportError, RuntimeError) as error:  # mpi4py without an MPI library
        raise BackendUnavailable(f"mpi4py found no MPI library ({error}): pip install mpich brings one") from None


def launched() -> bool:
    """Tell whether this process was started by an mpiexec, without starting MPI."""
    return any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"))
