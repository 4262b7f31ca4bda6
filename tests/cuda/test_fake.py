"""CUDA graphs, streams and devices on real CuPy over the fake driver; and that the fake sees what goes wrong."""

from __future__ import annotations

import contextlib
import re
import threading
from types import SimpleNamespace
from typing import Any

import fake
import fakecuda
import numpy as np
import pytest
from fakecuda import strict

import swl
from swl.backends import get
from swl.backends.cupy.backend import CupyBackend
from swl.backends.protocol import Target

pytestmark = pytest.mark.usefixtures("on_fake")

N, D, C = 40, 24, 300


def as_swl(code: str, **names: Any) -> Any:
    """Evaluate an expression in a function that seems to be swl's."""
    namespace = {"__name__": "swl.functional", **names}
    exec(f"def operation():\n    return {code}", namespace)
    return namespace["operation"]()


# ------------------------------------------------------------------------------------------------ graphs


class Step:
    """A step of training a network of two layers, and its parameters."""

    def __init__(self, dtype: Any, fused: bool) -> None:
        rng = np.random.default_rng(0)
        draw = lambda *shape: swl.asarray(rng.normal(size=shape).astype(dtype))  # noqa: E731
        self.x, self.t = draw(N, D), swl.asarray(rng.integers(0, C, N))
        last = (
            [swl.AffineSoftmaxWithLoss(draw(16, C), draw(C), memory_budget=4 * 4000)]
            if fused
            else [swl.Affine(draw(16, C), draw(C)), swl.SoftmaxWithLoss(label_smoothing=0.1)]
        )
        self.net = swl.Sequential(swl.Affine(draw(D, 16), draw(16)), swl.ReLU(), *last)
        self.first = {name: p.copy() for name, p in self.net.parameters().items()}
        self.sgd = swl.SGD(0.1)

    def reset(self) -> None:
        for name, p in self.net.parameters().items():
            p[...] = self.first[name]

    def __call__(self) -> Any:
        loss, _ = self.net.forward_backward(self.x, self.t)
        self.sgd.update(self.net.parameters(), self.net.gradients())
        return loss

    def results(self, loss: Any) -> list[bytes]:
        return [loss.get().tobytes(), *(p.get().tobytes() for p in self.net.parameters().values())]


def replayed(cupy: Any, step: Step, pool: Any, times: int = 3) -> tuple[list[Any], list[Any]]:
    """Run a step, then capture and replay it, others using the ordinary pool in between; give both rows of results."""
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc) if pool else contextlib.nullcontext():
        plain = [step.results(step()) for _ in range(times)]
        step.reset()
        if pool:
            pool.malloc(1 << 22)  # given back at once, for the capture, which cannot ask the driver for more
        stream.begin_capture()
        loss = step()
        graph = stream.end_capture()
        captured = []
        for _ in range(times):
            with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):
                others = [cupy.full(size, 7, np.float32) for size in (N, N * 16, N * C, D * 16, 16 * C) * 4]
            graph.launch(stream)
            captured.append(step.results(loss))
            assert all(float(other.min()) == 7 == float(other.max()) for other in others if pool)
    return plain, captured


@pytest.mark.parametrize("fused", [False, True], ids=["affine, loss", "fused head"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("reverse", [0, 1])
def test_a_training_step_captured_and_replayed_gives_the_same_bits(
    cupy: Any, dtype: Any, fused: bool, reverse: int
) -> None:
    with fakecuda.settings(reverse=reverse):
        plain, captured = replayed(cupy, Step(dtype, fused), cupy.cuda.MemoryPool())
    assert captured == plain
    assert plain[0] != plain[1]


def test_a_capture_whose_temporaries_go_back_to_the_ordinary_pool_is_seen(cupy: Any) -> None:
    """What docs/cuda.md warns of: a captured step needs a pool of its own."""
    plain, captured = replayed(cupy, Step(np.float32, False), None)
    assert captured == plain  # the step itself writes them anew
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.ones(1000, np.float32)
        x + 1  # compiled
        stream.begin_capture()
        y = x + 1
        graph = stream.end_capture()
        del y
        other = cupy.full(1000, 7, np.float32)
        graph.launch(stream)
        assert float(other[0]) == 2


def test_a_capture_refuses_a_wait(cupy: Any) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="StreamCaptureUnsupported"):
            stream.synchronize()
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="StreamCaptureInvalidated"):
            stream.end_capture()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_graph_runs_in_the_order_of_its_edges_alone(cupy: Any, ordered: bool) -> None:
    one, two = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    x, y = cupy.zeros(8, np.float32), cupy.zeros(8, np.float32)
    x += 1
    y[...] = x
    x[...] = 0
    cupy.cuda.Device().synchronize()
    one.begin_capture()
    fork = one.record()
    with one:
        x += 1
    two.wait_event(one.record() if ordered else fork)
    with two:
        y[...] = x
    one.wait_event(two.record())
    graph = one.end_capture()
    with fakecuda.settings(reverse=1):
        graph.launch(one)
        one.synchronize()
    assert float(y[0]) == ordered


def test_a_graph_whose_branches_do_not_join_is_refused(cupy: Any) -> None:
    one, two = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    x = cupy.zeros(8, np.float32)
    x += 1
    cupy.cuda.Device().synchronize()
    one.begin_capture()
    two.wait_event(one.record())
    with two:
        x += 1
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="StreamCaptureUnjoined"):
        one.end_capture()


# ------------------------------------------------------------------------------------------------ waits, copies, order


@pytest.mark.parametrize(
    "code", ["x.get()", "float(x[0])", "bool(x[0])", "x.tolist()", "str(x)", "s.synchronize()", "d.synchronize()"]
)
def test_waiting_inside_an_operation_is_an_error(cupy: Any, code: str) -> None:
    names = {"x": cupy.ones(2), "s": cupy.cuda.get_current_stream(), "d": cupy.cuda.Device()}
    eval(code, names)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="NotPermitted"):
        as_swl(code, **names)


@pytest.mark.parametrize("code", ["cp.asarray([1.0, 2.0])", "x.set(h)", "cp.concatenate([x] * 30)"])
def test_copying_from_the_host_inside_an_operation_is_an_error(cupy: Any, code: str) -> None:
    names = {"cp": cupy, "x": cupy.ones(2), "h": np.ones(2)}
    eval(code, names)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="NotPermitted"):
        as_swl(code, **names)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_missing_order_between_streams_gives_wrong_numbers(cupy: Any, ordered: bool) -> None:
    one, two = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with one:
        x = cupy.zeros(8, np.float32)
        x += 1
        y = x.copy()
        one.synchronize()
        x += 1
    if ordered:
        two.wait_event(one.record())
    with two:
        y[...] = x
        two.synchronize()
    assert float(y[0]) == (2 if ordered else 1)


@pytest.mark.parametrize("kept", [True, False])
def test_an_operand_freed_while_another_stream_reads_it_gives_wrong_numbers(cupy: Any, kept: bool) -> None:
    one, two = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with one:
        x = cupy.full(1024, 3, np.float32)
        y = x.copy()
        one.synchronize()
    with two:
        y[...] = x
    with one:
        if kept:
            two.synchronize()
        del x
        cupy.full(1024, 7, np.float32)
    with fakecuda.settings(ahead=1):
        two.synchronize()
    assert (float(y[0]) == 3) == kept


# ------------------------------------------------------------------------------------------------ devices


class Interface:
    """Of an array only ``__cuda_array_interface__``."""

    def __init__(self, array: Any) -> None:
        self.array, self.__cuda_array_interface__ = array, array.__cuda_array_interface__


def test_objects_with_only_the_interface_are_worked_on_where_they_are(cupy: Any) -> None:
    rng = np.random.default_rng(0)
    z, t = rng.normal(size=(4, 9)).astype(np.float32), rng.integers(0, 9, 4)
    for device in (0, 1):
        with cupy.cuda.Device(device):
            there, ids = Interface(cupy.asarray(z)), Interface(cupy.asarray(t))
            cupy.cuda.Device(device).synchronize()
        assert swl.asarray(there).data.ptr == there.array.data.ptr
        with fakecuda.recorded() as works:
            loss, grad = swl.cross_entropy_value_and_grad(there, ids)
        assert {work.device for work in works} == {device}
        assert loss.device.id == grad.device.id == device
        with swl.use_backend("numpy"):
            np.testing.assert_allclose(loss.get(), swl.cross_entropy(z, t), rtol=1e-6)
    ids = Interface(cupy.asarray(t))  # on device 0
    with pytest.raises(TypeError, match=r"logits is on cuda:1 but target is on cuda:0"):
        swl.cross_entropy(there, ids)


@pytest.mark.parametrize("told", [True, False])
def test_an_objects_stream_is_waited_for_by_the_device_and_not_by_the_host(cupy: Any, told: bool) -> None:
    one, two = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with one:
        x = cupy.zeros(8, np.float32)
        x += 1
        copied = x.copy()
        one.synchronize()
        x += 1
        there = Interface(x)
    if not told:
        del there.__cuda_array_interface__["stream"]
    strict.waits.clear()
    with two:
        copied[...] = swl.asarray(there)
        assert strict.waits == []
        two.synchronize()
    assert float(copied[0]) == (2 if told else 1)


def test_an_object_without_elements_is_on_the_current_device(cupy: Any) -> None:
    assert swl.asarray(Interface(cupy.zeros((0, 3), np.float32))).shape == (0, 3)


# ------------------------------------------------------------------------------------------------ kernels

SOURCE = """
struct Pair { const float* x; long long n; int more; };
template <typename T> __global__ void copy(const T* x, long long n, T* y) {
  if (threadIdx.x < n) __stcs(y + threadIdx.x, __ldcs(x + threadIdx.x));
}
template <typename T> __global__ void wide(const T* x) { __ldcs(reinterpret_cast<const uint4*>(x)); }
template <typename T> __global__ void lost(T some) { if (threadIdx.x < some) __syncthreads(); }
template <typename T> __global__ void torn(T some) { if (threadIdx.x < some) __shfl_sync(0xffffffffu, 1.0f, 0, 32); }
template <typename T> __global__ void half_warp(T some) { __shfl_sync(0x0000ffffu, 1.0f, 0, 16); }
template <typename T> __global__ void pair(Pair p, T* y) { y[threadIdx.x] = p.x[0] * p.n + p.more; }
template <typename T> __global__ void __cluster_dims__(4, 1, 1) around(T* y, int met) {
  extern __shared__ int mine[];
  mine[0] = blockIdx.x;
  if ((int)blockIdx.x % 4 < met) { __cluster_barrier_arrive(); __cluster_barrier_wait(); }
  y[blockIdx.x] = *(int*)__cluster_map_shared_rank(mine, (blockIdx.x + 1) % 4);
}
template <typename T> __global__ void tiny(const T* x, T* y) { y[threadIdx.x] = x[threadIdx.x] * (T)0.5; }
"""


@pytest.fixture
def kernels(cupy: Any) -> Any:
    names = (
        "copy<float>",
        "wide<float>",
        "lost<int>",
        "torn<int>",
        "half_warp<int>",
        "pair<float>",
        "tiny<float>",
        "around<int>",
    )
    module = cupy.RawModule(code=SOURCE, options=("-std=c++17", "-fmad=false"), name_expressions=names)
    return SimpleNamespace(**{name.split("<")[0]: module.get_function(name) for name in names})


def test_kernel_arguments_have_the_types_of_the_parameters(cupy: Any, kernels: Any) -> None:
    x, y, n = cupy.zeros(32, np.float32), cupy.empty(32, np.float32), np.int64(32)
    kernels.copy((1,), (32,), (x, n, y))
    assert np.all(y.get() == 0)
    for args, words in (
        ((x, np.int32(32), y), "argument 1 .* is 'l', got .*int32"),
        ((x, 32, y), "argument 1 .* got 32 of int"),
        ((x, n, cupy.zeros(32)), "argument 2 .* points to 'f', got float64"),
        ((x, n, np.zeros(32, np.float32)), "argument 2 .* pointer, got ndarray"),
        ((x, n), "3 parameters, got 2"),
    ):
        with pytest.raises(strict.Forbidden, match=words):
            kernels.copy((1,), (32,), args)


def test_a_struct_has_the_layout_of_the_parameter(cupy: Any, kernels: Any) -> None:
    x, y = cupy.full(1, 3, np.float32), cupy.empty(32, np.float32)
    fields = [("x", np.uint64), ("n", np.int64), ("more", np.int32)]
    values = (x.data.ptr, 2, 5)
    kernels.pair((1,), (32,), (np.array(values, np.dtype(fields, align=True)), y))
    assert float(y[0]) == 11
    for wrong in (fields[::-1], [*fields[:2], ("more", np.float32)], fields[:2], [*fields, ("rest", np.int64)]):
        made = np.zeros((), np.dtype(wrong, align=True))
        with pytest.raises(strict.Forbidden, match=r"argument 0 of pair<float> is \{24;"):
            kernels.pair((1,), (32,), (made, y))


@pytest.mark.parametrize(
    ("grid", "block", "shared", "words"),
    [
        ((1,), (2048,), 0, "1024"),
        ((1, 70000), (32,), 0, "65535"),
        ((0,), (32,), 0, "empty"),
        ((1,), (33,), 0, "not full"),
        ((1,), (32,), 50000, "shared memory"),
        ((np.int64(1),), (32,), 0, "must be of int"),
    ],
)
def test_geometry_that_a_device_forbids_is_refused(
    cupy: Any, kernels: Any, grid: Any, block: Any, shared: int, words: str
) -> None:
    x = cupy.zeros(32, np.float32)
    with pytest.raises((strict.Forbidden, cupy.cuda.driver.CUDADriverError), match=words):
        kernels.copy(grid, block, (x, np.int64(32), x), shared_mem=shared)


@pytest.mark.parametrize(
    ("name", "some", "words"),
    [
        ("wide", None, "MisalignedAddress.*misaligned address"),
        ("lost", 33, "not all threads reach a barrier or shuffle"),
        ("torn", 7, "not all threads reach a barrier or shuffle"),
        ("half_warp", 0, "a shuffle of less than a warp"),
    ],
)
def test_what_a_kernel_does_wrong_is_an_error_from_then_on(
    cupy: Any, kernels: Any, name: str, some: Any, words: str
) -> None:
    arg = cupy.zeros(32, np.float32)[1:] if some is None else np.int32(some)
    getattr(kernels, name)((1,), (64,), (arg,))
    for _ in range(2):
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match=words):
            cupy.cuda.Device().synchronize()
    fakecuda.forgive()
    kernels.lost((1,), (64,), (np.int32(64),))  # and the next launch is none the worse
    cupy.cuda.Device().synchronize()


def test_blocks_of_a_cluster_reach_each_others_shared_memory(cupy: Any, kernels: Any) -> None:
    y = cupy.zeros(8, np.int32)
    kernels.around((8,), (32,), (y, np.int32(4)), shared_mem=4)
    assert y.get().tolist() == [1, 2, 3, 0, 5, 6, 7, 4]
    kernels.around((8,), (32,), (y, np.int32(0)), shared_mem=4)  # nobody waits: what is read first is poison
    assert y.get()[0] == -1
    for clusters, blocks in ((0, 8), (1, 6)):
        with (
            fakecuda.settings(clusters=clusters),
            pytest.raises(cupy.cuda.driver.CUDADriverError, match="clusters of 4 blocks"),
        ):
            kernels.around((blocks,), (32,), (y, np.int32(4)), shared_mem=4)
    kernels.around((8,), (32,), (y, np.int32(3)), shared_mem=4)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="not all threads reach"):
        cupy.cuda.Device().synchronize()
    fakecuda.forgive()


def test_subnormal_floats_become_0_as_cupy_has_it_compiled(cupy: Any, kernels: Any) -> None:
    x, y = cupy.full(32, np.float32(1.5e-38)), cupy.empty(32, np.float32)
    kernels.tiny((1,), (32,), (x, y))
    assert np.all(y.get() == 0)


def test_memory_of_another_device_is_out_of_reach(cupy: Any, kernels: Any) -> None:
    with cupy.cuda.Device(1):
        away = cupy.zeros(32, np.float32)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="memory of device 1 in work on device 0"):
        kernels.copy((1,), (32,), (away, np.int64(32), away))


def test_new_memory_is_poisoned(cupy: Any) -> None:
    assert np.isnan(cupy.empty(3, dtype=np.float16).get()).all()
    assert np.all(cupy.empty(3, dtype=np.int64).get() < -2)


def test_the_fake_cannot_be_taken_for_a_card(cupy: Any) -> None:
    with pytest.raises(swl.BackendUnavailable, match="in this process CuPy runs on a fake one"):
        get("cupy")
    assert re.match("fake CUDA device", get(fake.NAME).info()["device 0"])


# ------------------------------------------------------------------------------------------------ the backend


def test_several_threads_at_once(cupy: Any) -> None:
    z = np.random.default_rng(0).normal(size=(8, 200)).astype(np.float32)
    want = swl.cross_entropy_value_and_grad(z, np.arange(8), backend="numpy")
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        backend = CupyBackend(cupy) if i % 2 else get(fake.NAME)
        for _ in range(20):
            ids, _, _ = backend.prepare_ids(backend.asarray(np.arange(8)), 200, -100, None)
            out, scale = backend.empty(z.shape, z.dtype), backend.asarray(np.full(1, 1 / 8, np.float32))
            rows = backend.cross_entropy_forward_backward(backend.asarray(z), Target(ids=ids), scale, out, False)
            results[i] = rows.loss.get().mean(), out.get()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for loss, grad in results:
        np.testing.assert_allclose(loss, want[0], rtol=1e-6)
        np.testing.assert_allclose(grad, want[1], atol=1e-7)


@pytest.mark.parametrize("row", [9, 10])
def test_elements_off_their_boundary_are_refused(cupy: Any, on_fake: CupyBackend, row: int) -> None:
    store = on_fake.asarray(np.zeros(4 * row, np.uint8))
    x = cupy.lib.stride_tricks.as_strided(store[:32].view(np.float32), (4, 2), (row, 4))
    ids = on_fake.asarray(np.zeros(4, int))
    W = on_fake.asarray(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match=rf"multiples of 4 bytes only, got .* strides \({row}, 4\)"):
        swl.cross_entropy(x, ids)
    with pytest.raises(ValueError, match="multiples of 4 bytes only"):
        swl.affine(x, W)
    swl.cross_entropy(x[:1], ids[:1])  # a row of no neighbour, or an array of no element, lies where it may
    swl.affine(x[:0], W)


def test_info_names_versions_and_devices(on_fake: CupyBackend) -> None:
    found = on_fake.info()
    assert re.fullmatch(r"CUDA 1[23]\.\d", found["driver"])
    assert "compute capability 9.0" in found["device 0"]


def test_state_is_read_when_the_stream_of_its_device_is_done(cupy: Any) -> None:
    with cupy.cuda.Device(1), cupy.cuda.Stream(non_blocking=True), cupy.cuda.Device(0):
        with cupy.cuda.Device(1):
            layer = swl.Affine(cupy.zeros((3, 3), np.float32))
            layer.W += 1
        assert np.all(swl.Sequential(layer).state_dict()["0.W"] == 1)
