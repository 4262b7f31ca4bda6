"""`affine`: an autograd function for tensors at hand, custom operations for whoever traces them; and what heads share with it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swl.ops.affine import Operands
from swl.torch._bridge import Bridge, bridge
from swl.torch._composed import placed
from swl.torch._loss import FLOATS, batched, require_tensors, route
from swl.torch._options import autocast_dtype

__all__ = ["affine", "checked_operands", "form_logits", "matrix", "products"]


HEAD = ("input", "linear_weight", "linear_bias")
"""What a head calls its operands."""


def affine(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``input·weightᵀ + bias``: `torch.nn.functional.linear` on swl's kernels.

    Parameters
    ----------
    input : Tensor, shape (..., D)
        float64, float32, float16 or bfloat16; on the CPU or a CUDA device.
    weight : Tensor, shape (K, D), of the dtype of `input`
    bias : Tensor, shape (K,), of the dtype of `input`, optional

    Returns
    -------
    Tensor, shape (..., K)
        16-bit operands are multiplied and summed in float32 and rounded once. Under autocast of autocast's dtype.

    Raises
    ------
    TypeError, ValueError
        Naming argument, what came and what is legal.

    Examples
    --------
    >>> import torch, swl.torch
    >>> swl.torch.affine(torch.tensor([1., 2.]), torch.eye(2), torch.tensor([10., 20.]))
    tensor([11., 22.])
    """
    require_tensors("affine", input=input, weight=weight, bias=bias)
    input, weight, bias = checked_operands(input, weight, bias, ("input", "weight", "bias"))
    way = route(input, weight, bias)
    if way == "traced":
        return _affine_operation(input, weight, bias)
    if way == "transformed":
        return torch.nn.functional.linear(input, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
        return _Affine.apply(input, weight, bias)
    return _affine(input, weight, bias)


def _autocast(*given: Tensor | None) -> tuple[Any, ...]:
    """Convert as torch converts the operands of a product under autocast."""
    dtype = autocast_dtype(next(t.device for t in given if t is not None))
    if dtype is None:
        return given
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype is torch.float64 else t.to(dtype) for t in given
    )


def checked_operands(
    input: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str] = HEAD
) -> tuple[Any, ...]:
    """Check the operands of a product, converted as autocast has it; errors call them by these names."""
    x, w, b = names
    input, weight, bias = _autocast(input, weight, bias)
    if weight.ndim != 2:
        raise ValueError(f"{w} must have shape (K, D), got {tuple(weight.shape)}")
    if not input.ndim or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"{x} must have shape (..., {weight.shape[1]}), got {tuple(input.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{b} must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for name, t in zip(names, (input, weight, bias), strict=True):
        if t is None:
            continue
        if t.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.dtype is not input.dtype or t.device != input.device:
            raise TypeError(f"{x} is {input.dtype} on {input.device} but {name} is {t.dtype} on {t.device}")
    return input, weight, bias


def _operands(here: Bridge, input: Tensor, weight: Tensor) -> Operands:
    return Operands.of(here.backend, here.array(input), here.array(weight.T))


def _affine(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    here = bridge(input)
    with here.scope():
        y = _operands(here, input, weight).forward(None if bias is None else here.array(bias))
        return here.tensor(y)


def _affine_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    here = bridge(input)
    rows, (K, D) = grad_output.numel() // max(weight.shape[0], 1), weight.shape
    with here.scope():
        grads = [
            torch.empty(shape, dtype=input.dtype, device=input.device) if needed else None
            for shape, needed in zip(((rows, D), (K, D), (K,)), needs, strict=True)
        ]
        dx, dw, db = grads
        here.backend.affine_backward(
            here.array(grad_output.reshape(rows, K)),
            here.array(input.reshape(rows, D)),
            here.array(weight.T),
            None if dx is None else here.array(dx),
            None if dw is None else here.array(dw.T),
            None if db is None else here.array(db),
        )
    return [None if dx is None else dx.view(input.shape), dw, db]


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _affine(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        if not torch.is_grad_enabled() and not batched(grad_output):
            return tuple(_affine_gradients(grad_output, input, weight, ctx.needs_input_grad))
        # to be differentiated again, or many at once: in torch's own operations
        g, x = grad_output.reshape(-1, weight.shape[0]), input.reshape(-1, weight.shape[1])
        d_input, d_weight, d_bias = ctx.needs_input_grad
        return grad_output @ weight if d_input else None, g.T @ x if d_weight else None, g.sum(0) if d_bias else None


@torch.library.custom_op("swl::affine", mutates_args=())
def _affine_operation(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _affine(input, weight, bias)


@_affine_operation.register_fake
def _(input: Any, weight: Any, bias: Any) -> Any:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.custom_op("swl::affine_backward", mutates_args=())
def _affine_operation_backward(grad_output: Tensor, input: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    a, b, c = needs
    return [t for t in _affine_gradients(grad_output, input, weight, (a, b, c)) if t is not None]


@_affine_operation_backward.register_fake
def _(grad_output: Any, input: Any, weight: Any, needs: Any) -> Any:
    shapes = input.shape, weight.shape, weight.shape[:1]
    return [input.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


def _affine_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _affine_backward(ctx: Any, grad_output: Tensor) -> Any:
    needs = list(ctx.needs_input_grad)
    return placed(_affine_operation_backward(grad_output, *ctx.saved_tensors, needs), needs)


_affine_operation.register_autograd(_affine_backward, setup_context=_affine_setup)


# ------------------------------------------------------------------------------------------------ what heads share with it


def matrix(x: Tensor) -> Tensor:
    """See ``(..., D)`` as ``(rows, D)``."""
    return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def form_logits(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """Form all logits, in the arithmetic's dtype and torch's own operations."""
    acc = torch.float64 if x.dtype is torch.float64 else torch.float32
    with nullcontext() if autocast_dtype(x.device) is None else torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x.to(acc), W.to(acc), None if b is None else b.to(acc))


def products(x: Any, weight: Any, count: int) -> int:
    """Count the operations of so many products of (..., D) with (K, D)."""
    return int(2 * math.prod(x[:-1]) * math.prod(weight) * count)


@register_flop_formula(torch.ops.swl.affine)
def _(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return products(x, weight, 1)


@register_flop_formula(torch.ops.swl.affine_backward)
def _(grad_output: Any, x: Any, weight: Any, needs: Any, **_: Any) -> int:
    return products(x, weight, sum(needs[:2]))
