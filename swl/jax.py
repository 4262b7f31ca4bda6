"""The losses for JAX on a CPU: `jax.custom_vjp` functions over host callbacks.

They work under `jax.jit`, `jax.grad`, `jax.vmap` and `jax.shard_map`. Limits: the CPU only, with a copy in and out of each
callback; `vmap` runs the elements of the batch one after the other; under a `jax.jit` of sharded arrays a callback has them
gathered first, which `jax.shard_map` does not; no forward mode and no second derivatives; gradients with respect to the inputs,
not to targets, weights or denominators, for which asking is an error.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from swl.backends import host_backend
from swl.functional import cross_entropy as _cross_entropy
from swl.functional import cross_entropy_value_and_grad, linear_cross_entropy_value_and_grad
from swl.functional import linear_cross_entropy as _linear_cross_entropy
from swl.ops.chunks import DEFAULT_BUDGET
from swl.options import OptionKwargs, Options
from swl.typing import Array, ArrayLike

__all__ = ["cross_entropy", "linear_cross_entropy"]

_ARRAYS = ("weight", "sample_weight", "denominator")


class _Call(NamedTuple):
    """What of a call is known before it runs."""

    options: tuple[tuple[str, Any], ...]  # those that are no arrays
    arrays: tuple[str, ...]  # names of the arrays after the differentiable ones and the target
    inputs: int  # how many arguments are differentiable

    def run(self, function: Any, *args: Any, dout: Array = None) -> Any:
        """Call a function of the library on NumPy arrays."""
        args = tuple(np.asarray(a) for a in args)
        inputs, target, rest = args[: self.inputs], args[self.inputs], args[self.inputs + 1 :]
        options = dict(self.options) | dict(zip(self.arrays, rest, strict=True)) | {"backend": host_backend()}
        if "denominator" in self.arrays:
            options["denominator"] = float(options["denominator"])
        if dout is not None:
            options["dout"] = np.asarray(dout)
        if self.inputs == 1:
            return function(*inputs, target, **options)
        x, W, *b = inputs
        return function(x, W, target, *b, **options)


def cross_entropy(logits: ArrayLike, target: ArrayLike, **options: Unpack[OptionKwargs]) -> jax.Array:
    """Compute the softmax cross-entropy of logits against class ids or probabilities.

    Parameters
    ----------
    logits : jax.Array, shape (..., C)
        float32, float16 or bfloat16; float64 where JAX has it enabled.
    target : jax.Array, shape (...) of any integer dtype, or (..., C)
    **options
        As for `swl.cross_entropy`, but for ``backend`` and ``check``.

    Returns
    -------
    jax.Array
        As `swl.cross_entropy`.

    Raises
    ------
    ValueError, TypeError
        As `swl.cross_entropy`; from within a callback, as JAX's error that holds the message.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, swl.jax
    >>> loss = lambda z: swl.jax.cross_entropy(z, jnp.array([0, 3]))
    >>> jax.grad(loss)(jnp.zeros((2, 4)))[0].tolist()
    [-0.375, 0.125, 0.125, 0.125]
    """
    return _call(1, options, {}, jnp.asarray(logits), target)


def linear_cross_entropy(
    x: ArrayLike,
    W: ArrayLike,
    target: ArrayLike,
    b: ArrayLike | None = None,
    *,
    memory_budget: int = DEFAULT_BUDGET,
    **options: Unpack[OptionKwargs],
) -> jax.Array:
    """Compute the cross-entropy of ``x·W + b`` without storing the logits.

    Parameters
    ----------
    x : jax.Array, shape (..., D)
    W : jax.Array, shape (D, C)
    target : jax.Array, shape (...) of any integer dtype, or (..., C)
    b : jax.Array, shape (C,), optional
    memory_budget : int
        Bytes of working memory.
    **options
        As for `swl.cross_entropy`, but for ``backend`` and ``check``.

    Returns
    -------
    jax.Array
        As `swl.linear_cross_entropy`.

    Examples
    --------
    >>> import jax.numpy as jnp, swl.jax
    >>> round(float(swl.jax.linear_cross_entropy(jnp.ones((2, 3)), jnp.zeros((3, 4)), jnp.array([0, 3]))), 4)
    1.3863
    """
    inputs = tuple(jnp.asarray(a) for a in (x, W, b) if a is not None)
    return _call(len(inputs), options, {"memory_budget": memory_budget}, *inputs, target)


def _call(inputs: int, options: OptionKwargs, more: dict[str, Any], *args: Any) -> jax.Array:
    for name in ("backend", "check"):
        if options.get(name) is not None:
            raise TypeError(f"swl.jax takes no option {name!r}: it runs on the host, which always checks")
    Options.checked({k: v for k, v in options.items() if k not in _ARRAYS})  # type: ignore[arg-type]
    given: dict[str, Array] = dict(options)
    arrays = {name: jnp.asarray(given.pop(name)) for name in _ARRAYS if given.get(name) is not None}
    plain = {name: value for name, value in given.items() if name not in _ARRAYS} | more
    call = _Call(tuple(sorted(plain.items())), tuple(arrays), inputs)
    others = {"target": jnp.asarray(args[inputs]), **arrays}
    out: jax.Array = _loss(call, *_vary_alike(*args[:inputs], *(_constant(name, a) for name, a in others.items())))
    return out


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _constant(name: str, a: Any) -> Array:
    """Return an array whose gradient must not be asked for."""
    return a


@_constant.defjvp
def _no_gradient(name: str, primals: Any, tangents: Any) -> Array:
    if jnp.issubdtype(primals[0].dtype, jnp.floating):
        raise NotImplementedError(f"the gradient with respect to {name} is not computed; use jax.lax.stop_gradient")
    return primals[0], tangents[0]


def _manual_axes(a: Any) -> frozenset[str]:
    """Return the axes of a mesh over which an array differs, within `jax.shard_map`; JAX's name for them has changed."""
    kind = jax.typeof(a) if hasattr(jax, "typeof") else None
    manual = getattr(kind, "manual_axis_type", None)
    found: frozenset[str] = getattr(kind, "vma", frozenset()) if manual is None else manual.varying
    return found


def _vary_alike(*args: Any) -> tuple[Any, ...]:
    """See arrays as differing over the same axes: the gradient of one that did not before is then summed over them."""
    every = frozenset[str]().union(*map(_manual_axes, args))
    return tuple(_vary(a, every - _manual_axes(a)) for a in args)


def _vary(a: Any, axes: frozenset[str]) -> Array:
    if not axes:
        return a
    names = tuple(sorted(axes))
    return jax.lax.pcast(a, names, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(a, names)


def _result(call: _Call, *args: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the loss."""
    dtype = jnp.float64 if jnp.result_type(*args[: call.inputs]) == jnp.float64 else jnp.float32
    leading = args[0].shape[:-1] if dict(call.options).get("reduction") == "none" else ()
    return jax.ShapeDtypeStruct(leading, dtype)


def _at_host(function: Any, result: Any, *args: Any) -> Array:
    axes = frozenset[str]().union(*map(_manual_axes, args))
    found = jax.pure_callback(function, result, *args, vmap_method="sequential")
    return jax.tree.map(lambda a: _vary(a, axes - _manual_axes(a)), found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(call: _Call, *args: Any) -> Array:
    function = _cross_entropy if call.inputs == 1 else _linear_cross_entropy
    return _at_host(functools.partial(call.run, function), _result(call, *args), *args)


def _forward(call: _Call, *primals: Any) -> Array:
    return _loss(call, *primals), primals


def _backward(call: _Call, args: Any, dout: Array) -> Array:
    """Compute the gradients in one sweep, which takes the upstream gradient as it is."""

    def gradients(dout: Array, *args: Any) -> Array:
        if call.inputs == 1:
            return (call.run(cross_entropy_value_and_grad, *args, dout=dout)[1],)
        return call.run(linear_cross_entropy_value_and_grad, *args, dout=dout)[1][: call.inputs]

    results = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args[: call.inputs])
    return *_at_host(gradients, results, dout, *args), *(None for _ in args[call.inputs :])


_loss.defvjp(_forward, _backward)
