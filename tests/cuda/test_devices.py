"""Work goes to the device and the stream of its call, whichever device is current: shown on two fake devices.

The fake driver refuses work on memory of another device, and lists the device and stream of all it does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import fake
import fakecuda
import numpy as np
import pytest
from needs import TORCH

import swl
from swl.backends.cupy.backend import CupyBackend
from swl.options import Options

N, D, C = 6, 5, 40
THERE = 1
"""The device of the arrays; 0 is current."""


@pytest.fixture(autouse=True)
def backend(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fake.registry, "_DEVICE", fake.NAME)
    # one that knows no device yet: a check reads the record of all that it knows
    monkeypatch.setitem(fake.registry._loaded, fake.NAME, fake.load())
    yield
    fakecuda.forgive()
    swl.check()


def device(index: int) -> Any:
    return fake.cupy().cuda.Device(index)


def put(x: Any, device: int = THERE) -> Any:
    """Copy to a device."""
    with fake.cupy().cuda.Device(device) as there:
        x = fake.cupy().asarray(np.asarray(x))
        there.synchronize()
        return x


def stream_on(index: int = THERE) -> Any:
    with device(index):
        return fake.cupy().cuda.Stream(non_blocking=True)


def host(x: Any) -> Any:
    """Bring results to the host, whatever they are made of."""
    if isinstance(x, tuple | list):
        return [y for part in x for y in host(part)]
    if not isinstance(x, fake.cupy().ndarray):
        return [] if x is None else [np.asarray(x)]
    with x.device as there:
        there.synchronize()
        return [x.get()]


@contextmanager
def only_on(device: int, stream: int = 0) -> Iterator[None]:
    """All work of the block goes to one device and stream, and what is current for the caller stays so."""

    def current() -> list[int]:
        cuda = fake.cupy().cuda
        return [cuda.Device().id, *(cuda.get_current_stream(i).ptr for i in (0, 1))]

    before = current()
    with fakecuda.recorded() as works:
        yield
    assert works
    assert {(work.device, work.stream) for work in works} == {(device, stream)}
    assert current() == before


class Numbers:
    """Operands of all calls, brought to where `put` puts them."""

    def __init__(self, put: Callable[[Any], Any]) -> None:
        rng = np.random.default_rng(0)
        self.x = put(rng.normal(size=(N, D)).astype(np.float32))
        self.whole = put(rng.integers(-3, 4, (N, D)))
        self.W = put(rng.normal(size=(D, C)).astype(np.float32))
        self.b = put(rng.normal(size=C).astype(np.float32))
        self.teacher_x = put(rng.normal(size=(N, 3)).astype(np.float32))
        self.teacher_W = put(rng.normal(size=(3, C)).astype(np.float32))
        self.dy = put(rng.normal(size=(N, C)).astype(np.float32))
        self.z = put(rng.normal(size=(N, C)).astype(np.float32))
        self.half = put(rng.normal(size=(N, 2 * C)).astype(np.float16))[:, ::2]
        self.long = put(rng.normal(size=(2, 9000)).astype(np.float32))
        self.few = put(rng.integers(0, D, 2))
        self.t = put(np.array([0, 1, -100, 3, 39, 5], np.int16))
        self.q = put(rng.dirichlet(np.ones(C), N))
        self.w = put(rng.uniform(0.5, 2, C))
        self.s = put(rng.uniform(0.5, 2, N))
        self.each = put(rng.normal(size=N))
        self.once = put(np.float64(0.5))
        self.out = put(np.zeros((N, C), np.float32))
        self.options = {
            "weight": self.w,
            "sample_weight": self.s,
            "label_smoothing": 0.1,
            "z_loss": 0.01,
            "softcap": 9.0,
            "stats": True,
        }


vg, linear = swl.cross_entropy_value_and_grad, swl.linear_cross_entropy_value_and_grad
log_prob, kl = swl.linear_log_prob_value_and_grad, swl.linear_kl_value_and_grad
CALLS: dict[str, Callable[..., Any]] = {
    "affine": lambda n, **k: swl.affine(n.x, n.W, n.b, **k),
    "affine of integers": lambda n, **k: swl.affine(n.whole, n.W, n.b, **k),
    "affine_backward": lambda n, **k: swl.affine_backward(n.dy, n.x, n.W, **k),
    "ids": lambda n, **k: swl.cross_entropy(n.z, n.t, check=True, **k),
    "ids, all options": lambda n, **k: swl.cross_entropy(n.z, n.t, **n.options, **k),
    "probabilities": lambda n, **k: swl.cross_entropy(n.z, n.q, **n.options, **k),
    "16 bits, strided": lambda n, **k: swl.cross_entropy(n.half, n.t, **k),
    "leading axes": lambda n, **k: swl.cross_entropy(n.z.reshape(2, 3, C), n.t.reshape(2, 3), reduction="none", **k),
    "both": lambda n, **k: vg(n.z, n.t, **n.options, **k),
    "both, strided": lambda n, **k: vg(n.half, n.q, dout=n.once, denominator=n.once, **k),
    "both, split rows": lambda n, **k: vg(n.long, n.few, **k),
    "both, out": lambda n, **k: vg(n.z, n.t, out=n.out, reduction="none", dout=n.each, **k),
    "linear": lambda n, **k: swl.linear_cross_entropy(n.x, n.W, n.t, n.b, **n.options, **k),
    "linear, both": lambda n, **k: linear(n.x, n.W, n.q, n.b, dout=n.once, **n.options, **k),
    "linear, chunks of rows": lambda n, **k: linear(n.x, n.W, n.t, n.b, memory_budget=600, **n.options, **k),
    "linear, chunks of classes": lambda n, **k: linear(n.x, n.W, n.t, n.b, memory_budget=200, **n.options, **k),
    "linear, callable": lambda n, **k: linear(n.x, n.W, lambda r, c: n.q[r, c], memory_budget=200, **k),
    "log_prob": lambda n, **k: swl.linear_log_prob(n.x, n.W, n.t, n.b, entropy=True, **k),
    "log_prob, both": lambda n, **k: log_prob(n.x, n.W, n.t, n.b, dlog_prob=n.each, dentropy=n.once, **k),
    "kl": lambda n, **k: swl.linear_kl(n.x, n.W, n.teacher_x, n.teacher_W, n.b, **k),
    "kl, both": lambda n, **k: kl(
        *(n.x, n.W, n.teacher_x, n.teacher_W, n.b, n.b), dout=n.once, sample_weight=n.s, direction="jsd", **k
    ),
}
every_call = pytest.mark.parametrize("name", CALLS)


class Foreign:
    """A stream of another library."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr


def agree(got: Any, want: Any) -> None:
    got, want = host(got), host(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-3 if a.dtype == np.float16 else 2e-5)


@every_call
def test_calls_run_on_the_device_of_their_arrays(name: str) -> None:
    numbers = Numbers(put)
    with only_on(THERE):
        got = CALLS[name](numbers)
    with swl.use_backend("numpy"):
        agree(got, CALLS[name](Numbers(np.asarray)))


@every_call
def test_calls_run_on_the_stream_that_is_current_on_that_device(name: str) -> None:
    numbers, stream = Numbers(put), stream_on()
    with device(THERE), stream, device(0), stream_on(0), only_on(THERE, stream.ptr):
        CALLS[name](numbers)


@every_call
def test_calls_run_on_the_stream_that_is_given(name: str) -> None:
    numbers, stream, external = Numbers(put), stream_on(), fake.cupy().cuda.ExternalStream
    with pytest.deprecated_call():
        others = external(stream_on().ptr), external(stream_on().ptr, THERE)
    for given in (stream, *others, Foreign(stream_on().ptr)):
        with device(THERE), stream_on(), device(0), only_on(THERE, given.ptr):
            CALLS[name](numbers, stream=given)


@every_call
def test_without_the_scope_all_of_this_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers(put)
    monkeypatch.setattr(CupyBackend, "scope", lambda self, stream=None, /, **arrays: nullcontext())
    with pytest.raises(Exception, match=r"device|CUBLAS_STATUS_INVALID_VALUE"):
        CALLS[name](numbers)


def test_host_arrays_go_to_the_current_device_and_the_stream_that_is_given() -> None:
    stream, numbers = stream_on(0), Numbers(np.asarray)
    with only_on(0, stream.ptr):
        swl.cross_entropy(numbers.z, numbers.t, backend=fake.NAME, stream=stream)


# ------------------------------------------------------------------------------------------------ layers


def network(numbers: Numbers, put: Callable[[Any], Any]) -> swl.Sequential:
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> Any:
        return put(rng.normal(size=shape).astype(np.float32))

    return swl.Sequential(
        swl.Affine(draw(D, 8), draw(8)),
        swl.ReLU(),
        swl.Affine(draw(8, 7)),
        swl.Sigmoid(),
        swl.Affine(draw(7, C), draw(C)),
        # host arrays, which are brought to the device of the scores
        swl.SoftmaxWithLoss(weight=np.linspace(1, 2, C), sample_weight=np.linspace(1, 2, N), label_smoothing=0.1),
    )


def train(numbers: Numbers, put: Callable[[Any], Any], optimizer: Any) -> list[Any]:
    net = network(numbers, put)
    first = net.forward(numbers.x, numbers.t), net.backward(), net[5].y
    optimizer.update(net.parameters(), net.gradients())
    second = net.forward_backward(numbers.x, numbers.t, 2.0)
    optimizer.update(net.parameters(), net.gradients())
    return [*first, *second, net.predict(numbers.x), *net.parameters().values()]


def embed(numbers: Numbers, put: Callable[[Any], Any]) -> list[Any]:
    layer = swl.Embedding(numbers.W)
    y = layer.forward(put(np.array([1, 4, 1])))
    layer.backward(y)
    return [y, layer.dW]


def fused_head(numbers: Numbers, put: Callable[[Any], Any]) -> list[Any]:
    found: list[Any] = []
    for budget in (1 << 20, 600, 200):
        head = swl.AffineSoftmaxWithLoss(
            numbers.W, numbers.b, memory_budget=budget, weight=np.linspace(1, 2, C), softcap=9.0
        )
        found += [head.forward(numbers.x, numbers.t), head.backward(numbers.once), head.dW, head.db]
        found += [*head.forward_backward(numbers.x, numbers.t), head.dW, head.db]
        found += [head.predict(numbers.x), *head.top_k(numbers.x, 3)]
    return found


def from_the_host(numbers: Numbers, put: Callable[[Any], Any]) -> list[Any]:
    """Inputs, targets and upstream gradients are brought to a layer's device."""
    x, t = Numbers(np.asarray).x, Numbers(np.asarray).t
    dy, each = Numbers(np.asarray).dy, Numbers(np.asarray).each
    affine, loss, head = (
        swl.Affine(numbers.W, numbers.b),
        swl.SoftmaxWithLoss(reduction="none"),
        swl.Embedding(numbers.W),
    )
    found = [affine.forward(x), affine.backward(dy), loss.forward(numbers.z, t), loss.backward(each)]
    found += [*loss.forward_backward(numbers.z, t, each), head.forward(np.array([2, 0]))]
    head.backward(np.ones((2, C), np.float32))
    norm = swl.BatchNormalization(put(np.ones(C, np.float32)), put(np.zeros(C, np.float32)))
    found += [norm.forward(np.asarray(dy)), norm.backward(dy)]
    for layer in (swl.ReLU(), swl.Sigmoid()):
        found += [layer.forward(numbers.z), layer.backward(dy)]
    whole = swl.AffineSoftmaxWithLoss(numbers.W, np.zeros(C, np.float32), reduction="none")
    return [*found, head.dW, whole.forward(x, t), whole.backward(each)]


def of_the_book(numbers: Numbers, put: Callable[[Any], Any]) -> list[Any]:
    ones, zeros = put(np.ones(C, np.float32)), put(np.zeros(C, np.float32))
    dropout, affine = swl.Dropout(0.5, rng=0), swl.Affine(numbers.W)
    norm = swl.BatchNormalization(ones, zeros, running_mean=np.zeros(C), running_var=np.ones(C))
    affine.grads  # noqa: B018 - from now on gradients are copied to where these are
    found = [dropout.forward(numbers.z), dropout.backward(numbers.dy), dropout.predict(numbers.z)]
    found += [norm.forward(numbers.z), norm.backward(numbers.dy), norm.predict(numbers.z), norm.dgamma, norm.dbeta]
    found += [affine.forward(numbers.x), affine.backward(numbers.dy), *affine.grads]
    loss = swl.SoftmaxWithLoss(label_smoothing=0.1)
    found += loss.finish(loss.begin(numbers.z, numbers.t), numbers.t)
    return [*found, swl.softmax(numbers.z), swl.accuracy(numbers.z, numbers.t)]


def state(numbers: Numbers, put: Callable[[Any], Any]) -> list[Any]:
    net = network(numbers, put)
    net.load_state_dict({name: values + 1 for name, values in net.state_dict().items()})
    return list(net.parameters().values())


SCRIPTS: dict[str, Callable[..., list[Any]]] = {
    "SGD": lambda n, p: train(n, p, swl.SGD(0.1)),
    "SGD, momentum": lambda n, p: train(n, p, swl.SGD(0.1, momentum=0.9, weight_decay=0.1)),
    "AdamW": lambda n, p: train(n, p, swl.AdamW(0.01)),
    "Embedding": embed,
    "fused head": fused_head,
    "from the host": from_the_host,
    "state": state,
    "of the book": of_the_book,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_layers_run_on_the_device_and_the_current_stream_of_their_arrays(name: str) -> None:
    numbers, stream = Numbers(put), stream_on()
    with device(THERE), stream, device(0), only_on(THERE, stream.ptr):
        got = SCRIPTS[name](numbers, lambda x: on(stream, x))
    with swl.use_backend("numpy"):
        agree(got, SCRIPTS[name](Numbers(np.asarray), np.asarray))


def test_asarray_converts_where_the_array_is() -> None:
    numbers = Numbers(put)
    with only_on(THERE), swl.use_backend(fake.NAME):
        swl.asarray(numbers.whole, np.float32)
    with only_on(0), swl.use_backend(fake.NAME):
        swl.asarray([1.0, 2.0])


def on(stream: Any, x: Any) -> Any:
    with device(THERE), stream:
        return fake.cupy().asarray(x)


def test_layers_on_two_devices_each_update_their_own() -> None:
    nets = [network(Numbers(lambda x: put(x, i)), lambda x: put(x, i)) for i in (0, 1)]  # noqa: B023 - called at once
    optimizer, parameters, gradients = swl.AdamW(), {}, {}
    for i, net in enumerate(nets):
        numbers = Numbers(lambda x: put(x, i))  # noqa: B023 - called at once
        net.forward_backward(numbers.x, numbers.t)
        parameters |= {f"{i}.{name}": p for name, p in net.parameters().items()}
        gradients |= {f"{i}.{name}": g for name, g in net.gradients().items()}
    optimizer.update(parameters, gradients)
    agree(list(nets[0].parameters().values()), list(nets[1].parameters().values()))


# ------------------------------------------------------------------------------------------------ errors


def test_a_bad_class_id_is_reported_by_its_device() -> None:
    numbers = Numbers(put)
    words = r"target\[3\] is 99; legal are class ids in \[0, 40\)"
    bad = put(np.array([0, 1, 2, 99, 4, 5]))
    with only_on(THERE):
        swl.cross_entropy(numbers.z, bad)
    with pytest.raises(ValueError, match=words):
        swl.check()
    swl.check()  # it was told once
    with pytest.raises(ValueError, match=words):
        swl.cross_entropy(numbers.z, bad, check=True, stream=stream_on())
    cuda = fake.cupy().cuda
    assert cuda.Device().id == 0
    assert cuda.get_current_stream() == cuda.Stream.null


def test_the_caller_gets_device_and_stream_back_after_an_error() -> None:
    numbers = Numbers(put)
    for wrong in (
        lambda: swl.affine(numbers.x, numbers.b),
        lambda: swl.cross_entropy(numbers.z, numbers.x, stream=stream_on()),
    ):
        with pytest.raises(ValueError, match="must have shape"):
            wrong()
        cuda = fake.cupy().cuda
        assert cuda.Device().id == 0
        assert [cuda.get_current_stream(i).ptr for i in (0, 1)] == [0, 0]


TWO_DEVICES: dict[str, tuple[str, str, Callable[[Numbers, Numbers], Any]]] = {
    "affine": ("x", "W", lambda a, b: swl.affine(a.x, b.W)),
    "affine, bias": ("x", "b", lambda a, b: swl.affine(a.x, a.W, b.b)),
    "affine_backward": ("x", "dout", lambda a, b: swl.affine_backward(b.dy, a.x, a.W)),
    "target": ("logits", "target", lambda a, b: swl.cross_entropy(a.z, b.t)),
    "weight": ("logits", "weight", lambda a, b: swl.cross_entropy(a.z, a.t, weight=b.w)),
    "sample_weight": ("logits", "sample_weight", lambda a, b: swl.cross_entropy(a.z, a.t, sample_weight=b.s)),
    "denominator": ("logits", "denominator", lambda a, b: swl.cross_entropy(a.z, a.t, denominator=b.once)),
    "dout": ("logits", "dout", lambda a, b: vg(a.z, a.t, dout=b.once)),
    "out": ("logits", "out", lambda a, b: vg(a.z, a.t, out=b.out)),
    "linear": ("x", "W", lambda a, b: linear(a.x, b.W, a.t)),
    "linear, target": ("x", "target", lambda a, b: linear(a.x, a.W, b.t)),
    "linear, bias": ("x", "b", lambda a, b: linear(a.x, a.W, a.t, b.b)),
    "linear, weight": ("x", "weight", lambda a, b: linear(a.x, a.W, a.t, weight=b.w)),
    "linear, sample_weight": ("x", "sample_weight", lambda a, b: linear(a.x, a.W, a.t, sample_weight=b.s)),
    "linear, denominator": ("x", "denominator", lambda a, b: linear(a.x, a.W, a.t, denominator=b.once)),
    "linear, dout": ("x", "dout", lambda a, b: linear(a.x, a.W, a.t, dout=b.once)),
    "log_prob": ("x", "W", lambda a, b: swl.linear_log_prob(a.x, b.W, a.t)),
    "log_prob, dentropy": ("x", "dentropy", lambda a, b: log_prob(a.x, a.W, a.t, dentropy=b.once)),
    "kl": ("x", "teacher_W", lambda a, b: swl.linear_kl(a.x, a.W, a.teacher_x, b.teacher_W)),
    "kl, bias": ("x", "teacher_b", lambda a, b: swl.linear_kl(a.x, a.W, a.teacher_x, a.teacher_W, teacher_b=b.b)),
    "kl, sample_weight": (
        "x",
        "sample_weight",
        lambda a, b: swl.linear_kl(a.x, a.W, a.teacher_x, a.teacher_W, sample_weight=b.s),
    ),
    "Affine": ("W", "b", lambda a, b: swl.Affine(a.W, b.b)),
    "Affine, x": ("W", "x", lambda a, b: swl.Affine(a.W).forward(b.x)),
    "Affine, dout": ("W", "dout", lambda a, b: _forward(swl.Affine(a.W), a.x).backward(b.dy)),
    "ReLU, dout": ("x", "dout", lambda a, b: _forward(swl.ReLU(), a.z).backward(b.dy)),
    "Sigmoid, dout": ("x", "dout", lambda a, b: _forward(swl.Sigmoid(), a.z).backward(b.dy)),
    "Embedding, x": ("W", "x", lambda a, b: swl.Embedding(a.W).forward(b.t)),
    "Embedding, dout": ("W", "dout", lambda a, b: _forward(swl.Embedding(a.W), a.few).backward(b.dy)),
    "SoftmaxWithLoss, t": ("x", "t", lambda a, b: swl.SoftmaxWithLoss().forward(a.z, b.t)),
    "SoftmaxWithLoss, weight": ("logits", "weight", lambda a, b: swl.SoftmaxWithLoss(weight=b.w).forward(a.z, a.t)),
    "SoftmaxWithLoss, dout": (
        "logits",
        "dout",
        lambda a, b: _forward(swl.SoftmaxWithLoss(), a.z, a.t).backward(b.once),
    ),
    "both, dout": ("logits", "dout", lambda a, b: swl.SoftmaxWithLoss().forward_backward(a.z, a.t, b.once)),
    "head, x": ("W", "x", lambda a, b: swl.AffineSoftmaxWithLoss(a.W).forward(b.x, a.t)),
    "head, t": ("W", "t", lambda a, b: swl.AffineSoftmaxWithLoss(a.W).forward(a.x, b.t)),
    "head, weight": ("W", "weight", lambda a, b: swl.AffineSoftmaxWithLoss(a.W, weight=b.w)),
    "head, dout": ("W", "dout", lambda a, b: _forward(swl.AffineSoftmaxWithLoss(a.W), a.x, a.t).backward(b.once)),
    "head, both": ("W", "dout", lambda a, b: swl.AffineSoftmaxWithLoss(a.W).forward_backward(a.x, a.t, b.once)),
    "head, predict": ("W", "x", lambda a, b: swl.AffineSoftmaxWithLoss(a.W).predict(b.x)),
    "head, top_k": ("W", "x", lambda a, b: swl.AffineSoftmaxWithLoss(a.W).top_k(b.x, 2)),
    "BatchNormalization": ("gamma", "beta", lambda a, b: swl.BatchNormalization(a.b, b.b)),
    "BatchNormalization, x": ("gamma", "x", lambda a, b: swl.BatchNormalization(a.b, a.b).forward(b.z)),
    "SGD": ("params", "grads", lambda a, b: swl.SGD().update([a.x], [b.x])),
    "AdamW": ("params", "grads", lambda a, b: swl.AdamW().update([a.x], [b.x])),
}


def _forward(layer: Any, *inputs: Any) -> Any:
    layer.forward(*inputs)
    return layer


@pytest.mark.parametrize("name", TWO_DEVICES)
def test_arrays_on_two_devices_are_refused_by_name(name: str) -> None:
    first, second, call = TWO_DEVICES[name]
    for here in (0, 1):
        with pytest.raises(TypeError, match=r"all arrays of a call must be .*on one device") as error:
            call(Numbers(lambda x: put(x, here)), Numbers(lambda x: put(x, 1 - here)))  # noqa: B023 - called at once
        said = re.findall(r"(\w+) is (?:a \w+ array )?on cuda:(\d)", str(error.value))
        assert sorted(said) == sorted([(first, str(here)), (second, str(1 - here))])


@every_call
def test_streams_that_are_none_are_refused(name: str) -> None:
    numbers = Numbers(put)
    for wrong, words in (
        (0, r"stream must be a cupy\.cuda\.Stream, or an object with __cuda_stream__ .* got 0 of type int"),
        ("fast", "got 'fast' of type str"),
        (stream_on(0), "stream is of cuda:0, but the arrays are on cuda:1"),
    ):
        with pytest.raises(TypeError, match=words):
            CALLS[name](numbers, stream=wrong)
    for home in ("numpy", "numba"):
        with swl.use_backend(home), pytest.raises(TypeError, match=f"stream is for arrays on a device.*'{home}'"):
            CALLS[name](Numbers(np.asarray), stream=stream_on())


def test_layers_take_no_stream() -> None:
    with pytest.raises(TypeError, match="unknown option 'stream'"):
        swl.SoftmaxWithLoss(stream=stream_on())  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", ["ids", "probabilities"])
def test_tensors_are_worked_on_on_their_device_and_torchs_stream(
    target: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason=TORCH)
    import tensors

    from swl.torch._options import packed

    stream = stream_on()
    tensors.send(monkeypatch, THERE, stream.ptr)
    rng = np.random.default_rng(0)
    x, W, b = (torch.from_numpy(rng.normal(size=s).astype(np.float32)) for s in ((N, D), (C, D), (C,)))
    t = (
        torch.tensor([0, 1, -100, 3, 39, 5])
        if target == "ids"
        else torch.from_numpy(rng.dirichlet(np.ones(C), N)).float()
    )
    leaves = [a.requires_grad_() for a in (x, W, b)]
    every = leaves if target == "ids" else [*leaves, t.requires_grad_()]
    options = {"weight": torch.linspace(1, 2, C), "reduction": reduction, "label_smoothing": 0.1}
    traced = packed(Options(**options))
    y = torch.nn.functional.linear(*leaves)
    want = torch.nn.functional.cross_entropy(y, t, **options)
    up = torch.full_like(want, 0.5)

    def gradients(loss: Any) -> Any:
        return [loss.detach(), *torch.autograd.grad(loss, every, up, retain_graph=True)]

    with only_on(THERE, stream.ptr):
        with torch.no_grad():
            plain = [
                swl.torch.cross_entropy(swl.torch.affine(*leaves), t, **options),
                swl.torch.linear_cross_entropy(x, W, t, linear_bias=b, **options),
            ]
        ops = torch.ops.swl
        found = [
            gradients(swl.torch.cross_entropy(swl.torch.affine(*leaves), t, **options)),
            gradients(swl.torch.linear_cross_entropy(x, W, t, linear_bias=b, **options)),
            gradients(ops.cross_entropy(ops.affine(*leaves), t, *traced, torch.float32, False)[0]),
            gradients(ops.linear_cross_entropy(x, W, t, b, *traced, 1 << 20, torch.float32, False)[0]),
        ]
    torch.testing.assert_close(plain, [want.detach()] * 2, rtol=1e-4, atol=1e-4)
    for got in found:
        torch.testing.assert_close(got, gradients(want), rtol=1e-4, atol=1e-4)
