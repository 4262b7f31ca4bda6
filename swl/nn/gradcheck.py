"""Gradients against central differences: ``∂f/∂x ≈ (f(x + h) − f(x − h))/2h``."""

from __future__ import annotations

import copy
import inspect
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from swl.nn.sequential import gradients_of, leaves, parameters_of
from swl.ops.arrays import beside, to_numpy
from swl.ops.checks import is_float, require_integer, require_number, require_plain, shown

__all__ = ["GradientError", "GradientReport", "check_gradients", "numerical_gradient"]

ALONE, GROUP = 1000, 8
"""Numbers of an array up to which each is shifted alone, and numbers that are shifted together in a larger one."""
_EPS, _TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)


def numerical_gradient(f: Callable[[Any], Any], x: Any, h: float | None = None) -> Any:
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


# ------------------------------------------------------------------------------------------------ check_gradients


class GradientError(AssertionError):
    """A gradient disagrees with the differences; the message names the worst element, both values and the tolerance."""


class GradientReport(NamedTuple):
    """What `check_gradients` found; prints as a table."""

    errors: dict[str, float]
    """Worst relative error of each array's gradient."""
    compared: dict[str, int]
    """Number of derivatives compared: elements, or directions."""
    tol: float

    @property
    def worst(self) -> float:
        """The worst relative error of all."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        lines = [f"gradients agree: worst relative error {self.worst:.1e}, tolerance {self.tol:.0e}"]
        width = max(map(len, self.errors), default=0)
        for name, error in self.errors.items():
            lines.append(f"  {name:<{width}}  {error:.1e}  {self.compared[name]} compared")
        return "\n".join(lines)


def check_gradients(
    of: Any,
    *inputs: Any,
    projections: int | None = None,
    tol: float = 1e-6,
    seed: int = 0,
    wrt: Sequence[int] | None = None,
    **kwargs: Any,
) -> GradientReport:
    r"""Compare analytic gradients with central differences, in float64.

    The output is projected on a random upstream gradient ``dout``, so that ``f = Σ dout·output``; each derivative is
    held to ``|analytic − numeric| <= tol·max(|analytic|, |numeric|, noise/tol)``, where the noise is the rounding error
    of the difference itself. NaN fails.

    Parameters
    ----------
    of : layer, pair of functions, or function
        - a layer or `Sequential`: `inputs` are those of its ``forward``; the gradients of the first input and of all
          parameters are checked, on a float64 copy of the layer;
        - ``(forward, backward)``: ``backward(dout, *inputs)`` returns the gradients of the inputs; it is given as many
          of the inputs as it takes;
        - one function that returns ``(value, gradients)``, such as `swl.cross_entropy_value_and_grad`.
    *inputs : arrays
        Copied; floating ones become float64. Integer arrays (class ids) are passed on as they are.
    projections : int, optional
        Check that many seeded random directions of each array, two evaluations each, in place of every element. Without it an
        array of up to 1,000 numbers takes two evaluations for each, and a larger one two for eight at a time with random
        signs: seconds for a small network, hours for a large one. A
        failure is then traced to an element by bisection.
    tol : float
        Relative tolerance.
    seed : int
        Of the upstream gradient and the directions.
    wrt : sequence of int, optional
        For functions, the positions of the inputs whose gradients are returned, in that order. By default all floating
        inputs but those called ``target`` or ``t``.
    **kwargs
        Further arguments of the functions.

    Returns
    -------
    GradientReport

    Raises
    ------
    GradientError
        An AssertionError; names the worst element, both values, and the tolerance.
    TypeError, ValueError
        If `of` cannot be checked.

    Notes
    -----
    Where a first difference disagrees it is taken again with smaller steps, so a kink (of `ReLU`) near a point does no
    harm; one exactly at the point does.

    Examples
    --------
    >>> import numpy as np, swl
    >>> rng = np.random.default_rng(0)
    >>> net = swl.Sequential(swl.Affine.init(5, 4, rng=rng), swl.Sigmoid(), swl.Affine.init(4, 3, rng=rng))
    >>> report = swl.check_gradients(net, rng.standard_normal((6, 5)))
    >>> report.worst < 1e-6, report.compared
    (True, {'x': 30, '0.W': 20, '0.b': 4, '2.W': 12, '2.b': 3})
    >>> z, t = rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
    >>> _ = swl.check_gradients(swl.cross_entropy_value_and_grad, z, t, label_smoothing=0.1)
    >>> _ = swl.check_gradients((swl.affine, swl.affine_backward), z, rng.standard_normal((5, 2)), np.zeros(2))
    >>> wrong = lambda dout, x: dout * x
    >>> swl.check_gradients((lambda x: x**2, wrong), np.array([3.0]))
    Traceback (most recent call last):
    swl.nn.gradcheck.GradientError: gradient of x at [0]: backward gives 0.377..., central differences give 0.754...
    (relative error 0.5, tolerance 1e-06)
    """
    require_number("tol", tol, "in (0, 1)", lambda v: 0 < v < 1)
    if projections is not None:
        require_integer("projections", projections, 1)
    rng = np.random.default_rng(require_integer("seed", seed, 0))
    given = tuple(_double(x) for x in inputs)
    if hasattr(of, "forward") and hasattr(of, "backward"):
        if wrt is not None or kwargs:
            raise TypeError("wrt and further arguments are for functions, not for layers")
        problem = _of_layer(of, given, rng)
    elif isinstance(of, tuple) and len(of) == 2 and all(map(callable, of)):
        problem = _of_pair(of[0], of[1], given, kwargs, wrt, rng)
    elif callable(of):
        problem = _of_value_and_grad(of, given, kwargs, wrt, rng)
    else:
        raise TypeError(f"of must be a layer, a pair of functions or a function, got {of!r}")

    report = GradientReport({}, {}, tol)
    progress = _Progress(sum(int(np.size(analytic)) for _, _, analytic in problem.arrays))
    for name, array, analytic in problem.arrays:
        check = _Check(name, array, analytic, problem.output, problem.dout, tol)
        if projections:
            worst, count = check.projected(projections, rng), projections
        else:
            worst, count = check.each(progress.step, rng)
        report.errors[name], report.compared[name] = worst.error, count
        if not worst.error <= tol:  # a NaN fails
            if worst.at is None:
                worst = check.bisect(worst)
            where = "" if worst.at is None else f" at {list(worst.at)}"
            raise GradientError(
                f"gradient of {name}{where}: backward gives {worst.analytic!r}, central differences give "
                f"{worst.numeric!r} (relative error {worst.error:.2g}, tolerance {tol:g})"
            )
    progress.end()
    return report


class _Progress:
    """A line on a terminal that says how far a check of every element is, once it takes longer than a moment."""

    AFTER, EVERY = 2.0, 0.5
    """Seconds until the first line, and between lines."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.shown = total, 0, False
        self.next = time.monotonic() + self.AFTER

    def step(self, count: int) -> None:
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
        if self.shown:
            print(file=sys.stderr)


class _Problem(NamedTuple):
    output: Callable[[], Any]  # evaluates the function at the present contents of the arrays
    dout: Any  # of the shape of the output
    arrays: list[tuple[str, Any, Any]]  # name, the array to shift in place, the gradient claimed for it


class _Comparison(NamedTuple):
    error: float
    analytic: float
    numeric: float
    at: tuple[int, ...] | None = None
    direction: Any = None

    @property
    def rank(self) -> float:
        return math.inf if math.isnan(self.error) else self.error


class _Check:
    """Compares the gradient of one array."""

    def __init__(self, name: str, array: Any, analytic: Any, output: Any, dout: Any, tol: float) -> None:
        if np.shape(analytic) != array.shape:
            raise GradientError(f"gradient of {name} has shape {np.shape(analytic)}, but {name} has {array.shape}")
        self.array, self.output, self.dout, self.tol = array, output, dout, tol
        self.analytic = to_numpy(analytic).astype(np.float64)
        self.home = to_numpy(array)

    def _write(self, values: Any) -> None:
        self.array[...] = beside(self.array, values)

    def along(self, direction: Any, analytic: float) -> _Comparison:
        """Compare along a direction, again with a smaller step where it disagrees."""
        moved = np.isfinite(self.home) & (direction != 0)
        size = float(np.abs(self.home[moved]).max(initial=1.0))
        reach = float(np.abs(direction).max())

        def differ(shrink: int) -> tuple[Any, Any, float]:
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
    ) -> _Comparison:
        """Compare with differences of the output over ±h; `differ` takes what the step is divided by.

        Errors are relative to `size`, or else to the larger derivative.
        """
        best = _Comparison(math.nan, analytic, math.nan)
        for shrink in (1, 8, 64):
            high, low, h = differ(shrink)
            numeric = float((self.dout * (high - low)).sum()) / (2 * h)
            noise = 20 * _EPS * float(abs(self.dout * high).sum()) / h
            whole = max(abs(analytic), abs(numeric)) if size is None else size
            error = abs(analytic - numeric) / max(whole, noise / self.tol, _TINY)
            if error <= self.tol:
                return _Comparison(error, analytic, numeric)
            if shrink == 1 or error < best.error:
                best = _Comparison(error, analytic, numeric)
        return best

    def at(self, index: Any, signs: Any = 1.0) -> _Comparison:
        """Compare along ± some elements; only they are written."""
        before, analytic = self.home[index], float((signs * self.analytic[index]).sum())
        size = float(np.abs(before[np.isfinite(before)]).max(initial=1.0))

        def shifted(by: Any) -> Any:
            self.array[index] = beside(self.array, before + by)
            return _array(self.output())

        def differ(shrink: int) -> tuple[Any, Any, float]:
            h = _EPS ** (1 / 3) * size / shrink
            try:
                return shifted(h * signs), shifted(-h * signs), h
            finally:
                self.array[index] = beside(self.array, before)

        largest = float(np.abs(self.analytic[index]).max())  # one wrong element of several must show beside their sum
        return self._compare(differ, analytic, largest if np.ndim(signs) else None)

    def element(self, index: tuple[int, ...]) -> _Comparison:
        return self.at(index)._replace(at=index)

    def each(self, step: Callable[[int], None], rng: np.random.Generator) -> tuple[_Comparison, int]:
        """Compare every element alone; of a large array, in groups with random signs. Also return the comparisons."""
        worst = _Comparison(0.0, 0.0, 0.0, ())
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

    def projected(self, count: int, rng: np.random.Generator) -> _Comparison:
        def one() -> _Comparison:
            v = rng.standard_normal(self.home.shape)
            return self.along(v, float((v * self.analytic).sum()))._replace(direction=v)

        if not self.home.size:
            return _Comparison(0.0, 0.0, 0.0)
        return max((one() for _ in range(count)), key=lambda c: c.rank)

    def bisect(self, failed: _Comparison) -> _Comparison:
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


def _double(x: Any) -> Any:
    """Copy an input, floating ones as float64; lists become arrays, numbers stay."""
    if isinstance(x, (list, tuple, float)):
        x = np.asarray(x)
    if not hasattr(x, "dtype"):
        return x
    return x.astype(np.float64) if is_float(x.dtype) else x.copy()


def _array(y: Any) -> Any:
    return y if hasattr(y, "dtype") else np.asarray(y)


def _random_like(y: Any, rng: np.random.Generator) -> Any:
    """Draw an upstream gradient for an output."""
    if not hasattr(y, "dtype"):
        return float(rng.standard_normal())
    return beside(y, np.asarray(rng.standard_normal(y.shape)))


def _of_layer(layer: Any, inputs: tuple[Any, ...], rng: np.random.Generator) -> _Problem:
    layer = copy.deepcopy(layer)
    for leaf in leaves([layer]):
        for name, p in parameters_of(leaf).items():
            if p.dtype != np.float64:
                if not hasattr(leaf, name):
                    raise TypeError(f"parameter {name} of {leaf!r} must be float64 for a check, got {p.dtype}")
                setattr(leaf, name, p.astype(np.float64))
    dout = _random_like(layer.forward(*inputs), rng)
    dx = layer.backward(dout)
    arrays = [("x", inputs[0], dx)] if hasattr(inputs[0], "dtype") and is_float(inputs[0].dtype) else []
    gradients = {name: to_numpy(g) for name, g in gradients_of(layer).items()}
    arrays += [(name, p, gradients[name]) for name, p in parameters_of(layer).items()]
    return _Problem(lambda: layer.forward(*inputs), dout, arrays)


def _of_pair(
    f: Any, backward: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], wrt: Any, rng: np.random.Generator
) -> _Problem:
    def output() -> Any:
        return f(*inputs, **kwargs)

    dout = _random_like(output(), rng)
    takes = [p for p in _signature(backward) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = any(p.kind == p.VAR_POSITIONAL for p in _signature(backward))
    gradients = backward(dout, *(inputs if anything else inputs[: len(takes) - 1]), **kwargs)
    return _Problem(output, dout, _named(f, inputs, gradients, wrt))


def _of_value_and_grad(
    f: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], wrt: Any, rng: np.random.Generator
) -> _Problem:
    def both(**more: Any) -> Any:
        result = f(*inputs, **kwargs, **more)
        if not (isinstance(result, tuple) and len(result) >= 2):
            raise TypeError(f"{getattr(f, '__name__', f)} must return (value, gradients), got {type(result).__name__}")
        return result

    value = both()[0]
    takes_dout = any(p.name == "dout" for p in _signature(f)) and "dout" not in kwargs
    if takes_dout:
        dout = _random_like(value, rng)
        gradients = both(dout=dout)[1]
    else:
        if np.size(value) != 1:
            raise TypeError("a function whose value is not a single number must take dout")
        dout, gradients = kwargs.get("dout", 1.0), both()[1]
    return _Problem(lambda: both()[0], dout, _named(f, inputs, gradients, wrt))


def _signature(f: Any) -> Sequence[inspect.Parameter]:
    return tuple(inspect.signature(f).parameters.values())


def _named(f: Any, inputs: tuple[Any, ...], gradients: Any, wrt: Any) -> list[tuple[str, Any, Any]]:
    """Match gradients with inputs."""
    names = [p.name for p in _signature(f) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"input {i}" for i in range(len(names), len(inputs))]
    if wrt is None:
        floating = (i for i, x in enumerate(inputs) if hasattr(x, "dtype") and is_float(x.dtype))
        wrt = [i for i in floating if names[i] not in ("t", "target")]
    found = list(gradients) if isinstance(gradients, (tuple, list)) else [gradients]
    if len(found) != len(wrt):
        found = [g for g in found if g is not None]
    if len(found) != len(wrt):
        raise ValueError(
            f"{len(found)} gradients came back for the {len(wrt)} inputs {[names[i] for i in wrt]}; "
            "name the positions of the inputs they belong to by wrt="
        )
    return [(names[i], inputs[i], g) for i, g in zip(wrt, found, strict=True) if g is not None]
