"""torch's modules over the functions: the same constructors and state dicts, and swl's options beside them."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from swl.ops.chunks import DEFAULT_BUDGET
from swl.options import ExtraKwargs
from swl.torch._affine import affine
from swl.torch._cross_entropy import cross_entropy
from swl.torch._linear import linear_cross_entropy
from swl.typing import Reduction, Results

__all__ = ["Affine", "CrossEntropyLoss", "LinearCrossEntropyLoss"]


class Affine(torch.nn.Linear):
    """`torch.nn.Linear` whose product is `affine`.

    Examples
    --------
    >>> import torch, swl.torch
    >>> swl.torch.Affine(3, 2)(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``input·weightᵀ + bias``."""
        return affine(input, self.weight, self.bias)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` whose loss is `cross_entropy`.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As torch has them.
    **extra
        As in `cross_entropy`; by name, and for all calls.

    Examples
    --------
    >>> import torch, swl.torch
    >>> swl.torch.CrossEntropyLoss(reduction="sum")(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(2.7726)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        **extra: Unpack[ExtraKwargs],
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.extra = extra

    def forward(self, input: Tensor, target: Tensor, *, stats: bool = False, **extra: Unpack[ExtraKwargs]) -> Results:
        """Compute the loss; options given here, as `sample_weight` of a batch, come before those of the module."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            stats=stats,
            **(self.extra | extra),
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    """`torch.nn.LinearCrossEntropyLoss`, a linear layer and its loss in one, without stored logits.

    Parameters
    ----------
    in_features, num_classes, out_features, bias, device, dtype, reduction, weight, ignore_index, label_smoothing, options
        As torch has them.
    memory_budget, **extra
        As in `linear_cross_entropy`.

    Examples
    --------
    >>> import torch, swl.torch
    >>> head = swl.torch.LinearCrossEntropyLoss(3, 4, bias=True)
    >>> sorted(head.state_dict())
    ['linear.bias', 'linear.weight']
    >>> head(torch.ones(2, 3), torch.tensor([0, 3])).shape
    torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: torch.nn.LinearCrossEntropyOptions | None = None,
        memory_budget: int = DEFAULT_BUDGET,
        **extra: Unpack[ExtraKwargs],
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight must have shape {(num_classes,)}, got {tuple(weight.shape)}")
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options, self.memory_budget, self.extra = options, memory_budget, extra
        self.linear = torch.nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )

    def forward(self, input: Tensor, target: Tensor, *, stats: bool = False, **extra: Unpack[ExtraKwargs]) -> Results:
        """Compute the loss; options given here, as `sample_weight` of a batch, come before those of the module."""
        shape, linear = (self.num_classes, *self.out_features), self.linear
        return linear_cross_entropy(
            input,
            linear.weight.reshape(*shape, linear.in_features),
            target,
            linear_bias=None if linear.bias is None else linear.bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            memory_budget=self.memory_budget,
            stats=stats,
            **(self.extra | extra),
        )

    def extra_repr(self) -> str:
        """Say what `print` shows of the module."""
        names = "num_classes", "out_features", "reduction", "ignore_index", "label_smoothing"
        given = {name: getattr(self, name) for name in names} | self.extra
        return ", ".join(f"{name}={value!r}" for name, value in given.items())
