"""Checkpoints in shards: every rank writes its own, and a manifest that is written last makes them one.

A checkpoint is a folder ``step-00000012`` with a file per writing rank and ``manifest.json``. Files are written under
another name and renamed; the manifest, with their sizes and checksums, only once all of them are on disk. So it is
complete or has no manifest, at whatever moment a run is killed; the one before is deleted only after that.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swl.backends import scope
from swl.distributed.comm import Grid, agree, as_numpy
from swl.ops.arrays import beside

__all__ = ["Checkpoints"]

MANIFEST = "manifest.json"


class _Place(NamedTuple):
    """Where an array here lies in the whole one."""

    axis: int | None  # None: it is the whole one
    start: int
    total: int


class Checkpoints:
    """Checkpoints of a network and its optimiser in a folder that all ranks can reach.

    Parameters
    ----------
    folder : path
        Made if it is not there.
    grid : Grid
        How the ranks are arranged; they may be arranged otherwise, or be more or fewer, when a checkpoint is loaded.
    keep : int
        Complete checkpoints that are kept; older ones are deleted.

    Raises
    ------
    ValueError
        If `keep` is less than 1.

    Examples
    --------
    >>> import tempfile, numpy as np, swl
    >>> from swl import distributed
    >>> net = swl.Sequential(swl.Affine.init(4, 2, rng=0), swl.SoftmaxWithLoss())
    >>> optimizer = swl.SGD()
    >>> with tempfile.TemporaryDirectory() as folder, distributed.run() as comm:
    ...     checkpoints = distributed.Checkpoints(folder, distributed.Grid.of(comm, class_parallel=1))
    ...     print(checkpoints.load(net, optimizer))
    ...     checkpoints.save(12, net, optimizer, {"epoch": 3})
    ...     checkpoints.load(net, optimizer)
    None
    (12, {'epoch': 3})
    """

    def __init__(self, folder: str | Path, grid: Grid, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.grid, self.keep = Path(folder), grid, keep

    def save(self, step: int, net: Any, optimizer: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint; all ranks call it together, after the same step.

        Parameters
        ----------
        step : int
            Steps done; checkpoints are ordered by it.
        net : swl.Sequential or DataParallel
        optimizer : swl.SGD or swl.AdamW
        extra : mapping, optional
            Anything else that JSON can hold: the same on all ranks.

        Raises
        ------
        RuntimeError, OSError
            On all ranks, if one of them could not write.
        """
        world = self.grid.world
        target = self.folder / f"step-{step:08}"
        written: dict[str, Any] = {}

        def write() -> str:
            target.mkdir(parents=True, exist_ok=True)
            (target / MANIFEST).unlink(missing_ok=True)  # of the same step of an earlier run
            return f"step {step}"

        agree(world, "Checkpoints.save", write)

        def write_shard() -> str:
            arrays = {name: found for name, found in _arrays(net, optimizer).items() if self._writes(found[1])}
            if arrays:
                name = f"rank-{world.rank:05}.npz"
                values = {key: as_numpy(value) for key, (value, _) in arrays.items()}
                _write(target / name, lambda file: np.savez(file, **values))
                data = (target / name).read_bytes()
                places = {
                    key: (*place, str(value.dtype), 1 if place.axis is None else value.shape[place.axis])
                    for key, (value, place) in arrays.items()
                }
                written.update(name=name, bytes=len(data), crc32=zlib.crc32(data), places=places)
            return ""

        agree(world, "Checkpoints.save", write_shard)
        shards = [shard for shard in world.allgather(written) if shard]

        def write_manifest() -> str:
            if world.rank == 0:
                state = {"step": step, "optimizer_steps": optimizer.steps, "extra": extra or {}, "shards": shards}
                _write(target / MANIFEST, lambda file: file.write(json.dumps(state, indent=1).encode()))
                for old in [path for path, _ in _complete(self.folder)][: -self.keep]:
                    (old / MANIFEST).unlink()  # first, or a half-deleted folder would look complete
                    shutil.rmtree(old)
            return ""

        agree(world, "Checkpoints.save", write_manifest)

    def load(
        self, net: Any, optimizer: Any, expect: Mapping[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """Bring network and optimiser to the state of the last complete checkpoint.

        Parameters
        ----------
        net, optimizer
            As for `save`: of the same names, shapes and dtypes over all ranks, whatever the shards.
        expect : mapping, optional
            What `extra` must hold, so that a run does not go on from another one's checkpoint.

        Returns
        -------
        (step, extra), or None
            None if there is no complete checkpoint; nothing was changed then.

        Raises
        ------
        ValueError
            If the checkpoint is of another run or network, or a file is damaged.
        RuntimeError
            If another rank could not load.
        """
        found: list[Any] = []

        def read() -> str:
            complete = _complete(self.folder)
            if complete:
                path, state = complete[-1]
                found.append(state)
                for name, value in (expect or {}).items():
                    if (saved := state["extra"].get(name)) != value:
                        raise ValueError(f"{path} is of another run: its {name} is {saved}, expected is {value}")
                self._read(path, state, net, optimizer)
                return f"step {state['step']}"
            return "no checkpoint"

        agree(self.grid.world, "Checkpoints.load", read)
        return (found[0]["step"], found[0]["extra"]) if found else None

    def _writes(self, place: _Place) -> bool:
        """Tell whether this rank writes an array: one rank for the whole ones, one row of the grid for shards."""
        return bool(self.grid.data.rank == 0 if place.axis is not None else self.grid.world.rank == 0)

    def _read(self, path: Path, state: dict[str, Any], net: Any, optimizer: Any) -> None:
        places = _places(net)
        parameters = net.parameters()
        values: dict[str, Any] = {}
        for shard in state["shards"]:
            wanted = {k: at for k, at in shard["places"].items() if _needed(places, parameters, k, at[0], at[1], at[4])}
            if not wanted:
                continue
            data = (path / shard["name"]).read_bytes()
            if len(data) != shard["bytes"] or zlib.crc32(data) != shard["crc32"]:
                raise ValueError(f"{path / shard['name']} is damaged: its checksum is not that of the manifest")
            del data
            with np.load(path / shard["name"]) as file:
                for key, (axis, start, total, dtype, _) in wanted.items():
                    name = key.split(":", 1)[1]
                    p, mine = parameters[name], places[name]
                    piece = file[key]
                    if piece.dtype.kind == "V":  # bfloat16, which a file stores as two nameless bytes
                        piece = piece.view(p.dtype)
                    if str(piece.dtype) != dtype or (axis, total) != (mine.axis, mine.total):
                        raise ValueError(f"{path}: {name!r} is of other size or dtype than the network's")
                    whole = values.setdefault(key, np.empty(p.shape, piece.dtype))
                    _copy(whole, mine, piece, start, f"{path}: {name!r}")
        missing = [name for name in parameters if f"p:{name}" not in values and parameters[name].size]
        unknown = {key.split(":", 1)[1] for shard in state["shards"] for key in shard["places"]} - parameters.keys()
        if missing or unknown:
            raise ValueError(f"{path} is of another network: missing are {missing}, unknown are {sorted(unknown)}")
        for name, p in parameters.items():
            if p.size:
                if values[f"p:{name}"].dtype != p.dtype:
                    raise ValueError(f"{path}: {name!r} is {values[f'p:{name}'].dtype}, the network's is {p.dtype}")
                with scope(p=p):
                    p[...] = beside(p, values[f"p:{name}"])
        optimizer.steps = state["optimizer_steps"]
        optimizer.state = {}
        for name, p in parameters.items():
            moments: list[Any] = []
            while (key := f"{len(moments)}:{name}") in values:
                moments.append(beside(p, values[key]))
            if moments:
                optimizer.state[name] = moments


def _places(net: Any) -> dict[str, _Place]:
    """Where the parameters here lie in the whole ones, by name."""
    net = getattr(net, "net", net)
    sharded: dict[str, _Place] = {}
    for i, layer in enumerate(net.layers):
        if hasattr(layer, "shards"):
            sharded |= {f"{i}.{name}": _Place(*place) for name, place in layer.shards().items()}
    return {name: sharded.get(name, _Place(None, 0, 0)) for name in net.parameters()}


def _arrays(net: Any, optimizer: Any) -> dict[str, tuple[Any, _Place]]:
    """Parameters ``p:NAME`` and the optimiser's moments ``0:NAME``, ``1:NAME``, with their places."""
    found = {}
    for name, place in _places(net).items():
        found[f"p:{name}"] = net.parameters()[name], place
        for i, moment in enumerate(optimizer.state.get(name, ())):
            found[f"{i}:{name}"] = moment, place
    return found


def _needed(
    places: Mapping[str, _Place], parameters: Mapping[str, Any], key: str, axis: int | None, start: int, size: int
) -> bool:
    """Tell whether a piece of a file has a part of what is here, so that only such files are read."""
    name = key.split(":", 1)[1]
    if name not in places or axis is None or places[name].axis != axis:
        return name in places
    mine = places[name]
    return start < mine.start + parameters[name].shape[axis] and mine.start < start + size


def _copy(whole: Any, mine: _Place, piece: Any, start: int, what: str) -> None:
    """Copy that part of a piece which lies in the array here."""
    if mine.axis is None:
        if piece.shape != whole.shape:
            raise ValueError(f"{what} has shape {piece.shape}, the network's has {whole.shape}")
        whole[...] = piece
        return
    stop = start + piece.shape[mine.axis]
    a, b = max(start, mine.start), min(stop, mine.start + whole.shape[mine.axis])
    if a < b:
        lead = (slice(None),) * mine.axis
        whole[(*lead, slice(a - mine.start, b - mine.start))] = piece[(*lead, slice(a - start, b - start))]


def _complete(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Give the complete checkpoints and their manifests, the oldest first."""

    def each() -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in sorted(folder.glob("step-*")):
            if (path / MANIFEST).is_file():
                yield path, json.loads((path / MANIFEST).read_text())

    return sorted(each(), key=lambda found: int(found[1]["step"]))


def _write(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file under another name, bring it to the disk, then rename it."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
