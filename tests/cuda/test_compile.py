"""Every kernel instance compiles for every supported device without a spill, and keeps the processors busy."""

from __future__ import annotations

from typing import Any

import compile_table
import pytest

from swl.backends.cupy.backend import CupyBackend, instances

pytestmark = pytest.mark.skipif(compile_table.missing() is not None, reason=str(compile_table.missing()))


def test_registers_occupancy_and_wide_accesses() -> None:
    kernels = compile_table.compile_all()
    expected = sum(map(len, compile_table.instances().values())) * len(compile_table.ARCHITECTURES)
    assert len(kernels) == expected
    assert [(k, k.problems()) for k in kernels if k.problems()] == []


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
