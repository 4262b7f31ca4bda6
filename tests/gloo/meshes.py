"""Run on four ranks: DTensors, FSDP2 and a mesh of two dimensions train as one process does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation calls it
from processes import SIZE
from torch.distributed.device_mesh import init_device_mesh

import swl.torch

warnings.simplefilter("ignore")  # torch's own, of FSDP2 and DTensor

from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module  # noqa: E402

N, D, C = 8, 6, 10  # over four ranks: 3, 3, 3 and 1 classes
g = torch.Generator().manual_seed(3)
x, t = torch.randn(N, D, generator=g, dtype=torch.float64), torch.randint(0, C, (N,), generator=g)
t[2] = -100


def linear(classes: int = C) -> Any:
    torch.manual_seed(0)
    return torch.nn.Linear(D, classes, dtype=torch.float64)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def like_loss_parallel(mesh: Any) -> None:
    """What `loss_parallel` computes of stored logits, sharded by classes."""
    head = parallelize_module(linear(), mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
    theirs = x.clone().requires_grad_()
    with loss_parallel():
        want = F.cross_entropy(head(theirs), t, ignore_index=-100)
        want.backward()
    grads = [p.grad.full_tensor() for p in head.parameters()]
    module = swl.torch.ClassParallelLinearCrossEntropyLoss()
    for whole in (x.clone(), distribute_tensor(x.clone(), mesh, [Replicate()])):
        head.zero_grad()
        ours = whole.requires_grad_()
        target = t if type(whole) is torch.Tensor else distribute_tensor(t, mesh, [Replicate()])
        loss = module(ours, head.weight, target, head.bias)
        loss.backward()
        assert type(loss) is torch.Tensor
        close(loss.detach(), want.full_tensor().detach())
        for p, right in zip(head.parameters(), grads, strict=True):
            assert p.grad.placements == (Shard(0),)
            close(p.grad.full_tensor(), right)
        assert type(ours.grad) is type(ours)
        close(ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad, theirs.grad)
    assert module.sizes == [3, 3, 3, 1]

    # class weights of all classes and of those here; probabilities whole and in shards; inputs still on their way
    w, q = torch.rand(C, generator=g).double() + 0.5, torch.rand(N, C, generator=g).double().softmax(1)
    whole = linear()
    want = F.cross_entropy(whole(x), q, w, label_smoothing=0.2)
    on_their_way = (
        distribute_tensor(x, mesh, [Shard(0)]).redistribute(placements=[Replicate()], async_op=True).to_local()
    )
    assert type(on_their_way) is not torch.Tensor
    for weight in (w, distribute_tensor(w, mesh, [Shard(0)]), distribute_tensor(w, mesh, [Replicate()])):
        for target in (q, distribute_tensor(q, mesh, [Shard(1)])):
            loss = swl.torch.class_parallel_linear_cross_entropy(
                on_their_way, head.weight, target, dist.group.WORLD, linear_bias=head.bias, weight=weight, label_smoothing=0.2
            )  # fmt: skip
            close(loss, want)


def other_layouts_are_refused(mesh: Any, grid: Any) -> None:
    W, b = linear().weight.detach(), linear().bias.detach()
    shard = distribute_tensor(W, mesh, [Shard(0)])
    loss = swl.torch.class_parallel_linear_cross_entropy
    with pytest.raises(ValueError, match=r"linear_weight must be sharded by its classes.*got \(Replicate\(\),\)"):
        loss(x, distribute_tensor(W, mesh, [Replicate()]), t)
    with pytest.raises(ValueError, match=r"over a mesh of shape \(2, 2\)"):
        loss(x, distribute_tensor(W, grid, [Shard(0), Shard(0)]), t)
    with pytest.raises(ValueError, match=r"input must have placements \(Replicate\(\),\) over a mesh.*Shard\(dim=1\)"):
        loss(distribute_tensor(x, mesh, [Shard(1)]), shard, t)
    with pytest.raises(ValueError, match=r"linear_bias must have placements \(Shard\(dim=0\),\) over"):
        loss(x, shard, t, linear_bias=distribute_tensor(b, mesh, [Replicate()]))
    with pytest.raises(ValueError, match="linear_weight is spread over another group than process_group"):
        loss(x, shard, t, grid.get_group("classes"))


class Model(torch.nn.Module):
    def __init__(self, classes: int, group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = torch.nn.Linear(D, D, dtype=torch.float64)
        self.head = linear(classes)
        self.loss = None if group is None else swl.torch.ClassParallelLinearCrossEntropyLoss(group, label_smoothing=0.1)

    def forward(self, x: Any, t: Any) -> Any:
        hidden = self.body(x).tanh()
        if self.loss is None:
            return F.cross_entropy(self.head(hidden), t, label_smoothing=0.1)
        return self.loss(hidden, self.head.weight, t, self.head.bias)


def train(model: Any, x: Any, t: Any) -> list[Any]:
    """Three steps of two micro-batches each."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(3):
        for part in (slice(0, 2), slice(2, 4)):
            loss = model(x[part], t[part])
            (loss / 2).backward()
            losses.append(loss.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def fsdp2(grid: Any) -> None:
    """Rows over one dimension of the mesh, classes over the other, as plain shards and as DTensors."""
    row, column = grid.get_local_rank("rows"), grid.get_local_rank("classes")
    ids = t.clamp(min=0)  # as many rows that count everywhere
    halves = [slice(0, N // 2), slice(N // 2, N)]

    single = Model(C)
    optimizer, want = torch.optim.SGD(single.parameters(), lr=0.5), []
    for _ in range(3):
        for part in (slice(0, 2), slice(2, 4)):
            losses = [single(x[half][part], ids[half][part]) for half in halves]
            (sum(losses) / 4).backward()
            want.append(losses[row].detach())
        optimizer.step()
        optimizer.zero_grad()

    plain = Model(C, grid.get_group("classes"))
    here = slice(5 * column, 5 * column + 5)
    plain.head = torch.nn.Linear(D, 5, dtype=torch.float64)
    with torch.no_grad():
        for mine, whole in zip(plain.head.parameters(), linear().parameters(), strict=True):
            mine.copy_(whole[here])
    fully_shard(plain, mesh=grid["rows"])
    spread = Model(C, grid.get_group("classes"))
    parallelize_module(spread, grid["classes"], {"head": ColwiseParallel()})
    fully_shard(spread, mesh=grid["rows"])
    assert tuple(spread.head.weight.device_mesh.shape) == (2, 2)
    for model in (plain, spread):
        close(train(model, x[halves[row]], ids[halves[row]]), want)
    close(plain.head.weight.full_tensor(), single.head.weight[here].detach())
    close(spread.head.weight.full_tensor(), single.head.weight.detach())
    close(spread.body.weight.full_tensor(), single.body.weight.detach())


def main() -> str:
    mesh = init_device_mesh("cpu", (SIZE,), mesh_dim_names=("classes",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
    like_loss_parallel(mesh)
    other_layouts_are_refused(mesh, grid)
    fsdp2(grid)
    return "DTensors, FSDP2 and a mesh of two dimensions train as one process"
