"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import swl
from swl.cli import main
from swl.demos.data import DataError, digits, from_file, split

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
    assert status == 0
    found = ACCURACY.match(lines[-1])
    assert found
    assert float(found[1]) >= 0.97
    assert lines[0] == "backend numba, float64; digits: 1797 rows of 64 numbers, 10 classes"
    assert "gradients checked: worst relative error" in lines[2]
    assert re.match(r"throughput [\d,]+ rows/s", lines[-2])
    assert len(losses(lines)) == 30
    assert "step" in err  # the progress bar


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
    from swl.demos.train import _write

    path = tmp_path / "net.npz"
    path.write_bytes(b"old")

    def half(file: Any) -> None:
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write(path, half)
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
        (["train", "digits", "--plot", "x.xyz"], "must end in .png, .svg or .pdf"),
        (["train", "digits", "--save", "net.pt"], "must end in .npz"),
        (["train", "digits", "--save", "."], "it is a folder"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_arguments_are_refused(capsys: Any, arguments: list[str], words: str) -> None:
    status, lines, err = run(capsys, *arguments)
    assert (status, lines) == (2, [])
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
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Hide(module), *sys.meta_path])
    status, lines, err = run(capsys, "train", "digits", "--plot", str(tmp_path / "x.png"), "--epochs", "1")
    assert (status, lines) == (2, [])  # before any work
    assert f"needs {package}, which is not installed: pip install {package}" in err


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
