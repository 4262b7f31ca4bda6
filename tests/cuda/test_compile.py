"""Every kernel instance compiles for every supported device without a spill, and keeps the processors busy."""

from __future__ import annotations

from typing import Any

import compile_table
import numpy as np
import pytest
import stand_in

from swl.backends.cupy.backend import CupyBackend

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


def test_kernels_are_compiled_with_the_options_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """No contraction, which the bits of fused and separate sweeps depend on; and what CuPy adds."""
    from cupy.cuda import compiler

    given: list[tuple[str, ...]] = []

    def preprocess(_source: str, options: tuple[str, ...], *_: object) -> None:
        given.append(options)
        raise InterruptedError

    class RawModule(stand_in.RawModule):
        def __init__(self, *, options: tuple[str, ...], **rest: Any) -> None:
            with pytest.raises(InterruptedError):  # as far as CuPy gets without a device
                compiler._compile_with_cache_cuda("", options, "90")
            super().__init__(options=options, **rest)

    monkeypatch.setattr(compiler, "_preprocess", preprocess)
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    monkeypatch.setattr(compiler, "_empty_file_preprocess_cache", {})
    monkeypatch.setattr(stand_in, "RawModule", RawModule)
    backend = CupyBackend(stand_in)
    backend.prepare_ids(backend.asarray(np.zeros(3, int)), 5, -100, None)
    ones = backend.asarray(np.ones((3, 3), np.float32))
    backend.affine_backward(ones, ones, ones, None, None, backend.empty((3,), np.float32))
    assert given == [(*compile_table.OPTIONS, *compile_table.CUPY_ADDS)] * 2
    assert given[0] == ("-std=c++17", "-fmad=false", "-ftz=true")
