"""Every kernel instance compiles for every supported device without a spill, and keeps the processors busy."""

from __future__ import annotations

import compile_table
import pytest

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
