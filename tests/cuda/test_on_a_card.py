"""The command for a machine with a card takes its way here, on the fake driver, and leaves what it has whatever fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("on_a_card.sh")


def run(out: Path, *arguments: str, python: str = sys.executable) -> tuple[int, dict[str, str]]:
    """Run the script; return its status, and the result of each step as the report has it."""
    environment = {**os.environ, "PYTHON": python}
    done = subprocess.run([SCRIPT, out, *arguments], capture_output=True, text=True, check=False, env=environment)
    report = (out / "report.md").read_text().split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("|")]
    steps = {row[0]: row[2] for row in rows[2:] if len(row) == 3}
    assert list(steps) == [line.split(": ")[0] for line in done.stdout.splitlines()], done.stderr
    return done.returncode, steps


@pytest.mark.usefixtures("on_fake")
def test_on_the_fake_driver_every_step_passes(tmp_path: Path) -> None:
    status, steps = run(tmp_path, "--dry-run")
    logs = {name: (tmp_path / f"{name}.err").read_text() for name in steps if (tmp_path / f"{name}.err").exists()}
    assert steps.pop("sanitizer") in ("no compute-sanitizer here", "passed")
    assert set(steps.values()) == {"passed"}, logs
    assert status == 0
    measured = json.loads((tmp_path / "bandwidth.json").read_text())["results"]
    assert [r["what"].split(": ")[1] for r in measured][:4] == ["copy", "forward", "backward", "both"]
    assert all(r["seconds"] > 0 for r in measured)
    assert "of its bandwidth" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_a_step_that_fails_is_reported_and_the_others_run(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    status, steps = run(tmp_path, *arguments, python="false")
    assert status == 1
    assert "bandwidth" in steps
    assert "conformance" in steps
    assert {result for name, result in steps.items() if name not in ("card", "sanitizer", "memory")} == {"failed: 1"}
    assert steps["sanitizer"] == "no compute-sanitizer here" or steps["sanitizer"].startswith("failed")
