"""Compile before the first step what a training loop will call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

import swl
from swl.backends import active, use_backend

__all__ = ["warmup"]

DTYPES = ("float32", "float64", "float16", "bfloat16")
CLASSES = 1024
ROWS = (4, 128)
"""A few rows, which one thread does alone, and enough to start the others."""
LARGE = (512, 96), (96, 10944)
"""Shapes of inputs and weights whose products, backward too, are large enough for a kernel of their own."""


def warmup(
    dtypes: str | Iterable[str] = ("float32",),
    *,
    ids: str | Iterable[str] = ("int64", "int32"),
    backend: str | None = None,
    progress: bool = True,
) -> None:
    """Compile the kernels that a training loop will call, or load those that an earlier process has kept on disk.

    Losses and layers are called on small arrays: forward, backward and both, every option, class ids and probabilities, and the
    fused head. After that a loop over inputs of these dtypes compiles nothing.

    Parameters
    ----------
    dtypes : iterable of {"float32", "float64", "float16", "bfloat16"}
        Of logits, inputs and parameters.
    ids : iterable of str
        Integer dtypes of the class ids.
    backend : str, optional
        Of which to compile the kernels; the active one by default.
    progress : bool
        Draw a bar on standard error, with tqdm if that is installed.

    Raises
    ------
    ValueError, TypeError
        For a dtype that swl does not compute with, or class ids that are no integers.
    BackendUnavailable
        If the backend cannot run here.

    Notes
    -----
    Without kernels on disk the Numba backend takes about 15 s for float32 and as long again for each other dtype; with them,
    about a second.

    Examples
    --------
    >>> import swl
    >>> swl.warmup(progress=False)
    """
    floats = [_float(name) for name in _names(dtypes)]
    integers = [_integer(name) for name in _names(ids)]
    with use_backend(backend or active()):
        jobs = [job for dtype in floats for job in _jobs(dtype, integers)]
        with _bar(len(jobs), progress) as step:
            for call in jobs:
                call()
                step()
        swl.check()


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _float(name: Any) -> np.dtype[Any]:
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ModuleNotFoundError:
            raise TypeError("bfloat16 arrays need ml_dtypes, which is not installed: pip install ml_dtypes") from None
        name = ml_dtypes.bfloat16
    try:
        dtype: np.dtype[Any] | None = np.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise ValueError(f"dtypes may name {', '.join(map(repr, DTYPES))} only, got {name!r}")
    return dtype


def _integer(name: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(name)
    if dtype.kind not in "iu":
        raise TypeError(f"ids must name integer dtypes, got {name!r}")
    return dtype


def _jobs(dtype: np.dtype[Any], ids: list[np.dtype[Any]]) -> Iterator[Callable[[], object]]:
    """Give the calls for one dtype."""
    rng = np.random.default_rng(0)
    W = swl.asarray(rng.random((16, CLASSES)).astype(dtype))
    x, large = (swl.asarray(rng.random(shape).astype(dtype)) for shape in LARGE)
    yield partial(_products, x, large)
    w = swl.asarray(np.ones(CLASSES), dtype)
    for n in ROWS:
        z, q = (swl.asarray(rng.random((n, CLASSES)).astype(dtype)) for _ in range(2))
        each = swl.asarray(np.ones(n), dtype)
        for t in (*(swl.asarray(np.arange(n), integer) for integer in ids), q):
            yield partial(_plain, z, t, each)
            yield partial(_options, z, t, w, each)
            for budget in (8 * n * CLASSES, 2 * n * CLASSES):  # all logits at once, and chunks of classes
                yield partial(_fused, z[:, :16], W, t, w, budget)
        yield partial(_affine, z[:, :16], W, w)


def _products(x: Any, W: Any) -> None:
    """Products that are large; with 16-bit operands each mixture with float32 ones has a kernel of its own."""
    ids = swl.asarray(np.arange(len(x)) % W.shape[1])
    swl.linear_cross_entropy_value_and_grad(x, W, ids)
    if x.itemsize == 2:
        swl.affine_backward(swl.affine(x, W), x, W)


def _plain(z: Any, t: Any, each: Any) -> None:
    """Forward, backward and both; in place, with an upstream gradient per row, from strided memory."""
    swl.cross_entropy(z, t)
    swl.cross_entropy_value_and_grad(z, t)
    swl.cross_entropy_value_and_grad(z, t, out=z.copy())
    swl.cross_entropy_value_and_grad(z.T.copy().T, t)
    layer = swl.SoftmaxWithLoss(reduction="none")
    layer.forward(z, t)
    layer.backward(each)


def _options(z: Any, t: Any, weight: Any, each: Any) -> None:
    """All options at once: they are arguments of the kernels, not kernels of their own."""
    layer = swl.SoftmaxWithLoss(weight=weight, sample_weight=each, label_smoothing=0.1, z_loss=1e-4, softcap=30.0)
    layer.forward(z, t)
    layer.backward()
    layer.forward_backward(z, t)
    swl.cross_entropy_value_and_grad(z, t, weight=weight, stats=True)


def _fused(x: Any, W: Any, t: Any, b: Any, memory_budget: int) -> None:
    layer = swl.AffineSoftmaxWithLoss(W, b, memory_budget=memory_budget)
    layer.forward(x, t)
    layer.backward()
    layer.forward_backward(x, t)


def _affine(x: Any, W: Any, b: Any) -> None:
    swl.affine_backward(swl.affine(x, W, b), x, W)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[], object]]:
    """Give what to call after each step: tqdm's, or a line that counts."""
    if not progress:
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            end = "\n" if done == total else ""
            print(f"\rswl.warmup: {done}/{total}", end=end, file=sys.stderr, flush=True)

        yield count
        return
    with tqdm(total=total, desc="swl.warmup", unit="call", leave=False) as bar:
        yield bar.update
