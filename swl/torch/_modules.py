"""torch's modules over the functions: the same constructors and state dicts, and swl's options beside them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from swl.ops.chunks import DEFAULT_BUDGET
from swl.torch._cross_entropy import cross_entropy
from swl.torch._linear import affine, linear_cross_entropy

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
    z_loss, softcap
        As in `cross_entropy`.

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
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap = z_loss, softcap

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        """Compute the loss; `sample_weight` and `denominator` as in `cross_entropy`."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            z_loss=self.z_loss,
            softcap=self.softcap,
            denominator=denominator,
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    """`torch.nn.LinearCrossEntropyLoss`, a linear layer and its loss in one, without stored logits.

    Parameters
    ----------
    in_features, num_classes, out_features, bias, device, dtype, reduction, weight, ignore_index, label_smoothing, options
        As torch has them.
    z_loss, softcap, memory_budget
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
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        memory_budget: int = DEFAULT_BUDGET,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight must have shape {(num_classes,)}, got {tuple(weight.shape)}")
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options, self.z_loss, self.softcap, self.memory_budget = options, z_loss, softcap, memory_budget
        self.linear = torch.nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        """Compute the loss; `sample_weight` and `denominator` as in `cross_entropy`."""
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
            sample_weight=sample_weight,
            z_loss=self.z_loss,
            softcap=self.softcap,
            denominator=denominator,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        """Say what `print` shows of the module."""
        names = "num_classes", "out_features", "reduction", "ignore_index", "label_smoothing", "z_loss", "softcap"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
