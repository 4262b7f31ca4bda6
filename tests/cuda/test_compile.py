"""Every kernel instance compiles for every supported device without a spill, and keeps the processors busy."""

from __future__ import annotations

import importlib
import math
import pickle
from pathlib import Path
from typing import Any

import bounds
import compile_table
import instructions
import pytest
from fakecuda import build

from swl.backends.cupy import compilation
from swl.backends.cupy.backend import CupyBackend
from swl.backends.cupy.compilation import instances

pytestmark = pytest.mark.skipif(compile_table.missing() is not None, reason=str(compile_table.missing()))


@pytest.fixture(scope="module")
def kernels() -> list[compile_table.Kernel]:
    """A sample of all instances for every device, compiled once for all processes of pytest; all of them are the table's matter."""
    sources = sorted((compile_table.HERE.parents[1] / "kernels").iterdir()) + sorted(compile_table.HERE.glob("*.py"))
    version = compile_table.missing() or "NVRTC {}.{}".format(*importlib.import_module("cupy").cuda.nvrtc.getVersion())

    def compile_sample(to: Path) -> None:
        (to / "kernels").write_bytes(pickle.dumps(compile_table.compile_all(sample=True)))

    made = build.kept(f"compiled-{build.digest(version, Path(compilation.__file__), *sources)}", compile_sample)
    return pickle.loads((made / "kernels").read_bytes())


def test_registers_occupancy_and_wide_accesses(kernels: list[compile_table.Kernel]) -> None:
    modules = [group for a in compile_table.ARCHITECTURES for group in compile_table.modules(a, sample=True)]
    assert len(kernels) == sum(len(instances(group)) for group in modules)
    assert [(k, k.problems()) for k in kernels if k.problems()] == []


def test_instructions_per_logit_stay_within_their_budget(kernels: list[compile_table.Kernel]) -> None:
    counts = instructions.counts_of(kernels)
    assert instructions.over_budget(counts) == []
    expected = {
        "ce_rows": {"forward", "backward"},
        "ce_rows forward": {"forward"},
        "ce_cluster": {"forward", "backward"},
        "ce_cluster forward": {"forward"},
        "ce_partial": {"forward"},
        "ce_backward": {"backward"},
    }
    for name, by_sweep in counts.items():
        kernel = name.split("<")[0] + " forward" * name.endswith(", 0>")
        assert set(by_sweep) == expected[kernel], name
        narrower = name.split("<")[1].startswith("float") and "__" in name
        devices = {"90"} if narrower or name.startswith("ce_cluster") else {"80", "90"}
        assert all(devices <= {*by_device} for by_device in by_sweep.values()), name
    assert {name.split("<")[0] for name in counts} == {"ce_rows", "ce_cluster", "ce_partial", "ce_backward"}


# the most instructions per logit, of class ids, on A100 and H100: forward, backward, both together
LIMITS = {
    ("float", "PLAIN"): (9, 11, 20),
    ("16 bit", "PLAIN"): (11, 13, 22),
    ("16 bit", "SMOOTHING"): (math.inf, math.inf, 35),
    ("16 bit", "SMOOTHING + WEIGHTS"): (math.inf, math.inf, 35),
    ("16 bit", "BIAS"): (math.inf, math.inf, 35),
    ("16 bit", "SOFTCAP"): (math.inf, math.inf, 60),
}


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("T", ["float", "__half", "__nv_bfloat16"])
def test_both_sweeps_issue_fewer_instructions_than_memory_leaves_time_for(
    kernels: list[compile_table.Kernel], T: str, architecture: str
) -> None:
    counts, V = instructions.counts_of(kernels), 4 if T == "float" else 8
    for (size, KIND), (most_forward, most_backward, most) in LIMITS.items():
        if (T == "float") != (size == "float"):
            continue
        fused, streamed = f"ce_rows<{T}, {KIND}, 0, {V}, 4>", f"ce_backward<{T}, {KIND}, {V}>"
        pairs = [(fused, fused)]
        pairs += [(f"ce_rows<{T}, {KIND}, 0, {V}, 0>", streamed), (f"ce_partial<{T}, {KIND}, {V}>", streamed)]
        if architecture == "90" and KIND == "PLAIN":
            pairs += [(f"ce_cluster<{T}, {KIND}, {V}, 4>",) * 2, (f"ce_cluster<{T}, {KIND}, {V}, 0>", streamed)]
        for forward, backward in pairs:
            one, other = counts[forward]["forward"][architecture], counts[backward]["backward"][architecture]
            assert one <= most_forward, forward
            assert other <= most_backward, backward
            assert one + other <= most, (forward, backward)


def test_memory_and_nothing_else_bounds_a_plain_loss(kernels: list[compile_table.Kernel]) -> None:
    found = [*bounds.bounds(kernels)]
    assert {(b.card, b.T, b.C) for b in found} == {
        (card.name, *case) for card in bounds.CARDS.values() for case in bounds.CASES
    }
    assert [b for b in found if b.share < 0.95] == []


def test_a_turn_of_every_warp_of_a_processor_loads_32_kib(kernels: list[compile_table.Kernel]) -> None:
    """Little's law: an H100's 3.35 TB/s, over 132 processors, times about a microsecond, are 17 to 40 KB."""
    in_flight = {}
    for k in kernels:
        if k.architecture in ("80", "90") and ", PLAIN," in k.name and (turn := k.turns.get("forward")):
            loads = sum(n for op, n in turn.ops.items() if op.startswith("LDG") and "128" in op)
            in_flight[k.architecture, k.name] = (
                loads * 16 * round(k.occupancy * compile_table.PROCESSOR[k.architecture][0])
            )
    assert len(in_flight) == 28
    assert {name: n for name, n in in_flight.items() if n < 32 * 1024} == {}


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.EF.128 R4, [R2] ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
        /*0030*/                   MUFU.RCP R9, R9 ;
.L_x_3:
        /*0040*/                   FADD R4, R4, -R8 ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/               @P2 BRA `(.L_x_4) ;
        /*0080*/                   FMUL R4, R4, R4 ;
.L_x_4:
        /*0090*/               @P1 BRA `(.L_x_3) ;
        /*00a0*/               @P3 CALL.REL.NOINC `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""


def test_the_cheapest_turn_takes_every_exponential_and_what_is_on_no_way_round() -> None:
    turn = instructions.cheapest_turn(instructions.blocks(LISTING), r"LDG\..*\b128\b", 4)
    assert turn is not None
    assert turn.logits == 4
    assert turn.ops == {"LDG.E.EF.128": 1, "FADD": 2, "MUFU.EX2": 4, "BRA": 5, "CALL.REL.NOINC": 1}
    assert turn.by_pipe() == {"branch": 6 / 4, "MUFU": 1.0, "FMA": 2 / 4, "memory": 1 / 4}


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "on"),
    # by the register file; by shared memory; by the number of threads: as NVIDIA's occupancy calculator has it
    [
        (64, 256, 0, ("80", 0.5)),
        (32, 1024, 60 * 1024, ("80", 1.0)),
        (32, 256, 0, ("86", 1.0)),
        (80, 512, 0, ("80", 0.25)),
    ],
)
def test_occupancy(registers: int, threads: int, shared: int, on: tuple[str, float]) -> None:
    assert compile_table.occupancy(on[0], registers, threads, shared) == on[1]


def test_every_module_is_compiled_with_the_options_of_the_table(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No contraction, which the bits of fused and separate sweeps depend on; and what CuPy adds."""
    from cupy.cuda import compiler

    given: list[tuple[str, ...]] = []
    original = compiler._preprocess

    def preprocess(source: str, options: tuple[str, ...], *rest: Any) -> Any:
        given.append(tuple(option for option in options if not option.startswith("-I")))
        return original(source, options, *rest)

    cupy.clear_memo()  # it keeps modules by their sources
    backend = CupyBackend(cupy)
    device = backend._device(cupy.zeros(1))
    monkeypatch.setattr(compiler, "_preprocess", preprocess)
    groups = [("class_ids",), ("affine", "float"), ("cross_entropy", "float", "PLAIN")]
    for group in groups:
        monkeypatch.setattr(compiler, "_empty_file_preprocess_cache", {})
        backend._kernel(device, instances(group)[0])
    assert given == [("-std=c++17", "-fmad=false", "-ftz=true")] * len(groups)
    assert (*compile_table.OPTIONS, *compile_table.CUPY_ADDS) == given[0]
