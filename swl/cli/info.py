"""``swl info``: versions, backends and why each is or is not usable."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import swl
from swl.backends import active, get
from swl.backends.host.memory import MEMORY
from swl.cli.common import JSON, add_flags, mib

__all__ = ["add", "kernel_cache"]


def add(commands: Any) -> None:
    """Add the command."""
    info = commands.add_parser("info", help="versions, backends and why each is or is not usable", allow_abbrev=False)
    add_flags(info, JSON)
    info.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print what is installed and what can be used."""
    sections = {"versions": _versions, "backends": _backends, "BLAS": _blas, "Numba": _numba}
    said = {title: list(lines()) for title, lines in sections.items()}
    for title, lines in said.items():
        print(title)
        for name, value in lines:
            print(f"  {name:<16}{value}")
    return {
        "versions": dict(said["versions"]),
        "backends": [info._asdict() for info in swl.available_backends()],
        "active": _active(),
        "blas": dict(said["BLAS"]),
        "kernel_cache": kernel_cache(),
        "memory": {**swl.memory_use()._asdict(), "limit": MEMORY.limit},
    }


def _active() -> str | None:
    """Name the active backend; None if the environment asks for none that there is."""
    try:
        return active()
    except ValueError:
        return None


def _versions() -> Iterator[tuple[str, str]]:
    yield "swl", f"{swl.__version__}, {Path(swl.__file__).parent}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    for name in ("numpy", "numba", "cupy", "torch", "mpi4py", "scikit-learn", "matplotlib", "tqdm"):
        yield name, _version(name)


def _version(package: str) -> str:
    names = ("cupy-cuda13x", "cupy-cuda12x", "cupy") if package == "cupy" else (package,)
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name) + (f" ({name})" if name != package else "")
    return "not installed"


def _backends() -> Iterator[tuple[str, str]]:
    try:
        chosen = active()
    except ValueError as error:
        yield "SWL_BACKEND", str(error)
        chosen = ""
    for info in swl.available_backends():
        if info.usable:
            details = ", ".join(f"{key} {value}" for key, value in get(info.name).info().items())
            yield info.name, f"usable{' (active)' if info.name == chosen else ''}: {details}"
        else:
            yield info.name, f"not usable: {info.reason}"


def _blas() -> Iterator[tuple[str, str]]:
    built: Any = np.show_config(mode="dicts")
    blas = built.get("Build Dependencies", {}).get("blas", {})
    yield "numpy's", f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
    try:
        pools = importlib.import_module("threadpoolctl").threadpool_info()
    except ModuleNotFoundError:
        yield "threads", "unknown (pip install threadpoolctl)"
        return
    for pool in pools:
        if pool["user_api"] == "blas":
            yield "threads", f"{pool['num_threads']} ({pool['internal_api']} {pool['version']})"


def _numba() -> Iterator[tuple[str, str]]:
    import numba

    config: Any = numba.config
    yield "threading layer", f"{config.THREADING_LAYER}; not used: swl's kernels run on a pool of its own"
    yield "kernel cache", kernel_cache()
    use = swl.memory_use()
    most = f"of at most {mib(MEMORY.limit)}; swl.empty_cache() gives it back"
    yield "memory", f"{mib(use.in_use)} in results, {mib(use.kept)} kept for later ones {most}"


def kernel_cache() -> str:
    """Name the folder that compiled kernels of the CPU are kept in."""
    from swl.backends.numba import kernels as _cpu_kernels

    return _cpu_kernels.sweep.stats.cache_path or "none that is safe and can be written to: each process compiles"
