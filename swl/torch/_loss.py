"""Cross-entropy of tensors: checks in torch's terms, and the sweeps over whatever memory layout the logits have."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from swl.backends import Rows
from swl.ops.checks import F32, F64
from swl.ops.cross_entropy import SMALL
from swl.ops.loss import Problem, problem
from swl.options import Options, Reduction, require_magnitudes
from swl.torch._bridge import Bridge, bridge, host_scalar

__all__ = [
    "FLOATS",
    "NO_TENSORS",
    "Loss",
    "Settings",
    "Tensors",
    "are_defaults",
    "at_once",
    "check",
    "check_values",
    "composed",
    "logits_rows",
    "out_dtype",
    "route",
    "settings",
    "target_gradient",
    "tensors",
]

FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_INTEGERS = frozenset(
    (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)
ACC: dict[Any, Any] = {torch.float64: F64, torch.float32: F32, torch.float16: F32, torch.bfloat16: F32}
"""The dtype of the arithmetic."""

_AS_IT_IS = (torch.float32, torch.float64)
"""The dtypes that need no conversion."""

PER_SAMPLE = 256
"""Positions of a sample from which a class dimension that is not the innermost is read in place, a sample at a time;
below, one copy with the classes innermost is cheaper than so many small sweeps."""


class Settings(NamedTuple):
    """The options of a loss that are no tensors."""

    reduction: Reduction = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: off


class Tensors(NamedTuple):
    """The options of a loss that are tensors."""

    weight: Tensor | None = None  # (C,)
    sample_weight: Tensor | None = None  # the shape of class ids
    denominator: Tensor | None = None  # 0-d


NO_TENSORS = Tensors()


# ------------------------------------------------------------------------------------------------ checks


def are_defaults(reduction: str, ignore_index: int, label_smoothing: float, z_loss: float) -> bool:
    """Tell whether options are their defaults, but for which id is ignored; takes whatever a caller may pass."""
    types = type(reduction), type(ignore_index), type(label_smoothing), type(z_loss)
    return types == (str, int, float, float) and reduction == "mean" and label_smoothing == z_loss == 0


def settings(
    reduction: str, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None
) -> Settings:
    """Check the options that are no tensors."""
    if softcap is None and are_defaults(reduction, ignore_index, label_smoothing, z_loss):
        return Settings(ignore_index=ignore_index)
    checked = Options.checked(
        {
            "reduction": reduction,  # type: ignore[typeddict-item]  # this is the check
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
        }
    )
    numbers = float(label_smoothing), float(z_loss), float(softcap or 0.0)
    return Settings(checked.reduction, int(ignore_index), *numbers)


def tensors(
    input: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    denominator: Tensor | float | None,
    reduction: str,
) -> Tensors:
    """Check the options that are tensors, but for their shapes."""
    if weight is None and sample_weight is None and denominator is None:
        return NO_TENSORS
    if denominator is not None:
        if not isinstance(denominator, Tensor):
            Options.checked({"reduction": reduction, "denominator": denominator})  # type: ignore[typeddict-item]
            require_magnitudes(ACC.get(input.dtype, F32), 1, denominator=float(denominator))
            denominator = torch.full((), float(denominator), dtype=torch.float64, device=input.device)
        elif reduction != "mean":
            raise ValueError(f"denominator applies to reduction='mean' only, got reduction={reduction!r}")
        elif denominator.ndim:
            raise ValueError(f"denominator must be a number or a 0-d tensor, got shape {tuple(denominator.shape)}")
    for name, t in (("weight", weight), ("sample_weight", sample_weight), ("denominator", denominator)):
        if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires a gradient, which is not computed; pass {name}.detach()")
    return Tensors(weight, sample_weight, denominator)


def require_tensor(name: str, x: Any) -> None:
    """Refuse an array of another library, whose dtypes and devices only look like torch's."""
    if not isinstance(x, Tensor):
        kind = type(x)
        raise TypeError(
            f"{name} must be a torch.Tensor, got {kind.__module__}.{kind.__name__}: torch.as_tensor makes one"
        )


def check(input: Tensor, target: Tensor, given: Tensors, setting: Settings) -> bool:
    """Check dtypes, devices and shapes in torch's terms; tell whether the target holds probabilities.

    Raises
    ------
    TypeError, ValueError
        Naming argument, what came and what is legal.
    """
    if input.dtype not in FLOATS:
        require_tensor("input", input)
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    shape = input.shape
    if not shape:
        raise ValueError("input must have shape (C,), (N, C) or (N, C, d1, ..., dK), got ()")
    C = shape[0] if len(shape) == 1 else shape[1]
    if not C:
        raise ValueError(f"input must have at least one class, got shape {tuple(shape)}")
    _, _, eps, z_loss, softcap = setting
    if eps or z_loss or softcap:
        require_magnitudes(ACC[input.dtype], C, label_smoothing=eps, z_loss=z_loss, softcap=softcap)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]
    probabilities = target.shape == shape
    if probabilities:
        if target.dtype not in FLOATS:
            require_tensor("target", target)
            raise TypeError(f"target of probabilities, having the shape of input, must be floating, got {target.dtype}")
        if setting.ignore_index >= 0:
            raise ValueError(f"ignore_index={setting.ignore_index} is for class ids, but target holds probabilities")
    elif target.shape != rows:
        raise ValueError(
            f"target must have shape {tuple(rows)} (class ids) or {tuple(shape)} (probabilities) "
            f"for input of shape {tuple(shape)}, got {tuple(target.shape)}"
        )
    elif target.dtype not in _INTEGERS:
        require_tensor("target", target)
        raise TypeError(f"target of class ids must be of an integer dtype, got {target.dtype}")
    weight, sample_weight, denominator = given
    if weight is not None and weight.shape != (C,):
        raise ValueError(f"weight must have shape {(C,)}, one per class, got {tuple(weight.shape)}")
    if sample_weight is not None and sample_weight.shape != rows:
        raise ValueError(f"sample_weight must have shape {tuple(rows)}, one per row, got {tuple(sample_weight.shape)}")
    for name, t in (("target", target), ("weight", weight), ("sample_weight", sample_weight)):
        if t is not None and t.device != input.device:
            require_tensor(name, t)
            raise TypeError(f"input is on {input.device} but {name} on {t.device}; all tensors must be on one device")
    if denominator is not None and denominator.device != input.device:
        raise TypeError(f"input is on {input.device} but denominator on {denominator.device}")
    return probabilities


def out_dtype(input: Tensor, target: Tensor, probabilities: bool) -> torch.dtype:
    """Say the dtype of the loss as torch has it: that of logits and probabilities; under autocast at least float32."""
    dtype = torch.promote_types(input.dtype, target.dtype) if probabilities else input.dtype
    if dtype is not torch.float64 and torch.is_autocast_enabled(input.device.type):
        return torch.float32
    return dtype


_PLAIN = (Tensor, torch.nn.Parameter)


def route(*given: Tensor | None) -> Literal["at hand", "traced", "transformed"]:
    """Say what the tensors allow.

    ``"at hand"``: they have memory to compute on here and now. ``"traced"``, as by `torch.compile` or with fake tensors: they
    need an operation that torch's dispatcher knows. ``"transformed"``, by `torch.func` or for forward-mode differentiation:
    they need torch's own operations, of which torch knows all derivatives and batching rules.
    """
    if torch.compiler.is_compiling():
        return "traced"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "transformed"
    if torch._C._len_torch_dispatch_stack():
        return "traced"
    for t in given:
        if t is not None and (type(t) not in _PLAIN or t.is_meta):
            return "traced"
    return "at hand"


# ------------------------------------------------------------------------------------------------ layouts


def logits_rows(x: Tensor) -> Tensor:
    """See ``(N, C, d1, ..., dK)`` as ``(rows, C)``; a copy where the dimensions do not merge."""
    if x.ndim == 2:
        return x
    if x.ndim == 1:
        return x.unsqueeze(0)
    return x.movedim(1, -1).reshape(x.numel() // x.shape[1], x.shape[1])


def _restored(rows: Tensor, x: Tensor) -> Tensor:
    """See a matrix ``(rows, C)`` in the shape of `x`."""
    if x.ndim == 2:
        return rows
    if x.ndim == 1:
        return rows.squeeze(0)
    return rows.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _per_sample(x: Tensor) -> bool:
    """Whether to sweep a sample at a time, for classes that are neither innermost nor few enough to copy."""
    if x.ndim < 3 or not x.numel() or x.shape[0] == 1:
        return False
    inner = math.prod(x.shape[2:])
    merges = x.stride(0) == inner * x.stride(-1) and x.stride(1) * x.shape[1] <= x.stride(-1)
    return inner >= PER_SAMPLE and not merges


def _samples(x: Tensor) -> list[Tensor]:
    return [sample.reshape(x.shape[1], -1).T for sample in x]


# ------------------------------------------------------------------------------------------------ sweeps


def at_once(input: Tensor, target: Tensor, ignore_index: int, gradient: bool) -> tuple[float, Tensor | None] | None:
    """Compute the mean loss of a small problem without options on a CPU, and its gradient; None where it is something else.

    Nothing was checked before: whatever is unusual is left to the general way, which also tells what is wrong.
    """
    if not (input.is_cpu and target.is_cpu) or input.numel() > SMALL or target.dtype is not torch.int64:
        return None
    if input.dtype not in _AS_IT_IS or target.is_neg():
        return None
    here = bridge(input)
    logits = here.array(input)
    out = np.empty(logits.shape, logits.dtype) if gradient else None
    done = here.backend.plain_loss(logits, target.numpy(), ignore_index, out)
    if done is None:
        return None
    total, count = done
    return total / count if count else math.nan, None if out is None else torch.from_numpy(out)


class Loss(NamedTuple):
    """A loss whose arguments were checked; its sweeps take the logits as a tensor."""

    bridge: Bridge
    problem: Problem
    shape: torch.Size  # of the rows

    @classmethod
    def of(cls, input: Tensor, target: Tensor, given: Tensors, setting: Settings, probabilities: bool) -> Loss:
        """Bring target and options to the backend."""
        here = bridge(input)
        array = here.array
        rows = logits_rows(target) if probabilities else target.reshape(-1)
        C = input.shape[0] if input.ndim == 1 else input.shape[1]
        n = input.numel() // C
        weight, sample_weight, denominator = given
        with here.scope():
            options = Options(
                None if weight is None else array(weight),
                setting.ignore_index,
                setting.reduction,
                setting.label_smoothing,
                None if sample_weight is None else array(sample_weight.reshape(-1)),
                setting.z_loss,
                setting.softcap or None,
                None if denominator is None else array(denominator),
            )
            nowhere: Any = None  # the sweeps below know where the logits are
            p = problem(here.backend, nowhere, array(rows), (n,), C, ACC[input.dtype], options)
        return cls(here, p, input.shape[:1] + input.shape[2:] if input.ndim > 1 else input.shape[:0])

    def forward(self, input: Tensor) -> Rows:
        """Sweep for the rows of the loss."""
        p = self.problem
        return self._sweep(input, lambda z, t, _, __: p.backend.cross_entropy_forward(z, t, False))

    def both(self, input: Tensor) -> tuple[Rows, Tensor]:
        """Sweep for the rows of the loss and, for an upstream gradient of 1, the gradient."""
        p = self.problem
        scale = p.row_scale(1.0)
        if input.ndim == 2:
            grad = self._empty(input.shape, input)
            z, out = self.bridge.array(input), self.bridge.array(grad)
            return p.backend.cross_entropy_forward_backward(z, p.target, scale, out, False), grad
        whole, parts = self._gradient(input)
        return self._sweep(
            input,
            lambda z, t, out, s: p.backend.cross_entropy_forward_backward(z, t, s, out, False),
            self._arrays(parts),
            scale,
        ), whole

    def backward(self, input: Tensor, rows: Rows, scale: Any) -> Tensor:
        """Sweep for the gradient; `scale` is `row_scale` of the upstream gradient."""
        p = self.problem
        whole, parts = self._gradient(input)
        done = 0

        def one(z: Any, t: Any, out: Any, s: Any) -> None:
            nonlocal done
            p.backend.cross_entropy_backward(z, t, rows.cut(done, done + z.shape[0]), s, out)
            done += z.shape[0]

        self._sweep(input, one, self._arrays(parts), scale)
        return whole

    def row_scale(self, grad_output: Tensor) -> Any:
        """Fold upstream gradient, row weights and denominator into one factor per row, or one for all."""
        return self.problem.row_scale(self.dout(grad_output))

    def dout(self, grad_output: Tensor) -> Any:
        """Bring the upstream gradient to the arithmetic's dtype: 16 bits times 1/N would be rounded to 16 bits."""
        g = grad_output.reshape(-1) if self.problem.options.reduction == "none" else grad_output
        return self.bridge.array(g.to(torch.float64 if self.problem.acc == F64 else torch.float32))

    def reduce(self, loss: Any, dtype: torch.dtype) -> Tensor:
        """Reduce the rows' losses as torch does: the mean of nothing is NaN."""
        p = self.problem
        if p.sample_weight is not None:
            loss = loss * p.sample_weight
        if p.options.reduction == "none":
            return self.bridge.tensor(loss).to(dtype).view(self.shape)
        total = p.backend.total(loss)
        if self.bridge.on_host:
            value = float(total)
            if p.denominator is not None:
                value = value / p.denominator if p.denominator else math.nan
            return host_scalar(value, dtype)
        return self.bridge.tensor(total if p.denominator is None else total / p.denominator).to(dtype)

    # -- pieces of the logits

    def _gradient(self, input: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Give memory for a gradient: as the caller gets it, and in the pieces of `_sweep`."""
        if _per_sample(input):
            whole = self._empty(input.shape, input)
            return whole, _samples(whole)
        C = input.shape[0] if input.ndim == 1 else input.shape[1]
        rows = self._empty((input.numel() // C, C), input)
        return _restored(rows, input), [rows]

    def _empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Give memory for a gradient: on a host from the backend, whose large blocks outlive the tensors made of them."""
        if not self.bridge.on_host:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        return self.bridge.tensor(self.problem.backend.empty(tuple(shape), self.bridge.array(like).dtype))

    def _arrays(self, parts: list[Tensor]) -> list[Any]:
        return [self.bridge.array(part) for part in parts]

    def _sweep(self, input: Tensor, one: Any, outs: list[Any] | None = None, scale: Any = None) -> Any:
        """Run a kernel over the logits, in one piece or a sample at a time."""
        target, array = self.problem.target, self.bridge.array
        if not _per_sample(input):
            return one(array(logits_rows(input.detach())), target, outs and outs[0], scale)
        parts, start = [], 0
        for k, sample in enumerate(_samples(input.detach())):
            stop = start + sample.shape[0]
            here = scale if scale is None or scale.shape[0] == 1 else scale[start:stop]
            parts.append(one(array(sample), target.rows(start, stop), outs and outs[k], here))
            start = stop
        if parts[0] is None:
            return None
        return Rows.joined(self.problem.backend.xp, parts)


def target_gradient(
    input: Tensor,
    target: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    setting: Settings,
) -> Tensor:
    """Compute the gradient with respect to probabilities, ``∂loss/∂q_c = −(1−ε)·w_c·log p_c``, in the arithmetic's dtype.

    It is 0 at a masked class without mass, where the loss is finite only as long as the mass stays 0.
    """
    z = logits_rows(input).to(row_max.dtype)
    if setting.softcap:
        z = _capped(z, setting.softcap)
    w = z.new_ones(z.shape[1]) if weight is None else weight.to(z.dtype)
    y = _probability_rows(target, w, setting.label_smoothing)
    log_p = _log_p(y, z - row_max[:, None], log_sum)
    return _restored(log_p * w * ((setting.label_smoothing - 1.0) * scale[:, None]), input)


def composed(input: Tensor, target: Tensor, given: Tensors, setting: Settings, probabilities: bool) -> Tensor:
    """Compute the loss in torch's own operations, all of whose derivatives torch knows: the equations of the kernels."""
    weight, sample_weight, denominator = given
    reduction, ignore_index, eps, z_loss, softcap = setting
    z = logits_rows(input)
    z = z if z.dtype is torch.float64 else z.float()
    C = z.shape[1]
    w = z.new_ones(C) if weight is None else weight.to(z.dtype)
    ids = invalid = None
    if probabilities:
        m = z.new_ones(z.shape[0])
        y = _probability_rows(target, w, eps)
    else:
        ids = target.reshape(-1).long()
        counts, invalid = _kinds(ids, C, ignore_index)
        ids = torch.where(counts, ids, 0)
        m = torch.where(counts, w[ids], 0)
        hot = ids[:, None] == torch.arange(C, device=ids.device)
        y = torch.where(counts[:, None], torch.where(hot, (1 - eps) * m[:, None], 0) + (eps / C) * w, 0)
        z = torch.where(counts[:, None], z, 0)  # whatever stands in a row that does not count
    if softcap:
        z = _capped(z, softcap)
    M = z.amax(1).detach()  # the loss does not depend on it
    u = z - M[:, None]
    S = u.exp().sum(1).log()
    loss = -(y * _log_p(y, u, S)).sum(1)
    if z_loss:
        loss = loss + z_loss * m * (M + S) ** 2
    if invalid is not None:
        loss = torch.where(invalid, math.nan, loss)
    s = torch.ones_like(m) if sample_weight is None else sample_weight.reshape(-1).to(z.dtype)
    loss = loss * s
    if reduction == "none":
        return loss.view(target.shape if not probabilities else input.shape[:1] + input.shape[2:])
    if reduction == "sum":
        return loss.sum()
    total = (s * m).sum() if denominator is None else denominator
    some = total != 0
    return torch.where(
        some, loss.sum() / torch.where(some, total, 1), math.nan
    )  # without a gradient where nothing counts


def _kinds(ids: Tensor, C: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Tell which rows count, and which ids are neither a class nor ignored."""
    legal = (ids >= 0) & (ids < C)
    if not -(2**63) <= ignore_index < 2**63:  # which no id can be
        return legal, ~legal
    ignored = ids == ignore_index
    return legal & ~ignored, ~(legal | ignored)


def _probability_rows(target: Tensor, w: Tensor, eps: float) -> Tensor:
    """y_c = w_c·((1−ε)·q_c + ε/C)."""
    return w * ((1 - eps) * logits_rows(target).to(w.dtype) + eps / w.shape[0])


def _log_p(y: Tensor, u: Tensor, S: Tensor) -> Tensor:
    """Compute log p = u − S, but 0 for a masked class, u = −inf, without mass: there y·log p and its derivatives are 0."""
    S = S[:, None]
    return torch.where((y == 0) & (u == -math.inf) & (S == S), 0, u - S)


def _capped(r: Tensor, softcap: float) -> Tensor:
    """Compute z = κ·tanh(r/κ) in a form whose derivative torch finds without the cancellation of 1 − tanh²."""
    a = r / softcap
    near = a.abs() < 0.5
    return softcap * torch.where(near, a.tanh(), a.sign() * (1 - 2 * torch.sigmoid(-2 * a.abs())))


def check_values(target: Tensor, C: int, acc: Any, given: Tensors, setting: Settings, probabilities: bool) -> None:
    """Check class ids and denominator as the kernels' way does, if the values inside a transform's tensors can be looked at.

    Where ids cannot, `composed` makes the row's loss NaN.
    """
    with torch._C._DisableFuncTorch():
        ids, denominator = None if probabilities else _inside(target), _inside(given.denominator)
        if ids is not None:
            here = bridge(ids)
            here.backend.prepare_ids(here.array(ids.reshape(-1)), C, setting.ignore_index, None)
        if denominator is not None:
            for value in denominator.reshape(-1).tolist():
                require_magnitudes(acc, C, denominator=value)


def _inside(t: Tensor | None) -> Tensor | None:
    """Return the tensor inside a transform's; None if its values cannot be looked at without waiting."""
    while t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    look = type(t) in _PLAIN and t is not None and t.is_cpu and not torch._C._len_torch_dispatch_stack()
    return t if look else None
