"""`cross_entropy`: an autograd function for tensors at hand, custom operations for whoever traces them.

On a CPU the forward sweep of a mean or a sum computes the gradient too, for an upstream gradient of 1: one sweep over the
logits instead of two. Backward hands that gradient over, scaled in place where the upstream gradient is not 1; whoever
asks again gets it from another sweep. On a device, where looking at the upstream gradient would wait, and in float16, where
a gradient of a mean underflows before a loss scale reaches it, backward is always a sweep of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack, cast

import torch
from torch import Tensor

from swl.options import ExtraKwargs, Options
from swl.torch._bridge import host_scalar
from swl.torch._composed import check_values, composed, differentiated, target_gradient
from swl.torch._loss import Loss, at_once, batched, check, out_dtype, require_tensors, route, rows_shape
from swl.torch._options import ACC, are_defaults, checked, packed, unpacked
from swl.torch._stats import composed_stats, fake_kept, kept_stats, of_kept, of_rows, result
from swl.typing import Reduction, Results

__all__ = ["cross_entropy"]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    stats: bool = False,
    **extra: Unpack[ExtraKwargs],
) -> Results:
    """Compute the cross-entropy of logits: `torch.nn.functional.cross_entropy` on swl's kernels.

    Parameters
    ----------
    input : Tensor, shape (C,), (N, C) or (N, C, d1, ..., dK)
        Logits; float64, float32, float16 or bfloat16, of any strides; on the CPU or a CUDA device. Never copied if ``K`` is
        0, the classes are innermost in memory, or a sample has at least 256 positions.
    target : Tensor
        Class ids of any integer dtype, of the shape of `input` without ``C``; or probabilities of the shape of `input`.
    weight : Tensor, shape (C,), optional
        Class weights.
    size_average, reduce : bool, optional
        Torch's old names for `reduction`.
    ignore_index, reduction, label_smoothing
        As torch has them; ``label_smoothing`` in [0, 1).
    stats : bool
        Whether to return by-products of each row, in the same sweep.
    **extra
        The fields of `swl.options.Options` that torch has not; ``sample_weight`` is of the shape of class ids.

    Returns
    -------
    loss : Tensor
        0-d, or of the shape of class ids under ``reduction="none"``; of the dtype of `input` (under autocast float32), NaN
        for the mean of nothing.
    stats : swl.RowStats of Tensor
        Only with ``stats=True``: each of the shape of class ids, in float32 (float64 for float64); without a gradient.

    Raises
    ------
    TypeError, ValueError
        Naming argument, what came and what is legal; on a CPU also for a class id out of range.
    NotImplementedError
        If `weight`, `sample_weight` or `denominator` requires a gradient.

    Notes
    -----
    Differentiable in `input` and in probabilities. Arithmetic and sums are in float32 (float64 for float64), rounded once.
    Derivatives of higher order, forward mode and the transforms of `torch.func` are right too, but run in torch's own
    operations, at their speed.

    Examples
    --------
    >>> import torch, swl.torch
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> swl.torch.cross_entropy(logits, torch.tensor([0, 3])).backward()
    >>> logits.grad[0]
    tensor([-0.3750,  0.1250,  0.1250,  0.1250])
    """
    if (
        (weight is size_average is reduce is None and not stats)
        and are_defaults(reduction, ignore_index, label_smoothing, extra)
        and route(input, target) == "at hand"
    ):
        tracked = input.requires_grad and torch.is_grad_enabled()
        small = at_once(input, target, ignore_index, tracked)
        if small is not None:
            if tracked:
                options = checked(input, None, reduction, ignore_index, label_smoothing, extra)
                return _apply(input, target, options, False, input.dtype, False, small)[0]
            return host_scalar(small[0], input.dtype)
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    require_tensors(
        "cross_entropy", input=input, target=target, weight=weight, sample_weight=extra.get("sample_weight")
    )
    options = checked(input, weight, reduction, ignore_index, label_smoothing, extra)
    probabilities = check(input, target, options)
    dtype = out_dtype(input, target, probabilities)
    way = route(input, target, *options.arrays().values())
    found: tuple[Tensor, ...]
    if way == "traced":
        loss, *kept = _operation(input, target, *packed(options), dtype, stats)
        found = loss, *of_kept(*kept)
    elif way == "transformed":
        C = input.shape[0 if input.ndim == 1 else 1]
        check_values(target, C, ACC[input.dtype], options, probabilities)
        found = (composed(input, target, options, probabilities).to(dtype),)
        if stats:
            found += composed_stats(input, target, options, probabilities)
    elif torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        found = _CrossEntropy.apply(input, target, options, probabilities, dtype, stats)
    else:
        here = Loss.of(input, target, options, probabilities)
        with here.bridge.scope():
            rows = here.forward(stats)
            found = here.reduce(rows.loss, dtype), *of_rows(here, rows)
    return result(found, rows_shape(input))


class _CrossEntropy(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        options: Options,
        probabilities: bool,
        dtype: torch.dtype,
        stats: bool,
        small: tuple[float, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(input, target)
        ctx.options = options, probabilities
        if small is not None:
            ctx.rows, ctx.gradient = None, small[1]
            return (host_scalar(small[0], dtype),)
        loss = Loss.of(input, target, options, probabilities)
        with loss.bridge.scope():
            one_sweep = loss.bridge.on_host and options.reduction != "none" and input.dtype is not torch.float16
            if one_sweep and ctx.needs_input_grad[0]:
                ctx.rows, ctx.gradient = loss.both(stats)
            else:
                ctx.rows, ctx.gradient = loss.forward(stats), None
            extra = of_rows(loss, ctx.rows)
            ctx.mark_non_differentiable(*extra)
            return loss.reduce(ctx.rows.loss, dtype), *extra

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        others = (None,) * 5
        if torch.is_grad_enabled() or batched(grad_output):
            return *_composed_gradients(ctx, grad_output), *others
        (d_input, ctx.gradient), d_target = (ctx.gradient, None), None
        if d_input is not None and not math.isfinite(scale := grad_output.item()):
            d_input = None  # a row that is ignored gets 0 all the same
        if d_input is not None:
            if scale != 1.0:
                d_input.mul_(grad_output)
            if not ctx.needs_input_grad[1]:
                return d_input, None, *others
        input, target = ctx.saved_tensors  # whose memory may have moved: nothing of the forward's arrays was kept
        options, probabilities = ctx.options
        loss = Loss.of(input, target, options, probabilities)
        with loss.bridge.scope():
            rows = ctx.rows if ctx.rows is not None else loss.forward()
            if d_input is None and ctx.needs_input_grad[0]:
                d_input = loss.backward(grad_output, rows)
            if ctx.needs_input_grad[1]:
                tensor, scale = loss.bridge.tensor, loss.row_scale(grad_output)
                d_target = target_gradient(input, target, tensor(rows.row_max), tensor(rows.log_sum), scale, options)
                d_target = d_target.to(target.dtype)
        return d_input, d_target, *others


_apply = super(torch.autograd.Function, _CrossEntropy).apply
"""What ``_CrossEntropy.apply`` calls when it has seen that no transform is active, as `route` has."""


def _composed_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        loss = composed(*ctx.saved_tensors, *ctx.options)
    return differentiated([loss], [grad_output.to(loss.dtype)], ctx.saved_tensors, ctx.needs_input_grad[:2])


# ------------------------------------------------------------------------------------------------ custom operations


@torch.library.custom_op("swl::cross_entropy", mutates_args=())
def _operation(
    input: Tensor,
    target: Tensor,
    tensors: Sequence[Tensor],
    names: str,
    reduction: str,
    ignore_index: int,
    numbers: Sequence[float],
    dtype: torch.dtype,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = unpacked(tensors, names, reduction, ignore_index, numbers)
    loss = Loss.of(input, target, options, target.shape == input.shape)
    with loss.bridge.scope():
        rows = loss.forward(stats)
        return loss.reduce(rows.loss, dtype), *kept_stats(loss, rows)


@_operation.register_fake
def _(input: Any, target: Any, tensors: Any, names: Any, reduction: Any, *others: Any) -> Any:
    *_, dtype, stats = others
    shape = rows_shape(input)
    loss = input.new_empty(shape if reduction == "none" else (), dtype=dtype)
    return loss, *fake_kept(input, math.prod(shape), stats)


@torch.library.custom_op("swl::cross_entropy_backward", mutates_args=())
def _operation_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    kept: Tensor,
    of_target: bool,
    tensors: Sequence[Tensor],
    names: str,
    reduction: str,
    ignore_index: int,
    numbers: Sequence[float],
) -> Tensor:
    options = unpacked(tensors, names, reduction, ignore_index, numbers)
    loss = Loss.of(input, target, options, target.shape == input.shape)
    with loss.bridge.scope():
        if of_target:
            scale = loss.row_scale(grad_output)
            grad = target_gradient(input, target, kept[0], kept[1], scale, options).to(target.dtype)
            return grad.clone(memory_format=torch.contiguous_format)
        # of the layout that the fake operation tells the compiler of
        return cast("Tensor", loss.backward(grad_output, loss.rows(kept))).contiguous()


@_operation_backward.register_fake
def _(grad_output: Any, input: Any, target: Any, kept: Any, of_target: bool, *options: Any) -> Any:
    return input.new_empty(input.shape, dtype=target.dtype if of_target else input.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, tensors, *ctx.others, _, _ = inputs
    ctx.save_for_backward(input, target, output[1], *tensors)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    input, target, kept, *tensors = ctx.saved_tensors
    grads = (
        _operation_backward(grad_loss, input, target, kept, of_target, tensors, *ctx.others) if needed else None
        for needed, of_target in zip(ctx.needs_input_grad, (False, True), strict=False)
    )
    return *grads, [None] * len(tensors), *(None,) * 6


_operation.register_autograd(_backward, setup_context=_setup_context)
