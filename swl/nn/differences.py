"""Central differences, ``∂f/∂x ≈ (f(x + h) − f(x − h))/2h``: of every element, and against gradients that are claimed."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from swl.ops.arrays import beside, to_numpy
from swl.ops.checks import is_float, require_plain
from swl.options import require_number, shown
from swl.typing import Array, ArrayLike

__all__ = ["Check", "Comparison", "Progress", "numerical_gradient"]

ALONE, GROUP = 1000, 8
"""Numbers of an array up to which each is shifted alone, and numbers that are shifted together in a larger one."""
_EPS, _TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)


def numerical_gradient(f: Callable[[Array], ArrayLike], x: Array, h: float | None = None) -> Array:
    """Compute the gradient of a scalar function by central differences over every element of `x`.

    Parameters
    ----------
    f : callable
        Called as ``f(x)``, and free to ignore its argument: `x` itself holds the shifted value meanwhile, so a function
        of a network whose parameter `x` is works too, as in the book. Returns a number or an array of one element.
    x : array of a floating dtype, preferably float64
        Changed in place, one element at a time, and restored, also if `f` raises.
    h : float, optional
        Step; by default ``∛eps·max(1, |x_i|)`` with the eps of the dtype of `x`, 6e-6 for float64.

    Returns
    -------
    array, of the shape and dtype of `x`

    Raises
    ------
    TypeError, ValueError
        If `x` is not a writeable floating array, or `f` does not return a single number.

    Notes
    -----
    Costs ``2·x.size`` calls of `f`. The relative error is about 1e-10 in float64, and 1e-3 at best in float32.

    Examples
    --------
    >>> import numpy as np, swl
    >>> swl.numerical_gradient(lambda x: (x**2).sum(), np.array([3., 4.])).round(6)
    array([6., 8.])
    """
    require_plain("x", x)
    if not hasattr(x, "dtype") or not is_float(x.dtype):
        raise TypeError(f"x must be an array of a floating dtype, got {getattr(x, 'dtype', type(x).__name__)}")
    if not getattr(x.flags, "writeable", True):
        raise ValueError("x is read-only, and its elements are to be shifted in place")
    if not callable(f):
        raise TypeError(f"f must be a function of x, got {shown(f)}")
    if h is not None:
        require_number("h", h, "finite and above 0", lambda v: 0 < v < math.inf)
    eps = float(np.finfo(x.dtype).eps) if x.dtype.kind == "f" else 2.0**-7  # bfloat16 has no finfo in NumPy
    gradient = np.empty(x.shape, x.dtype)

    def at(index: tuple[int, ...], value: Any) -> tuple[float, float]:
        """Value of f there, and where that is after rounding."""
        x[index] = value
        return _scalar(f(x)), float(x[index])

    for index in np.ndindex(x.shape):
        before = x[index].copy()
        step = h or eps ** (1 / 3) * max(1.0, abs(float(before)))
        try:
            high, right = at(index, float(before) + step)
            low, left = at(index, float(before) - step)
        finally:
            x[index] = before
        if right == left:
            raise ValueError(f"h={step!r} is lost in rounding at x{list(index)} = {float(before)!r}")
        gradient[index] = (high - low) / (right - left)
    return beside(x, gradient)


def _scalar(value: Any) -> float:
    if np.size(value) != 1:
        raise ValueError(f"f must return a single number, got shape {np.shape(value)}")
    return float(value if np.ndim(value) == 0 else value.reshape(()))


# ------------------------------------------------------------------------------------------------ comparison


class Comparison(NamedTuple):
    """A derivative that is claimed beside the one that differences give."""

    error: float
    analytic: float
    numeric: float
    at: tuple[int, ...] | None = None
    direction: Array = None

    @property
    def rank(self) -> float:
        """The error, a NaN as the largest."""
        return math.inf if math.isnan(self.error) else self.error


class Check:
    """The gradient of one array, compared with differences of the output."""

    def __init__(self, array: Array, analytic: Array, output: Any, dout: Array, tol: float) -> None:
        self.array, self.output, self.dout, self.tol = array, output, dout, tol
        self.analytic = to_numpy(analytic).astype(np.float64)
        self.home = to_numpy(array)

    def _write(self, values: Array) -> None:
        self.array[...] = beside(self.array, values)

    def along(self, direction: Any, analytic: float) -> Comparison:
        """Compare along a direction, again with a smaller step where it disagrees."""
        moved = np.isfinite(self.home) & (direction != 0)
        size = float(np.abs(self.home[moved]).max(initial=1.0))
        reach = float(np.abs(direction).max())

        def differ(shrink: int) -> tuple[Array, Array, float]:
            h = _EPS ** (1 / 3) * size / reach / shrink
            try:
                self._write(self.home + h * direction)
                high = _array(self.output())
                self._write(self.home - h * direction)
                return high, _array(self.output()), h
            finally:
                self._write(self.home)

        return self._compare(differ, analytic)

    def _compare(
        self, differ: Callable[[int], tuple[Any, Any, float]], analytic: float, size: float | None = None
    ) -> Comparison:
        """Compare with differences of the output over ±h; `differ` takes what the step is divided by.

        Errors are relative to `size`, or else to the larger derivative.
        """
        best = Comparison(math.nan, analytic, math.nan)
        for shrink in (1, 8, 64):
            high, low, h = differ(shrink)
            numeric = float((self.dout * (high - low)).sum()) / (2 * h)
            noise = 20 * _EPS * float(abs(self.dout * high).sum()) / h
            whole = max(abs(analytic), abs(numeric)) if size is None else size
            error = abs(analytic - numeric) / max(whole, noise / self.tol, _TINY)
            if error <= self.tol:
                return Comparison(error, analytic, numeric)
            if shrink == 1 or error < best.error:
                best = Comparison(error, analytic, numeric)
        return best

    def at(self, index: Any, signs: Any = 1.0) -> Comparison:
        """Compare along ± some elements; only they are written."""
        before, analytic = self.home[index], float((signs * self.analytic[index]).sum())
        size = float(np.abs(before[np.isfinite(before)]).max(initial=1.0))

        def shifted(by: Any) -> Array:
            self.array[index] = beside(self.array, before + by)
            return _array(self.output())

        def differ(shrink: int) -> tuple[Array, Array, float]:
            h = _EPS ** (1 / 3) * size / shrink
            try:
                return shifted(h * signs), shifted(-h * signs), h
            finally:
                self.array[index] = beside(self.array, before)

        largest = float(np.abs(self.analytic[index]).max())  # one wrong element of several must show beside their sum
        return self._compare(differ, analytic, largest if np.ndim(signs) else None)

    def element(self, index: tuple[int, ...]) -> Comparison:
        """Compare one element."""
        return self.at(index)._replace(at=index)

    def each(self, step: Callable[[int], None], rng: np.random.Generator) -> tuple[Comparison, int]:
        """Compare every element alone; of a large array, in groups with random signs. Also return the comparisons."""
        worst = Comparison(0.0, 0.0, 0.0, ())
        if self.home.size <= ALONE:
            for index in np.ndindex(self.home.shape):
                worst = max(worst, self.element(index), key=lambda c: c.rank)
                step(1)
            return worst, self.home.size
        groups = np.array_split(rng.permutation(self.home.size), -(-self.home.size // GROUP))
        for group in groups:
            index, signs = np.unravel_index(group, self.home.shape), rng.choice((-1.0, 1.0), len(group))
            found = self.at(index, signs)
            if found.rank > worst.rank:
                direction = np.zeros(self.home.shape)
                direction[index] = signs
                worst = found._replace(direction=direction)
            step(len(group))
        return worst, len(groups)

    def projected(self, count: int, rng: np.random.Generator) -> Comparison:
        """Compare along `count` random directions; return the worst."""

        def one() -> Comparison:
            v = rng.standard_normal(self.home.shape)
            return self.along(v, float((v * self.analytic).sum()))._replace(direction=v)

        if not self.home.size:
            return Comparison(0.0, 0.0, 0.0)
        return max((one() for _ in range(count)), key=lambda c: c.rank)

    def bisect(self, failed: Comparison) -> Comparison:
        """Trace a failed direction to an element: of its two halves, follow the one that disagrees more."""
        bad = np.argwhere(~np.isfinite(self.analytic))
        if len(bad):
            return self.element(tuple(map(int, bad[0])))
        support = np.flatnonzero(failed.direction)
        while len(support) > 1:
            halves = np.array_split(support, 2)
            support = max(halves, key=lambda half: self._gap(failed.direction, half))
        found = self.element(tuple(map(int, np.unravel_index(support[0], self.home.shape))))
        return found if not found.error <= self.tol else failed  # many small errors may have no culprit

    def _gap(self, direction: Any, half: Any) -> float:
        v = np.zeros(direction.size)
        v[half] = direction.ravel()[half]
        v = v.reshape(direction.shape)
        found = self.along(v, float((v * self.analytic).sum()))
        gap = abs(found.analytic - found.numeric)
        return math.inf if math.isnan(gap) else gap


class Progress:
    """A line on a terminal that says how far a check of every element is, once it takes longer than a moment."""

    AFTER, EVERY = 2.0, 0.5
    """Seconds until the first line, and between lines."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.shown = total, 0, False
        self.next = time.monotonic() + self.AFTER

    def step(self, count: int) -> None:
        """Count elements that were compared."""
        self.done += count
        if self.done % 64 >= count or time.monotonic() < self.next or not sys.stderr.isatty():
            return
        self.next, self.shown = time.monotonic() + self.EVERY, True
        print(
            f"\rcheck_gradients: {self.done:,} of {self.total:,} elements; projections=3 would check directions instead",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        """Leave the line."""
        if self.shown:
            print(file=sys.stderr)


def _array(y: Array) -> Array:
    return y if hasattr(y, "dtype") else np.asarray(y)
