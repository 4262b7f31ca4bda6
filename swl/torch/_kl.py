"""`linear_kl` for tensors: distillation from a teacher's hidden states, a custom operation that forms all logits in chunks."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swl.ops import kl as ops
from swl.ops.checks import F64
from swl.ops.chunks import DEFAULT_BUDGET
from swl.ops.linear_cross_entropy import ALL
from swl.options import DEFAULTS, Options
from swl.torch._affine import HEAD, checked_operands, form_logits, matrix, products
from swl.torch._bridge import Bridge, bridge
from swl.torch._composed import placed
from swl.torch._loss import require_tensors, route
from swl.torch._options import checked
from swl.typing import Direction

__all__ = ["linear_kl"]


def linear_kl(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    direction: Direction = "forward",
    temperature: float = 1.0,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Compute the divergence between the softmax of a head and that of a teacher's, without storing either's logits.

    Parameters
    ----------
    input, linear_weight, linear_bias : Tensor, shapes (..., D), (C, D) and (C,)
        The student's.
    teacher_input, teacher_weight, teacher_bias : Tensor, shapes (..., E), (C, E) and (C,)
        The teacher's, which get no gradient.
    direction, temperature, reduction, sample_weight, memory_budget
        As in `swl.linear_kl`.

    Returns
    -------
    Tensor
        0-d, or shape (...) under ``reduction="none"``; float64 for float64 input, else float32. Backward forms the logits once
        more. Transforms of `torch.func` store them, and a second derivative is an error.

    Raises
    ------
    TypeError, ValueError
        Naming argument, what came and what is legal.

    Examples
    --------
    >>> import torch, swl.torch
    >>> x, W = torch.ones(2, 3), torch.zeros(4, 3)
    >>> swl.torch.linear_kl(x, W, x, W, teacher_bias=torch.tensor([99., 0., 0., 0.]))
    tensor(1.3863)
    """
    student, teacher = (input, linear_weight, linear_bias), (teacher_input, teacher_weight, teacher_bias)
    names = HEAD, ("teacher_input", "teacher_weight", "teacher_bias")
    heads = []
    for tensors, of in zip((student, teacher), names, strict=True):
        require_tensors("linear_kl", **dict(zip(of, tensors, strict=True)))
        heads.append(checked_operands(*tensors, of))
    (x, W, b), (tx, tW, tb) = heads
    require_tensors("linear_kl", sample_weight=sample_weight)
    options = checked(x, None, reduction, DEFAULTS.ignore_index, 0.0, {"temperature": temperature})
    leading = x.shape[:-1]
    for name, found in (("teacher_input", tx.shape[:-1]), ("sample_weight", getattr(sample_weight, "shape", leading))):
        if found != leading:
            raise ValueError(f"{name} must have the leading shape of input, {tuple(leading)}, got {tuple(found)}")
    if tW.shape[0] != W.shape[0]:
        raise ValueError(f"linear_weight has {W.shape[0]} classes, but teacher_weight has {tW.shape[0]}")
    if any(t is not None and t.device != x.device for t in (tx, tW, tb, sample_weight)):
        raise TypeError(f"all tensors must be on one device, that of input, {x.device}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (tx, tW, tb, sample_weight)):
        raise NotImplementedError("the teacher's tensors and sample_weight get no gradient; detach them")
    s = None if sample_weight is None else sample_weight.reshape(-1)
    given = matrix(x), W, matrix(tx), tW, b, tb, s
    if route(*given) == "transformed":
        loss = _composed(*given, direction, options)
    else:
        loss = _operation(*given, direction, options.temperature, reduction, memory_budget)
    return loss.view(leading) if reduction == "none" else loss


def _problem(
    here: Bridge, tensors: Any, direction: Any, temperature: float, reduction: Any, budget: int, needs: Any
) -> Any:
    x, W, tx, tW, b, tb, s = (cast(Any, None if t is None else here.array(t)) for t in tensors)
    options = Options.checked({"temperature": temperature, "reduction": reduction, "sample_weight": s})
    return ops.head(here.backend, (x, W.T, b), (tx, tW.T, tb), options, direction, budget, needs)


def _composed(
    x: Tensor, W: Tensor, tx: Tensor, tW: Tensor, b: Any, tb: Any, s: Any, direction: str, options: Options
) -> Tensor:
    """Compute the loss in torch's own operations, all of whose derivatives torch knows."""
    log_p, log_q = ((form_logits(*head) / options.temperature).log_softmax(1) for head in ((x, W, b), (tx, tW, tb)))
    log_q = log_q.to(log_p.dtype)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        some = a > -torch.inf
        return torch.where(some, a.exp() * (torch.where(some, a, 0) - torch.where(some, b, 0)), 0).sum(1)

    if direction == "jsd":
        neither = (log_p == -torch.inf) & (log_q == -torch.inf)  # there logaddexp has no derivative
        log_m = torch.logaddexp(torch.where(neither, 0, log_p), torch.where(neither, 0, log_q)) - math.log(2)
        loss = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    else:
        loss = kl(log_q, log_p) if direction == "forward" else kl(log_p, log_q)
    weight = torch.ones_like(loss) if s is None else s.to(loss.dtype)
    loss = loss * weight
    if options.reduction == "none":
        return loss
    return loss.sum() if options.reduction == "sum" else loss.sum() / weight.sum()


@torch.library.custom_op("swl::linear_kl", mutates_args=())
def _operation(
    x: Tensor, W: Tensor, teacher_x: Tensor, teacher_W: Tensor, b: Tensor | None, teacher_b: Tensor | None,
    sample_weight: Tensor | None, direction: str, temperature: float, reduction: str, memory_budget: int,
) -> Tensor:  # fmt: skip
    here, tensors = bridge(x), (x, W, teacher_x, teacher_W, b, teacher_b, sample_weight)
    with here.scope():
        p = _problem(here, tensors, direction, temperature, reduction, memory_budget, ())
        rows, _ = ops.gradients(p, direction, 1.0)  # type: ignore[arg-type]
        loss = p.reduce(rows.loss)
        if reduction == "mean":  # torch's mean of nothing is NaN
            loss = p.backend.xp.where(p.backend.xp.asarray(p.denominator) != 0, loss, loss.dtype.type("nan"))
        return here.tensor(loss).clone()


@_operation.register_fake
def _(x: Any, W: Any, tx: Any, tW: Any, b: Any, tb: Any, s: Any, direction: Any, temperature: Any, *others: Any) -> Any:
    acc = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.new_empty(x.shape[:1] if others[0] == "none" else (), dtype=acc)


@torch.library.custom_op("swl::linear_kl_backward", mutates_args=())
def _operation_backward(
    grad_output: Tensor, x: Tensor, W: Tensor, teacher_x: Tensor, teacher_W: Tensor, b: Tensor | None,
    teacher_b: Tensor | None, sample_weight: Tensor | None, direction: str, temperature: float, reduction: str,
    memory_budget: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    here, tensors = bridge(x), (x, W, teacher_x, teacher_W, b, teacher_b, sample_weight)
    wanted = [name for name, needed in zip(ALL, needs, strict=True) if needed]
    with here.scope():
        p = _problem(here, tensors, direction, temperature, reduction, memory_budget, wanted)
        dout = here.array(grad_output.to(torch.float64 if p.acc == F64 else torch.float32))
        _, (dx, dW, db) = ops.gradients(p, direction, dout)  # type: ignore[arg-type]
        found = (dx, None if dW is None else dW.T, db)
        return [here.tensor(g).contiguous() for g in found if g is not None]


@_operation_backward.register_fake
def _(grad_output: Any, x: Any, W: Any, tx: Any, tW: Any, b: Any, *others: Any) -> Any:
    return [t.new_empty(t.shape) for t, needed in zip((x, W, b), others[-1], strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.others = inputs[7:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    dx, dW, db = placed(_operation_backward(grad_output, *ctx.saved_tensors, *ctx.others, needs), needs)
    return dx, dW, None, None, db, *(None,) * 6


_operation.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.swl.linear_kl)
def _(x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, *_: Any, **__: Any) -> int:
    return products(x, weight, 1) + products(teacher_x, teacher_weight, 1)


@register_flop_formula(torch.ops.swl.linear_kl_backward)
def _(grad_output: Any, x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, *others: Any, **__: Any) -> int:
    return products(x, weight, 1 + sum(others[-1][:2])) + products(teacher_x, teacher_weight, 1)
