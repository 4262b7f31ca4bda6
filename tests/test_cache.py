"""Compiled kernels on disk: a second process compiles nothing, and nothing that may have happened to the folder is an error.

Each case is a process of its own. Most call only the kernel that checks class ids, which compiles in a moment.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import ROOT

import swl

PACKAGE = Path(swl.__file__).parent

COUNT = """
import json, sys
import numpy as np, swl
from numba.core import event
from swl.backends import get
compiled = event.RecordingListener()
event.register("numba:compile", compiled)
"""
PASS = """
rng = np.random.default_rng(0)
z, t = rng.standard_normal((300, 1000), np.float32), rng.integers(0, 1000, 300)
loss, grad, stats = swl.cross_entropy_value_and_grad(z, t, label_smoothing=0.1, stats=True)
result = [float(loss), float(np.abs(grad).sum(dtype=np.float64)), int(stats.argmax.sum())]
"""
IDS = """
result = []
for dtype in sys.argv[1:]:
    clean, _, total = get("numba").prepare_ids(np.array([3, 100, 0, 127], dtype), 128, 100, None)
    result.append([clean.tolist(), total])
"""
RIGHT = [[3, -1, 0, 127], 3.0]
REPORT = """
print(json.dumps([len([e for _, e in compiled.buffer if e.is_start]), result]))
"""
# even the superuser then needs permission to write to a folder
NO_PRIVILEGES = """
import ctypes
if hasattr(ctypes.CDLL(None), "capset"):
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
"""
# the home folder is in neither the environment nor the password database: containers with arbitrary user ids
HOMELESS = """
import os, pwd
os.environ.pop("HOME"); os.environ.pop("XDG_CACHE_HOME", None)
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
"""
FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""


def start(
    code: str, folder: Path | None, *arguments: str, cwd: Any = PACKAGE.anchor, **environment: Any
) -> subprocess.Popen[str]:
    env = {**os.environ, "SWL_BACKEND": "numba", **{name: str(value) for name, value in environment.items()}}
    env.pop("NUMBA_CACHE_DIR", None)
    if folder is not None:
        env["NUMBA_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-c", code, *arguments]
    # the default is away from a checkout, which Python would import
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, Any]:
    """Give the number of kernels that a process compiled, and what they computed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    n_compiled, result = json.loads(out)
    return n_compiled, result


def ids(folder: Path | None, *dtypes: str, before: str = "", **environment: Any) -> int:
    """Check class ids of some dtypes in a process of its own; give the number of kernels that it compiled."""
    n_compiled, result = finish(start(before + COUNT + IDS + REPORT, folder, *dtypes, **environment))
    assert result == [RIGHT] * len(dtypes)
    return n_compiled


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that one process has filled."""
    folder = tmp_path_factory.mktemp("kernels")
    assert ids(folder, "int32", "int64") > 0
    return folder


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of that to do harm to."""
    yield Path(shutil.copytree(filled, tmp_path / "kernels"))
    subprocess.run(["chmod", "-R", "u+w", str(tmp_path)], check=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, without any kernels; give the folder to import it from."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "swl", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.rglob(pattern))


# ------------------------------------------------------------------------------------------------ a folder that works


def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    first, result = finish(start(COUNT + PASS + REPORT, folder))
    second, again = finish(start(COUNT + PASS + REPORT, folder))
    assert first > 0
    assert second == 0
    assert again == result


def test_processes_that_start_at_once(tmp_path: Path) -> None:
    orders = [("int32", "int64"), ("int64", "uint8"), ("uint8", "int32")]
    processes = [start(COUNT + IDS + REPORT, tmp_path, *order) for order in orders]
    for process, order in zip(processes, orders, strict=True):
        assert finish(process)[1] == [RIGHT] * len(order)
    ids(tmp_path, "int32", "int64", "uint8")  # whoever has written last
    assert ids(tmp_path, "int32", "int64", "uint8") == 0


def test_a_kernel_under_another_signatures_name_is_not_called(folder: Path) -> None:
    """As two processes may leave it that wrote their first kernels at the same time."""
    one, two = files(folder, "*prepare_ids*.nbc")
    was = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(was)
    assert ids(folder, "int32", "int64") > 0


# ------------------------------------------------------------------------------------------------ one that does not


@pytest.mark.parametrize("there", ["full", "empty", "missing", "a file"])
def test_a_folder_that_cannot_be_written_to(folder: Path, package: Path, there: str) -> None:
    if there == "empty":
        for file in files(folder, "*.nb?"):
            file.unlink()
    elif there != "full":
        shutil.rmtree(folder)
    if there == "a file":
        folder.touch()
    before = files(folder.parent, "*.nb?")
    subprocess.run(["chmod", "-R", "a-w", str(folder.parent)], check=True)
    where = {"PYTHONPATH": package, "HOME": folder.parent, "XDG_CACHE_HOME": folder.parent / "cache"}
    assert ids(folder, "int64", before=NO_PRIVILEGES, **where) > 0
    assert files(folder.parent, "*.nb?") == before


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX's")
def test_a_full_disk(tmp_path: Path) -> None:
    assert ids(tmp_path, "int64", before=FULL_DISK) > 0
    assert ids(tmp_path, "int64") > 0  # nothing half written is taken for a kernel
    assert ids(tmp_path, "int64") == 0


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "garbage", "cut short"])
def test_a_broken_file_is_written_anew(folder: Path, content: bytes | None) -> None:
    for file in files(folder, "*.nbc"):
        was = file.read_bytes()
        file.write_bytes(was[: len(was) * 2 // 3] if content is None else content)
    assert ids(folder, "int32", "int64") > 0
    assert ids(folder, "int32", "int64") == 0


DAMAGE = """
import importlib, pathlib, sys
import numpy as np
from swl.backends import get
get("numba").prepare_ids(np.array([3, 100, 0, 127]), 128, 100, None)
prepare_ids = importlib.import_module(sys.argv[1]).prepare_ids
(signature,) = prepare_ids.signatures
whole = {file: file.read_bytes() for file in pathlib.Path(prepare_ids.stats.cache_path).rglob("*prepare_ids*")}
rng = np.random.default_rng(0)

def flip(data):
    for at in rng.choice(8 * len(data), rng.integers(1, 4), replace=False):
        data[at // 8] ^= 1 << at % 8

def cut(data):
    del data[rng.integers(len(data)):]

def zero(data):
    page = rng.integers(len(data)) // 4096 * 4096
    data[page : page + 4096] = bytes(len(data[page : page + 4096]))

def lengthen(data):
    data += bytes(1)

def load():
    return prepare_ids._cache.load_overload(signature, prepare_ids.targetctx)

assert load() is not None
for file in whole:
    for damage in (flip, cut, zero, lengthen) * 30:
        data = bytearray(whole[file])
        damage(data)
        file.write_bytes(data)
        assert load() is None, (file, damage)
        for each, content in whole.items():
            each.write_bytes(content)
assert load() is not None
print("[0, null]")
"""


def test_flipped_bits_lost_ends_and_zeroed_pages_are_never_loaded(tmp_path: Path) -> None:
    finish(start(DAMAGE, tmp_path, "swl.backends.numba.kernels"))


# ------------------------------------------------------------------------------------------------ whose kernels

STRANGER = 65534
posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="only on POSIX do files say whose they are")


@pytest.fixture
def give_away() -> Callable[[Path], None]:
    if os.geteuid() != 0:
        pytest.skip(f"{ROOT}, who can give files away")
    return lambda path: os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


@posix
def test_no_kernel_comes_from_the_current_directory(package: Path, tmp_path: Path) -> None:
    """Where there is no home, Numba's folder for the user is ``./~/.cache/numba``."""
    current = tmp_path / "current"
    planted = current / "~" / ".cache" / "numba"
    where = {"PYTHONPATH": package, "cwd": current}
    current.mkdir()
    assert ids(planted, "int64", **where) > 0
    assert ids(planted, "int64", **where) == 0
    before = files(tmp_path, "*")
    subprocess.run(["chmod", "-R", "a-w", str(package)], check=True)
    assert ids(None, "int64", before=HOMELESS + NO_PRIVILEGES, **where) > 0
    assert files(tmp_path, "*") == before
    subprocess.run(["chmod", "-R", "u+w", str(package)], check=True)


@posix
def test_no_kernel_comes_from_a_folder_that_someone_else_made(
    package: Path, tmp_path: Path, give_away: Callable[[Path], None]
) -> None:
    """In a shared folder with the sticky bit, where the name of the subfolder is known beforehand."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    assert ids(shared, "int64", PYTHONPATH=package) > 0
    assert ids(shared, "int64", PYTHONPATH=package) == 0
    (planted,) = files(shared, "*")[:1]
    give_away(planted)
    assert ids(shared, "int64", PYTHONPATH=package) > 0


@pytest.fixture
def cache() -> Any:
    return importlib.import_module("swl.backends.numba.cache")


@posix
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775, 0o1777], ids=oct)
def test_a_folder_that_only_its_owner_decides_on_is_used(cache: Any, tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    folder = cache._safe(tmp_path / "not" / "there" / "yet")
    assert cache._safe(tmp_path).parent == tmp_path
    assert cache._safe(tmp_path / "not" / "there" / "yet") == folder


@posix
@pytest.mark.parametrize("umask", [0, 0o002, 0o077], ids=oct)
def test_what_is_made_is_this_users_alone(cache: Any, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = cache._safe(tmp_path / "new" / "newer")
        cache._write(folder / "kernel", b"payload")
    finally:
        os.umask(before)
    assert (folder / "kernel").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o022 == 0
    assert cache._read(folder / "kernel") == b"payload"


@posix
@pytest.mark.parametrize("path", ["", ".", "kernels", "~/.cache"])
def test_a_relative_folder_is_refused(cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert cache._safe(Path(path)) is None
    assert not any(tmp_path.iterdir())


@posix
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777], ids=oct)
def test_kernels_that_others_may_write_are_refused(cache: Any, tmp_path: Path, mode: int) -> None:
    folder = cache._safe(tmp_path)
    kernel = folder / "kernel"
    cache._write(kernel, b"payload")
    kernel.chmod(mode)
    assert cache._read(kernel) is None
    folder.chmod(mode)
    assert cache._safe(tmp_path) is None


@posix
def test_a_folder_is_refused_where_all_may_replace_it(cache: Any, tmp_path: Path) -> None:
    assert cache._safe(tmp_path / "above" / "kernels") is not None
    for above in (tmp_path / "above" / "kernels", tmp_path / "above"):
        above.chmod(0o777)
        assert cache._safe(tmp_path / "above" / "kernels") is None
        above.chmod(0o755)


@posix
def test_a_link_in_the_place_of_the_folder_is_refused(cache: Any, tmp_path: Path) -> None:
    folder = cache._safe(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert cache._safe(tmp_path) is None


@posix
def test_what_belongs_to_someone_else_is_refused(cache: Any, tmp_path: Path, give_away: Callable[[Path], None]) -> None:
    folder = cache._safe(tmp_path / "above" / "kernels")
    kernel = folder / "kernel"
    cache._write(kernel, b"payload")
    give_away(kernel)
    assert cache._read(kernel) is None
    for path in (folder, folder.parent, folder.parent.parent):
        give_away(path)
        assert cache._safe(tmp_path / "above" / "kernels") is None
        os.chown(path, 0, 0)
    assert cache._safe(tmp_path / "above" / "kernels") == folder


# ------------------------------------------------------------------------------------------------ stale kernels


def test_changed_sources_are_compiled_anew(package: Path, tmp_path: Path) -> None:
    """Also where neither size nor time stamp tell of the change, by which Python's own files of bytecode would go."""
    where = {"PYTHONPATH": package, "PYTHONDONTWRITEBYTECODE": 1}
    assert ids(tmp_path, "int64", **where) > 0
    assert ids(tmp_path, "int64", **where) == 0
    source = package / "swl" / "backends" / "numba" / "kernels.py"
    stamp = source.stat()
    text = source.read_text()
    assert text.count("count += 1") == 1
    source.write_text(text.replace("count += 1", "count -= 1"))
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert source.stat().st_size == stamp.st_size
    n_compiled, result = finish(start(COUNT + IDS + REPORT, tmp_path, "int64", **where))
    assert n_compiled > 0
    assert result[0][1] == -3.0


def test_a_change_of_what_the_kernels_are_made_of_counts_too(package: Path, tmp_path: Path) -> None:
    assert ids(tmp_path, "int64", PYTHONPATH=package) > 0
    with (package / "swl" / "backends" / "numba" / "simd" / "vectors.py").open("a") as source:
        source.write("\n# another version\n")
    assert ids(tmp_path, "int64", PYTHONPATH=package) > 0


def test_no_file_of_the_vectors_is_left_out() -> None:
    simd = importlib.import_module("swl.backends.numba.simd")
    there = {str(path) for path in Path(simd.__file__ or "").parent.glob("[!_]*.py")}
    assert {*simd.SOURCES} == there
