"""How many threads a process may use, and who says so."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["Threads", "default_threads", "processors"]

OWN = "SWL_NUM_THREADS"
SHARED = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables that other libraries obey, and that batch systems, joblib and loky set."""


class Threads(NamedTuple):
    """A number of threads and its source."""

    number: int
    source: str


def processors() -> int:
    """Count the processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Threads:
    """Return what ``SWL_NUM_THREADS`` says, or else the least of the processors, the control groups' quota and `SHARED`.

    Raises
    ------
    ValueError
        If ``SWL_NUM_THREADS`` is no integer above 0; empty, it counts as unset.
    """
    own = environment.get(OWN, "").strip()
    if own:
        if not (own.isascii() and own.isdigit() and int(own)):
            raise ValueError(f"{OWN} must be an integer above 0, got {own!r}")
        return Threads(int(own), OWN)
    found = [Threads(processors(), "processors")]
    found += [Threads(max(1, math.ceil(quota)), "CPU quota") for quota in _quotas(root)]
    for name in SHARED:
        first = environment.get(name, "").split(",")[0].strip()  # OpenMP's is a list, by depth
        if first.isascii() and first.isdigit() and int(first):
            found.append(Threads(int(first), name))
    return min(found, key=lambda threads: threads.number)


def _quotas(root: Path) -> Iterator[float]:
    """Give the processors' worth of time that each control group of this process grants, of both versions of the kernel's."""
    groups = root / "sys/fs/cgroup"
    lines: list[str] = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups / controllers if controllers else groups
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            with suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if float(quota) > 0:  # −1 and "max", which is no number, are none
                    yield float(quota) / float(period)
