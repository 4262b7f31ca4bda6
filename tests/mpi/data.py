"""Run on every rank: copies of a network on different rows train as one network on all of them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

import swl
from swl import distributed

D, H, C, N = 6, 11, 23, 37


def plain(last: Any) -> swl.Sequential:
    return swl.Sequential(
        swl.Affine.init(D, H, rng=0, dtype=np.float64), swl.ReLU(), swl.Affine.init(H, H, rng=1, dtype=np.float64), last
    )


def losses(number: int, comm: Any, class_parallel: int, options: dict[str, Any]) -> tuple[Any, Any, distributed.Grid]:
    """The loss of one process, the same for many, and how the ranks are arranged."""
    grid = distributed.Grid.of(comm, class_parallel)
    head = swl.Affine.init(H, C, rng=2, dtype=np.float64)
    if class_parallel > 1 or number % 3 == 2:
        many: Any = distributed.ClassParallelHead.of(grid.classes, head.W, head.b, **options)
    elif number % 3:
        many = swl.AffineSoftmaxWithLoss(head.W.copy(), head.b.copy(), **options)
    else:
        many = None
    return swl.AffineSoftmaxWithLoss(head.W, head.b, **options), many, grid


def rows_of(rank: int, size: int, uneven: bool) -> Any:
    """Rows of a rank: even shares, or nearly all on the last."""
    edges = np.linspace(0, N, size + 1).astype(int) if not uneven else np.array([*[0] * (size - 1), 3, N])
    return slice(edges[rank], edges[rank + 1])


def one_case(comm: Any, number: int, class_parallel: int, options: dict[str, Any], ignored: bool) -> str:
    rng = np.random.default_rng(number)
    single, many, grid = losses(number, comm, class_parallel, options)
    one = plain(single)
    if many is None:
        copy = swl.Affine(single.W.copy(), single.b.copy())
        net = swl.Sequential(*plain(swl.ReLU()).layers[:-1], copy, swl.SoftmaxWithLoss(**options))
    else:
        net = plain(many)
    if grid.data.rank:  # what rank 0 has is what counts
        net.parameters()["0.W"][...] = 7
    net = distributed.DataParallel(net, grid.data, bucket=[1, 400, 10**9][number % 3], check_every=1)
    step_one, step_many = swl.AdamW(1e-2), swl.AdamW(1e-2)
    for _ in range(3):
        x, t = rng.standard_normal((N, D)), rng.integers(0, C, N)
        if ignored:
            t[: N // 2] = -100  # some ranks have no row that counts
        here = rows_of(grid.data.rank, grid.data.size, uneven=number % 2 == 1)
        loss, dx = net.forward_backward(x[here], t[here], dout=1.5)
        want, want_dx = one.forward_backward(x, t, dout=1.5)
        np.testing.assert_allclose(loss, want, rtol=1e-12)
        np.testing.assert_allclose(dx, want_dx[here], rtol=1e-9, atol=1e-14)
        digest = hashlib.sha256(loss.tobytes() + net.parameters()["0.W"].tobytes()).hexdigest()
        assert set(comm.allgather(digest)) == {digest}, "ranks differ"
        step_one.update(one.parameters(), one.gradients())
        step_many.update(net.parameters(), net.gradients())
    np.testing.assert_allclose(net.parameters()["0.W"], one.parameters()["0.W"], rtol=1e-6, atol=1e-9)
    return digest


def faults(comm: Any) -> None:
    """A bad row on one rank, a parameter that went its own way, networks that are not the same."""
    last = comm.rank == comm.size - 1
    net = distributed.DataParallel(
        swl.Sequential(swl.Affine.init(D, C, rng=0), swl.SoftmaxWithLoss()), comm, check_every=2
    )
    x = np.ones((2, D), np.float32)
    with pytest.raises(ValueError if last else RuntimeError, match=rf"target\[1\] is {C}"):
        net.forward_backward(x, np.array([0, C if last else 1]))
    net.forward_backward(x, np.array([0, 1]))
    if last:
        net.parameters()["0.b"][3] += 1
    with pytest.raises(RuntimeError, match=rf"on ranks \[{comm.size - 1}\], the first of them '0.b', by step 2"):
        net.forward_backward(x, np.array([0, 1]))
    other = swl.Sequential(swl.Affine.init(D, C + last), swl.SoftmaxWithLoss())
    with pytest.raises(ValueError, match="ranks disagree"):
        distributed.DataParallel(other, comm)
    with pytest.raises(TypeError, match="last layer is"):
        distributed.DataParallel(swl.Sequential(swl.Affine.init(D, C)), comm)


def main() -> None:
    with distributed.run() as comm:
        digests, number = [], 0
        for class_parallel in (k for k in (1, 2, 4) if comm.size % k == 0):
            for options in (
                {},
                {"weight": np.linspace(0.1, 2, C), "label_smoothing": 0.1},
                {"reduction": "sum", "z_loss": 1e-3},
                {"denominator": 50.0},
            ):
                for ignored in (False, True):
                    digests.append(one_case(comm, number, class_parallel, options, ignored))
                    number += 1
        if comm.size > 1:
            faults(comm)
        if comm.rank == 0:
            print(number, "cases", hashlib.sha256("".join(digests).encode()).hexdigest())


if __name__ == "__main__":
    main()
