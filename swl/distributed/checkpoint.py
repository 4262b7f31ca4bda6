"""Checkpoints in shards: every rank writes its own, and a manifest that is written last makes them one.

A checkpoint is a folder ``step-00000012`` with a file per writing rank and ``manifest.json``. Files are written under
another name and renamed; the manifest, with their sizes and checksums, only once all of them are on disk. So it is
complete or has no manifest, at whatever moment a run is killed; the one before is deleted only after that. What a killed
run left half written is deleted by the next `save`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swl.backends import scope
from swl.distributed.comm import Alone, Grid, agree, as_numpy, from_rank_0
from swl.distributed.data import DataParallel
from swl.errors import BackendUnavailable
from swl.nn.optim import SGD, AdamW
from swl.nn.sequential import Sequential
from swl.ops.arrays import beside

__all__ = ["Checkpoints", "write_whole"]

MANIFEST = "manifest.json"
FORMATS = ("npz", "safetensors")
PASSED_OVER = "is used instead"  # how the warning of a damaged checkpoint ends


class Damaged(ValueError):  # noqa: N818 - `save` and `load` never let it out
    """A checkpoint's files are not what its manifest says."""


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
    grid : Grid, optional
        How the ranks are arranged; they may be arranged otherwise, or be more or fewer, when a checkpoint is loaded. Without
        it this process is alone, and MPI is not needed.
    keep : int
        Complete checkpoints that are kept; older ones are deleted.
    format : {"npz", "safetensors"}
        Of the files that `save` writes; `load` reads both. The latter needs the package safetensors.

    Raises
    ------
    ValueError
        If `keep` is less than 1, or there is no such format.
    swl.BackendUnavailable
        If the package of the format is not installed.

    Examples
    --------
    >>> import tempfile, numpy as np, swl
    >>> from swl import distributed
    >>> net = swl.Sequential(swl.Affine.init(4, 2, rng=0), swl.SoftmaxWithLoss())
    >>> optimizer = swl.SGD()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = distributed.Checkpoints(folder)
    ...     print(checkpoints.load(net, optimizer))
    ...     checkpoints.save(12, net, optimizer, {"epoch": 3})
    ...     checkpoints.load(net, optimizer)
    None
    (12, {'epoch': 3})
    """

    def __init__(self, folder: str | Path, grid: Grid | None = None, *, keep: int = 2, format: str = "npz") -> None:
        if not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be an integer of at least 1, got {keep!r}")
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}; legal are {', '.join(map(repr, FORMATS))}")
        if format == "safetensors":
            _safetensors()
        self.folder, self.grid, self.keep = Path(folder), grid or Grid(Alone(), Alone(), Alone()), keep
        self.format = format

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.folder)!r}, keep={self.keep})"

    def save(
        self, step: int, net: Sequential | DataParallel, optimizer: SGD | AdamW, extra: Mapping[str, Any] | None = None
    ) -> None:
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
                name = f"rank-{world.rank:05}.{self.format}"
                values = {key: as_numpy(value) for key, (value, _) in arrays.items()}
                write_whole(target / name, lambda file: _save(file, self.format, values))
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
                state["crc32"] = _checksum(state)
                write_whole(target / MANIFEST, lambda file: file.write(json.dumps(state, indent=1).encode()))
                self._tidy(target, {MANIFEST, *(shard["name"] for shard in shards)})
            return ""

        agree(world, "Checkpoints.save", write_manifest)

    def load(
        self, net: Sequential | DataParallel, optimizer: SGD | AdamW, expect: Mapping[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """Bring network and optimiser to the state of the last complete checkpoint that is whole.

        A damaged one is named in a RuntimeWarning, and the one before it is taken.

        Parameters
        ----------
        net, optimizer
            As for `save`: of the same names, shapes and dtypes over all ranks, whatever the shards.
        expect : mapping, optional
            What `extra` must hold, so that a run does not go on from another one's checkpoint. Of a mapping within it,
            only the keys given here are compared.

        Returns
        -------
        (step, extra), or None
            None if there is no complete checkpoint; nothing was changed then.

        Raises
        ------
        ValueError
            If the checkpoint is of another run or network, or all checkpoints are damaged.
        RuntimeError
            If another rank could not load.
        """
        world, damaged = self.grid.world, []
        for path in from_rank_0(world, lambda: _complete(self.folder)):
            state, damage = {}, None
            try:
                state = _verified(path, net)
            except Damaged as error:
                damage = str(error)
            damage = next((text for text in world.allgather(damage) if text is not None), None)
            if damage is None:
                break
            damaged.append(damage)
        else:
            if damaged:
                raise ValueError(f"no checkpoint in {self.folder} can be used: {'; '.join(damaged)}")
            return None

        def read() -> str:
            _compare(path, state["extra"], expect or {})
            _read(path, state, net, optimizer)
            return f"step {state['step']}"

        agree(world, "Checkpoints.load", read)
        for text in damaged if world.rank == 0 else ():
            warnings.warn(f"{text}; {path} {PASSED_OVER}", RuntimeWarning, stacklevel=2)
        return state["step"], state["extra"]

    def _writes(self, place: _Place) -> bool:
        """Tell whether this rank writes an array: one rank for the whole ones, one row of the grid for shards."""
        return bool(self.grid.data.rank == 0 if place.axis is not None else self.grid.world.rank == 0)

    def _tidy(self, target: Path, files: set[str]) -> None:
        """Delete what is older than the checkpoints that are kept, and what killed runs left half written."""
        complete = _complete(self.folder)
        for path in _steps(self.folder):
            if path not in complete[: self.keep] and path != target:
                (path / MANIFEST).unlink(missing_ok=True)  # first, or a half-deleted folder would look complete
                shutil.rmtree(path)
        for path in target.iterdir():
            if path.name not in files:
                path.unlink()


def _compare(path: Path, extra: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    """Raise the ValueError that names what `extra` has otherwise than `expect`."""
    for name, value in expect.items():
        saved = extra.get(name)
        if isinstance(value, Mapping) and isinstance(saved, Mapping):
            _compare(path, saved, value)
        elif saved != value:
            raise ValueError(f"{path} is of another run: its {name} is {saved}, expected is {value}")


def _checksum(state: Mapping[str, Any]) -> int:
    """Return the CRC-32 of what a manifest says, its own checksum aside."""
    said = {key: value for key, value in state.items() if key != "crc32"}
    return zlib.crc32(json.dumps(said).encode())


def _verified(path: Path, net: Sequential | DataParallel) -> dict[str, Any]:
    """Read the manifest of a checkpoint, and hold it and the files that are needed here against their checksums."""
    try:
        state: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        if state["crc32"] != _checksum(state):
            raise ValueError("its checksum is not that of its text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path / MANIFEST} is damaged: {error or type(error).__name__}") from None
    for shard in _shards(state, net):
        try:
            data = (path / shard["name"]).read_bytes()
        except OSError as error:
            raise Damaged(f"{path / shard['name']} cannot be read: {error.strerror}") from None
        if len(data) != shard["bytes"] or zlib.crc32(data) != shard["crc32"]:
            raise Damaged(f"{path / shard['name']} is damaged: its checksum is not that of the manifest")
    return state


def _shards(state: Mapping[str, Any], net: Sequential | DataParallel) -> Iterator[dict[str, Any]]:
    """Go through the files that have a part of what is here; their places are those of such parts alone."""
    places, parameters = _places(net), net.parameters()
    for shard in state["shards"]:
        wanted = {k: at for k, at in shard["places"].items() if _needed(places, parameters, k, at[0], at[1], at[4])}
        if wanted:
            yield {**shard, "places": wanted}


def _read(path: Path, state: Mapping[str, Any], net: Sequential | DataParallel, optimizer: SGD | AdamW) -> None:
    """Bring network and optimiser to what a checkpoint says; everything is read and checked before anything is written."""
    places, parameters = _places(net), net.parameters()
    values: dict[str, Any] = {}
    for shard in _shards(state, net):
        with _open(path / shard["name"]) as file:
            for key, (axis, start, total, dtype, _) in shard["places"].items():
                name = key.split(":", 1)[1]
                p, piece = parameters[name], file[key]
                if piece.dtype.kind == "V":  # bfloat16, which a file stores as two nameless bytes
                    piece = piece.view(p.dtype)
                if str(piece.dtype) != dtype:
                    raise ValueError(f"{path}: {name!r} is of another dtype than the network's")
                whole = values.setdefault(key, np.empty(p.shape, piece.dtype))
                _copy(whole, places[name], piece, _Place(axis, start, total), f"{path}: {name!r}")
    missing = [name for name in parameters if f"p:{name}" not in values and parameters[name].size]
    unknown = {key.split(":", 1)[1] for shard in state["shards"] for key in shard["places"]} - parameters.keys()
    if missing or unknown:
        raise ValueError(f"{path} is of another network: missing are {missing}, unknown are {sorted(unknown)}")
    for name, p in parameters.items():
        if p.size and values[f"p:{name}"].dtype != p.dtype:
            raise ValueError(f"{path}: {name!r} is {values[f'p:{name}'].dtype}, the network's is {p.dtype}")
    for name, p in parameters.items():
        if p.size:
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


def _places(net: Sequential | DataParallel) -> dict[str, _Place]:
    """Where the parameters here lie in the whole ones, by name."""
    net = net.net if isinstance(net, DataParallel) else net
    sharded: dict[str, _Place] = {}
    for i, layer in enumerate(net.layers):
        if hasattr(layer, "shards"):
            sharded |= {f"{i}.{name}": _Place(*place) for name, place in layer.shards().items()}
    return {name: sharded.get(name, _Place(None, 0, 0)) for name in net.parameters()}


def _arrays(net: Sequential | DataParallel, optimizer: SGD | AdamW) -> dict[str, tuple[Any, _Place]]:
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


def _copy(whole: Any, mine: _Place, piece: Any, its: _Place, what: str) -> None:
    """Copy that part of a piece which lies in the array here; either may be the whole array or a shard of it."""
    axis = its.axis if mine.axis is None else mine.axis
    if axis is None or its.axis not in (None, axis) or piece.ndim != whole.ndim:
        if piece.shape != whole.shape or its.axis != mine.axis:
            raise ValueError(f"{what} has shape {piece.shape}, the network's has {whole.shape}")
        whole[...] = piece
        return
    total, expected = (
        array.shape[axis] if place.axis is None else place.total for array, place in ((piece, its), (whole, mine))
    )
    aside = [array.shape[:axis] + array.shape[axis + 1 :] for array in (piece, whole)]
    if total != expected or aside[0] != aside[1]:
        raise ValueError(f"{what} is of other size than the network's: {total} along axis {axis}, not {expected}")
    first, last = max(its.start, mine.start), min(its.start + piece.shape[axis], mine.start + whole.shape[axis])
    if first < last:
        lead = (slice(None),) * axis
        whole[(*lead, slice(first - mine.start, last - mine.start))] = piece[
            (*lead, slice(first - its.start, last - its.start))
        ]


def _steps(folder: Path) -> list[Path]:
    """Return the folders of checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _complete(folder: Path) -> list[Path]:
    """Return those of complete checkpoints, the newest first."""
    return [path for path in _steps(folder) if (path / MANIFEST).is_file()]


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ModuleNotFoundError:
        raise BackendUnavailable(
            "checkpoints in format 'safetensors' need that package: pip install safetensors"
        ) from None


def _save(file: Any, format: str, values: Mapping[str, Any]) -> None:
    """Write arrays by name."""
    if format == "npz":
        np.savez(file, **values)
        return
    _safetensors()
    arrays = {name: np.ascontiguousarray(value) for name, value in values.items()}
    file.write(importlib.import_module("safetensors.numpy").save(arrays))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a file of arrays by name."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            yield file
        return
    yield {
        name: np.frombuffer(told["data"], _DTYPES[told["dtype"]]).reshape(told["shape"])
        for name, told in _safetensors().deserialize(path.read_bytes())
    }


_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "V2"}
"""The dtypes of parameters and moments as safetensors names them; bfloat16 as an ``.npz`` has it, two nameless bytes."""


def _runs(process: int) -> bool:
    """Tell whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_whole(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file under another name, bring it to the disk, then rename it: it is whole, or as it was.

    The other name has the number of this process. What killed processes left of this file is deleted.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        for old in path.parent.iterdir():
            left = re.fullmatch(rf"\.{re.escape(path.name)}\.(\d+)\.part", old.name)
            if left and not _runs(int(left[1])):
                old.unlink(missing_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise
