"""The benchmarks: that contenders are held to the same result, and that tables, pictures and files say what was measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llvmlite import binding as llvm

from swl.backends.host.threads import POOL
from swl.backends.registry import _REGISTRY
from swl.bench import CASES, GROUPS, Case, Contender, cases, measure, report, table, timing
from swl.bench.cases import logits_case
from swl.cli import main

ROOT = Path(__file__).parent.parent
APART = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
"""The environment of a run of pytest that is none of this one's."""

TINY = [
    *(logits_case("losses", 8, 13, dtype) for dtype in ("float32", "float64", "float16", "bfloat16")),
    logits_case("forward", 8, 13, grad=False),
    logits_case("losses", 11, 1000),  # with torch.compile
    Case("forward", "affine", (), partial(cases.affine, 5, 7, 3, False)),
    Case("backward", "affine", (), partial(cases.affine, 5, 7, 3, True)),
    *(Case(which, "products", (), partial(cases.products, 5, 7, 3, which)) for which in ("x·W", "G·Wᵀ", "xᵀ·G")),
    Case("", "head", (), partial(cases.head, 6, 5, 11)),
    Case("", "head16", (), partial(cases.head_16_bit, 6, 5, 11), own="float32"),
    Case("", "log_prob", (), partial(cases.log_prob, 6, 5, 11)),
    Case("", "kl", (), partial(cases.kl, 6, 5, 4, 11)),
    Case("", "one-hot", (), partial(cases.one_hot, 6, 5)),
    Case("", "after", (), partial(cases.after_product, 6, 5)),
    Case("", "threads", (), partial(cases.threads, 6, 5, "float32", {"softcap": 3.0}), own="all threads"),
    Case("", "step", (), partial(cases.training_step, 9, 8, 7, 5)),
    Case("book", "step", (), partial(cases.training_step, 9, 8, 7, 5, True)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONGEST_PAUSE", 0)
    monkeypatch.setattr(timing, "REPEAT", 2)
    monkeypatch.delitem(_REGISTRY, "cupy-fake", raising=False)  # of these tests, and no contender


@pytest.mark.filterwarnings("default")  # of what the peers do
@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.group} {case.title}".replace("×", "x"))
def test_contenders_compute_the_same_and_are_all_timed(case: Case) -> None:
    threads = POOL.threads
    times = measure(case, 2)
    assert case.own in times
    assert all(len(seconds) >= 2 and min(seconds) > 0 for seconds in times.values())
    if case.names:
        assert set(times) <= set(case.names)
    assert POOL.threads == threads


def test_every_case_names_all_its_contenders() -> None:
    order = "losses forward dtypes small one-hot affine products head head16 log_prob kl after threads step"
    assert order.split() == list(GROUPS)
    for case in CASES.values():
        assert case.own in case.names
        assert case.floor is None or case.floor in case.names


@pytest.mark.parametrize("wrong", [1.1, np.nan])
def test_a_contender_with_another_result_is_not_timed(wrong: float) -> None:
    right = np.ones(3)
    case = Case(
        "title", "group", ("swl", "other"),
        lambda: ({"swl": Contender(lambda: (right,)), "other": Contender(lambda: (right * [1, 1, wrong],))}, (right,), 1e-3),
    )  # fmt: skip
    with pytest.raises(AssertionError, match="other, title computes something else"):
        measure(case, 1)


def test_what_comes_before_a_call_is_done_but_not_timed() -> None:
    done = []
    contender = Contender(lambda: done.append("call"), lambda: done.append("before"), lambda: done.append("enter"))
    timing.block(contender)
    assert done[:5] == ["enter", "before", "call", "before", "call"]
    slow = timing.block(Contender(lambda: None, before=lambda: [x * x for x in range(20_000)]))
    assert max(slow) < 1e-4


def test_the_table_holds_times_and_multiples() -> None:
    case = logits_case("losses", 2, 3)
    text = table([(case, {"copy": [1e-3, 5e-3, 2e-3], "swl": [4e-3], "torch": [0.1]})])
    assert text.splitlines() == [
        "| losses | copy | swl | torch |",
        "| --- | ---: | ---: | ---: |",
        "| 2 × 3, float32, forward + backward | 2 (0.50×) | 4 | 100 (25.00×) |",
    ]


@pytest.mark.filterwarnings("default")
def test_the_command_prints_a_table_and_draws(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["bench", "step", "--rounds", "1"]) == 0
    out, err = capsys.readouterr()
    assert "| step | swl | NumPy by hand |" in out
    assert "784-50-10" in err
    picture = tmp_path / "times.png"
    monkeypatch.setattr(report, "CLASSES", (5, 7))
    monkeypatch.setattr(report, "LOGITS", 100)
    assert main(["bench", "--plot", str(picture), "--rounds", "1"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["nonsense"],
            f"GROUP may be {', '.join(GROUPS)} or all, got 'nonsense'",
        ),
        (["--plot", "x.xyz"], "must end in .png, .svg or .pdf"),
        (["--rounds", "0"], "must be finite and at least 1, got 0"),
    ],
)
def test_bad_arguments_of_the_command_are_refused(capsys: Any, arguments: list[str], words: str) -> None:
    try:
        status = main(["bench", *arguments])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    assert status == 2
    assert words in capsys.readouterr().err


def test_pytest_saves_rows_that_can_be_compared(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    node = "bench/bench_swl.py::test_contender[small: 1 x 10, float32, forward + backward | {}]"
    nodes = [node.format(contender) for contender in ("copy", "swl")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes]
    done = subprocess.run(
        [*command, "--rounds", "1", f"--benchmark-json={saved}"],
        cwd=ROOT,
        env=APART,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "| 1 × 10, float32, forward + backward |" in done.stdout
    run = json.loads(saved.read_text())
    assert "node" not in run["machine_info"]
    rows = {row["extra_info"]["contender"]: row for row in run["benchmarks"]}
    assert rows["swl"]["extra_info"]["times_own"] == 1
    ratio = rows["copy"]["stats"]["median"] / rows["swl"]["stats"]["median"]
    assert rows["copy"]["extra_info"]["times_own"] == pytest.approx(ratio)

    def compare(change: float) -> subprocess.CompletedProcess[str]:
        for row in run["benchmarks"]:
            row["extra_info"]["times_own"] *= change
        (tmp_path / "new.json").write_text(json.dumps(run))
        script = [sys.executable, "bench/compare.py", str(saved), str(tmp_path / "new.json")]
        return subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)

    assert compare(0.9).returncode == 0
    worse = compare(0.7)
    assert worse.returncode == 1
    assert "worse " in worse.stdout


def test_pytest_compares_with_a_run_of_another_machine(tmp_path: Path) -> None:
    node = f"{ROOT}/bench/bench_swl.py::test_contender[small: 1 x 10, float32, forward + backward | swl]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", f"{ROOT}/pyproject.toml", node]
    command += ["--rounds", "1", f"--benchmark-storage={tmp_path}"]

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=APART | environment, capture_output=True, text=True, check=False
        )

    assert run("--benchmark-save=before").returncode == 0
    (saved,) = tmp_path.rglob("*before.json")
    other = json.loads(saved.read_text())
    other["machine_info"]["cpu"] = {"brand_raw": "another"}
    saved.write_text(json.dumps(other))
    compared = run("--benchmark-compare")
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "(0001_before)" in compared.stdout
    refused = run(SWL_BACKEND="abacus")
    assert refused.returncode == 4
    assert "SWL_BACKEND is 'abacus'" in refused.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_inner_loops_are_vectors_without_calls(dtype: str) -> None:
    """Read from the assembly; the exponential, a polynomial, shows in the multiply-adds."""
    command = [sys.executable, "bench/assembly.py", dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    if "x86-64, not that of" in done.stdout:
        return  # nothing to read there
    assert any(int(n) >= 12 for n in re.findall(r"(\d+) multiply-adds", done.stdout))
    assert all(n == "0" for n in re.findall(r"(\d+) calls$", done.stdout, re.MULTILINE))
    by_instruction = dtype == "bfloat16" and llvm.get_host_cpu_features().get("avx512bf16")
    assert any(n != "0" for n in re.findall(r"(\d+) roundings", done.stdout)) == bool(by_instruction)
