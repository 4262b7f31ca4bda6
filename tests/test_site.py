"""The site as it is built: no warnings, every public object in its index, and notebooks whose output is what a run gives.

``python tests/test_site.py`` runs the notebooks and writes their output into them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import numpy as np
import pytest
from sphinx.util.inventory import InventoryFile
from test_docs import DOCS, modules, public

import swl

NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))


def test_the_site_builds_without_warnings_and_has_every_public_object(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "-q", DOCS, tmp_path / "site", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "site" / "objects.inv", "rb") as file:
        index = InventoryFile.load(file, "", lambda base, path: path)
    indexed = {name for kind, names in index.items() if kind.startswith("py:") for name in names}
    promised = {f"{module}.{name}" for module in modules() for name in public(module)}
    promised -= {f"swl.backends.{name}" for name in swl.__all__}  # they stand under their shorter names
    assert promised | {f"swl.{name}" for name in swl.__all__} <= indexed


def execute(path: Path) -> Any:
    """Run a notebook where it lies."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": path.parent}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where, coalesce_streams=True).execute()
    return notebook


def written(notebook: Any) -> list[str]:
    """What its cells print or show as text, and the kinds of what they show else."""
    found = []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        data = output.get("data", {})
        pictures = [kind for kind in data if kind.startswith("image/")]
        found += pictures or [output.get("text") or data["text/plain"]]
    return found


@pytest.mark.filterwarnings("ignore")  # of the notebooks' own machinery
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_a_run_gives(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words to the letter, numbers to a hundredth: other processors round otherwise."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    number = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
    run, shown = written(execute(path)), written(nbformat.read(path, as_version=4))
    assert [number.sub("#", text) for text in run] == [number.sub("#", text) for text in shown]
    values = [[float(n) for text in texts for n in number.findall(text)] for texts in (run, shown)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-2, atol=1e-6)


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(execute(path), path)
