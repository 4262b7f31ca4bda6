"""One `backend` fixture over the registry; which files are tests; Hypothesis settings."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest
from needs import GPU, IN_CI, TORCH

import swl
from swl.backends import Backend, get, registry
from swl.backends.registry import _REGISTRY

HERE = Path(__file__).parent

hypothesis.settings.register_profile(
    "swl",
    max_examples=100,
    deadline=None,  # the first example of a dtype compiles its kernels
    derandomize=IN_CI,
    print_blob=True,
    # `backend` is a fixture of function scope that holds nothing an example could change
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("swl")


# ------------------------------------------------------------------------------------------------ the fake GPU


def _fake() -> tuple[ModuleType | None, str | None]:
    """Register the CUDA backend on the fake driver; give its module, and the reason why it cannot run here."""
    if not (HERE / "cuda" / "fake.py").exists():
        return None, None
    sys.path.insert(0, str(HERE / "cuda"))
    module = importlib.import_module("fake")
    return module, module.register()


FAKE, NO_FAKE = _fake()
BACKENDS = [*_REGISTRY, *(["cupy-fake"] if NO_FAKE and "cupy-fake" not in _REGISTRY else [])]


@pytest.fixture(scope="session")
def cupy() -> Any:
    """CuPy on the fake driver; without it, the test is skipped."""
    reason = NO_FAKE or FAKE.fakecuda.missing()
    if reason:
        pytest.skip(reason)
    return FAKE.cupy()


@pytest.fixture
def on_fake(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The CUDA backend on the fake driver, active for the length of the test, which may break the devices."""
    monkeypatch.setattr(registry, "_DEVICE", FAKE.NAME)
    with swl.use_backend(FAKE.NAME):
        yield get(FAKE.NAME)
    FAKE.fakecuda.forgive()


# ------------------------------------------------------------------------------------------------ the fixture


class On:
    """A backend as the tests see it: its name, and the way of arrays there and back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ops: Backend = get(name)
        self.is_host = _REGISTRY[name][1] == "host"

    def array(self, x: Any, dtype: Any = None, *, writeable: bool = False) -> Any:
        """Copy `x` to the backend; read-only on a host, so that a write to an input is an error."""
        x = np.array(x, dtype=dtype)
        if not self.is_host:
            return self.ops.asarray(x)
        x.flags.writeable = writeable
        return x

    def numpy(self, x: Any) -> np.ndarray[Any, Any]:
        """Bring an array of the backend to NumPy."""
        if isinstance(x, np.ndarray | np.generic | float):
            return np.asarray(x)
        return np.asarray(x.get())


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[On]:
    """Every backend of the registry in turn, active for the length of the test."""
    yield from _use(request, monkeypatch)


@pytest.fixture(params=[name for name in _REGISTRY if _REGISTRY[name][1] == "host"])
def host_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[On]:
    """Every backend whose arrays are NumPy's."""
    yield from _use(request, monkeypatch)


def _use(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[On]:
    name = request.param
    if name == "cupy-fake" and (reason := NO_FAKE or FAKE.fakecuda.missing()):
        pytest.skip(reason)
    try:
        here = On(name)
    except swl.BackendUnavailable as error:
        if request.config.getoption("require_gpu"):
            pytest.fail(f"--require-gpu: {error}", pytrace=False)
        pytest.skip(f"{GPU}: {error}" if name == "cupy" else str(error))
    if not here.is_host:
        monkeypatch.setattr(registry, "_DEVICE", name)  # where device arrays belong: to the real GPU or to the fake one
    with swl.use_backend(name):
        yield here


# ------------------------------------------------------------------------------------------------ what is run


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out programs and helpers: to look for doctests is to import them, with all that they need."""
    return (collection_path.suffix == ".py" and not collection_path.name.startswith("test_")) or None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: needs more than 4 GB of memory or half a minute; run by `-m slow`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """One process of gloo as a mesh of torch's devices."""
    distributed = pytest.importorskip("torch.distributed", reason=TORCH)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("all",))
    distributed.destroy_process_group()
