"""`linear_log_prob` for tensors: what policy-gradient training needs of a language model's head, without its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swl.backends import Rows
from swl.backends.protocol import joined
from swl.ops import log_prob as ops
from swl.ops.checks import F64
from swl.ops.chunks import DEFAULT_BUDGET
from swl.ops.linear_cross_entropy import ALL
from swl.options import DEFAULTS, Options
from swl.torch._affine import checked_operands, form_logits, matrix, products
from swl.torch._bridge import Bridge, bridge
from swl.torch._composed import check_values, composed, differentiated, placed
from swl.torch._loss import batched, check, require_tensors, route
from swl.torch._options import ACC, checked
from swl.typing import Results

__all__ = ["linear_log_prob"]


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = DEFAULTS.ignore_index,
    memory_budget: int = DEFAULT_BUDGET,
) -> Results:
    """Compute ``log softmax((input·linear_weightᵀ + linear_bias)/temperature)`` at the target, without storing the logits.

    Parameters
    ----------
    input : Tensor, shape (..., D)
    linear_weight : Tensor, shape (C, D)
    target : Tensor, shape (...), of any integer dtype
        Class ids.
    linear_bias : Tensor, shape (C,), optional
    temperature : float
        Divides the logits; above 0.
    entropy : bool
        Also return the entropy of each row.
    ignore_index : int
        Class id whose rows are 0, without a gradient.
    memory_budget : int
        Bytes of working memory, inputs and gradients not counted.

    Returns
    -------
    log_prob : Tensor, shape (...)
        In nats; float64 for float64 input, else float32.
    entropy : Tensor, shape (...)
        ``−Σ_c p_c·log p_c`` in nats; only with ``entropy=True``. Both can be differentiated, again too; backward forms the logits
        once more.

    Raises
    ------
    TypeError, ValueError
        As `linear_cross_entropy`; also for a target of probabilities.

    Examples
    --------
    >>> import torch, swl.torch
    >>> log_prob, H = swl.torch.linear_log_prob(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]), entropy=True)
    >>> log_prob.exp(), H.exp()
    (tensor([0.2500, 0.2500]), tensor([4., 4.]))
    """
    given_ = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
    require_tensors("linear_log_prob", **given_)
    input, linear_weight, linear_bias = checked_operands(input, linear_weight, linear_bias)
    leading = input.shape[:-1]
    if target.shape != leading:
        raise ValueError(f"target must have shape {tuple(leading)}, one class id per row, got {tuple(target.shape)}")
    options = checked(input, None, "none", ignore_index, 0.0, {"temperature": temperature})
    x, t = matrix(input), target.reshape(-1)
    check(x.new_empty(()).expand(x.shape[0], linear_weight.shape[0]), t, options)
    call = Call(options.temperature, options.ignore_index, memory_budget, bool(entropy))
    way = route(x, linear_weight, t, linear_bias)
    if way == "transformed":
        check_values(t, linear_weight.shape[0], ACC[x.dtype], options, False)
        found = _composed(x, linear_weight, t, linear_bias, call)
    elif way == "traced":
        found = _operation(x, linear_weight, t, linear_bias, *call)[:2]
    else:
        found = _LinearLogProb.apply(x, linear_weight, t, linear_bias, call)
    log_prob, H = found[0].view(leading), found[1]
    return (log_prob, H.view(leading)) if entropy else log_prob


class Call(NamedTuple):
    """What a call asks for beside its tensors."""

    temperature: float
    ignore_index: int
    memory_budget: int
    entropy: bool

    @property
    def options(self) -> Options:
        return DEFAULTS._replace(reduction="none", temperature=self.temperature, ignore_index=self.ignore_index)

    def problem(self, here: Bridge, x: Tensor, W: Tensor, t: Tensor, b: Tensor | None, needs: Any = ()) -> Any:
        bias = None if b is None else here.array(b)
        arrays = here.array(x), here.array(W.T), here.array(t), bias
        return ops.head(here.backend, *arrays, self.options, self.memory_budget, needs)


def _forward(x: Tensor, W: Tensor, t: Tensor, b: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probabilities, entropies or nothing, and what backward needs of the rows, (3 or 4, N)."""
    here = bridge(x)
    with here.scope():
        p = call.problem(here, x, W, t, b)
        rows = p.source.forward(p, call.entropy)
        values = ops.values(p, rows)
        log_prob, H = here.tensor(values[0]), None if values[1] is None else here.tensor(values[1])
        kept = [rows.row_max, rows.log_sum, rows.mass, *([rows.entropy] if call.entropy else [])]
        stacked = joined(p.backend.xp, [field[None] for field in kept])
        return log_prob, log_prob.new_empty(0) if H is None else H, here.tensor(stacked)


def _gradients(
    d_log_prob: Tensor, d_entropy: Tensor | None, kept: Tensor, x: Tensor, W: Tensor, t: Tensor, b: Tensor | None,
    needs: list[bool], call: Call,
) -> list[Tensor | None]:  # fmt: skip
    here = bridge(x)
    with here.scope():
        p = call.problem(here, x, W, t, b, [name for name, needed in zip(ALL, needs, strict=True) if needed])
        acc = torch.float64 if p.acc == F64 else torch.float32
        a, h = (None if d is None else here.array(d.to(acc)) for d in (d_log_prob, d_entropy))
        M, S, A, *H = here.array(kept)
        _, gradients = ops.gradients(p, a, h, Rows(M, M, S, M, A, *H))
        dx, dW, db = (None if g is None else here.tensor(g) for g in gradients)
        return [dx, None if dW is None else dW.T, db]


def _composed(x: Tensor, W: Tensor, t: Tensor, b: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """Compute both in torch's own operations, all of whose derivatives torch knows."""
    logits = form_logits(x, W, b)
    log_prob = -composed(logits, t, call.options, False)
    if not call.entropy:
        return log_prob, logits.new_empty(0)
    counts = (t >= 0) & (t < W.shape[0]) & (t != call.ignore_index)
    log_p = (torch.where(counts[:, None], logits, 0) / call.temperature).log_softmax(1)
    p_log_p = torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min))
    return log_prob, torch.where(counts, -p_log_p.sum(1), 0)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, t: Tensor, b: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        log_prob, H, kept = _forward(x, W, t, b, call)
        ctx.save_for_backward(x, W, t, b, kept)
        ctx.call = call
        if not call.entropy:
            ctx.mark_non_differentiable(H)
        ctx.set_materialize_grads(False)
        return log_prob, H

    @staticmethod
    def backward(ctx: Any, d_log_prob: Any, d_entropy: Any) -> Any:
        (x, W, t, b, kept), call = ctx.saved_tensors, ctx.call
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        if d_log_prob is None and d_entropy is None:
            return (None,) * 5
        if torch.is_grad_enabled() or batched(d_log_prob if d_entropy is None else d_entropy):
            with torch.enable_grad():
                outputs = _composed(x, W, t, b, call)
            given = [(y, d) for y, d in zip(outputs, (d_log_prob, d_entropy), strict=True) if d is not None]
            dx, dW, db = differentiated([y for y, _ in given], [d for _, d in given], (x, W, b), needs)
        else:
            d_log_prob = torch.zeros_like(d_entropy) if d_log_prob is None else d_log_prob
            dx, dW, db = _gradients(d_log_prob, d_entropy, kept, x, W, t, b, needs, call)
        return dx, dW, None, db, None


@torch.library.custom_op("swl::linear_log_prob", mutates_args=())
def _operation(
    x: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None,
    temperature: float, ignore_index: int, memory_budget: int, entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(x, linear_weight, target, bias, Call(temperature, ignore_index, memory_budget, entropy))


@_operation.register_fake
def _(x: Any, W: Any, target: Any, bias: Any, temperature: Any, ignore_index: Any, budget: Any, entropy: Any) -> Any:
    N, acc = x.shape[0], torch.float64 if x.dtype is torch.float64 else torch.float32
    shapes = (N,), (N if entropy else 0,), (4 if entropy else 3, N)
    return tuple(x.new_empty(shape, dtype=acc) for shape in shapes)


@torch.library.custom_op("swl::linear_log_prob_backward", mutates_args=())
def _operation_backward(
    d_log_prob: Tensor, d_entropy: Tensor | None, kept: Tensor, x: Tensor, linear_weight: Tensor, target: Tensor,
    bias: Tensor | None, needs: list[bool], temperature: float, ignore_index: int, memory_budget: int, entropy: bool,
) -> list[Tensor]:  # fmt: skip
    call = Call(temperature, ignore_index, memory_budget, entropy)
    grads = _gradients(d_log_prob, d_entropy, kept, x, linear_weight, target, bias, needs, call)
    return [g.contiguous() for g in grads if g is not None]


@_operation_backward.register_fake
def _(a: Any, h: Any, kept: Any, x: Any, W: Any, target: Any, bias: Any, needs: Any, *call: Any) -> Any:
    return [y.new_empty(y.shape) for y, needed in zip((x, W, bias), needs, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W, target, bias, *ctx.call = inputs
    ctx.save_for_backward(output[2], x, W, target, bias)


def _backward(ctx: Any, d_log_prob: Tensor, d_entropy: Tensor, _: Any) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    upstream = d_log_prob, d_entropy if ctx.call[3] else None
    dx, dW, db = placed(_operation_backward(*upstream, *ctx.saved_tensors, needs, *ctx.call), needs)
    return dx, dW, None, db, None, None, None, None


_operation.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.swl.linear_log_prob)
def _(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return products(x, weight, 1)


@register_flop_formula(torch.ops.swl.linear_log_prob_backward)
def _(a: Any, h: Any, kept: Any, x: Any, weight: Any, target: Any, bias: Any, needs: Any, *_: Any, **__: Any) -> int:
    return products(x, weight, 1 + sum(needs[:2]))
