"""The number of threads follows whoever limits it, and counts of threads at work say so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from needs import TORCH

import swl
from swl.backends.host.limits import SHARED, default_threads, processors
from swl.backends.host.threads import Pool

AT_WORK = """
import hashlib, os, sys, threading
import numpy as np
import swl
from swl.backends.host.threads import POOL

exec(os.environ.get("FIRST", ""))
seen, together = set(), threading.Barrier(POOL.threads)

def work(begin, end):
    if threading.get_ident() not in seen:
        seen.add(threading.get_ident())
        together.wait(60)  # each takes a range

POOL.run(work, 100)
x, t = np.random.default_rng(0).standard_normal((3000, 700)).astype(np.float32), np.arange(3000) % 700
loss, gradient = swl.cross_entropy_value_and_grad(x, t, backend="numba")
print(len(seen) or 1, hashlib.sha256(loss.tobytes() + gradient.tobytes()).hexdigest())
"""
CLEAN = {name: value for name, value in os.environ.items() if name not in (*SHARED, "SWL_NUM_THREADS")}


def at_work(**environment: str) -> tuple[int, str]:
    """Run a process of its own; give the threads that worked, and the digest of a result."""
    command = [sys.executable, "-c", AT_WORK]
    done = subprocess.run(command, env=CLEAN | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    threads, digest = done.stdout.split()
    return int(threads), digest


def test_threads_at_work_are_those_that_were_granted_and_bits_do_not_depend_on_them() -> None:
    found = {
        at_work(): processors(),
        at_work(SWL_NUM_THREADS="3", OMP_NUM_THREADS="1"): 3,
        at_work(SWL_NUM_THREADS="3", FIRST="swl.set_num_threads(2)"): 2,
        **{at_work(**{name: "1"}): 1 for name in SHARED},
    }
    if hasattr(os, "sched_setaffinity"):
        mask = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
        found[at_work(FIRST=mask)] = 1
        found[at_work(FIRST="POOL.run(lambda *_: None, 100); " + mask)] = 1  # the threads are there already
        found[at_work(FIRST=mask, SWL_NUM_THREADS="3")] = 3
    for (threads, _), want in found.items():
        assert threads == want
    assert len({digest for _, digest in found}) == 1


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason=TORCH)
def test_torchs_number_is_followed_and_ours_overrides_it() -> None:
    followed = "import torch, swl.torch; POOL.run(lambda *_: None, 100); torch.set_num_threads({})"
    found = {
        at_work(FIRST=followed.format(1)): 1,
        at_work(FIRST=followed.format(1), SWL_NUM_THREADS="2"): 2,
        at_work(FIRST=followed.format(1) + "; swl.set_num_threads(2)"): 2,
        at_work(FIRST=followed.format(1) + "; swl.set_num_threads(2); swl.set_num_threads(None)"): 1,
        at_work(FIRST=followed.format(1) + "; torch.set_num_threads(64)"): processors(),  # not more than there are
    }
    for (threads, _), want in found.items():
        assert threads == want
    assert len({digest for _, digest in found}) == 1


def test_a_limit_may_come_while_threads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another thread, or a signal handler, imports `swl.torch` meanwhile."""
    monkeypatch.delenv("SWL_NUM_THREADS", raising=False)
    pool = Pool()
    pool.limit("first", lambda: pool.limit("second", lambda: 1) or 2)
    assert pool.threads <= 2
    assert pool.threads == 1


def grant(root: Path, groups: str, **files: str) -> Path:
    """Write what a kernel shows of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "want"),
    [
        ("0::/\n", {"cpu_DOT_max": "max 100000\n"}, None),
        ("0::/\n", {"cpu_DOT_max": "100000 100000\n"}, 1),
        (
            "0::/a/b\n",
            {"a__cpu_DOT_max": "50000 100000\n", "a__b__cpu_DOT_max": "max 100000\n"},
            1,
        ),  # of the outer group
        ("0::/not/mounted/here\n", {"cpu_DOT_max": "20000 100000\n"}, 1),
        (
            "3:cpuacct,cpu:/x\n",
            {"cpuacct,cpu__x__cpu_DOT_cfs_quota_us": "1", "cpuacct,cpu__x__cpu_DOT_cfs_period_us": "9"},
            1,
        ),
        ("1:cpu:/\n", {"cpu__cpu_DOT_cfs_quota_us": "-1", "cpu__cpu_DOT_cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu_DOT_max": "nonsense\n"}, None),
        ("", {}, None),
    ],
)
def test_a_quota_of_control_groups_counts(tmp_path: Path, groups: str, files: dict[str, str], want: Any) -> None:
    found = default_threads({}, grant(tmp_path, groups, **files))
    assert found == ((processors(), "processors") if want is None or processors() == 1 else (want, "CPU quota"))


def test_the_least_of_all_limits_is_named(tmp_path: Path) -> None:
    def found(**environment: str) -> Any:
        return default_threads(environment, tmp_path)

    assert found(SWL_NUM_THREADS=" 77 ", OMP_NUM_THREADS="1") == (77, "SWL_NUM_THREADS")
    assert found(SWL_NUM_THREADS="", OPENBLAS_NUM_THREADS="") == (processors(), "processors")
    assert found(OMP_NUM_THREADS="999999", NUMBA_NUM_THREADS="many") == (processors(), "processors")
    if processors() > 1:
        assert found(OMP_NUM_THREADS="1,4") == (1, "OMP_NUM_THREADS")


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "1.5", "²"])
def test_a_number_of_ours_that_is_none_is_an_error(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWL_NUM_THREADS", wrong)
    with pytest.raises(ValueError, match=f"SWL_NUM_THREADS must be an integer above 0, got '{wrong}'"):
        swl.set_num_threads()
    code = "import sys; from swl.cli import main; sys.exit(main(['train', 'digits', '--epochs', '1']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"swl: SWL_NUM_THREADS must be an integer above 0, got '{wrong}'\n")


def test_what_was_set_is_what_is_got() -> None:
    before = swl.get_num_threads()
    swl.set_num_threads(3)
    assert swl.get_num_threads() == 3
    swl.set_num_threads(before)
