"""The options of every loss, with torch's names and defaults."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from swl.typing import Array, ArrayLike, BackendName, Reduction

__all__ = [
    "DEFAULTS",
    "NUMBERS",
    "ExtraKwargs",
    "OptionKwargs",
    "Options",
    "require_magnitudes",
    "require_number",
    "shown",
]


class ExtraKwargs(TypedDict, total=False):
    """The keyword arguments that torch's losses have not; see `Options` for their meaning."""

    sample_weight: ArrayLike
    z_loss: float
    softcap: float | None
    temperature: float
    denominator: ArrayLike


class OptionKwargs(ExtraKwargs, total=False):
    """The keyword arguments that every loss of the library takes."""

    weight: ArrayLike
    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    backend: BackendName | None
    check: bool | None


class Number(NamedTuple):
    """What is legal for an option that is a number, in words and as a test, and what turns it off."""

    legal: str
    ok: Callable[[float], bool]
    off: Literal["", "0", "None"] = ""


NUMBERS = {
    "label_smoothing": Number("in [0, 1)", lambda v: 0 <= v < 1, off="0"),
    "z_loss": Number("finite and at least 0", lambda v: 0 <= v < math.inf, off="0"),
    "softcap": Number("None or finite and above 0", lambda v: 0 < v < math.inf, off="None"),
    "temperature": Number("finite and above 0", lambda v: 0 < v < math.inf),
}
"""The options that are numbers, in the order in which operations carry them."""
DENOMINATOR = Number("finite and above 0", lambda v: 0 < v < math.inf)


class Options(NamedTuple):
    """The options of every loss, with torch's names and defaults.

    Numbers other than 0 must also be within `require_magnitudes` of the arithmetic's dtype.
    """

    weight: ArrayLike | None = None
    """Class weights w, shape (C,): y_c is multiplied by w_c, and m = w_t in a row of class id t."""
    ignore_index: int = -100
    """Class id whose rows do not count: y = 0 and m = 0. It may lie outside [0, C)."""
    reduction: Reduction = "mean"
    """``"none"``: each row's s·loss. ``"sum"``: their sum. ``"mean"``: their sum over Σ s·m of the rows that count."""
    label_smoothing: float = 0.0
    """ε in [0, 1): y_c becomes (1−ε)·y_c + ε/C, before class weights."""
    sample_weight: ArrayLike | None = None
    """Row weights s, shape (...)."""
    z_loss: float = 0.0
    """λ, at least 0: λ·m·lse² is added to each row's loss, with lse = log Σ_c exp z_c."""
    softcap: float | None = None
    """κ above 0: z = κ·tanh(r/κ). None: z = r."""
    temperature: float = 1.0
    """τ above 0, which divides the logits before everything else: r = logits/τ."""
    denominator: ArrayLike | None = None
    """What ``"mean"`` divides by, in place of Σ s·m: a number above 0 or a 0-d array."""
    backend: BackendName | None = None
    """Name of the backend to use; None: the arrays decide."""
    check: bool | None = None
    """True: wait for a device and raise if a class id was out of range. A host always checks."""

    def arrays(self) -> dict[str, Array]:
        """Return the options that may be arrays, by name; None where not given."""
        return {name: getattr(self, name) for name in ("weight", "sample_weight", "denominator")}

    def numbers(self) -> dict[str, float]:
        """Return the options that are numbers, by name; 0.0 for None. Kernels are compiled for floats alone."""
        return {name: float(getattr(self, name) or 0.0) for name in NUMBERS}

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
        if not isinstance(self.reduction, str) or self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {shown(self.reduction)}; legal are 'mean', 'sum' and 'none'")
        for name, number in NUMBERS.items():
            value = getattr(self, name)
            if value is not None or number.off != "None":
                require_number(name, value, number.legal, number.ok)
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, numbers.Integral):
            raise TypeError(f"ignore_index must be an integer, got {shown(self.ignore_index)}")
        if self.denominator is not None:
            if self.reduction != "mean":
                raise ValueError(f"denominator applies to reduction='mean' only, got reduction={self.reduction!r}")
            if getattr(self.denominator, "ndim", None) != 0 or isinstance(self.denominator, numbers.Number):
                require_number("denominator", self.denominator, DENOMINATOR.legal, DENOMINATOR.ok)
        if self.check is not None and not isinstance(self.check, bool | np.bool):
            raise TypeError(f"check must be True, False or None, got {shown(self.check)}")
        return self


DEFAULTS = Options()
"""What `Options.checked` gives where there are none."""


def require_magnitudes(acc: np.dtype[Any], C: int, **numbers: float | None) -> None:
    """Check that options which are not 0 have a magnitude that arithmetic in `acc` can work with.

    Legal are ``tiny/eps`` to ``eps/tiny`` of the dtype, 1e-31 to 1e31 in float32: there a quotient by the number that
    underflows, to a subnormal number or to 0, is less than a rounding error of 1, and so is a product with it.

    Raises
    ------
    ValueError
        Naming the option, what came and what is legal.
    """
    least, most = _MAGNITUDES[acc]
    for name, value in numbers.items():
        low = C * least if name == "label_smoothing" else least  # kernels take ε/C
        if value and not low <= value <= most:
            high = "1)" if name == "label_smoothing" else f"{most:.3g}]"
            off = NUMBERS.get(name, DENOMINATOR).off
            raise ValueError(
                f"{name} must be {off and f'{off} or '}in [{low:.3g}, {high} "
                f"where arithmetic is in {acc}, got {shown(value)}"
            )


def _magnitudes(acc: np.dtype[Any]) -> tuple[float, float]:
    info = np.finfo(acc)
    least = float(info.tiny) / float(info.eps)
    return least, 1 / least


_MAGNITUDES = {acc: _magnitudes(acc) for acc in (np.dtype(np.float32), np.dtype(np.float64))}


def require_number(name: str, value: object, legal: str, ok: Callable[[float], bool]) -> None:
    """Check an argument that is a number, which `ok` tells whether it is legal."""
    if isinstance(value, bool) or not isinstance(value, float | numbers.Real):
        raise TypeError(f"{name} must be a real number, {legal}, got {shown(value)} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not ok(number):  # a NaN fails every comparison
        raise ValueError(f"{name} must be {legal}, got {shown(value)}")


def shown(value: object) -> str:
    """Return the value as an error message shows it: not more than a line, and of an array only what it is."""
    if shape := getattr(value, "shape", ()):
        return f"an array of shape {shape}"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of so many digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:80]}…"
