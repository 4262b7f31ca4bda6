"""The CUDA backend on a CPU, as the backend `cupy-emulated` of the registry: ``swl/backends/cupy/backend.py`` itself, with the
kernels of ``kernels/*.cu``, over the stand-in for CuPy."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import cpu_kernels
import stand_in

from swl.backends.cupy.backend import CupyBackend

registry = importlib.import_module("swl.backends.registry")  # the attribute of swl of that name is a function

NAME = "cupy-emulated"


class EmulatedBackend(CupyBackend):
    name = NAME


def load() -> EmulatedBackend:
    """Give the backend, as `swl.backends` asks for it."""
    return EmulatedBackend(stand_in)


def register() -> str | None:
    """Add the backend to the registry; say why if it cannot run here."""
    reason = cpu_kernels.missing_compiler()
    if reason is None and NAME not in registry._REGISTRY:
        registry._REGISTRY[NAME] = (__name__, "cuda")
        registry._DEVICE = NAME  # in this process, arrays on a device are the stand-in's
    return reason


def to_numpy(x: Any) -> np.ndarray[Any, Any]:
    """Bring an array of the backend to the host."""
    return x.get() if isinstance(x, stand_in.ndarray) else np.asarray(x)
