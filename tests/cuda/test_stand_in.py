"""The stand-in for CuPy is as strict as it says, and has nothing that CuPy has not."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import cpu_kernels
import emulated
import numpy as np
import pytest
import stand_in
from needs import CUPY

import swl
from swl.backends import get
from swl.backends.cupy.backend import CupyBackend
from swl.backends.protocol import Target

pytestmark = pytest.mark.skipif(cpu_kernels.missing_compiler() is not None, reason=str(cpu_kernels.missing_compiler()))

OWN = {
    "Forbidden",
    "ORDER",
    "OPTIMISE",
    "ATTRIBUTES",
    "N_DEVICES",
    "observers",
    "gemmEx",
    "getMathMode",
    "setMathMode",
    "RawKernel",
    "Device",
    "Stream",
    "ExternalStream",
    "get_current_stream",
    "Work",
    "recorded",
}


def as_swl(code: str, **names: Any) -> Any:
    """Evaluate an expression in a function that seems to be swl's."""
    namespace = {"__name__": "swl.functional", **names}
    exec(f"def operation():\n    return {code}", namespace)
    return namespace["operation"]()


# ------------------------------------------------------------------------------------------------ against CuPy


def public(module: Any) -> dict[str, Any]:
    here = {n: v for n, v in vars(module).items() if not n.startswith("_") and n not in OWN}
    return {n: v for n, v in here.items() if not inspect.ismodule(v) and getattr(v, "__module__", "") not in FOREIGN}


FOREIGN = {"typing", "types", "collections.abc", "contextlib", "swl.backends.cupy.structs"}


def test_every_name_is_cupys() -> None:
    cupy = pytest.importorskip("cupy", reason=CUPY)
    missing = [name for name in public(stand_in) if not hasattr(cupy, name) and name not in ("annotations",)]
    assert missing == []
    methods = [name for name in vars(stand_in.ndarray) if not name.startswith("_")]
    assert [name for name in methods if not hasattr(cupy.ndarray, name)] == []
    for ours in (stand_in.Device, stand_in.Stream, stand_in.ExternalStream):
        theirs = getattr(cupy.cuda, ours.__name__)
        assert [n for n in dir(ours) if not n.startswith("_") and not hasattr(theirs, n)] == []
    names = vars(stand_in.cuda).keys() - {"cublas"}  # which CuPy finds only where the library is installed
    assert [n for n in names if not hasattr(cupy.cuda, n)] == []


def test_every_keyword_is_cupys() -> None:
    cupy = pytest.importorskip("cupy", reason=CUPY)
    wrong = []
    for name, ours in public(stand_in).items():
        if not inspect.isfunction(ours):
            continue
        theirs = getattr(cupy, name)
        try:
            legal = set(inspect.signature(theirs).parameters)
        except (TypeError, ValueError):  # compiled: its first line of documentation is the signature
            continue
        given = {p.name for p in inspect.signature(ours).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
        if not isinstance(theirs, cupy.ufunc):
            wrong += [f"{name}({p}=)" for p in given - legal - {"args"}]
    assert wrong == []


def test_raw_modules_and_kernels_are_called_as_cupys() -> None:
    cupy = pytest.importorskip("cupy", reason=CUPY)
    signature = cupy.RawModule.__doc__.split("\n")[0]
    for parameter in inspect.signature(stand_in.RawModule).parameters:
        assert parameter in signature
    assert hasattr(cupy.RawKernel, "max_dynamic_shared_size_bytes")
    assert "shared_mem" in cupy.RawKernel.__call__.__doc__


# ------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    "code", ["x.get()", "float(x[0])", "int(x[0])", "bool(x[0])", "x.tolist()", "x[0].item()", "str(x)"]
)
def test_waiting_inside_an_operation_is_an_error(code: str) -> None:
    x = stand_in.asarray(np.ones(2))
    eval(code, {"x": x})
    with pytest.raises(stand_in.Forbidden, match="waits for the device"):
        as_swl(code, x=x)


def test_copying_from_the_host_inside_an_operation_is_an_error() -> None:
    with pytest.raises(stand_in.Forbidden, match="from the host"):
        as_swl("cp.asarray(1.0)", cp=stand_in)


def test_numpy_and_the_device_do_not_mix() -> None:
    x = stand_in.asarray(np.ones(2))
    for wrong in (lambda: np.exp(x), lambda: x + np.ones(2), lambda: np.asarray(x), lambda: stand_in.exp(np.ones(2))):
        with pytest.raises(TypeError):
            wrong()


def test_new_memory_is_poisoned() -> None:
    assert np.isnan(stand_in.empty(3, dtype=np.float16).get()).all()
    assert np.all(stand_in.empty(3, dtype=np.int64).get() != 0)


SOURCE = """
__global__ void f(const float* x, long long n, float* y) {
  if (threadIdx.x < n) __stcs(y + threadIdx.x, __ldcs(x + threadIdx.x));
}
__global__ void wide(const float* x) { __ldcs(reinterpret_cast<const uint4*>(x)); }
__global__ void lost(int some) { if (threadIdx.x < some) __syncthreads(); }
__global__ void torn(int some) { if (threadIdx.x < some) __shfl_sync(0xffffffffu, 1.0f, 0, 32); }
"""


@pytest.fixture(scope="module")
def module() -> Any:
    return stand_in.RawModule(code=SOURCE, name_expressions=("f", "wide", "lost", "torn"))


def test_kernel_arguments_have_the_types_of_the_parameters(module: Any) -> None:
    f = module.get_function("f")
    x, y = stand_in.zeros(32, dtype=np.float32), stand_in.empty(32, dtype=np.float32)
    f((1,), (32,), (x, np.int64(32), y))
    assert np.all(y.get() == 0)
    for args, words in (
        ((x, np.int32(32), y), "argument 1 .* is 'l', got .*int32"),
        ((x, 32, y), "argument 1 .* got 32 of int"),
        ((x, np.int64(32), stand_in.zeros(32)), "argument 2 .* points to 'f', got float64"),
        ((x, np.int64(32), np.zeros(32, np.float32)), "argument 2 .* pointer, got ndarray"),
        ((x, np.int64(32)), "3 parameters, got 2"),
    ):
        with pytest.raises(stand_in.Forbidden, match=words):
            f((1,), (32,), args)
    for grid, block, shared, words in (
        ((1,), (2048,), 0, "1024"),
        ((1, 70000), (32,), 0, "65535"),
        ((0,), (32,), 0, "empty"),
        ((1,), (33,), 0, "not full"),
        ((1,), (32,), 50000, "shared memory"),
        ((np.int64(1),), (32,), 0, "int64"),
    ):
        with pytest.raises(stand_in.Forbidden, match=words):
            f(grid, block, (x, np.int64(32), y), shared_mem=shared)


def test_rules_of_the_device(module: Any) -> None:
    x = stand_in.zeros(32, dtype=np.float32)
    with pytest.raises(RuntimeError, match="16-byte access at a misaligned address"):
        module.get_function("wide")((1,), (32,), (x[1:],))
    with pytest.raises(RuntimeError, match=r"not all threads reach the __syncthreads\(\)"):
        module.get_function("lost")((1,), (64,), (np.int32(33),))
    with pytest.raises(RuntimeError, match="not all threads reach the __shfl_sync"):
        module.get_function("torn")((1,), (32,), (np.int32(7),))
    module.get_function("lost")((1,), (64,), (np.int32(64),))  # and the next launch is none the worse


# ------------------------------------------------------------------------------------------------ the backend over it


@pytest.fixture
def backend() -> CupyBackend:
    assert emulated.register() is None
    return get("cupy-emulated")  # type: ignore[return-value]


def test_several_threads_at_once(backend: CupyBackend) -> None:
    z = np.random.default_rng(0).normal(size=(8, 200)).astype(np.float32)
    want = swl.cross_entropy_value_and_grad(z, np.arange(8), backend="numpy")
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        fresh = CupyBackend(stand_in) if i % 2 else backend
        for _ in range(20):
            ids, _, _ = fresh.prepare_ids(fresh.asarray(np.arange(8)), 200, -100, None)
            out = fresh.empty(z.shape, z.dtype)
            scale = fresh.asarray(np.full(1, 1 / 8, np.float32))
            target = Target(ids=ids)
            rows = fresh.cross_entropy_forward_backward(fresh.asarray(z), target, scale, out, False)
            results[i] = rows.loss.get().mean(), out.get()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for loss, grad in results:
        np.testing.assert_allclose(loss, want[0], rtol=1e-6)
        np.testing.assert_allclose(grad, want[1], atol=1e-7)


def test_a_step_copies_nothing_from_the_host_and_waits_for_nothing(backend: CupyBackend) -> None:
    """What a CUDA graph can repeat: the stand-in raises at whatever it could not."""
    rng = np.random.default_rng(0)
    x, W, b, t, s = (
        backend.asarray(a)
        for a in (
            rng.normal(size=(6, 5)).astype(np.float32),
            rng.normal(size=(5, 40)).astype(np.float32),
            np.zeros(40, np.float32),
            rng.integers(0, 40, 6),
            rng.uniform(size=6).astype(np.float32),
        )
    )
    y = swl.affine(x, W, b)
    loss, dy = swl.cross_entropy_value_and_grad(y, t, sample_weight=s, label_smoothing=0.1, z_loss=0.01)
    dx, dW, db = swl.affine_backward(dy, x, W)
    W -= 0.1 * dW
    assert np.isfinite(loss.get())
    assert dx.shape == (6, 5)
    assert db.shape == (40,)


def test_arrays_come_without_a_copy(backend: CupyBackend) -> None:
    x = stand_in.asarray(np.ones(3, np.float32))

    class Foreign:
        __cuda_array_interface__ = x.__cuda_array_interface__

    assert backend.asarray(x) is x
    assert backend.asarray(Foreign()).data.ptr == x.data.ptr


@pytest.mark.parametrize("row", [9, 10])
def test_elements_off_their_boundary_are_refused(backend: CupyBackend, row: int) -> None:
    store = backend.asarray(np.zeros(4 * row, np.uint8))
    x = store.reshape(4, row)[:, :8].view(np.float32)
    assert x.strides == (row, 4)
    ids = backend.asarray(np.zeros(4, int))
    with pytest.raises(ValueError, match=rf"multiples of 4 bytes only, got .* strides \({row}, 4\)"):
        swl.cross_entropy(x, ids)
    with pytest.raises(ValueError, match="multiples of 4 bytes only"):
        swl.affine(x, backend.asarray(np.ones((2, 3), np.float32)))
    swl.cross_entropy(x[:1], ids[:1])  # a row of no neighbour, or an array of no element, lies where it may
    swl.affine(x[:0], backend.asarray(np.ones((2, 3), np.float32)))


def test_info_names_versions_and_devices(backend: CupyBackend) -> None:
    found = backend.info()
    assert found["driver"] == "CUDA 12.9"
    assert "compute capability 9.0" in found["device 0"]
