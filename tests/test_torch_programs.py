"""swl.torch inside other people's programs: shards, compilers, tracers, counters, and tensors that are not plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation calls it

import swl.torch

IDS = torch.tensor([0, 1, -100, 4])
x64 = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W64 = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losses(x: Any, W: Any, **options: Any) -> Any:
    """All three functions in one number or vector."""
    fused = swl.torch.linear_cross_entropy(x, W, IDS.to(x.device), **options)
    return fused + swl.torch.cross_entropy(swl.torch.affine(x, W), IDS.to(x.device), **options)


# ------------------------------------------------------------------------------------------------ memory that others manage


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_storages_may_be_freed_and_filled_again_before_backward(dtype: Any, reduction: str) -> None:
    x, W = x64.to(dtype), W64.to(dtype).requires_grad_()

    def gradient(meanwhile: Callable[[], None]) -> Any:
        loss = losses(x, W, reduction=reduction)
        meanwhile()
        return torch.autograd.grad(loss.sum(), W)[0]

    def move() -> None:  # what FSDP does to parameters between forward and backward
        storage, values = W.untyped_storage(), W.detach().clone()
        size = storage.size()
        storage.resize_(0)
        held.append(torch.full((size,), 7, dtype=torch.uint8))  # takes the memory that came free
        storage.resize_(size)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(W):
            W.copy_(values)

    held: list[Any] = []
    want = gradient(lambda: None)
    torch.testing.assert_close(gradient(move), want, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_layers_train_under_fsdp2(mesh: Any, reduction: str) -> None:
    from torch.distributed.fsdp import fully_shard

    def model(ours: bool) -> Any:
        torch.manual_seed(0)
        head = swl.torch.LinearCrossEntropyLoss if ours else torch.nn.LinearCrossEntropyLoss
        affine = swl.torch.Affine if ours else torch.nn.Linear
        loss = swl.torch.CrossEntropyLoss if ours else torch.nn.CrossEntropyLoss
        parts = [affine(5, 6), head(6, 5, bias=True, reduction=reduction), loss(reduction=reduction)]
        return torch.nn.ModuleList(parts)

    def train(net: Any) -> list[float]:
        optimiser, seen = torch.optim.SGD(net.parameters(), lr=0.1), []
        for _ in range(3):
            y = net[0](x64.float())
            loss = net[1](y.tanh(), IDS) + net[2](y, IDS)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            seen.append(loss.item())
        return seen

    sharded = model(ours=True)
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    torch.testing.assert_close(train(sharded), train(model(ours=False)), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ patch


def test_patched_code_is_compiled_once() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: F.cross_entropy(x, IDS), backend=counter, fullgraph=True)
    with swl.torch.patch() as report:
        for _ in range(20):
            compiled(x64)
    assert counter.frame_count == 1
    assert report.covered == 1


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")  # torch's own
def test_patch_leaves_loss_parallel_to_torch(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    def run() -> Any:
        logits = distribute_tensor(x64.clone().requires_grad_(), mesh, [Shard(1)])
        with loss_parallel():
            loss = F.cross_entropy(logits, IDS)
            loss.backward()
        return loss.full_tensor(), logits.grad.full_tensor()

    want = run()
    with swl.torch.patch() as report:
        torch.testing.assert_close(run(), want, rtol=0, atol=0)
    assert dict(report.fell_through) == {"a DTensor, a subclass of Tensor": 1}


class Noting(torch.Tensor):
    """A subclass that sees each of torch's functions called on it."""

    seen: list[Any] = []  # noqa: RUF012 - of the class, as torch calls a class method

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_patch_leaves_subclasses_the_function_that_they_know() -> None:
    original, x = F.cross_entropy, x64.as_subclass(Noting)
    with swl.torch.patch() as report:
        Noting.seen.clear()
        loss = F.cross_entropy(x, IDS)
    assert type(loss) is Noting
    assert original in Noting.seen
    assert report.fell_through.total() == 1


@pytest.mark.parametrize("bad", [[[1.0, 2.0]], np.zeros((1, 2)), None, 3.0], ids=["list", "numpy", "None", "number"])
def test_patch_leaves_what_is_no_tensor_to_torchs_own_error(bad: Any) -> None:
    def message() -> str:
        with pytest.raises((TypeError, AttributeError)) as found:
            F.cross_entropy(bad, torch.tensor([0]))
        return str(found.value)

    want = message()
    with swl.torch.patch() as report:
        assert message() == want
    assert report.fell_through.total() == 1


def test_patch_under_a_default_device_of_meta() -> None:
    with swl.torch.patch() as report, torch.device("meta"):
        assert F.cross_entropy(torch.empty(4, 5), torch.empty(4, dtype=torch.long)).is_meta
        torch.testing.assert_close(F.cross_entropy(x64, IDS), swl.torch.cross_entropy(x64, IDS))
    assert (report.covered, report.fell_through.total()) == (1, 1)


# ------------------------------------------------------------------------------------------------ tensors without values


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("grad", [True, False])
def test_meta_tensors_give_shapes(reduction: str, grad: bool) -> None:
    x, W = (torch.empty_like(t, device="meta", requires_grad=grad) for t in (x64, W64))
    loss = losses(x, W, reduction=reduction, label_smoothing=0.1)
    assert (loss.shape, loss.device.type) == (torch.Size([4] if reduction == "none" else []), "meta")
    if grad:
        loss.sum().backward()
        assert (x.grad.shape, x.grad.device.type) == (x.shape, "meta")
        assert W.grad.shape == W.shape


def test_modules_work_where_meta_is_the_default_device() -> None:
    with torch.device("meta"):
        affine, head = swl.torch.Affine(5, 5), swl.torch.LinearCrossEntropyLoss(5, 5)
        assert head(affine(torch.empty(4, 5)), torch.empty(4, dtype=torch.long)).is_meta
        assert losses(x64, W64).device.type == "cpu"


# ------------------------------------------------------------------------------------------------ gradients of many at once


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_a_batch_of_upstream_gradients(reduction: str) -> None:
    x, W = x64.clone().requires_grad_(), W64.clone().requires_grad_()
    options = {"reduction": reduction, "label_smoothing": 0.1, "softcap": 3.0, "temperature": 0.7}
    assert torch.autograd.gradcheck(lambda x, W: losses(x, W, **options), (x, W), check_batched_grad=True)
    q = x64.softmax(1).requires_grad_()
    ours = lambda x, q: swl.torch.cross_entropy(x, q, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(ours, (x, q), check_batched_grad=True)
    rows = torch.autograd.functional.jacobian(lambda x: losses(x, W, **options), x, vectorize=True)
    torch.testing.assert_close(rows, torch.autograd.functional.jacobian(lambda x: losses(x, W, **options), x))


# ------------------------------------------------------------------------------------------------ tracers and counters


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # shapes are checked
@pytest.mark.parametrize("grad", [True, False])
def test_a_traced_function_computes_and_records_no_constant(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        for f in (lambda x, W: losses(x, W, label_smoothing=0.1), swl.torch.affine):
            traced = torch.jit.trace(f, (x64, W64))
            x = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5).requires_grad_(grad)
            torch.testing.assert_close(traced(x, W64), want := f(x, W64))
            if grad:
                got = torch.autograd.grad(traced(x, W64).sum(), x)
                torch.testing.assert_close(got, torch.autograd.grad(want.sum(), x))
        assert traced(x[:3], W64).shape == (3, 5)


def test_counters_see_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def count(f: Callable[..., Any]) -> int:
        x, W = x64.clone().requires_grad_(), W64.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            f(x, W).sum().backward()
        return counter.get_total_flops()

    three = count(F.linear)
    assert three == 3 * 2 * 4 * 5 * 5
    assert count(swl.torch.affine) == three
    head = count(lambda x, W: swl.torch.linear_cross_entropy(x, W, IDS))
    assert head == three * 4 // 3  # backward forms the logits once more
