"""The options of a loss of tensors: `swl.options.Options` whose arrays are tensors, and how custom operations carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swl.ops.checks import F32, F64
from swl.options import DEFAULTS, NUMBERS, ExtraKwargs, Options, require_magnitudes
from swl.torch._bridge import Bridge

__all__ = ["ACC", "are_defaults", "as_arrays", "autocast_dtype", "checked", "flattened", "packed", "unpacked"]

ACC: dict[Any, Any] = {torch.float64: F64, torch.float32: F32, torch.float16: F32, torch.bfloat16: F32}
"""The dtype of the arithmetic."""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast gives to products; None outside of it, and on a device that has none, as meta."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def are_defaults(reduction: str, ignore_index: int, label_smoothing: float, extra: Mapping[str, Any]) -> bool:
    """Tell whether options are their defaults, but for which id is ignored; takes whatever a caller may pass."""
    types = type(reduction), type(ignore_index), type(label_smoothing)
    return types == (str, int, float) and reduction == "mean" and label_smoothing == 0 and not extra


def checked(
    input: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float, extra: ExtraKwargs
) -> Options:
    """Check options, but for the shapes of tensors; a denominator becomes a tensor."""
    if weight is None and are_defaults(reduction, ignore_index, label_smoothing, extra):
        return DEFAULTS if ignore_index == DEFAULTS.ignore_index else DEFAULTS._replace(ignore_index=ignore_index)
    unknown = extra.keys() - ExtraKwargs.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {min(unknown)!r}; legal options are {', '.join(ExtraKwargs.__annotations__)}")
    given: dict[str, Any] = {
        "weight": weight,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        **extra,
    }
    denominator = given.pop("denominator", None)
    if denominator is not None:
        if not isinstance(denominator, Tensor):
            Options.checked({"reduction": given["reduction"], "denominator": denominator})
            require_magnitudes(ACC.get(input.dtype, F32), 1, denominator=float(denominator))
            denominator = torch.full((), float(denominator), dtype=torch.float64, device=input.device)
        elif reduction != "mean":
            raise ValueError(f"denominator applies to reduction='mean' only, got reduction={reduction!r}")
        elif denominator.ndim:
            raise ValueError(f"denominator must be a number or a 0-d tensor, got shape {tuple(denominator.shape)}")
    options = Options.checked(given)  # type: ignore[arg-type]
    floats: dict[str, Any] = {
        name: float(getattr(options, name)) for name in NUMBERS if getattr(options, name) is not None
    }
    options = options._replace(ignore_index=int(ignore_index), denominator=denominator, **floats)
    for name, t in options.arrays().items():
        if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires a gradient, which is not computed; pass {name}.detach()")
    return options


def flattened(options: Options, leading: torch.Size) -> Options:
    """Check that the row weights have this shape, and see them as a vector."""
    if (sample_weight := options.sample_weight) is None:
        return options
    if sample_weight.shape != leading:
        raise ValueError(f"sample_weight must have shape {tuple(leading)}, got {tuple(sample_weight.shape)}")
    return options._replace(sample_weight=sample_weight.reshape(-1))


def as_arrays(here: Bridge, options: Options) -> Options:
    """See the tensors among the options as arrays of a backend."""
    given = {name: here.array(t) for name, t in options.arrays().items() if t is not None}
    return options._replace(**given) if given else options


def packed(options: Options) -> tuple[list[Tensor], str, str, int, list[float]]:
    """Turn options into what an operation of torch's carries: tensors, their names, the reduction, an id, and numbers."""
    given = {name: t for name, t in options.arrays().items() if t is not None}
    numbers = list(options.numbers().values())
    return list(given.values()), " ".join(given), options.reduction, options.ignore_index, numbers


def unpacked(
    tensors: Sequence[Tensor], names: str, reduction: Any, ignore_index: int, numbers: Sequence[float]
) -> Options:
    """Undo `packed`."""
    arrays: dict[str, Any] = dict(zip(names.split(), tensors, strict=True))
    values: dict[str, Any] = {
        name: None if not value and getattr(DEFAULTS, name) is None else value
        for name, value in zip(NUMBERS, numbers, strict=True)
    }
    return Options(reduction=reduction, ignore_index=ignore_index, **arrays, **values)
