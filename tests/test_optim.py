"""Optimisers against PyTorch's, and their manners."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from needs import TORCH

import swl


def run(backend: Any, optimizer: Any, dtype: Any = np.float64, steps: int = 20) -> dict[str, Any]:
    """Minimise a quadratic bowl, whose gradient is ``A·p``, from a fixed start."""
    r = np.random.default_rng(0)
    start = {"W": r.normal(size=(3, 2)), "b": r.normal(size=4)}
    slopes = {"W": r.uniform(0.1, 3, (3, 2)), "b": r.uniform(0.1, 3, 4)}
    params = {name: backend.array(value, dtype, writeable=True) for name, value in start.items()}
    slope = {name: backend.array(value, dtype) for name, value in slopes.items()}
    for _ in range(steps):
        optimizer.update(params, {name: slope[name] * p for name, p in params.items()})
    return {name: backend.numpy(p) for name, p in params.items()}


def run_torch(make: Any, steps: int = 20) -> dict[str, Any]:
    torch = pytest.importorskip("torch", reason=TORCH)
    r = np.random.default_rng(0)
    start = {"W": r.normal(size=(3, 2)), "b": r.normal(size=4)}
    slopes = {"W": r.uniform(0.1, 3, (3, 2)), "b": r.uniform(0.1, 3, 4)}
    params = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    optimizer = make(torch.optim, list(params.values()))
    for _ in range(steps):
        for name, p in params.items():
            p.grad = torch.tensor(slopes[name]) * p.detach()
        optimizer.step()
    return {name: p.detach().numpy() for name, p in params.items()}


CASES: list[tuple[Any, Any]] = [
    (lambda: swl.SGD(lr=0.1), lambda o, p: o.SGD(p, lr=0.1)),
    (lambda: swl.SGD(lr=0.1, momentum=0.9), lambda o, p: o.SGD(p, lr=0.1, momentum=0.9)),
    (
        lambda: swl.SGD(lr=0.1, momentum=0.5, weight_decay=0.2),
        lambda o, p: o.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.2),
    ),
    (lambda: swl.AdamW(), lambda o, p: o.AdamW(p)),
    (
        lambda: swl.AdamW(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3),
        lambda o, p: o.AdamW(p, lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), CASES)
def test_steps_are_those_of_torch(backend: Any, ours: Any, theirs: Any) -> None:
    got, want = run(backend, ours()), run_torch(theirs)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("make", [lambda: swl.SGD(0.1, momentum=0.9), lambda: swl.AdamW(0.05)], ids=["SGD", "AdamW"])
def test_short_parameters_keep_their_dtype_and_a_longer_state(backend: Any, dtype: Any, make: Any) -> None:
    optimizer = make()
    got = run(backend, optimizer, dtype)
    want = run(backend, make(), np.float64)
    eps = {2: 2.0**-7, 4: 1e-6}[np.dtype(dtype).itemsize]
    for name in want:
        assert got[name].dtype == dtype
        np.testing.assert_allclose(got[name].astype(float), want[name], atol=10 * eps)
    assert {moment.dtype for moments in optimizer.state.values() for moment in moments} == {np.dtype(np.float32)}


def test_updates_are_in_place_and_gradients_only_read() -> None:
    p, g = np.ones(3), np.arange(3.0)
    g.flags.writeable = False
    for optimizer in (swl.SGD(0.1), swl.SGD(0.1, momentum=0.9, weight_decay=0.1), swl.AdamW(0.1)):
        before = p.copy()
        optimizer.update([p], [g])  # sequences, as in the second book
        assert not (p == before).all()
        np.testing.assert_array_equal(g, np.arange(3.0))


def test_the_learning_rate_may_change_between_steps() -> None:
    p = np.ones(1)
    optimizer = swl.SGD(0.1)
    optimizer.lr = 1.0
    optimizer.update([p], [np.array([0.25])])
    assert p == 0.75


@pytest.mark.parametrize(
    ("params", "grads", "error", "words"),
    [
        ({"W": np.ones(2)}, {"b": np.ones(2)}, ValueError, r"same keys, got \['W'\] and \['b'\]"),
        ({"W": np.ones(2)}, [np.ones(2)], TypeError, "both be mappings"),
        ([np.ones(2)], [], ValueError, "one length, got 1 and 0"),
        ({"a": np.ones(1), "W": np.ones(2)}, {"a": np.ones(1), "W": np.ones((1, 2))}, ValueError, r"grads\['W'\]"),
        (
            {"a": np.ones(1), "W": np.ones(2)},
            {"a": np.ones(1), "W": None},
            TypeError,
            r"params\['W'\] and its gradient",
        ),
        (
            {"a": np.ones(1), "W": np.ones(2, int)},
            {"a": np.ones(1), "W": np.ones(2)},
            TypeError,
            "floating dtype, got int",
        ),
    ],
)
@pytest.mark.parametrize("make", [swl.SGD, swl.AdamW])
def test_what_does_not_fit_changes_nothing(make: Any, params: Any, grads: Any, error: Any, words: str) -> None:
    optimizer = make()
    with pytest.raises(error, match=words):
        optimizer.update(params, grads)
    assert all((p == 1).all() for p in (params.values() if isinstance(params, dict) else params))
    assert optimizer.steps == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: swl.SGD(lr=-1),
        lambda: swl.SGD(lr=float("nan")),
        lambda: swl.SGD(momentum=1.0),
        lambda: swl.SGD(weight_decay=-0.1),
        lambda: swl.AdamW(betas=(0.9, 1.0)),
        lambda: swl.AdamW(eps=float("inf")),
    ],
)
def test_settings_are_checked(make: Any) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, "):
        make()
