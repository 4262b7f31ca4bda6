"""The gradient check: analytic gradients of layers and functions against central differences."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from swl.nn.differences import Check, Progress
from swl.nn.sequential import gradients_of, leaves, parameters_of
from swl.ops.arrays import beside, to_numpy
from swl.ops.checks import is_float, require_integer
from swl.options import require_number
from swl.typing import Array, ArrayLike, LayerLike

__all__ = ["GradientError", "GradientReport", "check_gradients"]


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
    of: LayerLike | tuple[Callable[..., Any], Callable[..., Any]] | Callable[..., Any],
    *inputs: ArrayLike,
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
    progress = Progress(sum(int(np.size(analytic)) for _, _, analytic in problem.arrays))
    for name, array, analytic in problem.arrays:
        if np.shape(analytic) != array.shape:
            raise GradientError(f"gradient of {name} has shape {np.shape(analytic)}, but {name} has {array.shape}")
        check = Check(array, analytic, problem.output, problem.dout, tol)
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


class _Problem(NamedTuple):
    output: Callable[[], Any]  # evaluates the function at the present contents of the arrays
    dout: Array  # of the shape of the output
    arrays: list[tuple[str, Any, Any]]  # name, the array to shift in place, the gradient claimed for it


def _double(x: Array) -> Any:
    """Copy an input, floating ones as float64; lists become arrays, numbers stay."""
    if isinstance(x, (list, tuple, float)):
        x = np.asarray(x)
    if not hasattr(x, "dtype"):
        return x
    return x.astype(np.float64) if is_float(x.dtype) else x.copy()


def _random_like(y: Array, rng: np.random.Generator) -> Array:
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
    def output() -> Array:
        return f(*inputs, **kwargs)

    dout = _random_like(output(), rng)
    takes = [p for p in _signature(backward) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = any(p.kind == p.VAR_POSITIONAL for p in _signature(backward))
    gradients = backward(dout, *(inputs if anything else inputs[: len(takes) - 1]), **kwargs)
    return _Problem(output, dout, _named(f, inputs, gradients, wrt))


def _of_value_and_grad(
    f: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], wrt: Any, rng: np.random.Generator
) -> _Problem:
    def both(**more: Any) -> Array:
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


def _named(f: Any, inputs: tuple[Any, ...], gradients: Array, wrt: Any) -> list[tuple[str, Any, Any]]:
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
