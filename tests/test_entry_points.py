"""Backends that other packages bring, by an entry point of the group ``swl.backends``."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

import swl
from swl.backends import registry

GOOD = """
from swl.backends.numpy import NumpyBackend

class Mine(NumpyBackend):
    name = "mine"

    def info(self):
        return {"made": "elsewhere"}

def load():
    return Mine()
"""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package on the path with four entry points: one good, three of the kinds that fail, and one that takes a name."""
    (tmp_path / "others_backend.py").write_text(GOOD)
    (tmp_path / "others_broken.py").write_text("import a_library_that_is_not_there")
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[swl.backends]\nmine = others_backend\nbroken = others_broken\nnowhere = others_nowhere\n"
        "renamed = others_backend\nnumpy = others_broken\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    importlib.invalidate_caches()


@pytest.mark.usefixtures("installed")
def test_a_backend_of_another_package_is_found_and_runs() -> None:
    logits, ids = np.array([[0.0, 1.0]]), np.array([0])
    with swl.use_backend("mine"):
        assert registry.active() == "mine"
        layer = swl.Affine.init(2, 2, rng=0)
        assert layer.backend == "mine"
        loss = swl.cross_entropy(logits, ids)
    np.testing.assert_array_equal(loss, swl.cross_entropy(logits, ids, backend="numpy"))
    np.testing.assert_array_equal(loss, swl.cross_entropy(logits, ids, backend="mine"))


@pytest.mark.usefixtures("installed")
def test_one_that_cannot_be_loaded_is_listed_with_the_reason() -> None:
    found = {b.name: b for b in swl.available_backends()}
    assert found["mine"].usable
    assert "others_broken cannot be loaded: ModuleNotFoundError: No module named 'a_library" in found["broken"].reason
    assert "others_nowhere cannot be loaded" in found["nowhere"].reason
    assert "must have that name, and has 'mine'" in found["renamed"].reason
    assert found["numpy"].usable  # the library's own names are not taken
    with pytest.raises(swl.BackendUnavailable, match="others_broken cannot be loaded"):
        swl.set_backend("broken")
    with pytest.raises(ValueError, match=r"backend is 'unknown'; legal names are .*'mine'"):
        swl.set_backend("unknown")
