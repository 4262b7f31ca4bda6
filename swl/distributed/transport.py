"""How arrays of a device travel between ranks: through the host, by an MPI that reads device memory, or by NCCL.

All three are communicators, with those of mpi4py's methods that move arrays, so whoever sums or gathers sees no difference;
and since sums are formed here (`swl.distributed.comm`), in the order of the ranks, not even the bits differ. Arrays of a
host need none of this: they go to the communicator of the caller.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from swl.backends import Backend, active, get
from swl.distributed.comm import agree, from_rank_0
from swl.errors import BackendUnavailable
from swl.typing import Array, Comm

__all__ = ["ThroughHost", "ThroughMpi", "ThroughNccl", "over", "own_device"]

SETTING = "SWL_TRANSPORT"
LEGAL = ("auto", "host", "mpi", "nccl")


def over(comm: Comm, backend: Backend) -> Any:
    """Give the communicator by which arrays of a backend travel; all ranks call it together.

    Parameters
    ----------
    comm : communicator of mpi4py's kind
    backend : Backend
        Its device, if it has one, is the current one.

    Returns
    -------
    communicator
        `comm` itself for arrays of a host. For those of a device what the environment variable ``SWL_TRANSPORT`` names:
        ``host``, ``mpi`` or ``nccl``; or, by default, ``nccl`` where it is installed and every rank has a device of its
        own, else ``host``.

    Raises
    ------
    ValueError
        If ``SWL_TRANSPORT`` is none of these, or differs between ranks.
    swl.BackendUnavailable
        If what it names is not there, on all ranks.
    """
    xp: Any = backend.xp
    if xp is np:
        return comm
    wanted = ""

    def describe() -> str:
        nonlocal wanted
        wanted = os.environ.get(SETTING) or "auto"
        if wanted not in LEGAL:
            raise ValueError(f"{SETTING} is {wanted!r}; legal are {', '.join(LEGAL)}")
        return f"{SETTING} {wanted}, arrays of {backend.name}"

    agree(comm, "transport of device arrays", describe)
    if wanted == "mpi":
        _require(comm, _why_not_mpi())
        return ThroughMpi(comm, xp)
    if wanted != "host" and comm.size > 1:
        nccl, reason = _nccl(xp)
        bus = xp.cuda.runtime.deviceGetPCIBusId(xp.cuda.Device().id)
        places = comm.allgather((platform.node(), bus))
        if not reason and len(set(places)) < comm.size:
            reason = f"it needs a device of its own for every rank, got {comm.size} ranks on {len(set(places))} devices"
        if wanted == "nccl":
            _require(comm, reason and f"{SETTING} is 'nccl', but {reason}")
        if not any(comm.allgather(reason)):
            return ThroughNccl(comm, xp, nccl)
    return ThroughHost(comm, xp)


def own_device(comm: Comm) -> None:
    """Make a device of this rank's own the current one, if the active backend has devices: the k-th for the k-th rank here.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All ranks, those of other machines included. Where a machine has more ranks than devices, they share them.
    """
    xp: Any = get(active()).xp
    here = comm.Split_type(importlib.import_module("mpi4py.MPI").COMM_TYPE_SHARED).rank
    if xp is not np:
        xp.cuda.Device(here % xp.cuda.runtime.getDeviceCount()).use()


def _require(comm: Comm, reason: str) -> None:
    """Raise on all ranks what speaks against a transport on one."""
    for rank, found in enumerate(comm.allgather(reason)):
        if found:
            raise BackendUnavailable(f"{found} (rank {rank} of {comm.size})")


def _nccl(xp: Any) -> tuple[Any, str]:
    """Give CuPy's module of NCCL, and why it cannot be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns of a library that nobody may have asked for
        nccl = importlib.import_module(f"{xp.__name__}.cuda.nccl")
    return nccl, "" if nccl.available else "CuPy cannot load it: pip install nvidia-nccl-cu12, or -cu13 for CUDA 13"


def _why_not_mpi() -> str:
    """Ask the MPI for what speaks against handing it device memory, if it can be asked: it would crash."""
    library = ctypes.CDLL(importlib.import_module("mpi4py.MPI").__file__)
    try:
        answer = library.MPIX_Query_cuda_support()  # of MPICH and of Open MPI
    except AttributeError:
        return ""
    return "" if answer else f"{SETTING} is 'mpi', but this MPI says that it cannot read device memory"


# ------------------------------------------------------------------------------------------------ the three


class _Transport:
    """What the three share: a collective that waits is one that does not, waited for."""

    def __init__(self, comm: Comm, xp: Any) -> None:
        self.comm, self.xp, self.rank, self.size = comm, xp, comm.rank, comm.size

    def Ialltoallv(self, send: Array, recv: Array) -> Any:  # noqa: N802 - mpi4py's names
        """Send a block to each rank and receive one from each; buffers as ``[array, (counts, offsets)]``."""
        raise NotImplementedError

    def Iallgatherv(self, send: Array, recv: Array) -> Any:  # noqa: N802
        """Send an array to all ranks, and receive theirs as ``[array, (counts, offsets)]``."""
        raise NotImplementedError

    def Alltoallv(self, send: Array, recv: Array) -> None:  # noqa: N802
        """Do `Ialltoallv` to its end."""
        self.Ialltoallv(send, recv).Wait()

    def Allgatherv(self, send: Array, recv: Array) -> None:  # noqa: N802
        """Do `Iallgatherv` to its end."""
        self.Iallgatherv(send, recv).Wait()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size} ranks)"


class ThroughHost(_Transport):
    """Device arrays copied to page-locked memory of the host, sent by any MPI, and copied to the device of the receiver.

    The host waits for the device twice: until an array is here, and until what came is there.
    """

    def Ialltoallv(self, send: Array, recv: Array) -> Any:  # noqa: N802
        """Send a block to each rank and receive one from each."""
        (a, sizes), (b, layout) = send, recv
        here, there = self._copied(a), self._like(b)
        return _Request(self.comm.Ialltoallv([here, sizes], [there, layout]), lambda: self._return(there, b), here)

    def Iallgatherv(self, send: Array, recv: Array) -> Any:  # noqa: N802
        """Send an array to all ranks, and receive theirs."""
        b, layout = recv
        here, there = self._copied(send), self._like(b)
        return _Request(self.comm.Iallgatherv(here, [there, layout]), lambda: self._return(there, b), here)

    def Bcast(self, x: Array, root: int) -> None:  # noqa: N802
        """Give all ranks the root's array."""
        there = self._copied(x)
        self.comm.Bcast(there, root)
        self._return(there, x)

    def _like(self, x: Array) -> Any:
        if not x.size:
            return np.empty(x.shape, x.dtype)
        return np.ndarray(x.shape, x.dtype, self.xp.cuda.alloc_pinned_memory(x.nbytes))

    def _copied(self, x: Array) -> Any:
        return x.get(out=self._like(x)) if x.size else self._like(x)

    def _return(self, there: Any, x: Array) -> None:
        if x.size:
            x[...] = self.xp.asarray(there)
            self.xp.cuda.get_current_stream().synchronize()  # or others would get the memory that is still read


class _Request:
    """A request of MPI's whose data is still to be brought to the device."""

    def __init__(self, request: Any, finish: Callable[[], None], keep: Any) -> None:
        self.request, self.finish, self.keep = request, finish, keep

    def Test(self) -> bool:  # noqa: N802
        """Let the MPI go on."""
        return bool(self.request.Test())

    def Wait(self) -> None:  # noqa: N802
        """Wait for the MPI, then copy."""
        self.request.Wait()
        self.finish()


class ThroughMpi(_Transport):
    """Device memory handed to an MPI that reads and writes it.

    MPI knows nothing of streams: what is to be sent must be there, and what still uses the memory that is received into must
    be done. So the host waits for the current stream before each collective; what comes after one needs no waiting, since
    MPI returns when the data is there. All of them are blocking ones: Open MPI takes device memory in no others.
    """

    def Ialltoallv(self, send: Array, recv: Array) -> Any:  # noqa: N802
        """Send a block to each rank and receive one from each."""
        self._settle()
        self.comm.Alltoallv(send, recv)
        return _DONE

    def Iallgatherv(self, send: Array, recv: Array) -> Any:  # noqa: N802
        """Send an array to all ranks, and receive theirs."""
        self._settle()
        self.comm.Allgatherv(send, recv)
        return _DONE

    def Bcast(self, x: Array, root: int) -> None:  # noqa: N802
        """Give all ranks the root's array."""
        self._settle()
        self.comm.Bcast(x, root)

    def _settle(self) -> None:
        self.xp.cuda.get_current_stream().synchronize()


class ThroughNccl(_Transport):
    """NCCL on the current stream: the host waits for nothing.

    Bytes are sent and received in groups, as NCCL does collectives whose blocks differ in size; it adds up nothing.

    Parameters
    ----------
    comm : communicator of mpi4py's kind
        It carries the name by which the ranks find each other.
    xp : cupy
    nccl : cupy.cuda.nccl
    """

    def __init__(self, comm: Comm, xp: Any, nccl: Any) -> None:
        super().__init__(comm, xp)
        self.nccl = nccl
        self.group = nccl.NcclCommunicator(comm.size, from_rank_0(comm, nccl.get_unique_id), comm.rank)

    def Ialltoallv(self, send: Array, recv: Array) -> Any:  # noqa: N802
        """Send a block to each rank and receive one from each."""
        (a, outgoing), (b, incoming) = send, recv
        stream, kind = self.xp.cuda.get_current_stream().ptr, self.nccl.NCCL_UINT8
        self.nccl.groupStart()
        try:
            for peer in range(self.size):
                for x, (counts, offsets), move in ((a, outgoing, self.group.send), (b, incoming, self.group.recv)):
                    if counts[peer]:
                        start, size = int(offsets[peer]) * x.itemsize, int(counts[peer]) * x.itemsize
                        move(x.data.ptr + start, size, kind, peer, stream)
        finally:
            self.nccl.groupEnd()
        return _DONE

    def Iallgatherv(self, send: Array, recv: Array) -> Any:  # noqa: N802
        """Send an array to all ranks, and receive theirs."""
        whole = np.full(self.size, send.size), np.zeros(self.size, int)  # the same block for everyone
        return self.Ialltoallv([send, whole], recv)

    def Bcast(self, x: Array, root: int) -> None:  # noqa: N802
        """Give all ranks the root's array."""
        if x.size:
            stream = self.xp.cuda.get_current_stream().ptr
            self.group.bcast(x.data.ptr, x.nbytes, self.nccl.NCCL_UINT8, root, stream)


class _Done:
    """The request of what is done, or what the stream does in its order."""

    def Test(self) -> bool:  # noqa: N802
        """Say that nothing is to be done."""
        return True

    def Wait(self) -> None:  # noqa: N802
        """Wait for nothing."""


_DONE = _Done()
