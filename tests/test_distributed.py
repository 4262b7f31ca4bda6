"""Heads over several ranks: the scripts in tests/mpi under mpiexec, and what needs no second rank."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mpi4py")

from swl.distributed.comm import Counted, Grid, in_blocks, sum_in_order

HERE = Path(__file__).parent / "mpi"
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "SWL_BACKEND": "numba"}


def start(ranks: int, *command: Any, **environment: str) -> subprocess.Popen[str]:
    assert MPIEXEC, "pip install '.[mpi]' brings mpiexec"
    return subprocess.Popen(
        [MPIEXEC, "-n", str(ranks), sys.executable, "-W", "error", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **environment},
        start_new_session=True,  # so that a hang can be ended with all its ranks
    )


def end(job: subprocess.Popen[str], timeout: float = 90) -> tuple[int, str, str]:
    try:
        out, err = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        out, err = job.communicate()
        pytest.fail(f"still running after {timeout} s\n{out}\n{err}")
    return job.returncode, out, err


def on(ranks: int, *command: Any, **environment: str) -> str:
    """Run to a good end; gives what was printed."""
    status, out, err = end(start(ranks, *command, **environment))
    assert status == 0, f"status {status}\n{out}\n{err}"
    return out


class OneRank:
    """The least of a communicator: the only rank."""

    rank, size = 0, 1


# ------------------------------------------------------------------------------------------------ the head


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_head_in_shards_is_the_head(ranks: int) -> None:
    """Loss, gradients, statistics and top-k for every option, uneven and empty shards; ranks agree bitwise."""
    first = on(ranks, HERE / "head.py")
    assert "48 cases" in first
    if ranks == 3:
        assert on(ranks, HERE / "head.py") == first, "another run, other bits"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_sent_do_not_depend_on_the_classes(ranks: int) -> None:
    assert on(ranks, HERE / "bytes_sent.py") == "bytes as in the model\n"


def test_what_differs_between_ranks_is_found_before_anything_is_sent() -> None:
    assert on(3, HERE / "disagree.py") == "all found\n"


def test_importing_the_library_imports_no_mpi() -> None:
    code = "import sys, swl, swl.distributed; sys.exit('mpi4py' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_on_many_ranks_train_as_on_one(ranks: int) -> None:
    """Also where ranks have different numbers of rows that count, on grids of rows × classes, and for every loss."""
    first = on(ranks, HERE / "data.py")
    assert "cases" in first
    if ranks == 4:
        assert on(ranks, HERE / "data.py") == first, "another run, other bits"


# ------------------------------------------------------------------------------------------------ one process


@pytest.mark.parametrize(("n", "parts"), [(0, 3), (2, 4), (10, 3), (7, 1)])
def test_blocks_cover_everything_evenly(n: int, parts: int) -> None:
    blocks = in_blocks(n, parts)
    assert [i for a, b in blocks for i in range(a, b)] == list(range(n))
    sizes = [b - a for a, b in blocks]
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


def test_a_sum_over_one_rank_is_the_array() -> None:
    x = np.arange(3.0)
    sum_in_order(OneRank(), x)
    np.testing.assert_array_equal(x, [0, 1, 2])


def test_a_grid_needs_a_divisor() -> None:
    with pytest.raises(ValueError, match="class_parallel must divide the number of ranks, 1, got 2"):
        Grid.of(OneRank(), 2)


def test_what_is_not_counted_is_refused() -> None:
    with pytest.raises(AttributeError, match="does not count 'Scan'"):
        Counted(OneRank()).Scan  # noqa: B018 - the access is the test
