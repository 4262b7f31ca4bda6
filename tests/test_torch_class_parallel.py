"""Classes over processes of torch's own: the scripts in tests/gloo, each on as many processes as it says."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

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


FOUND = {
    "options": "28 cases as in one process",
    "disagree": "all that differs between ranks, or is wrong on one",
    "meshes": "DTensors, FSDP2 and a mesh of two dimensions train as one process",
    "bytes_sent": "bytes as in the model",
}


@pytest.mark.parametrize(
    ("ranks", "scripts"),
    [
        (1, ["options", "bytes_sent"]),
        (2, ["options"]),
        (3, ["options", "disagree", "bytes_sent"]),
        (4, ["options", "meshes"]),
    ],
    ids=lambda case: str(case) if isinstance(case, int) else "-".join(case),
)
def test_shards_of_the_classes_give_the_loss_of_one_process(tmp_path: Path, ranks: int, scripts: list[str]) -> None:
    """Each script says at its top what it holds; `bytes_sent` comes last, as it lets nothing else be sent."""
    found = ends(start(ranks, tmp_path, "processes.py", *scripts))
    assert all(status == 0 for status, _, _ in found), "\n".join(err for _, _, err in found)
    assert found[0][1] == "".join(f"{name}: {FOUND[name]}\n" for name in scripts)


@pytest.mark.parametrize(("place", "ranks"), [("forward", 3), ("backward", 2)])
def test_a_killed_process_ends_the_others(tmp_path: Path, place: str, ranks: int) -> None:
    """Long before the group's timeout, which is ten minutes here."""
    *others, killed = ends(start(ranks, tmp_path, "faults.py", "killed", place))
    assert killed[0] == -signal.SIGKILL
    for rank, (status, out, err) in enumerate(others):
        assert status == 1
        assert out == ""
        assert re.search(rf"RuntimeError: .*\nswl: rank {rank} of {ranks} was waiting for the others", unprefixed(err))


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


def test_the_example_learns_as_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By torchrun, as the page says."""
    path = HERE.parent.parent / "examples" / "class_parallel_torch.py"
    arguments = [str(path), "--steps", "3", "--classes", "501", "--rows", "64"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", arguments)
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    alone = capsys.readouterr().out
    assert alone.splitlines()[0] == "processes: 1; classes of the first: 501 of 501"
    assert done.stdout.splitlines() == ["processes: 2; classes of the first: 251 of 501", alone.splitlines()[1]]
