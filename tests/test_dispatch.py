"""Which backend runs: from the shell, in the process, and by the arrays."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

import swl
from swl.backends import active, get
from swl.backends.registry import _REGISTRY

on_devices = pytest.mark.parametrize(
    "backend", [name for name, (_, home) in _REGISTRY.items() if home != "host"], indirect=True
)
HOSTS = [name for name, (_, home) in _REGISTRY.items() if home == "host"]
CUPY_USABLE = any(b.name == "cupy" and b.usable for b in swl.available_backends())
ACTIVE = "from swl.backends import active, get; print(get(active()).name)"


def shell(code: str, *flags: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in {**os.environ, "SWL_BACKEND": None, **variables}.items() if v is not None}
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


# ------------------------------------------------------------------------------------------------ from the shell


@pytest.mark.parametrize(
    ("value", "name"), [(None, "numba"), ("", "numba"), ("auto", "numba"), ("numba", "numba"), ("numpy", "numpy")]
)
def test_the_environment_variable_chooses(value: str | None, name: str) -> None:
    done = shell(ACTIVE, SWL_BACKEND=value)
    assert (done.stdout, done.returncode) == (f"{name}\n", 0), done.stderr


def test_an_unknown_name_is_an_error_that_lists_the_legal_ones() -> None:
    done = shell("import swl; swl.affine([[1.0]], [[1.0]])", SWL_BACKEND="nonsense")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "ValueError: SWL_BACKEND is 'nonsense'; legal names are 'numpy', 'numba', 'cupy', 'auto'"


def test_numba_that_must_not_compile_is_refused_with_the_way_out() -> None:
    code = "import swl; print(float(swl.cross_entropy([[0.0, 0.0]], [1])))"
    done = shell(code, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 1
    assert "BackendUnavailable: backend 'numba'" in done.stderr
    assert "SWL_BACKEND=numpy" in done.stderr.splitlines()[-1]
    done = shell(code, NUMBA_DISABLE_JIT="1", SWL_BACKEND="numpy")
    assert done.stdout == "0.6931471805599453\n", done.stderr


def test_cupy_runs_or_says_why_not() -> None:
    done = shell("import swl; print(type(swl.affine([[1.0]], [[1.0]])).__module__)", SWL_BACKEND="cupy")
    if CUPY_USABLE:
        assert done.stdout.startswith("cupy"), done.stderr
    else:
        assert done.returncode == 1
        assert "BackendUnavailable: backend 'cupy'" in done.stderr
        assert "install" in done.stderr.splitlines()[-1]


def test_without_cupy_the_error_names_the_remedy() -> None:
    code = "import sys; sys.modules['cupy'] = None\nimport swl\nswl.set_backend('cupy')"
    done = shell(code)
    assert done.returncode == 1
    assert "BackendUnavailable" in done.stderr
    assert "pip install" in done.stderr


def test_import_is_light() -> None:
    heavy = ("numba", "llvmlite", "cupy", "torch", "sklearn", "matplotlib", "tqdm", "scipy")
    code = f"import swl, sys; print([m for m in sys.modules if m.partition('.')[0] in {heavy}])"
    assert shell(code).stdout == "[]\n"
    # and no module is imported on the way and removed again
    imported = [line.rpartition("|")[2].strip() for line in shell("import swl", "-X", "importtime").stderr.splitlines()]
    assert "swl" in imported
    assert not [name for name in imported if name.partition(".")[0] in heavy]


def test_numpy_alone_never_imports_numba() -> None:
    code = """
import numpy as np, swl, sys
net = swl.Sequential(swl.Affine.init(4, 3), swl.ReLU(), swl.Affine.init(3, 2), swl.SoftmaxWithLoss())
net.forward_backward(np.ones((2, 4)), np.array([0, 1]))
print("numba" in sys.modules)"""
    assert shell(code, SWL_BACKEND="numpy").stdout == "False\n"


# ------------------------------------------------------------------------------------------------ in the process


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("SWL_BACKEND", raising=False)
    yield
    swl.set_backend(None)


def test_context_then_process_then_environment_then_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert active() == "numba"
    monkeypatch.setenv("SWL_BACKEND", "numpy")
    assert active() == "numpy"
    swl.set_backend("numba")
    assert active() == "numba"
    with swl.use_backend("numpy"):
        assert active() == "numpy"
        with swl.use_backend("auto"):
            assert active() == "numba"
        assert active() == "numpy"
    assert active() == "numba"
    swl.set_backend(None)
    assert active() == "numpy"


def test_a_context_ends_with_its_block_also_by_an_error() -> None:
    with pytest.raises(KeyError), swl.use_backend("numpy"):
        raise KeyError
    assert active() == "numba"


@pytest.mark.parametrize("choose", [swl.set_backend, lambda name: swl.use_backend(name).__enter__()])
@pytest.mark.parametrize("name", ["nonsense", "", "NumPy", 3])
def test_unknown_names_are_refused_and_change_nothing(choose: Any, name: Any) -> None:
    with pytest.raises(ValueError, match="legal names are 'numpy', 'numba', 'cupy'"):
        choose(name)
    assert active() == "numba"


@pytest.mark.skipif(CUPY_USABLE, reason="cupy is usable here")
@pytest.mark.parametrize("choose", [swl.set_backend, lambda name: swl.use_backend(name).__enter__()])
def test_an_unusable_backend_is_refused_and_changes_nothing(choose: Any) -> None:
    with pytest.raises(swl.BackendUnavailable, match="cupy"):
        choose("cupy")
    assert active() == "numba"
    with pytest.raises(swl.BackendUnavailable, match="cupy"):
        swl.cross_entropy(np.zeros((1, 2)), np.array([0]), backend="cupy")


def test_a_context_is_of_one_thread() -> None:
    seen: list[str] = []
    with swl.use_backend("numpy"):
        thread = threading.Thread(target=lambda: seen.append(active()))
        thread.start()
        thread.join()
        assert active() == "numpy"
    assert seen == ["numba"]


def test_a_context_is_of_one_task() -> None:
    async def task(name: str, mine: asyncio.Event, other: asyncio.Event) -> str:
        with swl.use_backend(name):
            mine.set()
            await other.wait()
            return active()

    async def both() -> list[str]:
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task("numpy", a, b), task("numba", b, a))

    assert asyncio.run(both()) == ["numpy", "numba"]


def test_every_backend_is_listed_with_a_reason_if_it_cannot_run() -> None:
    listed = swl.available_backends()
    assert [b.name for b in listed] == list(_REGISTRY)
    for b in listed:
        assert b.usable != bool(b.reason)
    assert {"numpy", "numba"} <= {b.name for b in listed if b.usable}


def test_asarray_brings_to_the_active_backend(backend: Any) -> None:
    x = swl.asarray([1, 2], np.float32)
    assert type(x) is type(backend.array([1.0]))
    assert x.dtype == np.float32
    assert swl.asarray(x) is x


# ------------------------------------------------------------------------------------------------ by the arrays


def test_arrays_decide(backend: Any) -> None:
    """Device arrays go to the device's backend, whatever host is active."""
    x, W = backend.array(np.ones((2, 3))), backend.array(np.ones((3, 2)))
    with swl.use_backend("numpy"):
        assert type(swl.affine(x, W)) is type(x)
        assert type(swl.ReLU().forward(x)) is type(x)
        layer = swl.Affine(W)
        assert layer.backend == ("numpy" if backend.is_host else backend.name)


def test_an_active_device_takes_host_arrays(backend: Any) -> None:
    there = type(backend.array([1.0]))
    assert type(swl.affine(np.ones((2, 3)), np.ones((3, 2)))) is there
    layer = swl.Affine(np.ones((3, 2)))
    assert layer.backend == backend.name
    assert type(layer.W) is there
    assert type(layer.forward(np.ones((2, 3)))) is there
    loss = swl.SoftmaxWithLoss()
    assert type(loss.forward(np.zeros((2, 3)), np.array([0, 1]))) is there
    assert type(loss.backward()) is there


@on_devices
def test_device_to_host_is_never_implicit(backend: Any) -> None:
    x = backend.array(np.ones((2, 3)))
    with swl.use_backend("numpy"):
        with pytest.raises(TypeError, match="x is on cuda:0, where backend 'numpy' cannot reach it"):
            swl.Affine(np.ones((3, 2))).forward(x)
        with pytest.raises(TypeError, match="t is on cuda:0, where backend 'numpy' cannot reach it"):
            swl.SoftmaxWithLoss().forward(np.ones((2, 3)), backend.array([0, 1]))
        with pytest.raises(TypeError, match="b is on cuda:0"):
            swl.Affine(np.ones((3, 2)), backend.array(np.ones(2)))


@on_devices
def test_two_libraries_in_one_call_are_refused(backend: Any) -> None:
    with pytest.raises(TypeError, match="numpy array on host"):
        swl.affine(backend.array(np.ones((2, 3))), np.ones((3, 2)))
    with pytest.raises(TypeError, match=r"logits is a .* but target is a numpy array on host"):
        swl.cross_entropy(backend.array(np.ones((2, 3))), np.array([0, 1]))


@pytest.mark.parametrize("name", HOSTS)
def test_the_keyword_chooses_among_hosts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ops = get(name)
    plain = type(ops).cross_entropy_forward
    monkeypatch.setattr(type(ops), "cross_entropy_forward", lambda *a, **k: calls.append(name) or plain(*a, **k))
    with swl.use_backend(next(other for other in HOSTS if other != name)):
        swl.cross_entropy(np.zeros((1, 2)), np.array([0]), backend=name)
        swl.SoftmaxWithLoss(backend=name).forward(np.zeros((1, 2)), np.array([0]))
    assert calls == [name, name]


def test_no_module_hides_a_function_of_the_backends() -> None:
    """Importing a submodule sets its name in the package, over a function of that name."""
    for found in pkgutil.iter_modules(swl.backends.__path__, "swl.backends."):
        with contextlib.suppress(ImportError):
            importlib.import_module(found.name)
    assert not [name for name in swl.backends.__all__ if inspect.ismodule(getattr(swl.backends, name))]
