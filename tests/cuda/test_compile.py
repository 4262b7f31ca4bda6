"""Every kernel instance compiles for every supported device without a spill, and keeps the processors busy."""

from __future__ import annotations

from typing import Any

import compile_table
import instructions
import pytest

from swl.backends.cupy.backend import CupyBackend
from swl.backends.cupy.compilation import instances

pytestmark = pytest.mark.skipif(compile_table.missing() is not None, reason=str(compile_table.missing()))


@pytest.fixture(scope="module")
def kernels() -> list[compile_table.Kernel]:
    """Every instance for every device."""
    return compile_table.compile_all()


def test_registers_occupancy_and_wide_accesses(kernels: list[compile_table.Kernel]) -> None:
    expected = sum(map(len, compile_table.instances().values())) * len(compile_table.ARCHITECTURES)
    assert len(kernels) == expected
    assert [(k, k.problems()) for k in kernels if k.problems()] == []


def test_instructions_per_logit_stay_within_their_budget(kernels: list[compile_table.Kernel]) -> None:
    counts = instructions.counts_of(kernels)
    assert instructions.over_budget(counts) == []
    expected = {
        "ce_rows": {"forward", "backward"},
        "ce_rows forward": {"forward"},
        "ce_partial": {"forward"},
        "ce_backward": {"backward"},
    }
    for name, by_sweep in counts.items():
        kernel = name.split("<")[0] + " forward" * name.endswith(", 0>")
        assert set(by_sweep) == expected[kernel], name
        assert all(tuple(by_device) == compile_table.ARCHITECTURES for by_device in by_sweep.values()), name
    assert {name.split("<")[0] for name in counts} == {"ce_rows", "ce_partial", "ce_backward"}


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
    for names in instances().values():
        monkeypatch.setattr(compiler, "_empty_file_preprocess_cache", {})
        backend._kernel(device, names[0])
    assert given == [("-std=c++17", "-fmad=false", "-ftz=true")] * len(instances())
    assert (*compile_table.OPTIONS, *compile_table.CUPY_ADDS) == given[0]
