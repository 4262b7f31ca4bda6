"""Heads over several ranks: the scripts in tests/mpi under mpiexec, and what needs no second rank."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needs import GPU, MPIEXEC

import swl
from swl.backends import get
from swl.distributed import transport
from swl.distributed.comm import Counted, Grid, in_blocks, sum_in_order

HERE = Path(__file__).parent / "mpi"
sys.path.append(str(HERE))
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "SWL_BACKEND": "numpy"}


def start(ranks: int, *command: Any, **environment: str) -> subprocess.Popen[str]:
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
    assert "56 cases" in first
    if ranks == 3:
        assert on(ranks, HERE / "head.py") == first, "another run, other bits"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_sent_do_not_depend_on_the_classes(ranks: int) -> None:
    assert on(ranks, HERE / "bytes_sent.py") == "bytes as in the model\n"


def test_what_differs_between_ranks_is_found_before_anything_is_sent() -> None:
    assert on(3, HERE / "disagree.py") == "all found\n"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_of_a_machine_divide_its_processors(ranks: int) -> None:
    """Each takes its share of threads; what the user has set stays, and so does a rank that is bound to its own."""
    code = """if True:
        import os, sys
        import swl
        from swl import distributed
        from swl.backends.host.blas import control
        from swl.backends.host.threads import POOL
        if "bound" in sys.argv:
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["PMI_RANK"])]})
        if "set" in sys.argv:
            swl.set_num_threads(7)
        else:
            swl.set_num_threads()
        before = POOL.threads, control().get()
        with distributed.run() as comm:
            found = comm.gather((POOL.threads, control().get()))
        assert (POOL.threads, control().get()) == before
        if comm.rank == 0:
            print(*found)
    """
    n = len(os.sched_getaffinity(0))
    share = max(1, n // ranks)

    def found(*arguments: str, **environment: str) -> list[tuple[int, int]]:
        job = start(ranks, "-c", code, *arguments, **{"OPENBLAS_NUM_THREADS": "", "OMP_NUM_THREADS": "", **environment})
        status, out, err = end(job)
        assert status == 0, err
        return [tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", out)]

    assert found() == [(share, min(share, n))] * ranks
    assert found("set") == [(7, min(share, n))] * ranks
    assert found(OPENBLAS_NUM_THREADS=str(n)) == [(share, n)] * ranks
    if ranks <= n:
        assert [threads for threads, _ in found("bound")] == [1] * ranks


def test_importing_the_library_imports_no_mpi() -> None:
    code = "import sys, swl, swl.distributed; sys.exit('mpi4py' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------ devices

on_fake_devices = pytest.mark.usefixtures("cupy")


@on_fake_devices
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_arrays_of_devices_travel_by_three_ways_to_the_same_bits(ranks: int) -> None:
    """Through the host, by MPI and by NCCL; as on the host; nothing waits where nothing must, on any device or stream."""
    found = {on(ranks, HERE / "device.py", "cupy-fake", SWL_TRANSPORT=how) for how in ("host", "mpi", "nccl")}
    assert len(found) == 1
    assert "cases" in found.pop()


@on_fake_devices
@pytest.mark.parametrize("ranks", [1, 3])
def test_what_arrays_of_devices_travel_by_is_chosen_on_all_ranks_alike(ranks: int) -> None:
    assert on(ranks, HERE / "choose.py") == "all chosen\n"


@on_fake_devices
def test_train_on_devices_prints_what_the_host_prints() -> None:
    """Both networks over 2 × 2 ranks, each on a device of its own, by NCCL."""
    on_devices = f"import sys; sys.path.insert(0, {str(HERE)!r}); import devices; devices.install(); "
    for arguments in (
        (*TEXT, "--dtype", "float64", "--limit", "1000"),
        (*DIGITS, "--epochs", "1", "--batch-size", "100"),
    ):
        command = (*arguments, "--class-parallel", "2")
        on_host = on(4, *SWL, *command)
        want = re.findall("epoch.*|test .*", on_host)
        assert len(want) == 2
        out = on(4, SWL[0], on_devices + SWL[1], *command, "--backend", "cupy-fake")
        assert re.findall("epoch.*|test .*", out) == want


@pytest.mark.parametrize("how", ["host", "nccl"])
def test_arrays_of_gpus_travel(how: str, request: pytest.FixtureRequest) -> None:
    """On real cards, of which NCCL needs one for each rank; that an MPI reads device memory cannot be expected of it."""
    try:
        count = get("cupy").xp.cuda.runtime.getDeviceCount()
    except swl.BackendUnavailable as error:
        if request.config.getoption("require_gpu"):
            pytest.fail(f"--require-gpu: {error}", pytrace=False)
        pytest.skip(f"{GPU}: {error}")
    ranks = 2 if how == "host" else min(count, 4)
    if ranks < 2:
        pytest.skip(f"{GPU}: NCCL between two ranks needs two")
    assert "cases" in on(ranks, HERE / "device.py", "cupy", SWL_TRANSPORT=how)


def test_the_imitation_of_nccl_has_cupys_methods_and_arguments(cupy: Any) -> None:
    """CuPy's module of it cannot be imported without NCCL, but has the signatures in its text."""
    import devices

    (library,) = Path(cupy.__file__).parents[1].glob("cupy_backends/cuda/libs/nccl*.so")
    text = library.read_bytes().decode("latin-1")

    def arguments(signature: str) -> list[str]:
        return [part.split("=")[0].split()[-1] for part in signature.split(",")]

    for name in ("send", "recv", "bcast"):
        (theirs,) = set(re.findall(rf"NcclCommunicator\.{name}\(([^)]*)\)", text))
        assert arguments(theirs) == list(inspect.signature(getattr(devices.NcclCommunicator, name)).parameters)
    theirs = re.search(r"NcclCommunicator\((int [^)]*)\)", text)[1]
    ours = list(inspect.signature(devices.NcclCommunicator).parameters)
    assert arguments(theirs)[: len(ours)] == ours
    for name in ("get_unique_id", "groupStart", "groupEnd"):
        assert f"{name}()" in text
        assert not inspect.signature(getattr(devices.nccl, name)).parameters
    assert "NCCL_UINT8" in text
    module, reason = transport._nccl(cupy)
    assert module.__name__ == "cupy.cuda.nccl"
    assert bool(reason) != module.available


# ------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_on_many_ranks_train_as_on_one(ranks: int) -> None:
    """Also where ranks have different numbers of rows that count, on grids of rows × classes, and for every loss."""
    first = on(ranks, HERE / "data.py")
    assert "cases" in first
    if ranks == 4:
        assert on(ranks, HERE / "data.py") == first, "another run, other bits"


# ------------------------------------------------------------------------------------------------ checkpoints, faults


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What training on 2 × 2 ranks prints if nothing happens."""
    out = on(4, HERE / "train.py", tmp_path_factory.mktemp("undisturbed"), 2)
    assert out.startswith("from step 0\n")
    return out


# rank, step, place, and the checkpoint that is complete then: one is written every 2 steps
KILLS = [(1, 5, "step", 4), (1, 6, "shard", 4), (0, 6, "manifest", 4), (0, 6, "delete", 6)]


@pytest.mark.parametrize(("rank", "step", "place", "last"), KILLS)
def test_a_killed_run_ends_at_once_and_resumes(
    tmp_path: Path, undisturbed: str, rank: int, step: int, place: str, last: int
) -> None:
    """Killed in a step, or at any moment of a checkpoint; the same bits in the end as without."""
    status, out, err = end(start(4, HERE / "train.py", tmp_path, 2, f"{rank}:{step}:{place}"))
    assert time.time() - (tmp_path / "died").stat().st_mtime < 10
    assert status != 0
    assert "parameters" not in out
    assert re.findall(r"swl: rank (\d) of 4, process \d+, ended without warning", err) == [str(rank)]
    assert "signal 9" in out + err, "mpiexec names the cause"
    assert on(4, HERE / "train.py", tmp_path, 2) == undisturbed.replace("from step 0", f"from step {last}")


def test_a_checkpoint_is_loaded_on_another_number_of_ranks(tmp_path: Path, undisturbed: str) -> None:
    """Written by 2 × 2 ranks, resumed by 1 × 3, written again, and resumed by one."""
    end(start(4, HERE / "train.py", tmp_path, 2, "0:5:step"))
    want = [line for line in undisturbed.splitlines() if line.startswith(("losses", "parameters"))]
    status, out, _ = end(start(3, HERE / "train.py", tmp_path, 3, "2:7:step"))
    assert status != 0
    assert "from step 4" in out
    resumed = on(1, HERE / "train.py", tmp_path, 1)
    assert "from step 6" in resumed
    for line, right in zip(resumed.splitlines()[1:], want, strict=False):
        numbers, expected = (np.array(text.split()[1:], dtype=float) for text in (line, right))
        np.testing.assert_allclose(numbers, expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("place", "message"), [("raise", "ValueError: the disk is on fire"), ("exit", "exit status 3")]
)
def test_an_error_on_one_rank_ends_the_job_by_name(tmp_path: Path, place: str, message: str) -> None:
    status, out, err = end(start(4, HERE / "train.py", tmp_path, 2, f"2:3:{place}"))
    assert time.time() - (tmp_path / "died").stat().st_mtime < 10
    assert status != 0
    assert "parameters" not in out
    assert f"swl: rank 2 of 4 failed: {message}" in err


def test_a_damaged_shard_is_passed_over_by_all_ranks(tmp_path: Path) -> None:
    on(1, HERE / "train.py", tmp_path, 1)
    shard = tmp_path / "step-00000008" / "rank-00000.npz"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    status, out, err = end(start(2, "-W", "default", HERE / "train.py", tmp_path, 2))
    assert status == 0
    assert "from step 6" in out
    assert re.search(r"step-00000008/rank-00000.npz is damaged: .*step-00000006 is used instead", err)


# ------------------------------------------------------------------------------------------------ swl train


SWL = ("-c", "import sys; from swl.cli import main; sys.exit(main(sys.argv[1:]))")
DIGITS = ("train", "digits", "--hidden", "20", "--seed", "3")


def progress(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(("epoch", "test accuracy"))]


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """What one process prints over two epochs."""
    command = [sys.executable, *SWL, *DIGITS, "--epochs", "2"]
    out = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout
    assert len(progress(out)) == 3
    return progress(out)


@pytest.mark.parametrize(("ranks", "class_parallel"), [(4, 2), (3, 3), (2, 1)])
def test_train_on_many_ranks_prints_what_one_prints(alone: list[str], ranks: int, class_parallel: int) -> None:
    """Losses to 8 places, and every line once."""
    out = on(ranks, *SWL, *DIGITS, "--epochs", "2", "--class-parallel", class_parallel)
    assert progress(out) == alone
    assert f"{ranks} ranks: rows over {ranks // class_parallel}, classes over {class_parallel}\n" in out


def test_train_goes_on_from_its_checkpoint(alone: list[str], tmp_path: Path) -> None:
    """On another number of ranks; with other settings not at all."""
    saved = tmp_path / "net.npz"
    arguments = (*DIGITS, "--epochs", "2", "--checkpoint", tmp_path / "run", "--save", saved)
    assert progress(on(2, *SWL, *arguments, "--class-parallel", "2")) == alone
    shutil.rmtree(tmp_path / "run" / "step-00000002")  # as if killed in the second epoch
    with np.load(saved) as file:
        before = dict(file)
    assert progress(on(1, *SWL, *arguments)) == alone[1:]
    with np.load(saved) as file:
        assert set(file) == {"0.W", "0.b", "2.W", "2.b"}
        for name in file:
            np.testing.assert_allclose(file[name], before[name], rtol=1e-6, atol=1e-9)
    status, out, err = end(start(2, *SWL, *arguments, "--lr", "7"))
    assert status == 2
    assert re.search(r"^swl: .* is of another run: its lr is 0.003, expected is 7.0", err, re.M)
    assert progress(out) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_language_model_on_many_ranks_learns_as_on_one(ranks: int) -> None:
    """Words that the ranks cannot share evenly, batches of a single word, held-out words over all ranks."""
    first = on(ranks, HERE / "text.py")
    assert "runs" in first
    if ranks == 4:
        assert on(ranks, HERE / "text.py") == first, "another run, other bits"


TEXT = ("train", "text", "--limit", "3000", "--hidden", "8", "--embedding", "6", "--batch-size", "900", "--seed", "3")


def test_train_text_on_many_ranks_prints_what_one_prints(tmp_path: Path) -> None:
    """Every line once, the losses to 8 places; and it goes on from its checkpoint, on other ranks."""
    arguments = (*TEXT, "--epochs", "2", "--dtype", "float64")
    command = [sys.executable, *SWL, *arguments, "--head", "fused"]
    alone = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout
    want = re.findall("epoch.*|test perplexity.*", alone)
    assert len(want) == 3
    out = on(4, *SWL, *arguments, "--class-parallel", "2", "--checkpoint", tmp_path / "run")
    assert re.findall("epoch.*|test perplexity.*", out) == want
    assert out.splitlines()[:2] == [alone.splitlines()[0], "4 ranks: rows over 2, classes over 2"]
    assert len(out.splitlines()) == 6
    shutil.rmtree(tmp_path / "run" / "step-00000002")  # as if killed in the second epoch
    resumed = on(3, *SWL, *arguments, "--class-parallel", "3", "--checkpoint", tmp_path / "run")
    assert re.findall("epoch.*|test perplexity.*", resumed) == want[1:]
    other = (*arguments, "--limit", "9000", "--class-parallel", "2", "--checkpoint", tmp_path / "run")
    status, out, err = end(start(2, *SWL, *other))
    assert status == 2
    assert "epoch" not in out
    assert re.search(r"^swl: .* is of another run: its rows is \d+, expected is \d+$", err, re.M)


def test_the_unfused_head_is_not_spread() -> None:
    status, _, err = end(start(2, *SWL, *TEXT, "--unfused"))
    assert status == 2
    assert err.splitlines() == [
        "swl: --head unfused: over ranks there is only the fused head, of which each has a part"
    ]


def test_ranks_that_cannot_be_arranged_are_refused_once() -> None:
    status, _, err = end(start(3, *SWL, *DIGITS, "--class-parallel", "2"))
    assert status == 2
    assert err.splitlines() == ["swl: class_parallel must divide the number of ranks, 3, got 2"]


# ------------------------------------------------------------------------------------------------ swl plan


def test_a_million_classes_on_four_ranks_need_a_quarter_each() -> None:
    """A quarter of W and of its gradient, and the budget: within 10 % of it at the peak."""
    sizes = ("--rows", "256", "--inputs", "64", "--classes", "1000000", "--measure")
    machine = ("--flops", "1e10", "--logits", "1e8", "--bandwidth", "1e9", "--latency", "1e-5")
    out = on(4, *SWL, "plan", *sizes, *machine, SWL_BACKEND="numba")
    planned, measured = (float(re.search(rf"{name} +([\d.,]+) MiB", out)[1]) for name in ("memory", "measured memory"))
    quarter = 250_000 * 64 * 4 / 2**20
    assert planned == pytest.approx(2 * quarter + 256 * 250_000 * 4 / 2**20, rel=0.01)
    assert 0.9 < measured / planned < 1.1


def test_plan_measures_what_it_is_not_told() -> None:
    out = on(2, *SWL, "plan", "--rows", "64", "--inputs", "16", "--classes", "5000", "--latency", "0")
    assert "measured on 2 ranks here: flops, logits, bandwidth\n" in out
    time, *parts = map(float, re.findall(r"[\d.]+(?:e-?\d+)?", re.search("time +(.*)", out)[1]))
    assert time == pytest.approx(sum(parts), rel=0.01)
    assert min(parts[:3]) > 0


def test_plans_that_cannot_be_are_refused() -> None:
    command = [sys.executable, *SWL, "plan", "--rows", "8", "--inputs", "2", "--classes", "4", "--ranks", "4"]
    command += ["--bandwidth", "1e9", "--latency", "0"]
    for more, words in ((["--class-parallel", "3"], "must divide"), (["--measure"], "1 ranks there are")):
        done = subprocess.run([*command, *more], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert words in done.stderr


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
    sum_in_order(OneRank(), np, x)
    np.testing.assert_array_equal(x, [0, 1, 2])


def test_a_grid_needs_a_divisor() -> None:
    with pytest.raises(ValueError, match="class_parallel must divide the number of ranks, 1, got 2"):
        Grid.of(OneRank(), 2)


def test_what_is_not_counted_is_refused() -> None:
    with pytest.raises(AttributeError, match="does not count 'Scan'"):
        Counted(OneRank()).Scan  # noqa: B018 - the access is the test
