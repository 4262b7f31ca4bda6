"""What some tests and doctests need beside the package's dependencies, and what pytest does where it is missing.

A plugin, which the conftest.py of the root loads. A file that needs a library as a whole stands in `FILES`; a single test skips
itself. Either way the reason begins with one of `REASONS`: in CI any other skip is a failure, because a test that does not run
proves nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")

TORCH, CLIENTS, JAX, MPI, SPHINX, CUPY, COMPILER, ROOT, GPU = REASONS = (
    "needs torch",
    "needs transformers",
    "needs JAX",
    "needs MPI",
    "needs Sphinx",
    "needs CuPy",
    "needs a C++ compiler",
    "needs the superuser",
    "needs a GPU",
)
MACHINE = ROOT, GPU
"""What no environment brings."""

FILES = {
    TORCH: [
        "tests/test_torch*.py",
        "swl/torch/*.py",
        "docs/torch.md",
        "docs/migration.md",
        "docs/scale.md",
        "tests/test_site.py",
    ],
    CLIENTS: ["tests/test_torch_huggingface.py", "tests/test_torch_clients.py", "docs/torch.md"],
    JAX: ["tests/test_jax.py", "swl/jax.py", "docs/torch.md"],
    MPI: [
        "tests/test_distributed.py",
        *(f"swl/distributed/{name}.py" for name in ("comm", "data", "head")),
        "docs/scale.md",
        "tests/test_site.py",
    ],
    SPHINX: ["tests/test_site.py"],
}

MISSING = {
    TORCH: find_spec("torch") is None,
    CLIENTS: not all(map(find_spec, ("transformers", "peft", "lightning", "skorch"))),
    JAX: find_spec("jax") is None,
    MPI: find_spec("mpi4py") is None or MPIEXEC is None,
    SPHINX: find_spec("sphinx") is None,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail where a test would be skipped for want of a GPU")
    parser.addoption(
        "--require-peers", action="store_true", help="fail where a test would be skipped for want of a library"
    )
    parser.addoption("--skipped-to", type=Path, help="write there what another environment has to run: `pytest @FILE`")


# ------------------------------------------------------------------------------------------------ whole files


class _Missing(pytest.File):
    """A file that cannot be imported here."""

    reason: str

    def collect(self) -> list[pytest.Item]:
        pytest.skip(self.reason, allow_module_level=True)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Iterator[None]:
    collectors = yield
    path = (
        file_path.relative_to(parent.config.rootpath) if file_path.is_relative_to(parent.config.rootpath) else file_path
    )
    reason = ", ".join(need for need, files in FILES.items() if MISSING[need] and any(map(path.match, files)))
    if not (collectors and reason):
        return collectors
    if not file_path.name.startswith("test_") and ">>> " not in file_path.read_text(encoding="utf-8"):
        return []  # it has no doctest to be missed
    file = _Missing.from_parent(parent, path=file_path)
    file.reason = reason
    return [file]


# ------------------------------------------------------------------------------------------------ skips

_skipped: dict[str, None] = {}  # in the order in which they came


def _look_at_skip(report: Any, config: pytest.Config) -> None:
    """Note what another environment has to run; fail where skipping is not allowed."""
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(MACHINE):
        _skipped[report.nodeid] = None
    peers = config.getoption("require_peers")
    if (IN_CI or peers) and not reason.startswith(MACHINE if peers else REASONS):
        report.outcome = "failed"
        report.longrepr = f"must not be skipped here: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    _look_at_skip(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    _look_at_skip(report, collector.config)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a process of pytest-xdist has noted."""
    _skipped.update(dict.fromkeys(getattr(node, "workeroutput", {}).get("skipped", ())))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["skipped"] = list(_skipped)
        return
    if session.config.getoption("skipped_to"):
        session.config.getoption("skipped_to").write_text("".join(f"{node}\n" for node in _skipped), encoding="utf-8")
