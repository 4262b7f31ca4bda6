"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import swl
from swl.cli import main
from swl.demos.data import DataError, digits, from_file, split
from swl.distributed import Checkpoints
from swl.distributed.checkpoint import write_whole

ACCURACY = re.compile(r"test accuracy (\d\.\d{4})\Z")


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWL_BACKEND", raising=False)


def run(capsys: Any, *arguments: str) -> tuple[int, list[str], str]:
    """Run the command in this process: exit status, lines of standard output, standard error."""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    out, err = capsys.readouterr()
    return status, out.strip().splitlines(), err


def losses(lines: list[str]) -> list[float]:
    return [float(found[1]) for line in lines if (found := re.match(r"epoch +\d+  loss (\S+)", line))]


def some_data(path: Path, **change: Any) -> Path:
    """Write a file with three blobs, easily told apart, whose columns differ in scale by 1e6."""
    rng = np.random.default_rng(0)
    t = rng.integers(0, 3, 200)
    x = rng.normal(size=(200, 2, 2)) * 0.3 + np.eye(4)[t].reshape(200, 2, 2) * 3
    arrays = {"x": x * np.array([[1e-3, 1], [1e3, 1]]), "t": t, **change}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


# ------------------------------------------------------------------------------------------------ swl train digits


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_train_digits_reaches_97_percent_with_the_defaults(capsys: Any, seed: str) -> None:
    status, lines, err = run(capsys, "train", "digits", "--seed", seed)
    assert (status, err) == (0, "")  # no bar: this is no terminal
    found = ACCURACY.match(lines[-1])
    assert found
    assert float(found[1]) >= 0.97
    assert lines[0] == "backend numba, float64; digits: 1797 rows of 64 numbers, 10 classes"
    assert "gradients checked: worst relative error" in lines[2]
    assert re.match(r"throughput [\d,]+ rows/s", lines[-2])
    assert len(losses(lines)) == 30


def test_the_same_seed_gives_the_same_losses_on_both_hosts(capsys: Any) -> None:
    runs = {
        name: losses(run(capsys, "train", "digits", "--backend", name, "--seed", "7")[1]) for name in ("numpy", "numba")
    }
    assert len(runs["numpy"]) == 30
    np.testing.assert_allclose(runs["numpy"], runs["numba"], rtol=1e-5)
    seven, eight = (losses(run(capsys, "train", "digits", "--seed", seed, "--epochs", "1")[1]) for seed in "78")
    assert abs(seven[0] / eight[0] - 1) > 1e-3


def test_options_reach_the_training(capsys: Any, tmp_path: Path) -> None:
    picture, saved = tmp_path / "curve.png", tmp_path / "net.npz"
    status, lines, _ = run(
        capsys, "train", "digits", "--backend", "numpy", "--hidden", "20", "--epochs", "3", "--batch-size", "200",
        "--lr", "0.01", "--dtype", "float32", "--plot", str(picture), "--save", str(saved),
    )  # fmt: skip
    assert status == 0
    assert lines[0].startswith("backend numpy, float32;")
    assert len(losses(lines)) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    state = dict(np.load(saved))
    assert {name: (value.shape, value.dtype.name) for name, value in state.items()} == {
        "0.W": ((64, 20), "float32"),
        "0.b": ((20,), "float32"),
        "2.W": ((20, 10), "float32"),
        "2.b": ((10,), "float32"),
    }
    assert sorted(os.listdir(tmp_path)) == ["curve.png", "net.npz"]  # nothing temporary is left
    umask = os.umask(0)
    os.umask(umask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~umask
    # the saved network takes the data as it is, and is the one whose accuracy was printed
    net = swl.Sequential(swl.Affine.init(64, 20), swl.ReLU(), swl.Affine.init(20, 10), swl.SoftmaxWithLoss())
    net.load_state_dict(state)
    test = split(digits()).test
    accuracy = (net.predict(test.x).argmax(axis=1) == test.t).mean()
    assert lines[-1] == f"test accuracy {accuracy:.4f}"


def test_the_split_has_every_row_once_and_is_the_same_for_every_seed() -> None:
    data = digits()
    parts = split(data)
    assert [len(part.x) for part in parts] == [1259, 179, 359]
    rows = np.concatenate([part.x for part in parts])
    np.testing.assert_array_equal(np.sort(rows.sum(axis=1)), np.sort(data.x.sum(axis=1)))
    np.testing.assert_array_equal(split(digits()).test.t, parts.test.t)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "net.npz"
    path.write_bytes(b"old")

    def half(file: Any) -> None:
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["net.npz"]


# ------------------------------------------------------------------------------------------------ swl train --data


@pytest.mark.parametrize("kind", ["ids", "one-hot"])
def test_train_on_a_file_of_ones_own(capsys: Any, tmp_path: Path, kind: str) -> None:
    path = some_data(tmp_path / "mine.npz")
    if kind == "one-hot":
        path = some_data(path, t=np.eye(3, dtype=np.int8)[np.load(path)["t"]])
    saved = tmp_path / "net.npz"
    status, lines, err = run(capsys, "train", "--data", str(path), "--hidden", "8", "--save", str(saved))
    assert status == 0, err
    assert lines[0].endswith("mine.npz: 200 rows of 4 numbers, 3 classes")
    assert lines[-1] == "test accuracy 1.0000"
    with np.load(path) as data, np.load(saved) as state:
        hidden = np.maximum(data["x"].reshape(200, 4) @ state["0.W"] + state["0.b"], 0)
        best = (hidden @ state["2.W"] + state["2.b"]).argmax(axis=1)
        assert (best == (data["t"] if kind == "ids" else data["t"].argmax(axis=1))).mean() > 0.98


T = np.arange(200) % 3
BAD: list[tuple[dict[str, Any], str]] = [
    ({"t": None}, r"must hold arrays x and t, got \['x'\]"),
    ({"x": np.ones(200)}, r"x must be numbers of shape \(N, ...\), got float64 of shape \(200,\)"),
    ({"x": np.full((200, 2), "a")}, "x must be numbers"),
    ({"x": np.ones((4, 2)), "t": T[:4]}, "at least 10 rows"),
    ({"x": np.where(np.arange(200)[:, None] == 7, np.nan, np.ones((200, 2)))}, "x must be finite, but row 7 is not"),
    ({"t": T[:100]}, r"t must have shape \(200,\) or \(200, C\).*got \(100,\)"),
    ({"t": T.astype(float)}, "t of class ids must be of an integer dtype, got float64"),
    ({"t": T - 1}, "class ids must be 0, 1, ..., got -1 in row 0"),
    ({"t": np.zeros((200, 3))}, "must hold probabilities"),
    ({"x": np.array([None] * 200)}, "Object arrays cannot be loaded"),
    ({"x": np.ones((0, 2)), "t": T[:0]}, r"at least 10 rows and a column, got shape \(0, 2\)"),
    ({"t": np.where(T == 1, 10**12, T)}, "class ids must be below 10,000,000, got 1000000000000 in row 1"),
    ({"t": T[:, None]}, r"t of class ids must have shape \(200,\), got \(200, 1\): t.reshape\(-1\) has it"),
    ({"x": np.full((200, 2), 1e308)}, r"x must hold numbers up to 1e\+100, got 1e\+308 in row 0"),
    ({"x": np.ones((200, 2))}, "x must differ between rows, but all 200 are the same"),
    ({"t": np.full((200, 3), np.nan)}, "must hold probabilities"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_data_is_refused_in_one_line(capsys: Any, tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "mine.npz"
    some_data(path, **change)
    with pytest.raises(DataError, match=words):
        from_file(path)
    status, lines, err = run(capsys, "train", "--data", str(path))
    assert (status, lines) == (2, [])
    assert re.fullmatch(r"swl: .*\n", err)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    text, single = tmp_path / "x.npz", tmp_path / "x.npy"
    text.write_text("x,t\n1,2\n")
    np.save(single, np.ones(3))
    for path, words in [
        (tmp_path / "none.npz", "no such file"),
        (text, "is not an .npz file"),
        (single, "a single array"),
    ]:
        with pytest.raises(DataError, match=words):
            from_file(path)
    broken = some_data(tmp_path / "broken.npz")
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"is not an .npz file that can be read"):
        from_file(broken)


# ------------------------------------------------------------------------------------------------ refusals


SIZES = ("--rows", "64", "--inputs", "16", "--classes", "5000")
NETWORK = ("--bandwidth", "4e11", "--latency", "3e-5")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required"),
        (["train"], "one of the arguments dataset --data is required"),
        (["train", "mnist"], "invalid choice: 'mnist'"),
        (["train", "digits", "--data", "x.npz"], "not allowed with"),
        (["train", "digits", "--epochs", "0"], "must be finite and at least 1, got 0"),
        (["train", "digits", "--hidden", "2.5"], "invalid int value: '2.5'"),
        (["train", "digits", "--lr", "nan"], "must be finite and at least 0, got nan"),
        (["train", "digits", "--backend", "nonsense"], "legal names are 'numpy', 'numba', 'cupy'"),
        (["train", "digits", "--plot", "nowhere/x.png"], "nowhere is not a folder that can be written to"),
        (
            ["train", "digits", "--checkpoint", "pyproject.toml/run"],
            "pyproject.toml is not a folder that can be written",
        ),
        (["train", "digits", "--hidden", "1000000000000"], "--hidden 1000000000000 and 10 classes need"),
        (["plan", *SIZES, "--ranks", "8"], "--bandwidth and --latency must be given for --ranks 8 outside mpiexec"),
        (["plan", *SIZES, "--device", "K80"], "invalid choice: 'K80'"),
        (
            ["plan", *SIZES, "--ranks", "8", "--class-parallel", "3", *NETWORK, "--device", "H100"],
            "must divide --ranks",
        ),
        (["train", "text", "--limit", "100", "--context", "100000"], "--context must be less than the "),
        (
            ["train", "text", "--limit", "100", "--embedding", "10000000000"],
            "--hidden 64 and --embedding 10000000000 need",
        ),
        (["completion", "csh"], "invalid choice: 'csh'"),
        (["train", "digits", "--plot", "x.xyz"], "must end in .png, .svg or .pdf"),
        (["train", "digits", "--save", "net.pt"], "must end in .npz"),
        (["train", "digits", "--save", "."], "it is a folder"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_arguments_are_refused(capsys: Any, arguments: list[str], words: str) -> None:
    status, lines, err = run(capsys, *arguments)
    assert (status, lines[1:]) == (2, [])
    assert words in err
    assert "Traceback" not in err


def test_a_bad_environment_variable_is_refused(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWL_BACKEND", "nonsense")
    status, _, err = run(capsys, "train", "digits")
    assert status == 2
    assert re.fullmatch(r"swl: SWL_BACKEND is 'nonsense'; legal names are 'numpy', 'numba', 'cupy'.*\n", err)
    assert "nonsense" in "".join(run(capsys, "info")[1])


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn", "scikit-learn"), ("tqdm", "tqdm"), ("matplotlib", "matplotlib")]
)
def test_a_missing_library_is_named_with_its_command(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, package: str
) -> None:
    hide(monkeypatch, module)
    picture = str(tmp_path / "x.png")
    status, lines, err = run(capsys, "train", "digits", "--plot", picture, "--progress", "--epochs", "1")
    assert (status, lines) == (2, [])  # before any work
    assert f"needs {package}, which is not installed: pip install {package}" in err


def test_what_needs_no_library_works_without(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Training with checkpoints and planning need neither tqdm, matplotlib nor MPI."""
    hide(monkeypatch, "tqdm", "matplotlib", "mpi4py", "sklearn")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    path = some_data(tmp_path / "mine.npz")
    folder = str(tmp_path / "run")
    status, lines, err = run(capsys, "train", "--data", str(path), "--epochs", "1", "--checkpoint", folder)
    assert (status, err) == (0, "")
    assert ACCURACY.match(lines[-1])
    status, lines, _ = run(capsys, "plan", *SIZES, "--ranks", "8", "--device", "H100", *NETWORK)
    assert status == 0
    assert "6.7e+13 flop/s, 1.68e+11 logits/s, 4e+11 B/s, 3e-05 s per collective" in lines[-1]
    assert run(capsys, "plan", *SIZES, "--device", "H100")[0] == 0  # one rank sends nothing


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let libraries be as not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] in modules]:
        monkeypatch.delitem(sys.modules, name)
    for module in modules:
        monkeypatch.setattr(sys, "meta_path", [_Hide(module), *sys.meta_path])


class _Hide:
    """An import hook under which a library is not installed."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.module:
            raise ModuleNotFoundError(f"No module named {self.module!r}", name=self.module)


def test_an_unusable_backend_is_refused_in_one_line(capsys: Any) -> None:
    reasons = {b.name: b.reason for b in swl.available_backends()}
    if reasons["cupy"]:
        assert run(capsys, "train", "digits", "--backend", "cupy") == (2, [], f"swl: {reasons['cupy']}\n")


# ------------------------------------------------------------------------------------------------ faults of the world


@pytest.mark.parametrize("command", [("plan", *SIZES), ("bench",), ("warmup",), ("train", "digits"), ("train", "text")])
def test_a_bad_backend_is_refused_by_all_that_use_one(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.setenv("SWL_BACKEND", "zz")
    status, lines, err = run(capsys, *command)
    assert (status, lines) == (2, [])
    assert re.fullmatch("swl: SWL_BACKEND is 'zz'.*\n", err)


@pytest.mark.parametrize("flag", ["--save", "--plot", "--checkpoint"])
def test_a_full_disk_is_one_line_and_the_old_file_stays(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("swl.distributed.checkpoint.os.fsync", full)
    data = some_data(tmp_path / "mine.npz")
    old = tmp_path / {"--save": "net.npz", "--plot": "x.png", "--checkpoint": "run"}[flag]
    if flag != "--checkpoint":
        old.write_bytes(b"old")
    status, _, err = run(capsys, "train", "--data", str(data), "--hidden", "4", "--epochs", "1", flag, str(old))
    assert status == 2
    assert re.fullmatch(rf"swl: {old}.*: No space left on device\n", err)
    assert flag == "--checkpoint" or old.read_bytes() == b"old"
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]


@pytest.mark.parametrize(("variable", "launcher"), [("WORLD_SIZE", "torchrun"), ("SLURM_STEP_NUM_TASKS", "srun")])
def test_processes_that_know_nothing_of_each_other_are_refused(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, variable: str, launcher: str
) -> None:
    monkeypatch.setenv(variable, "4")
    status, lines, err = run(capsys, "train", "digits")
    assert (status, lines) == (2, [])
    assert re.fullmatch(
        rf"swl: this is one of 4 processes of {launcher}.*: start them by mpiexec -n 4, or one alone\n", err
    )
    monkeypatch.setenv(variable, "1")
    assert run(capsys, "train", "digits", "--epochs", "1", "--hidden", "4")[0] == 0


def test_what_killed_processes_left_beside_a_file_is_deleted(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale, alive, other = (
        tmp_path / name
        for name in (f".net.npz.{gone.pid}.part", f".net.npz.{os.getppid()}.part", f".a.npz.{gone.pid}.part")
    )
    for path in (stale, alive, other):
        path.write_bytes(b"half")
    write_whole(tmp_path / "net.npz", lambda file: file.write(b"whole"))
    assert sorted(tmp_path.iterdir()) == sorted([alive, other, tmp_path / "net.npz"])


def test_no_memory_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 7 TiB")

    monkeypatch.setattr("swl.demos.train.build", none)
    assert run(capsys, "train", "digits")[::2] == (2, "swl: not enough memory: Unable to allocate 7 TiB\n")


def test_a_reader_who_leaves_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} -m swl info | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, cwd=Path(swl.__file__).parents[1]
    )
    assert done.stdout == "versions\n"
    assert done.stderr == ""


def test_a_killed_command_leaves_no_child() -> None:
    """The process that trains a language model ends with the command that started it."""
    arguments = ["train", "text", "--limit", "200000", "--head", "fused", "--batch-size", "64", "--backend", "numpy"]
    command = subprocess.Popen(
        [sys.executable, "-m", "swl", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    try:
        if not children.exists():
            pytest.skip("needs /proc, which tells the children of a process")
        child = _soon(lambda: children.read_text().split())[0]
    finally:
        command.kill()
        command.wait()
    assert _soon(lambda: not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text())


def _soon(found: Any) -> Any:
    for _ in range(600):
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("not within 30 s")


# ------------------------------------------------------------------------------------------------ checkpoints


def small(folder: Path) -> tuple[Any, Any, Any]:
    net = swl.Sequential(swl.Affine.init(4, 3, rng=0), swl.ReLU(), swl.Affine.init(3, 2, rng=1), swl.SoftmaxWithLoss())
    return net, swl.AdamW(), Checkpoints(folder)


def test_a_longer_run_goes_on_from_a_checkpoint_and_another_run_names_the_setting(capsys: Any, tmp_path: Path) -> None:
    data, folder = str(some_data(tmp_path / "mine.npz")), str(tmp_path / "run")
    arguments = ("train", "--data", data, "--hidden", "4", "--checkpoint", folder)
    assert len(losses(run(capsys, *arguments, "--epochs", "3")[1])) == 3
    status, lines, _ = run(capsys, *arguments, "--epochs", "5")
    assert status == 0
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch   4", "epoch   5"]
    assert run(capsys, *arguments, "--epochs", "2")[0] == 0  # all of it is done
    newest = tmp_path / "run" / "step-00000005" / "rank-00000.npz"
    kept = newest.read_bytes()
    newest.write_bytes(b"")
    status, lines, err = run(capsys, *arguments, "--epochs", "4")
    assert (status, losses(lines)) == (0, [])
    assert re.fullmatch(rf"swl: {newest} is damaged: .*step-00000004 is used instead\n", err)
    newest.write_bytes(kept)
    status, _, err = run(capsys, *arguments, "--epochs", "5", "--lr", "7")
    assert status == 2
    assert re.fullmatch(r"swl: .*step-00000005 is of another run: its lr is 0.003, expected is 7.0\n", err)


@pytest.mark.parametrize("place", ["manifest.json", "rank-00000.npz"])
@pytest.mark.parametrize("newest", [True, False])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, place: str, newest: bool) -> None:
    net, optimizer, checkpoints = small(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, net, optimizer)
    damaged = tmp_path / f"step-0000000{1 + newest}" / place
    damaged.write_bytes(damaged.read_bytes()[:100])
    if not newest:  # it is never looked at
        assert checkpoints.load(net, optimizer) == (2, {})
        return
    with pytest.warns(RuntimeWarning, match=f"{re.escape(str(damaged))} is damaged.*step-00000001 is used instead"):
        assert checkpoints.load(net, optimizer) == (1, {})
    other = tmp_path / "step-00000001" / place
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used: .*step-00000002.* damaged"):
        checkpoints.load(net, optimizer)


def test_checkpoints_in_safetensors(tmp_path: Path) -> None:
    """What other programs read; bfloat16 and moments come back to the bit."""
    pytest.importorskip("safetensors")
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(0)

    def make() -> Any:
        net = swl.Sequential(
            swl.Affine.init(4, 3, rng=0, dtype=bfloat16), swl.Affine.init(3, 2, rng=1), swl.SoftmaxWithLoss()
        )
        return net, swl.AdamW(), Checkpoints(tmp_path, format="safetensors")

    net, optimizer, checkpoints = make()
    net.forward_backward(rng.normal(size=(5, 4)).astype(bfloat16), np.arange(5) % 2)
    optimizer.update(net.parameters(), net.gradients())
    checkpoints.save(1, net, optimizer, {"a": 1})
    saved = {name: p.copy() for name, p in net.parameters().items()}
    assert (tmp_path / "step-00000001" / "rank-00000.safetensors").is_file()
    other, its, _ = make()
    assert Checkpoints(tmp_path).load(other, its) == (1, {"a": 1})
    for name, p in other.parameters().items():
        np.testing.assert_array_equal(p, saved[name])
        for found, want in zip(its.state[name], optimizer.state[name], strict=True):
            np.testing.assert_array_equal(found, want)
            assert found.flags.writeable
    with pytest.raises(ValueError, match="format is 'pt'; legal are 'npz', 'safetensors'"):
        Checkpoints(tmp_path, format="pt")


def test_a_format_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch, "safetensors")
    with pytest.raises(swl.BackendUnavailable, match="pip install safetensors"):
        Checkpoints(tmp_path, format="safetensors")


def test_what_killed_runs_left_is_deleted_by_the_next_save(tmp_path: Path) -> None:
    net, optimizer, checkpoints = small(tmp_path)
    (tmp_path / "step-by-step").mkdir()  # somebody else's
    for step, name in (
        (3, ".rank-00000.npz.part"),
        (4, "rank-00000.npz"),
        (6, "rank-00007.npz"),
        (7, "rank-00000.npz"),
    ):
        (tmp_path / f"step-0000000{step}").mkdir()
        (tmp_path / f"step-0000000{step}" / name).write_bytes(b"half")
    for step in (5, 6):
        checkpoints.save(step, net, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000006", "step-by-step"]
    assert sorted(path.name for path in (tmp_path / "step-00000006").iterdir()) == ["manifest.json", "rank-00000.npz"]


def test_damaged_files_are_one_line_and_the_good_ones_still_load(tmp_path: Path) -> None:
    """500 files, each changed somewhere by bits, cut, or written over."""
    rng = np.random.default_rng(0)
    net, optimizer, checkpoints = small(tmp_path / "run")
    for step in (1, 2):
        checkpoints.save(step, net, optimizer, {"step": step})
    arrays, refused = tmp_path / "mine.npz", 0
    for packed in (False, True):
        write = np.savez_compressed if packed else np.savez
        write(arrays, x=np.round(rng.normal(size=(20, 3)), 1), t=np.arange(20) % 3)
        good = arrays.read_bytes()
        for _ in range(130):
            arrays.write_bytes(_damage(rng, good))
            said = ""
            try:
                from_file(arrays)
            except DataError as error:
                said = str(error)
            assert said == "" or (str(arrays) in said and "\n" not in said)
            refused += said != ""
        arrays.write_bytes(good)
        assert from_file(arrays).n_classes == 3
    assert refused > 200
    newest = tmp_path / "run" / "step-00000002"
    for path in (newest / "manifest.json", newest / "rank-00000.npz"):
        good = path.read_bytes()
        for _ in range(120):
            bad = _damage(rng, good)
            path.write_bytes(bad)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                found = checkpoints.load(net, optimizer)
            assert found in ((1, {"step": 1}), (2, {"step": 2}))
            assert len(seen) == (found[0] == 1)
            if seen:
                assert str(path) in str(seen[0].message)
                assert "\n" not in str(seen[0].message)
        path.write_bytes(good)
        assert checkpoints.load(net, optimizer) == (2, {"step": 2})


def _damage(rng: Any, good: bytes) -> bytes:
    """Flip bits, write over a stretch, cut, or repeat."""
    data = bytearray(good)
    kind, at = rng.integers(4), int(rng.integers(len(data)))
    if kind == 0:
        for place in rng.integers(len(data), size=rng.integers(1, 6)):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[at : at + 16] = rng.bytes(16)
    elif kind == 2:
        del data[at:]
    else:
        data[at:at] = data[: int(rng.integers(1, 50))]
    return bytes(data)


# ------------------------------------------------------------------------------------------------ --json, completion


def test_json_is_all_there_is_on_standard_output(capsys: Any, tmp_path: Path) -> None:
    data = str(some_data(tmp_path / "mine.npz"))

    def printed(*arguments: str) -> Any:
        status, lines, err = run(capsys, *arguments, "--json")
        assert (status, len(lines)) == (0, 1), err
        return json.loads(lines[0])

    info = printed("info")
    assert info["versions"]["numpy"] == np.__version__
    assert {backend["name"] for backend in info["backends"]} == {b.name for b in swl.available_backends()}
    plan = printed("plan", *SIZES, "--device", "A100")
    assert plan["machine"]["bandwidth"] is None  # infinite: JSON has no such number
    assert plan["seconds"] == pytest.approx(sum(plan["seconds_of"].values()))
    assert plan["per_rank"]["classes"] == 5000
    trained = printed("train", "--data", data, "--hidden", "4", "--epochs", "2", "--backend", "numpy")
    assert trained["settings"]["hidden"] == 4
    assert [epoch["epoch"] for epoch in trained["epochs"]] == [1, 2]
    assert 0 <= trained["test_accuracy"] <= 1


def test_a_progress_bar_is_shown_where_it_is_asked_for(capsys: Any, tmp_path: Path) -> None:
    data = str(some_data(tmp_path / "mine.npz"))
    arguments = ("train", "--data", data, "--hidden", "4", "--epochs", "1")
    assert run(capsys, *arguments)[2] == ""
    assert "step" in run(capsys, *arguments, "--progress")[2]
    assert run(capsys, *arguments, "--no-progress")[2] == ""


def test_the_shell_completes_commands_and_flags(capsys: Any) -> None:
    _, lines, _ = run(capsys, "completion", "bash")
    script = "\n".join(lines)

    def completed(*words: str) -> list[str]:
        line = " ".join(f'"{word}"' for word in words)
        ask = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _swl; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split()

    assert completed("swl", "") == ["info", "warmup", "bench", "plan", "train", "completion"]
    assert completed("swl", "pl") == ["plan"]
    assert completed("swl", "train", "di") == ["digits"]
    assert completed("swl", "train", "text", "--cont") == ["--context"]
    assert completed("swl", "plan", "--rows", "5", "--dev") == ["--device"]


# ------------------------------------------------------------------------------------------------ swl info


def test_info_names_versions_backends_and_reasons(capsys: Any) -> None:
    status, lines, _ = run(capsys, "info")
    text = "\n".join(lines)
    assert status == 0
    assert f"numpy           {np.__version__}" in text
    for b in swl.available_backends():
        line = next(line for line in lines if re.match(rf"  {b.name} +(not )?usable", line))
        assert (b.reason in line) if b.reason else ("usable" in line)
    for words in ("numba           usable (active)", "BLAS", "threading layer", "kernel cache"):
        assert words in text


def test_the_console_command_is_installed() -> None:
    swl_command = Path(sys.executable).parent / "swl"
    done = subprocess.run([swl_command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"swl {swl.__version__}\n"
