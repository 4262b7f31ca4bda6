"""The launches of every branch again, in programs built with AddressSanitizer and ThreadSanitizer.

The latter runs every CUDA thread of every block as a thread of its own, all at the same time. What is touched depends on a dtype by
its size alone, so float16 stands for bfloat16 too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import branches
import checks
import fake
import numpy as np
import pytest
import recording

from swl.backends.cupy.backend import CupyBackend
from swl.backends.cupy.compilation import instances, module_of

pytestmark = pytest.mark.usefixtures("on_fake")


def record(cases: Iterable[branches.Case]) -> recording.Recording:
    """Record the launches of cases, of class ids and of affine maps."""
    with recording.recording() as made, pytest.MonkeyPatch.context() as patch:
        sweep(cases)
        patch.setattr(checks, "both_orders", lambda run: run())
        checks.check_ids(make)
        checks.check_affine(make)
    return made


def make() -> CupyBackend:
    return CupyBackend(fake.cupy())


def sweep(cases: Iterable[branches.Case]) -> None:
    for case in cases:
        with branches.small_device(case.processors, case.shared, case.clusters):
            branches.run(case, make())


@pytest.fixture(scope="module")
def launches(cupy: Any) -> recording.Recording:
    return record(case for case in branches.cases(branches.DTYPES[:3]) if case.out != "bfloat16")


@pytest.fixture(scope="module")
def synchronising(cupy: Any) -> recording.Recording:
    """All branches in float32, and for float16 the variants in which threads wait for each other: threads are slow to make."""
    full, others = branches.DTYPES[:1], branches.DTYPES[2:3]
    cases = [*branches.cases(full), *(c for c in branches.cases(others) if c.out == "shifted" or c.offset)]
    return record(case for case in cases if case.out != "bfloat16")


def rough(group: tuple[str, ...]) -> tuple[str, ...]:
    """Name a module but for the options that it is compiled for."""
    file, T, KIND, G, *_ = *group, "", "", ""
    return file, T, KIND if KIND in ("", "PLAIN") else "PROBS" if "PROBS" in KIND else "OPTIONS", G


TYPES = [("float", ""), ("double", ""), ("__half", ""), ("float", "__half")]
MODULES = [
    ("class_ids", "", "", ""),
    *(("affine", T, "", "") for T, G in TYPES if not G),
    *(
        (file, T, KIND, G)
        for file in ("cross_entropy", "clusters")
        for T, G in TYPES
        for KIND in ("PLAIN", "OPTIONS", "PROBS")
    ),
]


def replay(made: recording.Recording, module: tuple[str, ...], flags: tuple[str, ...], reverse: int = 0) -> None:
    chosen = [names for names in made.records if rough(module_of(names[0])) == module]
    assert chosen
    for names in chosen:
        complaint = recording.replay(made.sources[names], names, made.records[names], flags, reverse)
        assert not complaint, complaint[:4000]


@pytest.mark.parametrize("module", MODULES, ids=" ".join)
def test_no_access_out_of_bounds(launches: recording.Recording, module: tuple[str, ...]) -> None:
    for reverse in (0, 1):
        replay(launches, module, recording.ADDRESS, reverse)


@pytest.mark.parametrize("module", [m for m in MODULES if "double" not in m], ids=" ".join)
def test_no_race_with_all_blocks_at_the_same_time(synchronising: recording.Recording, module: tuple[str, ...]) -> None:
    replay(synchronising, module, recording.THREAD)


BROKEN = {
    "missing barrier": (recording.THREAD, "  __syncthreads();  // warp 0 reads", "  // warp 0 reads", "data race"),
    "blocks add to one another's sums": (
        recording.THREAD,
        "store(to + 1, sums.exp);",
        "store(to + 1 - s * SUMS, load(to + 1 - s * SUMS) + sums.exp);",
        "data race",
    ),
    "tail": (recording.ADDRESS, "C - c < V ? (int)(C - c) : V", "V", "illegal address outside of the arrays"),
    "head": (recording.ADDRESS, "c < 0 ? (int)-c : 0", "0", "illegal address outside of the arrays"),
    "staged row": (
        recording.ADDRESS,
        "packed.copy_to(stage + (j - from - each)",
        "packed.copy_to(stage + (j - from)",
        "heap-buffer-overflow",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_seen(name: str) -> None:
    flags, old, new, words = BROKEN[name]
    options = "smoothing" if name == "staged row" else branches.ALL
    cases = [c for c in branches.cases(branches.DTYPES[:1]) if c.options == options and not c.dense]
    with recording.recording() as made:
        sweep(c for c in cases if c.out in ("new", "same", "shifted"))  # those of one type
    sources = {names: source for names, source in made.sources.items() if old in source}
    complaints = (
        recording.replay(source.replace(old, new), names, made.records[names], flags)
        for names, source in sources.items()
    )
    assert any(words in complaint for complaint in complaints)


@pytest.mark.parametrize("claims", [True, False])
def test_two_streams_at_once_leave_one_error(claims: bool, on_fake: CupyBackend) -> None:
    """The record of the device is claimed by one atomic: a look at it and a write after that are a race."""
    bad = on_fake.asarray(np.full(3, 9))
    with recording.recording() as made:
        backend = make()
        keep = [backend.prepare_ids(bad, 5, -100, None) for _ in range(2)]
    (names,) = made.records
    first, second = (r for r in made.records[names] if r.calls[0].name.startswith("finish_ids"))
    source, claim = made.sources[names], "atomicCAS(error_5, 0ull, 1ull) == 0ull"
    if not claims:
        assert claim in source
        source = source.replace(claim, "load(error_5) == 0 && (store(error_5, 1ull), true)")
    complaint = recording.replay(source, names, [first.beside(second)], recording.THREAD)
    assert ("data race" in complaint) == (not claims), complaint[:4000]
    assert keep


def test_the_recording_holds_every_kernel_instance(launches: recording.Recording) -> None:
    """Nothing that the backend launches goes without a sanitizer's look."""

    def variant(name: str) -> str:
        """Name a kernel but for the options that it is compiled for."""
        group = module_of(name)
        return name.replace(f", {group[2]}", f", {rough(group)[2]}", 1) if len(group) > 2 else name

    groups = [(file, T, *((KIND,) if KIND else ()), *((G,) if G else ())) for file, T, KIND, G in MODULES]
    every = {name for group in groups for name in instances(tuple(filter(None, group)))}
    # a bias of another dtype than the rows it goes to is a conversion more, at the same addresses
    converting = {name for name in every if re.fullmatch(r"fill_rows<(\w+), (?!\1>)\w+>", name)}
    assert every - converting <= set(map(variant, launches.kernels))
