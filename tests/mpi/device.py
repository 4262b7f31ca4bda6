"""Run on every rank: heads and networks on devices give what they give on the host, whatever arrays travel by.

    device.py BACKEND

SWL_TRANSPORT says how arrays travel. The line printed is a checksum of all results: it must not depend on that.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import swl
from swl import distributed
from swl.backends import get
from swl.distributed.comm import Counted
from swl.distributed.cost import step_bytes

N, D, C = 37, 5, 43
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight": True, "label_smoothing": 0.2, "sample_weight": True},
    {"ignore_index": 3, "z_loss": 0.1, "softcap": 3.0},
    {"reduction": "none", "weight": True},
    {"denominator": 9.0, "check": True},
]
TOLERANCE = {np.float32: {"rtol": 2e-5, "atol": 2e-5}, np.float64: {"rtol": 1e-11, "atol": 1e-12}}


def host(x: Any) -> Any:
    return np.asarray(x.get() if hasattr(x, "get") else x)


@contextlib.contextmanager
def elsewhere(backend: str) -> Iterator[None]:
    """Make another device the current one, if there is one, and on all of them streams that are not the default one."""
    cuda: Any = getattr(get(backend).xp, "cuda", None)
    devices = [] if cuda is None else [cuda.Device(k) for k in range(cuda.runtime.getDeviceCount())]
    here = None if cuda is None else cuda.Device().id
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(device)
            device.synchronize()
            stack.callback(device.synchronize)
            stack.enter_context(cuda.Stream())
        if devices:
            stack.enter_context(cuda.Device((here + 1) % len(devices)))
        yield


def digest(*arrays: Any) -> bytes:
    return hashlib.sha256(b"".join(np.ascontiguousarray(host(a)).tobytes() for a in arrays)).digest()


def one_head(comm: Any, number: int, options: dict[str, Any], backend: str) -> bytes:
    """Loss, gradients and statistics of a head in shards on devices, beside those of one head on the host."""
    rng = np.random.default_rng(number)
    dtype = (np.float32, np.float64)[number % 2]
    x, W, b = (rng.standard_normal(shape).astype(dtype) for shape in ((N, D), (D, C), C))
    t = rng.integers(0, C, N) if number % 3 != 2 else rng.random((N, C)).astype(dtype)
    options = {k: v for k, v in options.items() if k != "ignore_index" or t.ndim == 1}
    arrays = {"weight": rng.random(C).astype(dtype), "sample_weight": rng.random(N).astype(dtype)}
    options |= {name: value for name, value in arrays.items() if options.get(name)}
    dout = rng.standard_normal(N).astype(dtype) if options.get("reduction") == "none" else 1.5
    with swl.use_backend("numpy"):
        one = swl.AffineSoftmaxWithLoss(W, b, **options)
        want, want_dx = one.forward_backward(x, t, dout)

    edges = [0, *sorted(rng.integers(0, C + 1, comm.size - 1).tolist()), C]
    here = slice(edges[comm.rank], edges[comm.rank + 1])
    on = {name: swl.asarray(value) for name, value in {**arrays, "x": x, "t": t}.items()}
    options |= {name: on[name] for name in arrays if name in options}
    head = distributed.ClassParallelHead(
        comm,
        swl.asarray(W[:, here].copy()),
        swl.asarray(b[here].copy()),
        memory_budget=(2**20, 3000)[number % 2],
        **options,
    )
    assert head.backend == backend
    dout_there = swl.asarray(dout) if isinstance(dout, np.ndarray) else dout
    with elsewhere(backend):
        loss, dx, stats = head.forward_backward(on["x"], on["t"], dout_there, stats=True)
        again = head.forward(on["x"], on["t"])
        dx_again = head.backward(dout_there)
        top = head.top_k(on["x"], 4)
    assert digest(again, dx_again) == digest(loss, dx)
    tol = TOLERANCE[dtype]
    np.testing.assert_allclose(host(loss), host(want), **tol)
    np.testing.assert_allclose(host(dx), host(want_dx), **tol)
    np.testing.assert_allclose(host(head.dW), host(one.dW)[:, here], **tol)
    np.testing.assert_allclose(host(head.db), host(one.db)[here], **tol)
    same = digest(loss, dx, *stats, *top)
    assert set(comm.allgather(same)) == {same}, f"case {number}: ranks differ"
    return same + digest(head.dW, head.db)


def one_network(comm: Any, class_parallel: int, options: dict[str, Any]) -> bytes:
    """Three steps of a network over data × classes, ranks with no row among them, beside one network on the host."""
    grid = distributed.Grid.of(comm, class_parallel)
    rng = np.random.default_rng(7)
    with swl.use_backend("numpy"):
        *body, last = network().layers
        one = swl.Sequential(*body, swl.AffineSoftmaxWithLoss(last.W, last.b, **options))
    *body, last = network().layers
    options = {name: swl.asarray(value) if name == "weight" else value for name, value in options.items()}
    head = distributed.ClassParallelHead.of(grid.classes, last.W, last.b, **options)
    if grid.data.rank:
        body[0].W[...] = 7.0  # what rank 0 has is what counts
    net = distributed.DataParallel(swl.Sequential(*body, head), grid.data, bucket=200, check_every=2)
    steps = swl.AdamW(1e-2), swl.AdamW(1e-2)
    losses = []
    for size in (N, 1, N):
        x, t = rng.standard_normal((size, D)), rng.integers(0, C, size)
        rows = slice(size * grid.data.rank // grid.data.size, size * (grid.data.rank + 1) // grid.data.size)
        there = swl.asarray(x[rows]), swl.asarray(t[rows])
        with elsewhere(net.loss_layer.backend):
            loss, dx = net.forward_backward(*there)
        with swl.use_backend("numpy"):
            want, want_dx = one.forward_backward(x, t)
        np.testing.assert_allclose(host(loss), host(want), rtol=1e-11)
        np.testing.assert_allclose(host(dx), host(want_dx)[rows], rtol=1e-9, atol=1e-13)
        for optimizer, trained in zip(steps, (net, one), strict=True):
            optimizer.update(trained.parameters(), trained.gradients())
        losses.append(loss)
    same = digest(*losses, net.parameters()["0.W"])
    assert set(comm.allgather(same)) == {same}, "ranks differ"
    return same + digest(*net.parameters().values())


def network() -> Any:
    return swl.Sequential(
        swl.Affine.init(D, 8, rng=1, dtype=np.float64), swl.ReLU(), swl.Affine.init(8, C, rng=2, dtype=np.float64)
    )


def waiting(comm: Any) -> None:
    """What the host waits for in a step: with NCCL for nothing, otherwise before each collective, or around it."""
    from fakecuda import strict

    head = distributed.ClassParallelHead.init(comm, D, C, weight=swl.asarray(np.ones(C, np.float32)))
    net = distributed.DataParallel(
        swl.Sequential(swl.Affine.init(D, D, rng=0), head), comm.Split(comm.rank), check_every=0
    )
    x, t = swl.asarray(np.ones((N, D), np.float32)), swl.asarray(np.arange(N))
    net.forward_backward(x, t)
    strict.waits.clear()
    net.forward_backward(x, t)
    collectives = 2 * 3  # the weights of the rows' classes; M, S, d, A; dx
    expected = {
        "ThroughNccl": [],
        "ThroughMpi": ["cudaStreamSynchronize"],
        "ThroughHost": ["cudaStreamSynchronize"] * 2,
    }
    how = type(head.transport).__name__
    assert strict.waits == (expected[how] * collectives if comm.size > 1 else []), (how, strict.waits)
    head = distributed.ClassParallelHead.init(comm, D, C)
    head.transport = counted = Counted(head.transport)
    head.forward_backward(x, t)
    assert sum(comm.allgather(counted.sent)) == comm.size * step_bytes(N, D, comm.size)


def main(backend: str) -> None:
    with distributed.run() as comm:
        if backend == "cupy-fake":
            import devices

            devices.install()
        with swl.use_backend(backend):
            distributed.own_device(comm)
            if (cuda := getattr(get(backend).xp, "cuda", None)) is not None:
                assert cuda.Device().id == comm.rank % cuda.runtime.getDeviceCount()
            results = [one_head(comm, i, options, backend) for i, options in enumerate(OPTIONS * 2)]
            grids = [k for k in (1, 2, 3, 4) if comm.size % k == 0]
            several = {}, {"weight": np.linspace(0.1, 2, C), "label_smoothing": 0.1}
            results += [one_network(comm, k, options) for k in grids for options in several]
            if backend == "cupy-fake":
                waiting(comm)
        every = comm.gather(b"".join(results))
        if comm.rank == 0:
            print(len(results), "cases", hashlib.sha256(b"".join(every)).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
