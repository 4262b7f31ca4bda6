"""Optimisers: SGD with momentum, and AdamW. They update arrays in place, of any backend.

As in the book, ``update(params, grads)`` takes what the network gives: dicts with the same keys, or two sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from swl.backends import scope
from swl.ops.checks import acc_dtype, is_float, is_real, require_plain
from swl.options import require_number, shown
from swl.typing import Array

__all__ = ["SGD", "AdamW"]

Arrays = Mapping[str, Any] | Sequence[Any]


def _pairs(params: Arrays, grads: Arrays) -> Iterator[tuple[Any, Any, Any]]:
    """Go through (key, parameter, gradient), all of them checked first."""
    if isinstance(params, Mapping) != isinstance(grads, Mapping) or not all(
        isinstance(given, Mapping | Sequence) and not isinstance(given, str) for given in (params, grads)
    ):
        kinds = f"{type(params).__name__} and {type(grads).__name__}"
        raise TypeError(f"params and grads must both be mappings or both be sequences, got {kinds}")
    if isinstance(params, Mapping) and isinstance(grads, Mapping):
        keys: list[Any] = list(params)
        if keys != list(grads) and set(keys) != set(grads):
            raise ValueError(f"params and grads must have the same keys, got {sorted(params)} and {sorted(grads)}")
    elif len(params) != len(grads):
        raise ValueError(f"params and grads must be of one length, got {len(params)} and {len(grads)}")
    else:
        keys = list(range(len(params)))
    found = [(key, params[key], grads[key]) for key in keys]
    for key, p, g in found:
        if not hasattr(p, "dtype") or not hasattr(g, "dtype"):
            raise TypeError(
                f"params[{key!r}] and its gradient must be arrays, got {type(p).__name__}, {type(g).__name__}"
            )
        if p.shape != g.shape:
            raise ValueError(f"grads[{key!r}] must have the shape of its parameter, {p.shape}, got {g.shape}")
        if not is_float(p.dtype):
            raise TypeError(f"params[{key!r}] must be of a floating dtype, got {p.dtype}")
        if not is_real(g.dtype):
            raise TypeError(f"grads[{key!r}] must hold real numbers, got {g.dtype}")
        require_plain(f"params[{key!r}]", p)
        require_plain(f"grads[{key!r}]", g)
        if not getattr(p.flags, "writeable", True):
            raise ValueError(f"params[{key!r}] is read-only, and is to be updated in place")
    return iter(found)


def _number(name: str, value: float, *, below: float = math.inf) -> float:
    require_number(name, value, f"in [0, {below:g})", lambda v: 0 <= v < below)
    return float(value)


def _subtract(p: Array, step: Array) -> None:
    """``p -= step`` in the dtype of the arithmetic, rounded once."""
    if p.dtype == step.dtype:
        p -= step
    else:
        p[...] = (p.astype(step.dtype) - step).astype(p.dtype)


class _Optimizer:
    """What the optimisers share: the state of each parameter, in the dtype of the arithmetic."""

    def __init__(self) -> None:
        self.steps = 0
        self.state: dict[Any, Any] = {}

    def __repr__(self) -> str:
        settings = ((name, value) for name, value in vars(self).items() if name not in ("steps", "state"))
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings)})"

    def _moments(self, key: Any, p: Array, count: int) -> list[Any]:
        found: list[Any] | None = self.state.get(key)
        if found is None:
            found = self.state[key] = [p.astype(acc_dtype(p.dtype)) for _ in range(count)]
            for moment in found:
                moment[...] = 0
        return found


class SGD(_Optimizer):
    """Stochastic gradient descent: ``v ← μ·v + g + δ·p``, ``p ← p − lr·v``.

    Parameters
    ----------
    lr : float
        Learning rate; may be assigned between updates.
    momentum : float
        μ in [0, 1).
    weight_decay : float
        δ of an L2 penalty ``δ/2·‖p‖²``.

    Examples
    --------
    >>> import numpy as np, swl
    >>> W = np.array([1., 2.])
    >>> swl.SGD(lr=0.1).update({"W": W}, {"W": np.array([10., 0.])})
    >>> W
    array([0., 2.])
    """

    def __init__(self, lr: float = 0.01, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.lr = _number("lr", lr)
        self.momentum = _number("momentum", momentum, below=1)
        self.weight_decay = _number("weight_decay", weight_decay)

    def update(self, params: Arrays, grads: Arrays) -> None:
        """Make one step, in place.

        Parameters
        ----------
        params, grads : mappings with the same keys, or sequences of one length
            Arrays; the gradients are only read.

        Raises
        ------
        TypeError, ValueError
            Naming the parameter, before anything is written.
        """
        pairs = _pairs(params, grads)
        self.steps += 1
        for key, p, g in pairs:
            with scope(params=p, grads=g):
                if self.weight_decay:
                    g = g + self.weight_decay * p
                if self.momentum:
                    (v,) = self._moments(key, p, 1)
                    v *= self.momentum
                    v += g
                    g = v
                _subtract(p, self.lr * g)


class AdamW(_Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    ``m ← β₁·m + (1−β₁)·g``, ``s ← β₂·s + (1−β₂)·g²``, ``p ← p − lr·(m̂/(√ŝ + eps) + δ·p)`` with ``m̂ = m/(1−β₁ᵗ)`` and
    ``ŝ = s/(1−β₂ᵗ)`` at step t.

    Parameters
    ----------
    lr : float
        Learning rate; may be assigned between updates.
    betas : (float, float)
        β₁ and β₂, in [0, 1).
    eps : float
    weight_decay : float
        δ, on every parameter that is given.

    Examples
    --------
    >>> import numpy as np, swl
    >>> W = np.array([1., 2.])
    >>> swl.AdamW(lr=0.1, weight_decay=0).update({"W": W}, {"W": np.array([10., 0.])})
    >>> W
    array([0.9, 2. ])
    """

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.lr = _number("lr", lr)
        if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, got {shown(betas)}")
        self.betas = _number("betas[0]", betas[0], below=1), _number("betas[1]", betas[1], below=1)
        self.eps = _number("eps", eps)
        self.weight_decay = _number("weight_decay", weight_decay)

    def update(self, params: Arrays, grads: Arrays) -> None:
        """Make one step, in place; as `SGD.update`."""
        pairs = _pairs(params, grads)
        self.steps += 1
        beta1, beta2 = self.betas
        fix1, fix2 = 1 - beta1**self.steps, math.sqrt(1 - beta2**self.steps)
        for key, p, g in pairs:
            with scope(params=p, grads=g):
                m, s = self._moments(key, p, 2)
                g = g.astype(m.dtype, copy=False)
                m *= beta1
                m += (1 - beta1) * g
                s *= beta2
                s += (1 - beta2) * (g * g)
                step = m / (s**0.5 / fix2 + self.eps)
                step *= self.lr / fix1
                if self.weight_decay:
                    step += (self.lr * self.weight_decay) * p
                _subtract(p, step)
