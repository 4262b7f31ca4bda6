"""Run the compiled kernels with every array between two pages that nobody may touch: ``python tests/guarded.py losses|products``.

A kernel that reads or writes beside an array, its scratch included, ends the program. What survives is compared to the bits of the
same calls on ordinary memory, so that the two pages are all that is different.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

import swl
from swl.backends.numba import backend, gemm, kernels

PAGE = mmap.PAGESIZE
HALVES = [np.dtype("float16")]
with suppress(ImportError):
    import ml_dtypes

    HALVES.append(np.dtype(ml_dtypes.bfloat16))
PLACES = "begin", "end"
"""Where an array lies in the pages that may be touched: no page is larger than what is beside it."""


def guarded(shape: Any, dtype: Any, place: str) -> Any:
    """Make an array between two pages that are not to be read or written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    length = -(-size // PAGE) * PAGE
    memory = np.frombuffer(mmap.mmap(-1, length + 2 * PAGE), np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for page in (0, PAGE + length):
        assert protect(memory.ctypes.data + page, PAGE, 0) == 0
    start = PAGE if place == "begin" else PAGE + length - size
    return memory[start : start + size].view(dtype).reshape(shape)


def between_guards(kernel: Callable[..., Any], place: str) -> Callable[..., Any]:
    """Let a kernel work on copies of its arrays that are `guarded`, and copy back what may be written to."""

    def call(*arguments: Any) -> Any:
        copies: dict[tuple[int, int], Any] = {}  # one for the logits and the gradient that is written over them
        given = []
        for x in arguments:
            if isinstance(x, np.ndarray):
                where = x.ctypes.data, x.nbytes
                if where not in copies:
                    copies[where] = guarded(x.shape, x.dtype, place)
                    copies[where][...] = x
                y = copies[where].view()
                y.flags.writeable = x.flags.writeable
                given.append(y)
            else:
                given.append(x)
        result = kernel(*given)
        for x, y in zip(arguments, given, strict=True):
            if isinstance(x, np.ndarray) and x.flags.writeable:
                x[...] = y
        return result

    return call


# ------------------------------------------------------------------------------------------------ losses


def losses() -> list[bytes]:
    """Return the bits of all results of losses whose rows are short and long, few and many, with options and without."""
    shapes = [(1, 1), (33, 10), (1, 64), (33, 65), (3, 4097)]
    cases = list(itertools.product(("float32", "float64"), shapes))
    found = []
    for dtype, (N, C) in [*cases, *itertools.product(HALVES, ((33, 10), (33, 65), (3, 4097)))]:
        rng = np.random.default_rng(C)
        z, q, weight, x, W = (rng.random(shape).astype(dtype) for shape in ((N, C), (N, C), C, (N, 5), (5, C)))
        ids = rng.integers(0, C, N)
        ids[N // 3] = -100
        options = {"weight": weight, "label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.1}
        for target, chosen in itertools.product((ids, ids.astype(np.int32), q), ({}, {"z_loss": 0.1}, options)):
            over = z.copy()
            found += swl.cross_entropy_value_and_grad(z, target, **chosen)
            found += [*swl.cross_entropy(z, target, stats=True, **chosen)[1], swl.cross_entropy(z, target, **chosen)]
            found.append(swl.cross_entropy_value_and_grad(over, target, out=over, stats=True, **chosen)[1])
            layer = swl.SoftmaxWithLoss(reduction="sum", **chosen)
            found += [layer.forward(z, target), layer.backward()]
            head = swl.linear_cross_entropy_value_and_grad(x, W, target, weight, memory_budget=4096, **chosen)
            found += [head[0], *head[1]] if C < 100 else []
    return [np.asarray(x).tobytes() for x in found]


def check_losses() -> None:
    """Compare the losses between guards to those on ordinary memory."""
    names = "sweep", "plain_loss", "plain_loss_of_rows", "prepare_ids", "total", "convert"
    whole = {name: getattr(kernels, name) for name in names}
    for past_the_caches in (False, True):
        backend.STREAM = ((0, 0),) if past_the_caches else ()
        expected = losses()
        scratch = backend.scratch
        for place in PLACES:
            for name, kernel in whole.items():
                setattr(kernels, name, between_guards(kernel, place))
            backend.scratch = lambda size, dtype: np.empty(size, dtype)  # not a number more than was asked for
            assert losses() == expected
        backend.scratch = scratch
        for name, kernel in whole.items():
            setattr(kernels, name, kernel)


# ------------------------------------------------------------------------------------------------ products


def check_products() -> None:
    """Multiply matrices of all layouts, bfloat16 by pairs where the processor does."""
    halves = HALVES if backend.READS_HALVES else []
    for dtype, place in itertools.product((np.float32, np.float64, *halves), PLACES):
        gemm.scratch = lambda size, dtype, place=place: guarded(size, dtype, place)
        for (m, n, k), a_turned, b_turned in itertools.product(
            ((1, 1, 1), (9, 49, 257), (13, 25, 31), (16, 96, 64)), (False, True), (False, True)
        ):
            rng = np.random.default_rng(m)
            a, b = (
                guarded(shape[::-1], dtype, place).T if turned else guarded(shape, dtype, place)
                for shape, turned in (((m, k), a_turned), ((k, n), b_turned))
            )
            a[...], b[...] = rng.standard_normal(a.shape), rng.standard_normal(b.shape)
            out = guarded((m, n), dtype, place)
            gemm.gemm(a, b, out)
            exact = a.astype(np.float64) @ b.astype(np.float64)
            assert (np.abs(out - exact) <= 1e-3 + (np.abs(exact) / 256 if out.itemsize == 2 else 0)).all()


if __name__ == "__main__":
    swl.set_backend("numba")
    swl.set_num_threads(1)
    {"losses": check_losses, "products": check_products}[sys.argv[1]]()
    print("survived")
