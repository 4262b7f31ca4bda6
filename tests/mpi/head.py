"""Run on every rank: a head in shards gives what the definition gives, with the same bits on all ranks.

The last line printed is a checksum of all results, for runs to be compared by.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import oracle
from ranks import BUDGETS, OPTIONS

import swl
from swl import distributed


def sizes_of(rng: Any, C: int, ranks: int) -> Any:
    """Uneven shards, some of them empty."""
    edges = np.sort(rng.integers(0, C + 1, ranks - 1))
    return np.diff(np.concatenate(([0], edges, [C])))


def one_case(comm: Any, number: int, options: dict[str, Any], kind: str, dtype: Any, budget: int) -> list[Any]:
    rng = np.random.default_rng([number, comm.size])
    N, D = int(rng.choice([0, 1, 7, 40, 130])), int(rng.integers(1, 9))
    C = int(rng.choice([1, 2, 3, 17, 64, 211]))
    acc = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    x, W = (rng.standard_normal(shape).astype(dtype) for shape in ((N, D), (D, C)))
    W *= dtype(3)
    b = rng.standard_normal(C).astype(dtype) if rng.random() < 0.6 else None
    sizes = sizes_of(rng, C, comm.size)
    stop = int(sizes[: comm.rank + 1].sum())
    here = slice(stop - int(sizes[comm.rank]), stop)
    options = dict(options)
    weight = rng.random(C).astype(acc)
    if options.get("weight"):
        options["weight"] = weight
    if options.get("sample_weight"):
        options["sample_weight"] = rng.random(N).astype(acc)
    if kind == "ids":
        t = rng.integers(0, C, N)
        if rng.random() < 0.3:
            t[:] = min(1, C - 1)  # most shards have no class of the batch
        given = t
    else:
        t = rng.random((N, C)).astype(acc)
        given = {"whole": t, "shard": t[:, here].copy(), "callable": lambda rows, classes: t[rows, classes]}[kind]
    dout = rng.standard_normal(N).astype(acc) if options.get("reduction") == "none" else 1.5

    local = dict(options)
    if "weight" in local and number % 2:
        local["weight"] = weight[here].copy()
    head = distributed.ClassParallelHead(
        comm, W[:, here].copy(), None if b is None else b[here].copy(), memory_budget=budget, **local
    )
    loss, dx, stats = head.forward_backward(x, given, dout, stats=True)
    dW, db = head.dW, head.db
    again = head.forward(x, given)
    assert again.tobytes() == loss.tobytes()
    dx_again = head.backward(dout)
    assert dx_again.tobytes() == dx.tobytes()
    assert head.dW.tobytes() == dW.tobytes()

    # the definition, in float64
    x64, W64, b64 = x.astype(float), W.astype(float), 0.0 if b is None else b.astype(float)
    want = oracle.cross_entropy(x64 @ W64 + b64, t, dout=dout, **options)
    spread = np.abs(x64) @ np.abs(W64) + np.abs(b64) + 1  # what a logit is added up from
    top = spread.max(axis=1, initial=0)
    # a rounding of a logit moves a row's loss by its gradient; the shifts of shards cancel between d and the whole
    mass = t.sum(axis=1) if kind != "ids" else np.ones(N)
    s = np.asarray(options.get("sample_weight", np.ones(N)), dtype=float)
    if options.get("reduction", "mean") == "mean":
        m = 1.0 if kind != "ids" else (weight[t] if "weight" in options else 1.0) * (t != options.get("ignore_index"))
        s = s / max(options.get("denominator", (s * m).sum()), 1e-30)
    moved = s * mass * (want.row_scale + top) * (1 + options.get("z_loss", 0) * want.row_scale)
    scale = want.loss_scale + (moved if want.loss.ndim else moved.sum())
    oracle.assert_close("loss", loss, want.loss, scale, acc, roundings=64)
    G = want.grad_scale * (1 + top[:, None])
    oracle.assert_close("dx", dx, want.grad @ W64.T, G @ np.abs(W64).T, acc, dtype, 64)
    oracle.assert_close("dW", dW, (x64.T @ want.grad)[:, here], (np.abs(x64).T @ G)[:, here], acc, dtype, 64)
    if b is not None:
        oracle.assert_close("db", db, want.grad.sum(axis=0)[here], G.sum(axis=0)[here], acc, dtype, 64)
    row = want.row_scale * (1 + top)
    counts = np.ones(N, bool) if kind != "ids" else t != options.get("ignore_index", -100)
    for name in ("row_max", "log_sum", "log_prob", "entropy"):
        got, right = getattr(stats, name), getattr(want, name)
        oracle.assert_close(name, got[counts], right[counts], row[counts], acc, roundings=64)
    # equal to the last bit would need equal logits; the products of a shard may be rounded otherwise
    z = x64 @ W64 + b64
    cap, r = options.get("softcap") or 0, z / options.get("temperature", 1)
    capped = cap * np.tanh(r / cap) if cap else r
    chosen = np.take_along_axis(capped, stats.argmax[:, None], axis=1)[:, 0]
    assert (chosen >= capped.max(axis=1, initial=-np.inf) - 1e-3)[counts].all()

    k = int(rng.integers(1, C + 1))
    classes, scores = head.top_k(x, k)
    order = np.argsort(-z, axis=1, kind="stable")[:, :k]
    spread = top[:, None] + 0 * order
    oracle.assert_close("top_k", scores, np.take_along_axis(z, order, axis=1), spread, acc)
    oracle.assert_close("classes of top_k", np.take_along_axis(z, classes, axis=1), scores, spread, acc)
    assert all(len(set(row)) == k for row in classes.tolist())
    if N and kind == "ids":
        assert (
            abs(head.accuracy(x, t, k) - (order == t[:, None]).any(axis=1).mean()) <= 1e-12 + (dtype != np.float64) / N
        )
    same = [loss, dx, *stats, scores, classes]
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in same)).hexdigest()
    assert set(comm.allgather(digest)) == {digest}, f"case {number}: ranks differ"
    whole_W, whole_b = head.gather()
    assert np.array_equal(whole_W, W)
    assert b is None or np.array_equal(whole_b, b)
    return [digest, *comm.allgather(hashlib.sha256(dW.tobytes()).hexdigest())]


def ties(comm: Any) -> None:
    """Equal logits of any size give exactly log C, and the first class wins, wherever the shards are cut."""
    C, N = 4 * comm.size, 5
    head = distributed.ClassParallelHead.of(comm, np.full((1, C), 1e8, np.float32))
    loss, stats = head.forward(np.ones((N, 1), np.float32), np.arange(N) % C, stats=True)
    assert loss == np.float32(np.log(C)), loss
    assert (stats.argmax == 0).all()
    classes, _ = head.top_k(np.ones((N, 1), np.float32), 3)
    assert (classes == [0, 1, 2]).all()


def masked(comm: Any) -> None:
    """A shard of −inf only adds nothing; −inf at the target is +inf; a NaN stays in its row."""
    C = 2 * comm.size
    b = np.zeros(C)
    b[2:] = -np.inf
    head = distributed.ClassParallelHead.of(comm, np.zeros((1, C)), b, reduction="none")
    x = np.array([[1.0], [2.0], [np.nan]])
    t = np.array([0, C - 1, 1])
    if comm.size == 1:
        t[1] = 0
    ids, _ = head.top_k(x[:2], C)
    assert (ids == np.arange(C)).all(), "shards have fewer than C classes, and still every class comes once"
    loss, dx = head.forward_backward(x, t)
    assert loss[0] == np.log(2)
    assert np.isnan(loss[2])
    assert loss[1] == (np.inf if comm.size > 1 else np.log(2))
    assert (dx[:1] == 0).all()
    head.forward_backward(x[:1], t[:1])
    here = slice(head.first, head.first + head.W.shape[1])
    assert (head.db == np.array([-0.5, 0.5] + [0] * (C - 2))[here]).all()


def main() -> None:
    with distributed.run() as comm:
        results: list[Any] = []
        number = 0
        for backend in ("numba", "numpy"):
            with swl.use_backend(backend):
                for options in OPTIONS:
                    kinds = (
                        ["ids"] if "ignore_index" in options else ["ids", ["whole", "shard", "callable"][number % 3]]
                    )
                    for kind in kinds:
                        dtype = [np.float64, np.float32, np.float32][number % 3]
                        results += one_case(comm, number, options, kind, dtype, BUDGETS[number % 4 % 3])
                        number += 1
                ties(comm)
                masked(comm)
        if comm.rank == 0:
            print(number, "cases", hashlib.sha256("".join(results).encode()).hexdigest())


if __name__ == "__main__":
    main()
