"""Devices for every rank, on a CPU: CuPy on the fake driver, with NCCL and an MPI that reads the memory of these devices.

A rank sees two devices, as under a ``CUDA_VISIBLE_DEVICES`` of its own. NCCL is an imitation: it moves the bytes over MPI,
when a group ends, and has the methods of CuPy's, with their arguments (a test compares the two). Device memory is the
host's here, so any MPI can read it; that nothing was pending when it did is checked.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))

import fake
import fakecuda
from fakecuda import strict

from swl.distributed import transport

WORLD = MPI.COMM_WORLD.Dup()
NAME = fake.NAME

why_not_mpi = transport._why_not_mpi
bus_ids: list[str] = []


def install(bus: str | None = None) -> None:
    """Register the fake backend, and what belongs to it on many ranks; devices are all at `bus`, or each at its own."""
    reason = fake.register() or fakecuda.missing()
    if reason:
        raise RuntimeError(reason)
    fake.registry._DEVICE = NAME
    cupy = fake.cupy()
    bus_ids[:] = [bus or f"0000:{WORLD.rank:02x}:{device:02x}.0" for device in (0, 1)]
    cupy.cuda.runtime.deviceGetPCIBusId = lambda device: bus_ids[device]
    sys.modules["cupy.cuda.nccl"] = nccl  # type: ignore[assignment]
    through_mpi = transport.ThroughMpi.__init__
    transport.ThroughMpi.__init__ = lambda self, comm, xp: through_mpi(self, Settled(comm), xp)
    transport._why_not_mpi = lambda: ""  # this MPI reads the memory of these devices


class Interface:
    """Of an array on a device only ``__cuda_array_interface__``, one of the two ways in which mpi4py takes one."""

    def __init__(self, array: Any) -> None:
        self.array, self.itemsize, self.nbytes = array, array.itemsize, array.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.array.__cuda_array_interface__


class Settled:
    """A communicator that refuses device memory while work is pending on the device, as MPI is not to get it."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size

    def __getattr__(self, name: str) -> Any:
        def taken(buffer: Any) -> Any:
            if not isinstance(buffer, fake.cupy().ndarray):
                return buffer
            assert not fakecuda.lib.fakecuda_pending(), f"{name} is given device memory that is still worked on"
            assert name in ("Alltoallv", "Allgatherv", "Bcast"), f"{name} of Open MPI takes no device memory"
            return Interface(buffer)

        def call(*args: Any) -> Any:
            return getattr(self.comm, name)(
                *([taken(arg[0]), *arg[1:]] if isinstance(arg, list) else taken(arg) for arg in args)
            )

        return call


# ------------------------------------------------------------------------------------------------ NCCL


NCCL_UINT8 = 1
_group: list[tuple[str, Any, int, int, int]] | None = None


class NcclError(RuntimeError):
    pass


def get_unique_id() -> bytes:
    """The rank that waits for the others, and a number of its own, in NCCL's 128 bytes."""
    get_unique_id.count = getattr(get_unique_id, "count", 0) + 1
    return np.array([WORLD.rank, get_unique_id.count], np.int64).tobytes().ljust(128, b"\0")


class NcclCommunicator:
    def __init__(self, ndev: int, commId: bytes, rank: int) -> None:
        assert len(commId) == 128
        root, number = map(int, np.frombuffer(commId[:16], np.int64))
        self.ndev, self.rank, self.tag = ndev, rank, 1 + root * 100 + number
        if WORLD.rank == root:  # all wait for all, as in NCCL
            found = {rank: root}
            while len(found) < ndev:
                found.update([WORLD.recv(tag=self.tag)])
            for other in found.values():
                if other != root:
                    WORLD.send(found, other, tag=self.tag)
        else:
            WORLD.send((rank, WORLD.rank), root, tag=self.tag)
            found = WORLD.recv(source=root, tag=self.tag)
        self.ranks, self.device = [found[k] for k in range(ndev)], fake.cupy().cuda.Device().id

    def _enqueue(self, what: str, ptr: int, count: int, datatype: int, peer: int, stream: int) -> None:
        for value in (ptr, count, datatype, peer, stream):
            assert isinstance(value, int), f"{what} got {value!r}"  # stricter than Cython, which asks for __index__
        assert datatype == NCCL_UINT8
        cuda = fake.cupy().cuda
        assert stream == cuda.get_current_stream().ptr
        assert count > 0
        assert 0 <= peer < self.ndev
        assert _group is not None, f"{what} outside of a group waits for ever"
        assert self.device == cuda.Device().id, f"{what} on device {cuda.Device().id}, made on {self.device}"
        _group.append((what, self, ptr, count, peer))

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._enqueue("send", sendbuf, count, datatype, peer, stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._enqueue("recv", recvbuf, count, datatype, peer, stream)

    def bcast(self, buff: int, count: int, datatype: int, root: int, stream: int) -> None:
        groupStart()
        for peer in range(self.ndev):
            if self.rank == root and peer != root:
                self.send(buff, count, datatype, peer, stream)
        if self.rank != root:
            self.recv(buff, count, datatype, root, stream)
        groupEnd()


def groupStart() -> None:  # noqa: N802 - NCCL's names
    global _group
    assert _group is None
    _group = []


def groupEnd() -> None:  # noqa: N802
    global _group
    assert _group is not None
    calls, _group = _group, None
    with strict.unwatched():  # in stream order: here, at once
        fake.cupy().cuda.get_current_stream().synchronize()
    requests = []
    for what, comm, ptr, count, peer in calls:
        memory = (ctypes.c_char * count).from_address(ptr)
        start = WORLD.Isend if what == "send" else WORLD.Irecv
        requests.append(start([memory, MPI.BYTE], comm.ranks[peer], comm.tag))
    MPI.Request.Waitall(requests)


nccl = SimpleNamespace(
    available=True,
    NCCL_UINT8=NCCL_UINT8,
    NcclError=NcclError,
    NcclCommunicator=NcclCommunicator,
    get_unique_id=get_unique_id,
    groupStart=groupStart,
    groupEnd=groupEnd,
)
