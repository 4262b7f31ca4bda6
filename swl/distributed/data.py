"""A network whose copies work on different rows of a batch, and whose gradients are those of the whole batch.

Means are over the rows that count on all ranks: with ``d_r`` the denominator of rank r's rows (`swl.options`), each
gradient is scaled by ``d_r / Σ d``, and they are added up. The average of the means of the ranks would be wrong as soon
as one of them has fewer rows, or more ignored ones.
"""

from __future__ import annotations

import zlib
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from swl.backends import get, host_backend, resolve
from swl.distributed.comm import agree, as_numpy, block_layout, gather_numbers, gather_values, in_blocks, ordered_sum
from swl.distributed.transport import over
from swl.nn.base import Layer, LossLayer, bring
from swl.nn.sequential import Sequential, leaves
from swl.ops.checks import acc_dtype
from swl.typing import Array, ArrayLike, Comm

__all__ = ["DataParallel"]

BUCKET = 2**20
"""Bytes of gradients that are sent together (docs/scale.md)."""


class DataParallel(Layer):
    """A network that every rank has a copy of, trained on rows that each rank brings.

    Parameters
    ----------
    net : swl.Sequential
        Its last layer is a `SoftmaxWithLoss`, `AffineSoftmaxWithLoss` or `ClassParallelHead`. The parameters of rank 0
        are copied to all ranks.
    comm : mpi4py.MPI.Comm
        The ranks with copies. For a `ClassParallelHead` those with the same classes: ``Grid.data``.
    bucket : int
        Bytes of gradients that are sent together, while the backward pass goes on to earlier layers.
    check_every : int
        Steps after which a checksum of the parameters is compared over the ranks; 0: never.

    Raises
    ------
    ValueError
        On all ranks, if the networks differ in names, shapes, dtypes or options.
    TypeError
        If the last layer is no loss of the library.

    Examples
    --------
    >>> import numpy as np, swl
    >>> from swl import distributed
    >>> with distributed.run() as comm:
    ...     net = distributed.DataParallel(swl.Sequential(swl.Affine(np.zeros((2, 4))), swl.SoftmaxWithLoss()), comm)
    ...     loss, dx = net.forward_backward(np.ones((3, 2)), np.array([0, 1, 3]))
    >>> loss
    array(1.38629436)
    """

    is_loss = True

    def __init__(self, net: Sequential, comm: Comm, *, bucket: int = BUCKET, check_every: int = 100) -> None:
        self.net, self.comm, self.bucket, self.check_every = net, comm, bucket, check_every
        self.steps = 0

        def describe() -> str:
            if not isinstance(net, Sequential) or not isinstance(net[len(net) - 1], LossLayer):
                raise TypeError(
                    "net must be a Sequential whose last layer is a SoftmaxWithLoss, AffineSoftmaxWithLoss or "
                    f"ClassParallelHead, got {net!r}"
                )
            on_host = all(isinstance(p, np.ndarray) for p in net.parameters().values())
            self._backend = get(host_backend()) if on_host else resolve(None, net.parameters())
            found = {name: (p.shape, str(p.dtype)) for name, p in net.parameters().items()}
            return f"{found}, {net!r}, bucket {bucket}, check_every {check_every}"

        agree(comm, "DataParallel", describe)
        self.loss_layer: Any = net[len(net) - 1]
        with self._scope():
            self.transport, xp = over(comm, self._backend), self._backend.xp
            for p in net.parameters().values() if comm.size > 1 else ():
                values = xp.ascontiguousarray(p)
                self.transport.Bcast(values.reshape(-1).view(np.uint8), 0)
                p[...] = values.reshape(p.shape)

    def _scope(self) -> AbstractContextManager[object]:
        return self._backend.scope(**dict(list(self.net.parameters().items())[:1]))

    def forward_backward(self, x: ArrayLike, t: ArrayLike, dout: ArrayLike = 1) -> tuple[Array, Array]:
        """Compute the loss of all ranks' rows, and leave its gradients on the layers.

        Parameters
        ----------
        x, t : arrays
            The rows of this rank; there may be none.
        dout : number

        Returns
        -------
        loss : 0-d array
            Of the rows of all ranks, the same bits on every rank; under ``reduction="none"`` those of the rows here.
        dx : array, of the shape of `x`
            Gradient of that loss, with respect to the rows here.

        Raises
        ------
        RuntimeError
            If another rank found an error in its arguments, naming rank and cause; or if parameters have become
            different, naming the ranks.
        """
        if self.check_every and self.steps % self.check_every == 0:
            self.check_parameters()
        self.steps += 1
        problem: Any = None

        def describe() -> str:
            nonlocal problem
            scores = x
            for layer in self.net.layers[:-1]:
                scores = layer.forward(scores)
            problem = self.loss_layer.begin(scores, t)
            return ""

        with self._scope():
            agree(self.comm, "DataParallel.forward_backward", describe)
            xp, options, share = self._backend.xp, self.loss_layer.options, 1.0
            if options.reduction == "mean" and options.denominator is None:
                share = _share(xp, problem.denominator, self._total(problem.denominator))
            dout = bring(self._backend, "dout", dout) if hasattr(dout, "dtype") else dout
            loss, dx = self.loss_layer.finish(problem, t, dout * share)
            if options.reduction != "none" and self.comm.size > 1:
                loss = xp.asarray(self._total(loss.astype(np.float64) * share), dtype=loss.dtype)

            sums = _Buckets(self.transport, xp, self.bucket)
            sums.add(self.loss_layer)
            for layer in reversed(self.net.layers[:-1]):
                dx = layer.backward(dx)
                sums.add(layer)
            sums.finish()
            for leaf in leaves([self.net]):
                if isinstance(leaf, Layer):
                    leaf._publish()
        return loss, dx

    def _total(self, number: Any) -> Array:
        """Add up a number over the ranks, in their order: a float, or of a device, which nobody waits for, a 0-d array."""
        xp = self._backend.xp
        if xp is np:
            return float(ordered_sum(gather_numbers(self.comm, float(number)))[0])
        number = number if hasattr(number, "dtype") else xp.full((), number, np.float64)
        return ordered_sum(gather_values(self.transport, xp, number)) if self.comm.size > 1 else number

    def check_parameters(self) -> None:
        """Compare a checksum of the parameters over the ranks.

        Raises
        ------
        RuntimeError
            If they differ, naming the ranks and the first parameter that does.
        """
        parameters = self.parameters()
        found = [zlib.crc32(np.ascontiguousarray(as_numpy(p)).view(np.uint8).data) for p in parameters.values()]
        differ = gather_numbers(self.comm, *found)
        differ = differ != differ[0]
        if differ.any():
            ranks, name = np.flatnonzero(differ.any(axis=1)), list(parameters)[int(differ.any(axis=0).argmax())]
            raise RuntimeError(
                f"parameters have become different from those of rank 0 on ranks {ranks.tolist()}, the first of them "
                f"{name!r}, by step {self.steps}"
            )

    def predict(self, x: ArrayLike) -> Array:
        """Compute the scores of the rows here."""
        return self.net.predict(x)

    def parameters(self) -> dict[str, Array]:
        """Give the parameters of the network: the very arrays."""
        found: dict[str, Any] = self.net.parameters()
        return found

    def gradients(self) -> dict[str, Array]:
        """Give the gradients of the last step, of the rows of all ranks."""
        found: dict[str, Any] = self.net.gradients()
        return found

    @property
    def grads(self) -> list[Array]:
        """The gradients of the network, of the rows of all ranks, in arrays that each step overwrites."""
        found: list[Any] = self.net.grads
        return found

    def __repr__(self) -> str:
        return f"DataParallel({self.net!r}, {self.comm.size} ranks)"


def _share(xp: Any, part: Any, total: Any) -> Any:
    """part/total, and 0 where nothing counts on any rank."""
    if isinstance(total, float):
        return part / total if total else 0.0
    return xp.where(total == 0, 0.0, part / xp.where(total == 0, 1.0, total))


class _Buckets:
    """Gradients on their way: a bucket is sent as soon as it is full, and added up at the end, in order."""

    def __init__(self, comm: Comm, xp: Any, size: int) -> None:
        self.comm, self.xp, self.size = comm, xp, size
        self.waiting: list[Any] = []
        self.under_way: list[tuple[Any, Any, Any, list[Any]]] = []

    def add(self, layer: Any) -> None:
        """Take over the gradients of a layer, to be replaced by their sums."""
        if self.comm.size == 1:
            return
        # any layer of the user's is taken as Sequential takes it
        for gradient in Sequential(layer).gradients().values():
            if self.waiting and acc_dtype(self.waiting[0].dtype) != acc_dtype(gradient.dtype):
                self._send()
            self.waiting.append(gradient)
            if sum(g.nbytes for g in self.waiting) >= self.size:
                self._send()
        for request, *_ in self.under_way:
            request.Test()  # lets an MPI without a thread of its own move the data

    def _send(self) -> None:
        if not self.waiting:
            return
        acc = acc_dtype(self.waiting[0].dtype)
        flat = self.xp.concatenate([g.reshape(-1).astype(acc, copy=False) for g in self.waiting])
        sizes = np.array([b - a for a, b in in_blocks(flat.size, self.comm.size)])
        received = self.xp.empty((self.comm.size, int(sizes[self.comm.rank])), acc)
        layout = block_layout(np.full(self.comm.size, received.shape[1]))
        request = self.comm.Ialltoallv([flat, block_layout(sizes)], [received, layout])
        self.under_way.append((request, flat, received, self.waiting))
        self.waiting = []

    def finish(self) -> None:
        """Wait, add up in the order of the ranks, and write the sums over the gradients."""
        self._send()
        gathering = []
        for request, flat, received, gradients in self.under_way:
            request.Wait()
            total = ordered_sum(received)
            sizes = np.array([b - a for a, b in in_blocks(flat.size, self.comm.size)])
            gathering.append((self.comm.Iallgatherv(total, [flat, block_layout(sizes)]), total, flat, gradients))
        for request, _, flat, gradients in gathering:
            request.Wait()
            start = 0
            for g in gradients:
                g[...] = flat[start : start + g.size].reshape(g.shape).astype(g.dtype, copy=False)
                start += g.size
