"""The CUDA backend on real CuPy over the fake driver, as the backend `cupy-fake` of the registry.

It is ``swl/backends/cupy`` itself, under a name that cannot be taken for a card's. In a process with the fake the backend
`cupy` says that there is no driver, as it would without.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fakecuda
from fakecuda import strict

from swl.backends.cupy.backend import CupyBackend
from swl.errors import BackendUnavailable

registry = importlib.import_module("swl.backends.registry")

NAME = "cupy-fake"


class FakeBackend(CupyBackend):
    name = NAME


class _NoDriver:
    @staticmethod
    def load() -> Any:
        raise BackendUnavailable(
            f"backend 'cupy' finds no NVIDIA driver; in this process CuPy runs on a fake one, as {NAME!r}"
        )


def load() -> CupyBackend:
    """Return the backend, as `swl.backends` asks for it."""
    return FakeBackend(cupy())


def cupy() -> Any:
    """Return CuPy over the fake driver."""
    reason = fakecuda.missing()
    if reason:
        raise BackendUnavailable(f"backend {NAME!r}: {reason}")
    module = importlib.import_module("cupy")
    strict.enforce()
    return module


def register() -> str | None:
    """Add the backend to the registry; return why it cannot run here, as far as can be told without building it."""
    reason = fakecuda.install()
    if reason is None and NAME not in registry._REGISTRY:
        registry._REGISTRY[NAME] = (__name__, "cuda")
        sys.modules["fake_no_driver"] = _NoDriver  # type: ignore[assignment]
        registry._REGISTRY["cupy"] = ("fake_no_driver", "cuda")
    return reason
