"""The fused head inside causal language models of Hugging Face's transformers.

Such a model calls its head, perhaps scales or caps the logits, and hands them to its `loss_function`. Here the head gives
`LazyLogits`, which remember what is done to them; the loss takes hidden states and weight from them, and no logits are
stored. Whatever else meets them computes them, and sees the tensor that the head would have given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from swl.ops.chunks import DEFAULT_BUDGET
from swl.options import ExtraKwargs
from swl.torch._dtensor import is_dtensor
from swl.torch._linear import linear_cross_entropy
from swl.torch._options import autocast_dtype

__all__ = ["Applied", "LazyLogits", "apply_to"]

Step = tuple[Callable[..., Tensor], tuple[float, ...]]
"""A function of logits, and its other arguments."""


class LazyLogits:
    """Logits that are computed when anything but a loss wants them.

    Has `shape`, `dtype` and `device` of the tensor it stands for; every other attribute, operator and function of torch
    computes the tensor and goes to it.
    """

    def __init__(self, head: torch.nn.Linear, hidden: Tensor, steps: tuple[Step, ...] = ()) -> None:
        self.head, self.hidden, self.steps = head, hidden, steps

    @property
    def shape(self) -> torch.Size:
        """That of the hidden states, with classes in the place of features."""
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden states, unless the model asked for float32."""
        return torch.float32 if any(function is Tensor.float for function, _ in self.steps) else self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """That of the hidden states."""
        return self.hidden.device

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    def tensor(self) -> Tensor:
        """Compute the logits as the model would have."""
        weight, bias = _parameters(self.head)
        dtype = self.hidden.dtype
        logits = linear(self.hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
        for function, args in self.steps:
            logits = function(logits, *args)
        return logits

    def loss_options(self) -> ExtraKwargs:
        """Say in a loss's terms what was done to the logits r: ``r / divisor``, or ``tanh(r / divisor) / after``."""
        divisors = [1.0]
        for function, args in self.steps:
            if function is torch.tanh:
                divisors.append(1.0)
            elif function is torch.div:
                divisors[-1] *= args[0]
            elif function is torch.mul:
                divisors[-1] /= args[0]
        divisor, *after = divisors
        if not after:
            return {"temperature": divisor}
        return {"temperature": divisor * after[0], "softcap": 1 / after[0]}

    # ---------------------------------------------------------------------------------- what models do to their logits

    def _then(self, function: Callable[..., Tensor], *args: Any) -> Any:
        known = all(isinstance(number, int | float) and number > 0 for number in args)
        if known and not (function is torch.tanh and any(before is torch.tanh for before, _ in self.steps)):
            return LazyLogits(self.head, self.hidden, (*self.steps, (function, args)))
        return function(self.tensor(), *args)

    def __truediv__(self, other: Any) -> Any:
        return self._then(torch.div, other)

    def __mul__(self, other: Any) -> Any:
        return self._then(torch.mul, other)

    __rmul__ = __mul__

    def tanh(self) -> Any:
        """Compute the hyperbolic tangent, of a softcap."""
        return self._then(torch.tanh)

    def float(self) -> Any:
        """Convert to float32, in which the loss is computed anyway."""
        return self._then(Tensor.float)

    def contiguous(self) -> LazyLogits:
        """Return itself: computed logits are contiguous."""
        return self

    # ---------------------------------------------------------------------------------- whatever else is done to them

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.tanh and not kwargs:
            return args[0].tanh()
        args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, LazyLogits.tensor, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: LazyLogits, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)

    return apply


for _name in (
    *("add", "radd", "sub", "rsub", "rtruediv", "neg", "pow", "matmul"),
    *("lt", "le", "gt", "ge", "eq", "ne", "getitem", "len", "iter", "array"),
):
    setattr(LazyLogits, f"__{_name}__", _operator(f"__{_name}__"))


class _Head(torch.nn.Linear):
    """A head whose logits are lazy."""

    def forward(self, input: Tensor) -> Any:
        dtype = autocast_dtype(input.device)
        return LazyLogits(self, input if dtype is None or input.dtype is torch.float64 else input.to(dtype))


def _parameters(head: torch.nn.Linear) -> tuple[Tensor, Tensor | None]:
    if is_dtensor(head.weight):
        raise RuntimeError(
            "the head's weight is sharded when the loss needs it; let fully_shard(model) hold the head together with the rest "
            "of the model, not by itself"
        )
    return head.weight, head.bias


def _loss(
    logits: Any,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    memory_budget: int,
    **others: Any,
) -> Tensor:
    """Compute the loss of a causal language model: that of every token's logits and the next token."""
    if not isinstance(logits, LazyLogits):
        raise RuntimeError(
            "the logits were computed before the loss: apply_to looks for models that do no more to them than multiply or "
            "divide by positive numbers and one tanh; undo it by remove()"
        )
    if logits.shape[-1] != vocab_size:
        raise ValueError(f"vocab_size must be that of the head, {logits.shape[-1]}, got {vocab_size}")
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden = logits.hidden.flatten(0, -2)
    weight, bias = _parameters(logits.head)
    with torch.autocast(hidden.device.type, hidden.dtype, enabled=hidden.dtype in (torch.float16, torch.bfloat16)):
        loss = linear_cross_entropy(  # under autocast: in float32, whatever the dtype of the operands
            hidden,
            weight,
            shift_labels.reshape(-1).to(hidden.device),
            linear_bias=bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            memory_budget=memory_budget,
            **logits.loss_options(),
        )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _compute_unless_trained(model: torch.nn.Module, args: Any, output: Any) -> Any:
    """Give logits as a tensor where no loss or no gradient was asked for: a hook of the model's forward."""
    values = output if isinstance(output, tuple) else output.values()
    if torch.is_grad_enabled() and not isinstance(next(iter(values)), LazyLogits):  # a loss comes first
        return output
    return torch.utils._pytree.tree_map_only(LazyLogits, LazyLogits.tensor, output)


class Applied:
    """What `apply_to` has done to a model, to be undone by `remove`, or at the end of a ``with``."""

    def __init__(self, model: Any, memory_budget: int) -> None:
        self.model = model
        self._loss_before = vars(model).get("_loss_function")
        self._hook = model.register_forward_hook(_compute_unless_trained)
        model.loss_function = functools.partial(_loss, memory_budget=memory_budget)
        model.get_output_embeddings().__class__ = _Head

    def remove(self) -> None:
        """Make the model what it was; a second time does nothing."""
        if self._hook.id not in self.model._forward_hooks:
            return
        self._hook.remove()
        self.model.get_output_embeddings().__class__ = torch.nn.Linear
        del self.model._loss_function
        if self._loss_before is not None:
            self.model.loss_function = self._loss_before

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply_to(model: torch.nn.Module, *, memory_budget: int = DEFAULT_BUDGET) -> Applied:
    """Give a causal language model of transformers the fused head: its loss stores no logits from now on.

    Parameters
    ----------
    model : torch.nn.Module
        One with a `torch.nn.Linear` as output embeddings, which its forward calls, and transformers' loss of causal language
        models as `loss_function`; or a module around one, as PEFT's. With labels, and gradients enabled, the model gives the
        same loss, and logits that are computed if someone looks at them; else what it gave before.
    memory_budget : int
        As in `linear_cross_entropy`.

    Returns
    -------
    Applied
        Its `remove` undoes all.

    Raises
    ------
    ValueError
        If no module is such a model, saying for the nearest one what is missing.

    Examples
    --------
    >>> import torch, swl.torch
    >>> swl.torch.apply_to(torch.nn.Linear(3, 4))
    Traceback (most recent call last):
        ...
    ValueError: model must be or hold a causal language model of transformers; Linear has no get_output_embeddings()
    """
    nearest = -1, ""
    for module in model.modules():
        lack = _lack(module)
        if lack is None:
            return Applied(module, memory_budget)
        nearest = lack if lack[0] > nearest[0] else nearest
    raise ValueError(f"model must be or hold a causal language model of transformers; {nearest[1]}")


def _lack(module: Any) -> tuple[int, str] | None:
    """Say what a module lacks of a causal language model, after how many things that it has."""
    name = type(module).__name__
    if not hasattr(module, "get_output_embeddings"):
        return 0, f"{name} has no get_output_embeddings()"
    head = module.get_output_embeddings()
    if head is None:
        return 1, f"{name} has no output embeddings"
    if type(head) is _Head:
        return 4, f"{name} has the fused head already"
    if type(head) is not torch.nn.Linear or "forward" in vars(head):
        return 2, f"{name} has output embeddings of type {type(head).__name__}, not a plain torch.nn.Linear"
    from transformers.loss.loss_utils import ForCausalLMLoss

    loss = getattr(module, "loss_function", None)
    if loss is not ForCausalLMLoss:
        return 3, f"{name} has {loss!r} as loss_function, not transformers' ForCausalLMLoss"
    if "loss_function" not in inspect.unwrap(type(module).forward).__code__.co_names:
        return 3, f"{name} has a forward that calls no loss_function"
    return None
