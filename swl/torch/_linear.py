"""`linear_cross_entropy`: an autograd function for tensors at hand, custom operations for whoever traces them.

The fused head computes its gradients in the forward sweep, three matrix products in all, for an upstream gradient of 1, and
backward hands them over, scaled in place. Under ``reduction="none"``, in float16, where a gradient of a mean underflows before
a loss scale reaches it, on a second backward, and in a compiled graph, backward forms the logits again: a fourth product.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Unpack, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swl.backends import Rows
from swl.ops.chunks import DEFAULT_BUDGET
from swl.ops.linear_cross_entropy import ALL
from swl.ops.linear_cross_entropy import check as check_linear
from swl.ops.loss import Problem, Source
from swl.options import DEFAULTS, ExtraKwargs, Options
from swl.torch._affine import affine, checked_operands, form_logits, matrix, products
from swl.torch._bridge import Bridge, bridge
from swl.torch._composed import check_values, composed, differentiated, placed, target_gradient
from swl.torch._cross_entropy import cross_entropy
from swl.torch._loss import Loss, batched, check, require_tensors, route
from swl.torch._options import ACC, as_arrays, autocast_dtype, checked, flattened, packed, unpacked
from swl.torch._stats import composed_stats, fake_kept, kept_stats, of_kept, of_rows, result
from swl.typing import Reduction, Results

__all__ = ["Formed", "handed_over", "linear_cross_entropy"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: torch.nn.LinearCrossEntropyOptions | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    stats: bool = False,
    **extra: Unpack[ExtraKwargs],
) -> Results:
    """Compute the cross-entropy of ``input·linear_weightᵀ + linear_bias`` without storing the logits.

    `torch.nn.functional.linear_cross_entropy` on swl's kernels.

    Parameters
    ----------
    input : Tensor, shape (D,) or (N, D)
        Also (..., D), for targets ``(...)`` or ``(..., C)``.
    linear_weight : Tensor, shape (C, D); or (C, d1, ..., dK, D), for which the logits are stored
    target : Tensor
        Class ids or probabilities, of the shapes that the logits ask for.
    linear_bias : Tensor, shape (C,) or (C, d1, ..., dK), optional
    weight, reduction, label_smoothing, stats, **extra
        As in `cross_entropy`.
    ignore_index : int, optional
        For class ids only; -100 by default.
    options : torch.nn.LinearCrossEntropyOptions, optional
        Its ``batch_chunk_size``, if set, replaces `memory_budget` by that of so many rows of logits. Its other fields trade
        accuracy or repeated backward for memory, and nothing is to be traded here.
    memory_budget : int
        Bytes of working memory, inputs and gradients not counted.

    Returns
    -------
    loss : Tensor
        As `cross_entropy`, of the dtype of `input`.
    stats : swl.RowStats of Tensor
        Only with ``stats=True``, as `cross_entropy`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `affine` and `cross_entropy`.

    Examples
    --------
    >>> import torch, swl.torch
    >>> swl.torch.linear_cross_entropy(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    require_tensors(
        "linear_cross_entropy",
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        weight=weight,
        sample_weight=extra.get("sample_weight"),
    )
    if linear_weight.ndim > 2:
        return _positions(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, stats, extra
        )
    dtype_before = input.dtype
    input, linear_weight, linear_bias = checked_operands(input, linear_weight, linear_bias)
    C, leading = linear_weight.shape[0], input.shape[:-1]
    probabilities = target.shape == (*leading, C)
    if probabilities and ignore_index is not None:
        raise ValueError("ignore_index cannot be given with a target of probabilities")
    ignored = DEFAULTS.ignore_index if ignore_index is None else ignore_index
    given = checked(input, weight, reduction, ignored, label_smoothing, extra)
    if target.shape not in (leading, (*leading, C)):
        raise ValueError(
            f"target must have shape {tuple(leading)} (class ids) or {(*leading, C)} (probabilities), "
            f"got {tuple(target.shape)}"
        )
    given = flattened(given, leading)
    x = matrix(input)
    t = matrix(target) if probabilities else target.reshape(-1)
    check(x.new_empty(()).expand(x.shape[0], C), t, given)
    dtype = torch.promote_types(input.dtype, target.dtype) if probabilities else input.dtype
    if autocast_dtype(input.device) is not None and dtype_before is not torch.float64:
        dtype = torch.float32
    if options is not None and options.batch_chunk_size is not None:
        size = 8 if input.dtype is torch.float64 else 4
        memory_budget = size * (options.batch_chunk_size * C + 2 * x.shape[1] * min(C, 2048))
    way = route(x, linear_weight, t, linear_bias, *given.arrays().values())
    found: tuple[Tensor, ...]
    if way == "transformed":
        check_values(t, C, ACC[x.dtype], given, probabilities)
        logits = form_logits(x, linear_weight, linear_bias)
        found = (composed(logits, t, given, probabilities).to(dtype),)
        if stats:
            found += composed_stats(logits, t, given, probabilities)
    elif way == "traced":
        loss, *kept = _operation(x, linear_weight, t, linear_bias, *packed(given), memory_budget, dtype, stats)
        found = loss, *of_kept(*kept)
    elif torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (x, linear_weight, t, linear_bias)):
        found = _LinearCrossEntropy.apply(x, linear_weight, t, linear_bias, given, memory_budget, dtype, stats)
    else:
        head = _head(x, linear_weight, t, linear_bias, given, memory_budget)
        with head.bridge.scope():
            rows = head.forward(stats)
            found = head.reduce(rows.loss, dtype), *of_rows(head, rows)
    if given.reduction == "none":
        found = found[0].view(leading), *found[1:]
    return result(found, leading)


def _positions(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: Reduction,
    ignore_index: int | None,
    label_smoothing: float,
    stats: bool,
    extra: ExtraKwargs,
) -> Results:
    """Do a loss with a head of its own for every position: one product, and the logits stored."""
    C, *positions, D = linear_weight.shape
    if input.ndim != 2:
        raise ValueError(f"input must have shape (N, {D}) for linear_weight of shape {tuple(linear_weight.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(f"linear_bias must have shape {(C, *positions)}, got {tuple(linear_bias.shape)}")
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = affine(input, linear_weight.reshape(-1, D), bias).view(input.shape[0], C, *positions)
    if ignore_index is not None and target.shape == logits.shape:
        raise ValueError("ignore_index cannot be given with a target of probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index
    return cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        stats=stats,
        **extra,
    )


class Formed(NamedTuple):
    """Inputs and weights as the source of a loss, whose gradients are tensors."""

    bridge: Bridge
    source: Source

    @property
    def home(self) -> dict[str, Any]:
        return self.source.home

    def forward(self, p: Problem, stats: bool) -> Rows:
        return self.source.forward(p, stats)

    def forward_backward(self, p: Problem, dout: Any, stats: bool) -> tuple[Rows, list[Tensor | None]]:
        rows, gradients = self.source.forward_backward(p, dout, stats)
        return rows, self._tensors(*gradients)

    def backward(self, p: Problem, dout: Any, rows: Rows) -> list[Tensor | None]:
        return self._tensors(*self.source.backward(p, dout, rows))

    def probabilities(self, p: Problem, rows: Rows) -> Any:
        return self.source.probabilities(p, rows)

    def _tensors(self, dx: Any, dW: Any, db: Any) -> list[Tensor | None]:
        tensor = self.bridge.tensor
        return [None if g is None else tensor(g) for g in (dx, None if dW is None else dW.T, db)]


def _head(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: Options,
    memory_budget: int,
    needs: Collection[bool] = (False, False, False),
) -> Loss:
    """Check the fused head's loss over tensors."""
    here = bridge(x)
    with here.scope():
        b = None if bias is None else here.array(bias)
        names = [name for name, needed in zip(ALL, needs, strict=True) if needed]
        W, t = here.array(linear_weight.T), here.array(target)
        p = check_linear(here.backend, here.array(x), W, b, t, as_arrays(here, options), memory_budget, names)
    return Loss(here, p._replace(source=Formed(here, p.source)), x.shape[:1])


def handed_over(ctx: Any, head: Loss, grad_output: Tensor) -> list[Tensor | None]:
    """Return the gradients that forward has left, scaled in place; the second time, or if it left none, sweep for them."""
    grads, ctx.gradients = ctx.gradients, None
    if grads is None:
        return cast("list[Tensor | None]", head.backward(grad_output, ctx.rows))
    if not head.bridge.on_host or grad_output.item() != 1.0:
        _scale(head, grads, grad_output)
    return cast("list[Tensor | None]", grads)


def _scale(head: Loss, grads: list[Tensor | None], factor: Tensor) -> None:
    """Scale gradients in place; a row of dx that is ignored stays 0, also where the factor is not finite."""
    ids = head.problem.target.ids
    of_rows = factor if ids is None else torch.where(head.bridge.tensor(ids) >= 0, factor, 0)[:, None]
    for g, by in zip(grads, (of_rows, factor, factor), strict=True):
        if g is not None:
            g.mul_(by)


def _target_gradient(
    head: Loss,
    rows: Rows,
    grad_output: Tensor,
    x: Tensor,
    W: Tensor,
    target: Tensor,
    b: Tensor | None,
    options: Options,
) -> Tensor:
    """Form the logits once more, all of them: this gradient is as large."""
    with torch.no_grad():
        row_max, log_sum = head.bridge.tensor(rows.row_max), head.bridge.tensor(rows.log_sum)
        scale = head.row_scale(grad_output)
        return target_gradient(form_logits(x, W, b), target, row_max, log_sum, scale, options).to(target.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        options: Options,
        memory_budget: int,
        dtype: torch.dtype,
        stats: bool,
    ) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        head = _head(x, linear_weight, target, bias, options, memory_budget, needs)
        with head.bridge.scope():
            ctx.gradients = None
            if options.reduction != "none" and x.dtype is not torch.float16 and any(needs):
                rows, ctx.gradients = head.both(stats)
            else:
                rows = head.forward(stats)
            ctx.save_for_backward(x, linear_weight, target, bias)
            ctx.rows, ctx.others = rows, (options, memory_budget)
            extra = of_rows(head, rows)
            ctx.mark_non_differentiable(*extra)
            return head.reduce(rows.loss, dtype), *extra

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        others = (None,) * 4
        if torch.is_grad_enabled() or batched(grad_output):
            return *_composed_gradients(ctx, grad_output), *others
        # the memory of what was saved may have moved: nothing of the forward's arrays was kept
        (x, W, target, bias), rows, (options, memory_budget) = ctx.saved_tensors, ctx.rows, ctx.others
        d_x, d_weight, d_target, d_bias = ctx.needs_input_grad[:4]
        head = _head(x, W, target, bias, options, memory_budget, (d_x, d_weight, d_bias))
        with head.bridge.scope():
            dx, dW, db = handed_over(ctx, head, grad_output)
            dt = _target_gradient(head, rows, grad_output, x, W, target, bias, options) if d_target else None
        return dx, dW, dt, db, *others


def _composed_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, W, target, bias = ctx.saved_tensors
    with torch.enable_grad():
        logits = form_logits(x, W, bias)
        loss = composed(logits, target, ctx.others[0], target.shape == logits.shape)
    return differentiated([loss], [grad_output.to(loss.dtype)], ctx.saved_tensors, ctx.needs_input_grad[:4])


@torch.library.custom_op("swl::linear_cross_entropy", mutates_args=())
def _operation(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    names: str,
    reduction: str,
    ignore_index: int,
    numbers: Sequence[float],
    memory_budget: int,
    dtype: torch.dtype,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = unpacked(tensors, names, reduction, ignore_index, numbers)
    head = _head(x, linear_weight, target, bias, options, memory_budget)
    with head.bridge.scope():
        rows = head.forward(stats)
        return head.reduce(rows.loss, dtype), *kept_stats(head, rows)


@_operation.register_fake
def _(x: Any, W: Any, target: Any, bias: Any, tensors: Any, names: Any, reduction: Any, *others: Any) -> Any:
    *_, dtype, stats = others
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=dtype)
    return loss, *fake_kept(x, x.shape[0], stats)


@torch.library.custom_op("swl::linear_cross_entropy_backward", mutates_args=())
def _operation_backward(
    grad_output: Tensor,
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    needs: list[bool],
    tensors: Sequence[Tensor],
    names: str,
    reduction: str,
    ignore_index: int,
    numbers: Sequence[float],
    memory_budget: int,
) -> list[Tensor]:
    options = unpacked(tensors, names, reduction, ignore_index, numbers)
    d_x, d_weight, d_target, d_bias = needs
    head = _head(x, linear_weight, target, bias, options, memory_budget, (d_x, d_weight, d_bias))
    with head.bridge.scope():
        rows, dt = head.rows(kept), None
        dx, dW, db = head.backward(grad_output, rows)
        if d_target:
            dt = _target_gradient(head, rows, grad_output, x, linear_weight, target, bias, options)
    return [t.contiguous() for t in (dx, dW, dt, db) if t is not None]


@_operation_backward.register_fake
def _(
    grad_output: Any, x: Any, linear_weight: Any, target: Any, bias: Any, kept: Any, needs: Any, *options: Any
) -> Any:
    like = (x, linear_weight, target, bias)
    return [x.new_empty(t.shape, dtype=t.dtype) for t, needed in zip(like, needs, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, linear_weight, target, bias, tensors, *ctx.others, _, _ = inputs
    ctx.save_for_backward(x, linear_weight, target, bias, output[1], *tensors)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:4])
    x, W, target, bias, kept, *tensors = ctx.saved_tensors
    grads = _operation_backward(grad_loss, x, W, target, bias, kept, needs, tensors, *ctx.others)
    return *placed(grads, needs), [None] * len(tensors), *(None,) * 7


_operation.register_autograd(_backward, setup_context=_setup_context)


# ------------------------------------------------------------------------------------------------ what counters of work see


@register_flop_formula(torch.ops.swl.linear_cross_entropy)
def _(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return products(x, weight, 1)


@register_flop_formula(torch.ops.swl.linear_cross_entropy_backward)
def _(grad_output: Any, x: Any, weight: Any, target: Any, bias: Any, kept: Any, needs: Any, *_: Any, **__: Any) -> int:
    return products(x, weight, 1 + sum(needs[:2]))  # the logits are formed once more
