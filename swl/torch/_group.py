"""A process group of torch's as a communicator, with those of mpi4py's methods that `swl.distributed` uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from swl.distributed.comm import agree

__all__ = ["Group"]


class Group:
    """The processes of a group: gloo carries arrays of a host, NCCL those of a device, on torch's current stream.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        By default all processes.

    Raises
    ------
    RuntimeError
        If there are no process groups yet.
    ValueError
        If this process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "a class-parallel loss needs processes that know each other: torch.distributed.init_process_group() "
                "after torchrun has started them"
            )
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the process group of the loss")
        self.on_host = "cpu:" in dist.get_backend_config(group)

    def agree(self, what: str, describe: Callable[[], str]) -> None:
        """Do `swl.distributed.comm.agree`; a group of NCCL alone would have to wait for the device, and only describes."""
        if self.on_host:
            agree(self, what, describe)
        else:
            describe()

    def Allgather(self, send: Any, recv: Any) -> None:  # noqa: N802 - mpi4py's names
        """Gather a few numbers of the host."""
        device = torch.device("cpu") if self.on_host else torch.device("cuda", torch.cuda.current_device())
        mine = torch.tensor(send.reshape(-1), device=device)
        found = mine.new_empty(self.size * mine.numel())
        self._exchange(mine.repeat(self.size), found, [mine.numel()] * self.size, [mine.numel()] * self.size)
        recv.reshape(-1)[...] = found.cpu().numpy()

    def Allgatherv(self, send: Any, recv: Any) -> None:  # noqa: N802
        """Send an array to all ranks, and receive theirs as ``[array, (counts, offsets)]``."""
        mine, (found, (counts, _)) = _tensor(send), recv
        self._exchange(mine.repeat(self.size), _tensor(found), [mine.numel()] * self.size, counts)

    def Alltoallv(self, send: Any, recv: Any) -> None:  # noqa: N802
        """Send a block to each rank and receive one from each; buffers as ``[array, (counts, offsets)]``."""
        (a, (outgoing, _)), (b, (incoming, _)) = send, recv
        self._exchange(_tensor(a), _tensor(b), outgoing, incoming)

    def allgather(self, value: Any) -> list[Any]:
        """Gather an object of each rank."""
        found: list[Any] = [None] * self.size
        with self._noted():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def add_up(self, x: Tensor) -> None:
        """Replace a tensor by its sum over the ranks."""
        if self.size > 1:
            with self._noted():
                dist.all_reduce(x, group=self.group)

    def _exchange(self, a: Tensor, b: Tensor, outgoing: Any, incoming: Any) -> None:
        sizes = [int(count) for count in incoming], [int(count) for count in outgoing]
        with self._noted():
            dist.all_to_all_single(b, a, *sizes, group=self.group)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Say in an error of torch's who was waiting for whom."""
        try:
            yield
        except RuntimeError as error:
            error.add_note(
                f"swl: rank {self.rank} of {self.size} was waiting for the others in a class-parallel loss; "
                "one of them has ended, does something else, or was slower than the group's timeout"
            )
            raise

    def __repr__(self) -> str:
        return f"Group({self.size} ranks)"


def _tensor(a: Any) -> Tensor:
    """See a contiguous array as a vector, in the same memory."""
    a = a.reshape(-1)
    return torch.from_numpy(a) if isinstance(a, np.ndarray) else torch.from_dlpack(a)
