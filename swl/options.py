"""The options of every loss, with torch's names and defaults."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, NamedTuple, TypedDict

__all__ = ["DEFAULTS", "OptionKwargs", "Options", "Reduction"]

Reduction = Literal["mean", "sum", "none"]


class OptionKwargs(TypedDict, total=False):
    """The keyword arguments that every loss of the library takes; see `Options` for their meaning."""

    weight: Any
    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    sample_weight: Any
    z_loss: float
    softcap: float | None
    denominator: Any
    backend: str | None
    check: bool | None


class Options(NamedTuple):
    """The options of every loss, with torch's names and defaults."""

    weight: Any = None
    """Class weights w, shape (C,)."""
    ignore_index: int = -100
    """Class id whose rows do not count; it may lie outside [0, C)."""
    reduction: Reduction = "mean"
    """``"mean"``, ``"sum"`` or ``"none"``."""
    label_smoothing: float = 0.0
    """ε in [0, 1)."""
    sample_weight: Any = None
    """Row weights s, shape (...)."""
    z_loss: float = 0.0
    """λ of λ·m·lse², at least 0."""
    softcap: float | None = None
    """κ of z = κ·tanh(r/κ), above 0; None: off."""
    denominator: Any = None
    """What ``"mean"`` divides by, in place of the sum of the row weights: a number above 0 or a 0-d array."""
    backend: str | None = None
    """Name of the backend to use; None: the arrays decide."""
    check: bool | None = None
    """True: wait for a device and raise if a class id was out of range. A host always checks."""

    def arrays(self) -> dict[str, Any]:
        """Return the options that may be arrays, by name; None where not given."""
        return {name: getattr(self, name) for name in ("weight", "sample_weight", "denominator")}

    @classmethod
    def checked(cls, kwargs: OptionKwargs) -> Options:
        """Build the options and check whatever can be checked without the arrays.

        Raises
        ------
        TypeError, ValueError
            Naming the option, what came and what is legal.
        """
        if not kwargs:
            return DEFAULTS
        unknown = kwargs.keys() - DEFAULTS._asdict().keys()
        if unknown:
            raise TypeError(f"unknown option {min(unknown)!r}; legal options are {', '.join(cls._fields)}")
        self = cls(**kwargs)
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {self.reduction!r}; legal are 'mean', 'sum' and 'none'")
        _number("label_smoothing", self.label_smoothing, "in [0, 1)", lambda v: 0 <= v < 1)
        _number("z_loss", self.z_loss, "finite and at least 0", lambda v: 0 <= v < math.inf)
        if self.softcap is not None:
            _number("softcap", self.softcap, "None or finite and above 0", lambda v: 0 < v < math.inf)
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, numbers.Integral):
            raise TypeError(f"ignore_index must be an integer, got {self.ignore_index!r}")
        if self.denominator is not None:
            if self.reduction != "mean":
                raise ValueError(f"denominator applies to reduction='mean' only, got reduction={self.reduction!r}")
            if getattr(self.denominator, "ndim", None) != 0 or isinstance(self.denominator, numbers.Number):
                _number("denominator", self.denominator, "finite and above 0", lambda v: 0 < v < math.inf)
        if self.check not in (None, True, False):
            raise TypeError(f"check must be True, False or None, got {self.check!r}")
        return self


DEFAULTS = Options()
"""What `Options.checked` gives where there are none."""


def _number(name: str, value: Any, legal: str, ok: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number {legal}, got {value!r} of type {type(value).__name__}")
    if not ok(value):  # a NaN fails every comparison
        raise ValueError(f"{name} must be {legal}, got {value!r}")
