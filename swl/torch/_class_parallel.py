"""The fused head whose classes are spread over the processes of a group: `swl.distributed.shard` on torch's own engine.

Forward computes the gradients too, as `swl.torch.linear_cross_entropy` does, and of ``dx`` this rank's part; backward adds up
the parts, in one all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from swl.distributed.comm import gather_numbers
from swl.distributed.shard import Classes, Shard, described, share_row_weight
from swl.ops.affine import Operands
from swl.ops.chunks import DEFAULT_BUDGET, require_budget
from swl.ops.linear_cross_entropy import ALL
from swl.ops.loss import Problem
from swl.options import DEFAULTS, ExtraKwargs, Options
from swl.torch._affine import checked_operands, matrix
from swl.torch._bridge import bridge
from swl.torch._dtensor import local, mesh_of, sizes_over
from swl.torch._group import Group
from swl.torch._linear import Formed, handed_over
from swl.torch._loss import Loss, batched, check, require_tensors, route
from swl.torch._options import as_arrays, autocast_dtype, checked, flattened
from swl.torch._stats import of_rows, result
from swl.typing import Reduction, Results

__all__ = ["ClassParallelLinearCrossEntropyLoss", "class_parallel_linear_cross_entropy"]

NAME = "class_parallel_linear_cross_entropy"


def class_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    process_group: torch.distributed.ProcessGroup | None = None,
    *,
    linear_bias: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = DEFAULTS.ignore_index,
    label_smoothing: float = 0.0,
    memory_budget: int = DEFAULT_BUDGET,
    stats: bool = False,
    **extra: Unpack[ExtraKwargs],
) -> Results:
    """Compute `linear_cross_entropy` over classes that are spread over the processes of a group.

    All ranks of the group call it together, and `backward` too, with the same `input` and `target`. Of each row they exchange
    four numbers in forward, and one more with class weights; backward adds up ``dx`` in one all-reduce.

    Parameters
    ----------
    input : Tensor, shape (..., D)
        The same on all ranks, as its gradient will be.
    linear_weight : Tensor, shape (C_k, D)
        The classes of this rank. Shards lie in the order of the ranks, and C = Σ_k C_k; they may differ in size, and a rank may
        have none.
    target : Tensor, shape (...) of class ids in [0, C); or (..., C) or (..., C_k) of probabilities
        Without a gradient.
    process_group : torch.distributed.ProcessGroup, optional
        The ranks that share the classes; by default all processes, or those of the mesh of `linear_weight`.
    linear_bias : Tensor, shape (C_k,), optional
        On all ranks or on none.
    sizes : sequence of int, optional
        Classes of each rank. By default they are gathered in every call, which waits for the device where the group has NCCL
        alone; `ClassParallelLinearCrossEntropyLoss` gathers them once.
    weight : Tensor, shape (C,) or (C_k,), optional
        Class weights: of all classes, or of those here.
    reduction, ignore_index, label_smoothing, **extra
        As in `cross_entropy`; the same on all ranks.
    memory_budget : int
        Bytes of working memory of a rank, inputs and gradients not counted.
    stats : bool
        Also return a `swl.RowStats`; then eight float64 numbers of a row are exchanged in place of four.

    Returns
    -------
    loss : Tensor
        As `linear_cross_entropy`: the same bits on every rank.
    stats : RowStats of tensors
        Only with ``stats=True``; likewise.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `linear_cross_entropy`; also, on all ranks, if what must be the same differs between them, which is not looked at in a
        group of NCCL alone. Second derivatives and transforms are refused.
    RuntimeError
        If another rank found an error in its arguments, with its rank and cause; if `init_process_group` was not called; by
        torch, if another rank has ended or the group's timeout is over.

    Notes
    -----
    `linear_weight` and `linear_bias` may be DTensors sharded by classes, ``Shard(0)``, over a mesh of one dimension, as
    `ColwiseParallel` makes them; then `sizes` follow from their shapes. The other tensors may be replicated DTensors on that
    mesh. The result is a plain tensor.

    Examples
    --------
    One process is enough to try it:

    >>> import torch, torch.distributed as dist, swl.torch
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> swl.torch.class_parallel_linear_cross_entropy(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    tensor(1.3863)
    >>> dist.destroy_process_group()
    """
    mesh = mesh_of(linear_weight)
    ranks = Group(_group(process_group, mesh))
    counted = list(_counted(ranks, linear_weight, mesh) if sizes is None else sizes)
    call = done = None

    def prepare() -> str:
        nonlocal call, done
        given = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
        require_tensors(NAME, **given, weight=weight, sample_weight=extra.get("sample_weight"))
        x, t = local("input", input, mesh), local("target", target, mesh, target.ndim - 1 if target.ndim else None)
        W = local("linear_weight", linear_weight, mesh, 0, replicated=False)
        b = local("linear_bias", linear_bias, mesh, 0, replicated=False)
        others: Any = {name: local(name, value, mesh) for name, value in extra.items()}
        options = checked(x, local("weight", weight, mesh, 0), reduction, ignore_index, label_smoothing, others)
        call = _Call.of(ranks, counted, x, W, t, b, options, memory_budget, stats)
        done = call.loss()
        return f"{described(done.problem)}, {call}"

    ranks.agree(NAME, prepare)
    assert call is not None
    assert done is not None
    loss, *others = call.run(done)
    return result((loss.view(call.leading) if reduction == "none" else loss, *others), call.leading)


def _group(process_group: Any, mesh: Any) -> Any:
    """Choose between what was asked for and the processes over which a DTensor is spread."""
    if mesh is None:
        return process_group
    group = mesh.get_group()
    if process_group is not None and process_group is not group:
        raise ValueError(f"linear_weight is spread over another group than process_group: its mesh is {mesh}")
    return group


def _counted(ranks: Group, linear_weight: Any, mesh: Any) -> list[int]:
    """Tell the classes of each rank, by a DTensor's shape or else by asking all ranks."""
    if mesh is not None:
        return sizes_over(mesh, linear_weight.shape[0])

    def describe() -> str:
        require_tensors(NAME, linear_weight=linear_weight)
        if linear_weight.ndim != 2:
            raise ValueError(f"linear_weight must have shape (C_k, D), got {tuple(linear_weight.shape)}")
        return f"linear_weight of {linear_weight.shape[1]} inputs"

    ranks.agree(f"linear_weight of {NAME}", describe)
    return [int(size) for size in gather_numbers(ranks, linear_weight.shape[0])[:, 0]]


class _Call(NamedTuple):
    """The tensors of a call, and all else that it asks for."""

    ranks: Group
    sizes: list[int]
    x: Tensor  # (N, D)
    W: Tensor
    t: Tensor  # (N,) or (N, C) or (N, C_k)
    b: Tensor | None
    options: Options
    memory_budget: int
    stats: bool
    leading: torch.Size
    dtype: torch.dtype  # of the loss
    needs: tuple[bool, bool, bool]  # of x, W and b

    @classmethod
    def of(
        cls,
        ranks: Group,
        sizes: list[int],
        x: Tensor,
        W: Tensor,
        t: Tensor,
        b: Tensor | None,
        options: Options,
        memory_budget: int,
        stats: bool,
    ) -> _Call:
        """Check everything in torch's terms."""
        wide = x.dtype is torch.float64
        x, W, b = checked_operands(x, W, b)
        require_budget(memory_budget)
        if len(sizes) != ranks.size or sizes[ranks.rank] != W.shape[0] or not sum(sizes):
            raise ValueError(
                f"sizes must be the classes of each of {ranks.size} ranks, at least one in all, and {W.shape[0]} of this one as "
                f"linear_weight has them, got {sizes} on rank {ranks.rank}"
            )
        leading, C, here = x.shape[:-1], sum(sizes), W.shape[0]
        probabilities = t.shape != leading
        if probabilities and t.shape not in ((*leading, C), (*leading, here)):
            raise ValueError(
                f"target must have shape {tuple(leading)} (class ids), {(*leading, C)} or, of the classes here, "
                f"{(*leading, here)} (probabilities), got {tuple(t.shape)}"
            )
        options = flattened(options, leading)
        flat = matrix(x)
        N = flat.shape[0]
        kinds = options if options.weight is None else options._replace(weight=_standing_in(options.weight, C))
        check(_standing_in(x, N, C), _standing_in(t, N, C) if probabilities else t.reshape(-1), kinds)
        if t.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("target requires a gradient, which is not computed; pass target.detach()")
        t = matrix(t) if probabilities else t.reshape(-1)
        with _disable_current_modes():  # one that counts or logs keeps nobody from the tensors' memory
            way = route(flat, W, t, b, *options.arrays().values())
        if way != "at hand":
            raise NotImplementedError(f"{NAME} needs plain tensors with memory, outside of transforms and compilers")
        dtype = torch.promote_types(x.dtype, t.dtype) if probabilities else x.dtype
        if autocast_dtype(x.device) is not None and not wide:
            dtype = torch.float32
        asked = torch.is_grad_enabled()
        needs = asked and x.requires_grad, asked and W.requires_grad, asked and b is not None and b.requires_grad
        return cls(ranks, sizes, flat, W, t, b, options, memory_budget, stats, leading, dtype, needs)

    def __str__(self) -> str:
        """Say what must be the same on all ranks, beside what the shard says."""
        plain = {name: value for name, value in self.options._asdict().items() if not isinstance(value, Tensor)}
        given = [name for name, value in self.options.arrays().items() if value is not None]
        return (
            f"linear_weight of {self.W.dtype}, linear_bias {'absent' if self.b is None else 'given'}, sizes {self.sizes}, "
            f"memory_budget {self.memory_budget}, stats {self.stats}, options {plain}, tensors {given}, gradient of input "
            f"{'wanted' if self.needs[0] else 'not wanted'}"
        )

    def loss(self) -> Loss:
        """Bring everything to the backend, and check what only it can."""
        return _loss(self.x, self.W, self.t, self.b, self)

    def run(self, loss: Loss) -> tuple[Tensor, ...]:
        """Compute the loss, and the by-products if asked; from here on the ranks depend on each other."""
        with loss.bridge.scope():
            loss = loss._replace(problem=share_row_weight(loss.problem))
        if any(self.needs):
            return _ClassParallel.apply(self.x, self.W, self.b, self, loss)
        with loss.bridge.scope():
            rows = loss.forward(self.stats)
            return loss.reduce(rows.loss, self.dtype), *of_rows(loss, rows)


def _standing_in(t: Tensor, *shape: int) -> Tensor:
    """Return a tensor for checks of shapes and dtypes, without memory of that size."""
    return t.detach().new_empty(()).expand(shape)


def _loss(x: Tensor, W: Tensor, t: Tensor, b: Tensor | None, call: _Call) -> Loss:
    here = bridge(x)
    with here.scope():
        classes = Classes(call.ranks, call.ranks, call.sizes)
        options, array = as_arrays(here, call.options), here.array
        weight = None if options.weight is None else classes.weight_here(here.backend, options.weight)
        shard = Shard(
            classes,
            Operands.of(here.backend, array(x), array(W.T)),
            None if b is None else array(b),
            call.memory_budget,
            [name for name, needed in zip(ALL, call.needs, strict=True) if needed],
            add_up=False,
        )
        return Loss(here, shard.problem(array(t), options, weight), x.shape[:1])


class _ClassParallel(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, call: _Call, loss: Loss) -> tuple[Tensor, ...]:
        p, here = loss.problem, loss.bridge
        loss = loss._replace(problem=p._replace(source=Formed(here, p.source)))
        with here.scope():
            ctx.gradients = None
            if call.options.reduction != "none" and x.dtype is not torch.float16:
                rows, ctx.gradients = loss.both(call.stats)
            else:
                rows = loss.forward(call.stats)
            ctx.save_for_backward(x, W, call.t, b)
            ctx.rows, ctx.shared = rows, (p.target.row_weight, p.denominator)
            ctx.call = call._replace(x=None, W=None, t=None, b=None)
            extra = of_rows(loss, rows)
            ctx.mark_non_differentiable(*extra)
            return loss.reduce(rows.loss, call.dtype), *extra

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled() or batched(grad_output):
            raise NotImplementedError(
                f"{NAME} has first derivatives only, one at a time: no create_graph, no is_grads_batched"
            )
        (x, W, t, b), call = ctx.saved_tensors, ctx.call
        loss = _loss(x, W, t, b, call)
        p = _shared(loss.problem, *ctx.shared)
        loss = loss._replace(problem=p._replace(source=Formed(loss.bridge, p.source)))
        with loss.bridge.scope():
            dx, dW, db = handed_over(ctx, loss, grad_output)
            if dx is not None:
                call.ranks.add_up(dx)
                dx = dx.to(x.dtype)
        return dx, dW, db, None, None


def _shared(p: Problem, row_weight: Any, denominator: Any) -> Problem:
    """Take over what the ranks have told each other in forward."""
    return p._replace(target=p.target._replace(row_weight=row_weight), denominator=denominator)


class ClassParallelLinearCrossEntropyLoss(torch.nn.Module):
    """`class_parallel_linear_cross_entropy` as a module: weights stay where the model has them.

    Parameters
    ----------
    process_group, sizes, weight, reduction, ignore_index, label_smoothing, memory_budget, **extra
        As in `class_parallel_linear_cross_entropy`. Sizes that were not given are gathered in the first call, for all calls.

    Examples
    --------
    >>> import torch, torch.distributed as dist, swl.torch
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> loss = swl.torch.ClassParallelLinearCrossEntropyLoss(label_smoothing=0.1)
    >>> loss(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3])), loss.sizes
    (tensor(1.3863), [4])
    >>> dist.destroy_process_group()
    """

    weight: Tensor | None

    def __init__(
        self,
        process_group: torch.distributed.ProcessGroup | None = None,
        *,
        sizes: Sequence[int] | None = None,
        weight: Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULTS.ignore_index,
        label_smoothing: float = 0.0,
        memory_budget: int = DEFAULT_BUDGET,
        **extra: Unpack[ExtraKwargs],
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.process_group, self.sizes = process_group, sizes
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.memory_budget, self.extra = memory_budget, extra

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        *,
        stats: bool = False,
        **extra: Unpack[ExtraKwargs],
    ) -> Results:
        """Compute the loss; options given here, as `sample_weight` of a batch, come before those of the module."""
        if self.sizes is None:
            mesh = mesh_of(linear_weight)
            self.sizes = _counted(Group(_group(self.process_group, mesh)), linear_weight, mesh)
        return class_parallel_linear_cross_entropy(
            input,
            linear_weight,
            target,
            self.process_group,
            linear_bias=linear_bias,
            sizes=self.sizes,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            memory_budget=self.memory_budget,
            stats=stats,
            **(self.extra | extra),
        )

    def extra_repr(self) -> str:
        """Say what `print` shows of the module."""
        names = "sizes", "reduction", "ignore_index", "label_smoothing"
        given = {name: getattr(self, name) for name in names} | self.extra
        return ", ".join(f"{name}={value!r}" for name, value in given.items())
