"""Which backends there are, and which one runs.

A backend is one module with a function ``load()`` that returns a `Backend`, and one line in `_REGISTRY`.
Modules are imported at first use, so ``import swl`` imports none of the libraries behind them.

Other packages may bring backends of their own for arrays in host memory: an entry point of the group ``swl.backends`` names the
backend and its module, in a ``pyproject.toml``::

    [project.entry-points."swl.backends"]
    mine = "my_package.swl_backend"
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from importlib import metadata
from typing import Literal, NamedTuple

import numpy as np

from swl.backends.protocol import Backend, host_scope
from swl.errors import BackendUnavailable
from swl.typing import Array, ArrayLike, BackendName

# name: (module, where its arrays live)
_REGISTRY: dict[str, tuple[str, Literal["host", "cuda"]]] = {
    "numpy": ("swl.backends.numpy", "host"),
    "numba": ("swl.backends.numba.backend", "host"),
    "cupy": ("swl.backends.cupy.backend", "cuda"),
}
SPECIFICATION = "numpy"
"""As short as the equations, and slow."""
_AUTO = "numba"
_DEVICE = "cupy"
"""Where arrays on a device belong."""
_loaded: dict[str, Backend] = {}
_chosen: str | None = None
_in_context: ContextVar[str | None] = ContextVar("swl_backend", default=None)


class BackendInfo(NamedTuple):
    """One line of `available_backends()`."""

    name: str
    usable: bool
    reason: str
    """Why it is not usable here; empty if it is."""


def scope(**arrays: Array) -> AbstractContextManager[object]:
    """Enter the `Backend.scope` of arrays of whatever backend; the first one decides which."""
    first = next(iter(arrays.values()))
    return host_scope() if type(first) is np.ndarray else resolve(None, {"array": first}).scope(**arrays)


def _discover() -> None:
    """Add the backends of other packages that are installed; a name of the library's own stays its own."""
    for point in metadata.entry_points(group="swl.backends"):
        _REGISTRY.setdefault(point.name, (point.module, "host"))


def _known(name: object, source: str) -> str:
    if name == "auto":
        return _AUTO
    if isinstance(name, str) and name not in _REGISTRY:
        _discover()
    if not isinstance(name, str) or name not in _REGISTRY:
        legal = ", ".join(repr(legal) for legal in (*_REGISTRY, "auto"))
        raise ValueError(f"{source} is {name!r}; legal names are {legal}")
    return name


def get(name: str) -> Backend:
    """Return the backend called `name`, importing it at its first use.

    Raises
    ------
    ValueError
        If there is no backend of that name.
    BackendUnavailable
        If it cannot run here; the message gives the cause and the remedy.
    """
    found = _loaded.get(name)
    if found is None:
        name = _known(name, "backend")
        found = _loaded.get(name) or _load(name)
        _loaded[name] = found
    return found


def _load(name: str) -> Backend:
    module = _REGISTRY[name][0]
    if module.partition(".")[0] == "swl":
        return importlib.import_module(module).load()  # type: ignore[no-any-return]
    try:
        found: Backend = importlib.import_module(module).load()
    except BackendUnavailable:
        raise
    except Exception as error:  # whatever another package raises, the other backends go on
        kind = type(error).__name__
        raise BackendUnavailable(
            f"backend {name!r} of the module {module} cannot be loaded: {kind}: {error}"
        ) from error
    if getattr(found, "name", None) != name:
        wrong = getattr(found, "name", None)
        raise BackendUnavailable(f"backend {name!r} of the module {module} must have that name, and has {wrong!r}")
    return found


def loaded() -> tuple[Backend, ...]:
    """Return the backends that have been used in this process."""
    return tuple(_loaded.values())


def available_backends() -> tuple[BackendInfo, ...]:
    """List every backend, whether it is usable here and, if not, why.

    Examples
    --------
    >>> import swl
    >>> [b.name for b in swl.available_backends() if b.usable][:2]
    ['numpy', 'numba']
    """

    def one(name: str) -> BackendInfo:
        try:
            get(name)
        except BackendUnavailable as error:
            return BackendInfo(name, False, str(error))
        return BackendInfo(name, True, "")

    _discover()
    return tuple(one(name) for name in _REGISTRY)


def active() -> str:
    """Name the active backend: `use_backend`, else `set_backend`, else ``SWL_BACKEND``, else numba."""
    name = _in_context.get() or _chosen
    if name is not None:
        return name
    return _known(os.environ.get("SWL_BACKEND") or "auto", "SWL_BACKEND")


def host_backend() -> str:
    """Name the backend for host memory: the active one, or the default where that is a device's."""
    name = active()
    return name if _REGISTRY[name][1] == "host" else _AUTO


def device() -> str:
    """Name the backend for memory on a device."""
    return _DEVICE


def set_backend(name: BackendName | None) -> None:
    """Make `name` the active backend of the process; None returns to ``SWL_BACKEND``.

    Raises
    ------
    ValueError
        If there is no backend of that name.
    BackendUnavailable
        If it cannot run here.
    """
    global _chosen
    if name is not None:
        name = _known(name, "backend")
        get(name)
    _chosen = name


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Make `name` the active backend within a ``with`` block, for this thread or async task only.

    Examples
    --------
    >>> import swl
    >>> with swl.use_backend("numpy"):
    ...     type(swl.asarray([1.0])).__name__
    'ndarray'
    """
    name = _known(name, "backend")
    get(name)
    token = _in_context.set(name)
    try:
        yield
    finally:
        _in_context.reset(token)


def _home(x: ArrayLike) -> tuple[str, str] | None:
    """Library and device of an array; None for lists, numbers and whatever else NumPy makes an array of."""
    if type(x) is np.ndarray:
        return "numpy", "host"
    if isinstance(x, (int, float)):
        return None
    library = type(x).__module__.partition(".")[0]
    if hasattr(x, "__cuda_array_interface__"):
        device = getattr(x, "device", None)
        return library, f"cuda:{getattr(device, 'id', getattr(device, 'index', 0))}"
    if hasattr(x, "__dlpack_device__"):
        kind, index = x.__dlpack_device__()
        return library, f"cuda:{index}" if kind == 2 else "host"
    if isinstance(x, np.ndarray):
        return "numpy", "host"
    return None


def on_device(x: ArrayLike) -> bool:
    """Tell whether `x` is an array in a CUDA device's memory."""
    home = _home(x)
    return home is not None and home[1] != "host"


def resolve(asked: str | None, arrays: Mapping[str, ArrayLike]) -> Backend:
    """Choose the backend of one call: its arrays decide, then what was asked for, then the active backend.

    `arrays` maps argument names to values; None and plain Python values decide nothing. Host arrays go to a device only
    where that was asked for, by argument or by an active device backend.

    Raises
    ------
    TypeError
        If arrays of two libraries or two devices meet, or a host backend is asked to take device arrays.
    """
    first: tuple[str, tuple[str, str]] | None = None
    for name, x in arrays.items():
        if x is None:
            continue
        home = _home(x)
        if home is None:
            continue
        if first is None:
            first = name, home
        elif first[1] != home:
            (a, (lib_a, dev_a)), (lib_b, dev_b) = first, home
            raise TypeError(
                f"{a} is a {lib_a} array on {dev_a} but {name} is a {lib_b} array on {dev_b}; "
                "all arrays of a call must be of one library and on one device"
            )
    if first is not None and first[1][1] != "host":
        if asked is not None and _REGISTRY[_known(asked, "backend")][1] == "host":
            raise TypeError(f"{first[0]} is on {first[1][1]}, where backend {asked!r} cannot reach it")
        return get(asked or _DEVICE)
    return get(asked or active())
