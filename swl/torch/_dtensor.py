"""DTensors whose classes are spread over a mesh of one dimension: the part that is here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from swl.torch._loss import PLAIN

__all__ = ["is_dtensor", "local", "mesh_of", "sizes_over"]


def mesh_of(linear_weight: Any) -> Any:
    """Return the mesh over which the classes of a weight ``(C, D)`` are sharded; None for a plain tensor."""
    if not is_dtensor(linear_weight):
        return None
    mesh, placements = linear_weight.device_mesh, linear_weight.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            "linear_weight must be sharded by its classes over a mesh of one dimension, placements (Shard(dim=0),), got "
            f"{placements} over a mesh of shape {tuple(mesh.shape)}"
        )
    return mesh


def sizes_over(mesh: Any, C: int) -> list[int]:
    """Return the classes of each rank, as `Shard` cuts them: like `torch.chunk`."""
    P = mesh.size()
    most = -(-C // P)
    return [max(0, min(most, C - k * most)) for k in range(P)]


def local(name: str, t: Any, mesh: Any, shard: int | None = None, replicated: bool = True) -> Any:
    """Take the part that is here of a DTensor which is replicated, or sharded along `shard`; its gradient is laid out alike.

    Other tensors are returned as they are.
    """
    if is_dtensor(t):
        placement = t.placements[0]
        legal = (placement.is_replicate() and replicated) or (shard is not None and placement.is_shard(shard))
        if t.device_mesh.ndim != 1 or not legal:
            words = ["(Replicate(),)"] * replicated + [f"(Shard(dim={shard}),)"] * (shard is not None)
            raise ValueError(
                f"{name} must have placements {' or '.join(words)} over a mesh of one dimension, got {t.placements}; "
                "redistribute changes them"
            )
        if mesh is not None and t.device_mesh != mesh:
            raise ValueError(f"{name} is on the mesh {t.device_mesh} but linear_weight on {mesh}")
        t = t.to_local()
    # a result that is still on its way to this rank, an AsyncCollectiveTensor, is waited for
    return t if t is None or type(t) in PLAIN or not isinstance(t, Tensor) else t.clone()


def is_dtensor(t: Any) -> bool:
    """Tell whether a tensor is spread over processes."""
    if type(t) in PLAIN or not isinstance(t, Tensor):
        return False
    from torch.distributed.tensor import DTensor  # slow to import, and where it was not there are none

    return isinstance(t, DTensor)
