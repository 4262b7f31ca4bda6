"""Classes over processes of torch's own: the scripts in tests/gloo, each on as many processes as it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import swl.torch

HERE = Path(__file__).parent / "gloo"
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "SWL_BACKEND": "numpy"}

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch with torch.distributed")


def start(ranks: int, meeting: Path, script: str, *arguments: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", HERE / script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(ranks), "MEETING": str(meeting / "meeting")},
        )
        for rank in range(ranks)
    ]


def ends(jobs: list[subprocess.Popen[str]], timeout: float = 90) -> list[tuple[int, str, str]]:
    """Wait for status, output and messages of each process; what hangs is a failure."""
    found = []
    try:
        for job in jobs:
            out, err = job.communicate(timeout=timeout)
            found.append((job.returncode, out, err))
    except subprocess.TimeoutExpired:
        pytest.fail(f"rank {len(found)} is still running after {timeout} s; those before it: {found}")
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
    return found


def on(ranks: int, meeting: Path, script: str) -> str:
    """Run to a good end; gives what rank 0 printed."""
    found = ends(start(ranks, meeting, script))
    assert all(status == 0 for status, _, _ in found), "\n".join(err for _, _, err in found)
    return found[0][1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shards_of_the_classes_give_the_loss_of_one_process(tmp_path: Path, ranks: int) -> None:
    """Loss and gradients for every option, uneven and empty shards; ranks agree bitwise."""
    assert on(ranks, tmp_path, "options.py") == "28 cases\n"


@pytest.mark.parametrize("ranks", [1, 3])
def test_bytes_sent_do_not_depend_on_the_classes(tmp_path: Path, ranks: int) -> None:
    assert on(ranks, tmp_path, "bytes_sent.py") == "bytes as in the model\n"


def test_what_differs_between_ranks_is_found_before_anything_is_sent(tmp_path: Path) -> None:
    assert on(3, tmp_path, "disagree.py") == "all found\n"


def test_meshes_dtensors_and_fsdp2_train_as_one_process(tmp_path: Path) -> None:
    assert on(4, tmp_path, "meshes.py") == "as one process\n"


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_killed_process_ends_the_others(tmp_path: Path, place: str) -> None:
    """Long before the group's timeout, which is ten minutes here."""
    found = ends(start(3, tmp_path, "faults.py", "killed", place))
    assert found[2][0] == -signal.SIGKILL
    for rank, (status, out, err) in enumerate(found[:2]):
        assert status == 1
        assert out == ""
        assert re.search(rf"RuntimeError: .*\nswl: rank {rank} of 3 was waiting for the others", unprefixed(err))


def test_a_process_that_does_not_come_is_not_waited_for_beyond_the_timeout(tmp_path: Path) -> None:
    jobs = start(2, tmp_path, "faults.py", "absent", "backward")
    ((status, _, err),) = ends(jobs[:1], timeout=50)
    jobs[1].kill()
    jobs[1].communicate()
    assert status == 1
    assert re.search(r"Timed out.*\nswl: rank 0 of 2 was waiting for the others", unprefixed(err))


def unprefixed(err: str) -> str:
    """What torch prints of an error, without the rank before each line."""
    return re.sub(r"^\[rank\d+\]: ", "", err, flags=re.M)


def test_without_processes_that_know_each_other_the_error_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        swl.torch.class_parallel_linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))


def test_the_example_learns_as_one_process(tmp_path: Path) -> None:
    """By torchrun, as the page says."""
    path = HERE.parent.parent / "examples" / "class_parallel_torch.py"

    def losses(*launcher: Any) -> list[str]:
        command = [sys.executable, *launcher, path, "--steps", "3", "--classes", "501", "--rows", "64"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return re.findall(r"loss .*", done.stdout)

    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"
    alone = losses(*torchrun, "1")
    assert len(alone) == 1
    assert losses(*torchrun, "2") == alone
