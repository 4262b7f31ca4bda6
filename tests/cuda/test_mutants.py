"""No mutant of the kernels or the host code survives the tests: here every sixteenth, and all by `mutants.py` itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mutants


def test_every_sixteenth_mutant_is_killed(cupy: Any) -> None:
    """In a process of its own: mutants crash, and forking is for processes without threads."""
    chosen = range(0, len(mutants.MUTANTS), 16)
    command = [sys.executable, mutants.__file__, "--tests-pass", *map(str, chosen)]  # which this suite shows by itself
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(chosen)} of {len(chosen)} killed" in done.stdout


def test_every_mutant_is_a_change_of_what_is_there() -> None:
    for mutant in mutants.MUTANTS:
        kernel = mutant.file in mutants.KERNELS
        folder = mutants.ROOT / ("kernels" if kernel else "")
        endings = (".cu", ".cuh") if kernel else (".py",)
        files = [Path(f"{folder / mutant.file.replace('.', '/')}{ending}") for ending in endings]
        (text,) = (file.read_text(encoding="utf-8") for file in files if file.exists())
        assert mutant.replaced(text) != text
    assert len({(mutant.file, mutant.what) for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 90
