"""No mutant of the kernels survives the checks; and what only ThreadSanitizer sees, it sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cpu_kernels
import mutants
import pytest

pytestmark = pytest.mark.skipif(cpu_kernels.missing_compiler() is not None, reason=str(cpu_kernels.missing_compiler()))


def test_every_mutant_is_killed() -> None:
    """In a process of its own: mutants crash, and forking is for processes without threads."""
    done = subprocess.run(
        [sys.executable, str(Path(mutants.__file__))], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(mutants.MUTANTS)} of {len(mutants.MUTANTS)} killed" in done.stdout
    assert len(mutants.MUTANTS) >= 25
