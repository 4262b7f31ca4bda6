"""Labelled data for `swl train`: the handwritten digits of scikit-learn, or a file of the user's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Data", "DataError", "Part", "Split", "digits", "from_file", "require", "split"]


class DataError(ValueError):
    """The data cannot be used; the message says what came and what is legal."""


class Data(NamedTuple):
    """Inputs and targets of a classifier."""

    name: str
    x: Any  # (N, D), float64
    t: Any  # (N,) class ids, or (N, C) probabilities
    n_classes: int
    scale: str  # how inputs are scaled best: "all" together or "each" feature alone


class Part(NamedTuple):
    """Some rows of the data."""

    x: Any
    t: Any


class Split(NamedTuple):
    """The three parts that training needs."""

    train: Part
    validation: Part
    test: Part


MOST_CLASSES = 10_000_000
"""Classes of a file: an id beyond is taken for an error, since a network has weights for every id below the largest."""
LARGEST = 1e100
"""Largest number of x, whose square must be finite."""
_PACKAGES = {"sklearn": "scikit-learn"}


def require(module: str, purpose: str) -> Any:
    """Import an optional library, or say what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        package = _PACKAGES.get(error.name, error.name)
        raise DataError(
            f"{purpose} needs {package}, which is not installed: pip install {package} "
            "(or all that the demos need: pip install scikit-learn matplotlib tqdm)"
        ) from None


def digits() -> Data:
    """Load 1,797 handwritten digits of 8 × 8 pixels, which come with scikit-learn (UCI, Alpaydin and Kaynak, 1998)."""
    x, t = require("sklearn.datasets", "the digits data").load_digits(return_X_y=True)
    return Data("digits", x, t, 10, "all")


def from_file(path: Path) -> Data:
    """Load ``x`` (N, ...) and ``t``, ids (N,) or probabilities (N, C), from an ``.npz`` file.

    Raises
    ------
    DataError
        If the file or what is in it cannot be used.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise DataError(f"{path} must be an .npz file with arrays x and t, but holds a single array")
            if not {"x", "t"} <= set(loaded):
                raise DataError(f"{path} must hold arrays x and t, got {sorted(loaded)}")
            x, t = loaded["x"], loaded["t"]
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except DataError:
        raise
    except Exception as error:  # NumPy and zipfile raise many kinds; an object array would need pickle
        raise DataError(f"{path} is not an .npz file that can be read: {_one_line(error)}") from None
    return checked(str(path), x, t)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def checked(name: str, x: Any, t: Any) -> Data:
    """Check arrays from outside."""
    for argument, array in (("x", x), ("t", t)):
        if not isinstance(array, np.ndarray):
            raise DataError(f"{name}: {argument} must be an array, got {type(array).__name__}")
    if x.ndim < 2 or x.dtype.kind not in "iubf":
        raise DataError(f"{name}: x must be numbers of shape (N, ...), got {x.dtype} of shape {x.shape}")
    if len(x) < 10 or not x.size:
        raise DataError(f"{name}: x must have at least 10 rows and a column, got shape {x.shape}")
    with np.errstate(over="ignore"):  # of a long double
        x = x.reshape(len(x), -1).astype(np.float64)
    if not np.isfinite(x).all():
        raise DataError(f"{name}: x must be finite, but row {int(np.argwhere(~np.isfinite(x))[0, 0])} is not")
    if np.abs(x).max() > LARGEST:
        row = int(np.argwhere(np.abs(x) > LARGEST)[0, 0])
        raise DataError(f"{name}: x must hold numbers up to {LARGEST:g}, got {np.abs(x[row]).max():g} in row {row}")
    if (x == x[0]).all():
        raise DataError(f"{name}: x must differ between rows, but all {len(x)} are the same")
    if t.shape[:1] != x.shape[:1] or t.ndim not in (1, 2):
        raise DataError(f"{name}: t must have shape ({len(x)},) or ({len(x)}, C) for the rows of x, got {t.shape}")
    if t.ndim == 2:
        if t.shape[1] == 1:
            raise DataError(f"{name}: t of class ids must have shape ({len(x)},), got {t.shape}: t.reshape(-1) has it")
        if t.dtype.kind not in "iubf" or not (np.isfinite(t).all() and (t >= 0).all() and (t.sum(axis=1) > 0).all()):
            raise DataError(f"{name}: t of shape {t.shape} must hold probabilities or one-hot rows")
        return Data(name, x, t, t.shape[1], "each")
    if t.dtype.kind not in "iu":
        raise DataError(f"{name}: t of class ids must be of an integer dtype, got {t.dtype}")
    if t.min() < 0:
        raise DataError(f"{name}: class ids must be 0, 1, ..., got {int(t.min())} in row {int(t.argmin())}")
    if t.max() >= MOST_CLASSES:
        raise DataError(
            f"{name}: class ids must be below {MOST_CLASSES:,}, got {int(t.max())} in row {int(t.argmax())}"
        )
    return Data(name, x, t, int(t.max()) + 1, "each")


def split(data: Data) -> Split:
    """Split into 70 % to train, 10 % to validate and 20 % to test.

    The order is random but always the same, so that runs with different seeds are tested on the same rows.
    """
    order = np.random.default_rng(0).permutation(len(data.x))
    cuts = [len(order) // 5, len(order) // 5 + max(len(order) // 10, 1)]
    test, validation, train = (Part(data.x[rows], data.t[rows]) for rows in np.split(order, cuts))
    return Split(train, validation, test)
