"""Compiled kernels on disk: used where they can be, and never the reason why a call fails."""

# mypy: ignore-errors
# Numba's internals are typed in some of its versions and not in others.

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

__all__ = ["kept"]


class _Cache(FunctionCache):
    """Numba's cache, without its trust in the files.

    A file may be cut short by a full disk. And two processes that start with an empty folder may both call their first kernel
    number 1, of which one signature's index then leads to the other's code.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Give the kernel for a signature; None, whereupon it is compiled, if there is none or none that can be read."""
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # of a broken pickle, nearly any
            with suppress(OSError):
                self.flush()  # or the index could not be read for saving either
            return None
        return found if found is None or found.signature.args == tuple(sig) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a kernel; if it cannot be written, it serves this process all the same."""
        with suppress(OSError):
            super().save_overload(sig, data)


@functools.cache
def _digest(files: tuple[str, ...]) -> str:
    return hashlib.blake2b(b"".join(Path(file).read_bytes() for file in files), digest_size=6).hexdigest()


def kept(function: Callable[..., Any], *files: str) -> Any:
    """Compile a function of these source files at its first call for each signature, and keep the result on disk.

    Numba takes a kept result for fresh by the time stamp of the function's own file, which a wheel may share with the last version,
    and knows nothing of the files that it imports. So what the sources say is part of the name. Where there is no folder to keep
    anything in, each process compiles for itself.
    """
    function.__qualname__ += "_" + _digest(files)
    options = {"nogil": True, "error_model": "numpy"}
    try:
        kernel = njit(function, cache=True, **options)
    except RuntimeError:  # no folder of those that Numba tries can be written to
        return njit(function, **options)
    kernel._cache = _Cache(function)
    return kernel
