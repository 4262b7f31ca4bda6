"""What is shipped: the wheel as it is built, installed elsewhere, and put to work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import swl

ROOT = Path(__file__).parent.parent


def run(*command: Any, **more: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as ``python -m build`` does: the source archive, and the wheel out of that."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_its_kernels_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"swl/{p.relative_to(ROOT / 'swl').as_posix()}" for p in (ROOT / "swl").rglob("*.py")}
    kernels = {f"swl/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.cu*")}
    assert len(kernels) >= 3
    assert sources | kernels | {"swl/py.typed"} == {name for name in names if name.startswith("swl/")}
    assert {name.partition("/")[0] for name in names} == {"swl", f"swl-{swl.__version__}.dist-info"}


def test_its_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"swl-{swl.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    needs = [
        line.split()[1] for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert {name.partition(">")[0] for name in needs} == {"numpy", "numba"}
    assert "swl = swl.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in archive.namelist()


def test_its_description_has_no_link_that_needs_the_repository(wheel: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(f"swl-{swl.__version__}.dist-info/METADATA").decode()
    description = metadata.partition("\n\n")[2]
    assert description.startswith("# swl\n")
    assert not re.findall(r"\]\((?!https?:|#).*?\)", description)
    assert re.findall(r"\]\(docs/.*?\)", (ROOT / "README.md").read_text())  # which the repository's own page has


def test_installed_elsewhere_it_imports_and_trains(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target), "SWL_BACKEND": "numba"}
    where = run(sys.executable, "-c", "import swl; print(swl.__file__)", cwd=elsewhere, env=environment)
    assert Path(where.strip()) == target / "swl" / "__init__.py"
    train = "import sys; from swl.cli import main; sys.exit(main(['train', 'digits', '--epochs', '4']))"
    lines = run(sys.executable, "-c", train, cwd=elsewhere, env=environment).splitlines()
    assert float(lines[-1].removeprefix("test accuracy ")) > 0.9
    info = run(sys.executable, "-c", "from swl.cli import main; main(['info'])", cwd=elsewhere, env=environment)
    assert str(target / "swl") in info


def test_in_an_archive_it_runs(wheel: Path, tmp_path: Path) -> None:
    """A wheel is a zip file, from which Python imports."""
    code = "import numpy as np, swl; print(swl.__file__, swl.cross_entropy(np.zeros((2, 4)), [0, 3], backend='{}'))"
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    for backend in ("numpy", "numba"):
        said = run(sys.executable, "-c", code.format(backend), cwd=tmp_path, env=environment)
        assert said.split() == [str(wheel / "swl" / "__init__.py"), "1.3862943611198906"]
    code = "from swl.backends.cupy.compilation import source; print(source('cross_entropy'))"
    assert "__global__" in run(sys.executable, "-c", code, cwd=tmp_path, env=environment)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == swl.__version__
    assert f"\nversion: {swl.__version__}\n" in (ROOT / "CITATION.cff").read_text()
