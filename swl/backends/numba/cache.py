"""Compiled kernels on disk: used where they can be, and never the reason why a call fails.

A kernel for one signature is one file. It begins with a digest of the file's name and of all that follows, which is checked
before anything of it is unpickled. The name holds a digest of whatever the kernel was compiled from and for. So a file that is
cut short, has a flipped bit or lies under the name of another kernel is not loaded but compiled and written anew. A file appears
under its name when it is complete: processes that write at the same time each leave a whole one.

To load a kernel is to run what the file says, so it matters who may have written it. The folders are those that Numba uses, in its
order: ``NUMBA_CACHE_DIR``, ``__pycache__`` beside the source, the user's cache folder. Kernels lie in a subfolder of their own. A
folder is passed over where it cannot be written to, and also unless

- its path is absolute: what lies in the current directory is anybody's, and where neither ``HOME`` nor the password database knows
  the user's home, the user's cache folder is ``./~/.cache``;
- the subfolder (made with mode 0700) and every file in it belong to this user or to the superuser, and neither group nor others may
  write to them;
- each folder above belongs to this user, to the superuser or to the owner of ``/`` (who need not be user 0 in a container), and is
  not writable by all, except with the sticky bit, which keeps its entries from being replaced.

A folder above may be writable by its group, because a umask of 002 makes all of a user's folders so, with a group that has no other
member. If it has, these can put another subfolder in the place of ours, but it is then theirs and refused. On Windows only the path
is looked at.
"""

# mypy: ignore-errors
# Numba's internals are typed in some of its versions and not in others.

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba import config, njit
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

__all__ = ["kept"]

# ------------------------------------------------------------------------------------------------ whose it is

POSIX = os.name == "posix"


def _ours(status: os.stat_result) -> bool:
    """Return whether a file or folder belongs to this user or the superuser, and nobody else may write to it."""
    return not POSIX or (status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022)


def _keeps_entries(status: os.stat_result) -> bool:
    """Return whether a folder above ours, of its own, lets nobody else replace what lies in it."""
    owners = (os.geteuid(), 0, os.stat("/").st_uid) if POSIX else ()
    return not POSIX or (status.st_uid in owners and (not status.st_mode & 0o002 or status.st_mode & stat.S_ISVTX))


def _make(folder: Path) -> None:
    """Make a folder and those above it, whatever the umask not writable by others."""
    if not folder.exists():
        _make(folder.parent)
        folder.mkdir(0o755, exist_ok=True)


def _safe(base: Path) -> Path | None:
    """Return a subfolder of `base` for kernels, made if need be; None if `base` is not safe or cannot be written to."""
    if not base.is_absolute():
        return None
    try:
        _make(base)
        base = Path(os.path.realpath(base))
        if not all(_keeps_entries(above.stat()) for above in (base, *base.parents)):
            return None
        folder = base / (f"swl-{os.geteuid()}" if POSIX else "swl")
        folder.mkdir(0o700, exist_ok=True)
        status = folder.lstat()
        if not (stat.S_ISDIR(status.st_mode) and _ours(status)):
            return None
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return folder


@functools.cache
def _folder(source: str) -> Path | None:
    """Return the first folder that kernels of a source file can be kept in; None if there is none."""
    bases = config.CACHE_DIR, Path(source).parent / "__pycache__", AppDirs("numba", appauthor=False).user_cache_dir
    return next(filter(None, map(_safe, map(Path, bases))), None)


# ------------------------------------------------------------------------------------------------ what it says

DIGEST = 32
"""Bytes of the digest that a file begins with."""


def _digest(*parts: bytes, size: int = DIGEST) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=size).digest()


def _read(path: Path) -> bytes | None:
    """Return what was written to a file; None if it is not ours or not as it was written."""
    with path.open("rb") as file:
        if not _ours(os.fstat(file.fileno())):
            return None
        content = file.read()
    payload = content[DIGEST:]
    return payload if content[:DIGEST] == _digest(path.name.encode(), payload) else None


def _write(path: Path, payload: bytes) -> None:
    """Write a file that only this user can read; it takes its place when it is complete."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(_digest(path.name.encode(), payload) + payload)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise


class _Cache(NullCache):
    """The kernels of one function in one folder."""

    def __init__(self, function: Callable[..., Any], folder: Path) -> None:
        self._name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        self._folder = folder

    @property
    def cache_path(self) -> str:
        return str(self._folder)

    def _path(self, sig: Any, codegen: Any) -> Path:
        """Return where the kernel for a signature is kept, by what the same sources may be compiled to."""
        python = sys.implementation.cache_tag, getattr(sys, "abiflags", "")
        compiled = numba.__version__, *python, *map(str, sig), *codegen.magic_tuple()
        return self._folder / f"{self._name}-{_digest(repr(compiled).encode(), size=16).hex()}.nbc"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the kernel for a signature; None, whereupon it is compiled, if there is none or none that can be used."""
        target_context.refresh()
        try:
            payload = _read(self._path(sig, target_context.codegen()))
            return payload and CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception:  # of a pickle, nearly any
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a kernel; if it cannot be written, it serves this process all the same."""
        if data.library.has_dynamic_globals:  # addresses, which mean something in this process only
            return
        payload = dumps(data._reduce())
        with suppress(OSError):
            _write(self._path(sig, data.codegen), payload)


@functools.cache
def _sources(files: tuple[str, ...]) -> str:
    """Return a digest of source files."""
    read = __spec__.loader.get_data  # a package may lie in an archive
    return _digest(*map(read, files), size=6).hex()


def kept(function: Callable[..., Any], *files: str) -> Any:
    """Compile a function of these source files at its first call for each signature, and keep the result on disk.

    Numba takes a kept result for fresh by the function's own file and knows nothing of the files that this one imports. So what all
    of them say is part of the name. Where there is no folder to keep anything in, each process compiles for itself.
    """
    function.__qualname__ += "_" + _sources(files)
    kernel = njit(function, nogil=True, error_model="numpy")
    if (folder := _folder(files[0])) is not None:
        kernel._cache = _Cache(function, folder)
    return kernel
