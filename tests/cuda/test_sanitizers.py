"""The launches of every branch again, in programs built with AddressSanitizer and ThreadSanitizer.

The latter runs every CUDA thread of every block as a thread of its own, all at the same time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import branches
import checks
import cpu_kernels
import pytest
import recording
import stand_in

from swl.backends.cupy.backend import CupyBackend, instances

pytestmark = pytest.mark.skipif(cpu_kernels.missing_compiler() is not None, reason=str(cpu_kernels.missing_compiler()))


def record(cases: Iterable[branches.Case]) -> recording.Recording:
    """Record the launches of cases, of class ids and of affine maps."""
    with recording.recording() as made, pytest.MonkeyPatch.context() as patch:
        for case in cases:
            with branches.small_device(case.processors, case.shared):
                branches.run(case, CupyBackend(stand_in))
        patch.setattr(checks, "both_orders", lambda run: run())
        checks.check_ids(lambda: CupyBackend(stand_in))
        checks.check_affine(lambda: CupyBackend(stand_in))
    return made


@pytest.fixture(scope="module")
def launches() -> recording.Recording:
    return record(branches.cases())


@pytest.fixture(scope="module")
def synchronising() -> recording.Recording:
    """All branches in float32, and for the other dtypes the variants in which threads wait for each other.

    Which thread touches what depends on the dtype only by the length of a pack, and threads are slow to make.
    """
    full, others = branches.DTYPES[:1], branches.DTYPES[1:]
    return record([*branches.cases(full), *(c for c in branches.cases(others) if c.out == "shifted" or c.offset)])


MODULES = [names[0] for names in instances().values()]  # each by its first kernel


def replay(made: recording.Recording, module: str, flags: tuple[str, ...], mode: int, folder: Path) -> None:
    (names,) = (names for names in made.launches if names[0] == module)
    complaint = recording.replay(made.libraries[names], bytes(made.launches[names]), flags, mode, folder)
    assert not complaint, complaint[:4000]


@pytest.mark.parametrize("module", MODULES)
def test_no_access_out_of_bounds(launches: recording.Recording, module: str, tmp_path: Path) -> None:
    for mode in (cpu_kernels.FORWARD, cpu_kernels.REVERSE):
        replay(launches, module, recording.ADDRESS, mode, tmp_path)


@pytest.mark.parametrize("module", MODULES)
def test_no_race_with_all_blocks_at_the_same_time(
    synchronising: recording.Recording, module: str, tmp_path: Path
) -> None:
    replay(synchronising, module, recording.THREAD, cpu_kernels.THREADS, tmp_path)


@pytest.mark.parametrize(
    ("flags", "mode", "old", "new", "words"),
    [
        (
            recording.THREAD,
            cpu_kernels.THREADS,
            "  __syncthreads();  // warp 0 reads",
            "  // warp 0 reads",
            "data race",
        ),
        (
            recording.THREAD,
            cpu_kernels.THREADS,
            "store(to + 1, sums.exp);",
            "store(to + 1 - s * SUMS, load(to + 1 - s * SUMS) + sums.exp);",
            "data race",
        ),
        (
            recording.ADDRESS,
            cpu_kernels.FORWARD,
            "C - c < V ? (int)(C - c) : V",
            "V",
            "heap-buffer-overflow",
        ),
    ],
    ids=["missing barrier", "blocks add to one another's sums", "tail"],
)
def test_a_broken_kernel_is_seen(
    flags: tuple[str, ...], mode: int, old: str, new: str, words: str, tmp_path: Path
) -> None:
    cases = [c for c in branches.cases(branches.DTYPES[:1]) if c.options == branches.ALL and not c.dense]
    cases = [c for c in cases if c.out in ("new", "same", "shifted")]  # those of one module
    with recording.recording() as made:
        for case in cases:
            with branches.small_device(case.processors, case.shared):
                branches.run(case, CupyBackend(stand_in))
    ((names, library),) = made.libraries.items()
    assert old in library.source
    library.source = library.source.replace(old, new)
    assert words in recording.replay(library, bytes(made.launches[names]), flags, mode, tmp_path)


def test_the_recording_holds_every_kernel_instance(launches: recording.Recording) -> None:
    """Nothing that the backend launches goes without a sanitizer's look."""
    every = {name for group in instances().values() for name in group}
    # a bias of another dtype than the rows it goes to is a conversion more, at the same addresses
    converting = {name for name in every if re.fullmatch(r"fill_rows<(\w+), (?!\1>)\w+>", name)}
    assert every - converting <= launches.kernels
