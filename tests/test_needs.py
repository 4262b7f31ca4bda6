"""What cannot run here is skipped with its reason, wherever it is collected from; and CI allows no other skip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BARE = "import sys; sys.modules.update(dict.fromkeys({missing!r})); import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def run(folder: Path, *arguments: Any, missing: tuple[str, ...] = (), **environment: str) -> tuple[int, str]:
    """Run pytest where the libraries `missing` are not installed."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            BARE.format(missing=missing),
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            *map(str, arguments),
        ],
        cwd=folder,
        env={**os.environ, "CI": "", "PYTEST_ADDOPTS": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_without_torch_jax_and_mpi_their_tests_and_doctests_are_skipped(tmp_path: Path) -> None:
    """Programs under tests/, which import what they like, are none of them."""
    paths = "tests/mpi tests/mutants tests/test_distributed.py tests/test_jax.py tests/test_torch.py swl/distributed swl/torch"
    paths += " swl/jax.py swl/backends/registry.py docs/scale.md docs/torch.md"
    arguments = (*paths.split(), "--skipped-to", tmp_path / "skipped")
    status, out = run(ROOT, *arguments, missing=("torch", "transformers", "jax", "mpi4py"), CI="true")
    assert status == 0, out
    skipped = (tmp_path / "skipped").read_text().split()
    assert {"tests/test_torch.py", "swl/torch/_linear.py", "docs/torch.md", "tests/test_jax.py", "swl/jax.py"} < {
        *skipped
    }
    assert {"tests/test_distributed.py", "swl/distributed/head.py", "docs/scale.md"} < {*skipped}
    assert "needs torch, needs transformers, needs JAX" in out
    status, out = run(
        ROOT, f"@{tmp_path / 'skipped'}", "--require-peers", missing=("torch", "transformers", "jax", "mpi4py")
    )
    assert status != 0
    assert "must not be skipped here: needs MPI" in out


def test_without_a_compiler_the_fake_device_is_skipped(tmp_path: Path) -> None:
    arguments = ("tests/cuda/test_kernels.py", "tests/cuda/test_devices.py", "tests/test_dispatch.py")
    status, out = run(ROOT, *arguments, "-k", "not numba and not numpy", CI="true", PATH="", CXX="")
    assert status == 0, out
    assert "needs a C++ compiler: g++ is not on the PATH" in out
    assert "failed" not in out


SKIPS = """
import pytest
def test_runs(): pass
def test_library(): pytest.skip("needs torch")
def test_gpu(): pytest.skip("needs a GPU: none")
def test_other(): pytest.skip("not today")
@pytest.mark.xfail
def test_fails(): assert False
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A root with the plugin, and one file of tests."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "conftest.py", tmp_path)
    shutil.copy(ROOT / "tests" / "needs.py", tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests" / "test_skips.py").write_text(SKIPS)
    return tmp_path


def test_who_may_skip_what(project: Path) -> None:
    status, out = run(project)
    assert (status, out.splitlines()[-1].split(" in ")[0]) == (0, "1 passed, 3 skipped, 1 xfailed")
    status, out = run(project, CI="true")
    assert (status, out.splitlines()[-1].split(" in ")[0]) == (1, "1 failed, 1 passed, 2 skipped, 1 xfailed")
    assert "must not be skipped here: not today" in out
    status, out = run(project, "--require-peers")
    assert (status, out.splitlines()[-1].split(" in ")[0]) == (1, "2 failed, 1 passed, 1 skipped, 1 xfailed")


def test_what_was_skipped_is_what_the_next_environment_runs(project: Path) -> None:
    file = project / "tests" / "test_skips.py"
    assert (
        run(project, "--skipped-to", project / "skipped", "--deselect", f"{file.relative_to(project)}::test_other")[0]
        == 0
    )
    assert (project / "skipped").read_text() == "tests/test_skips.py::test_library\n"
    file.write_text(SKIPS.replace('pytest.skip("needs torch")', "pass"))  # the library is installed
    status, out = run(project, "--require-peers", "@skipped")
    assert (status, out.splitlines()[-1].split(" in ")[0]) == (0, "1 passed")
    file.write_text(SKIPS.replace("test_library", "test_renamed"))
    status, out = run(project, "--require-peers", "@skipped")
    assert status != 0
    assert "not found" in out
