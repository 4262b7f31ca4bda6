"""The seam between the library and its kernels: the operations a backend has, and which backend runs.

A backend is one module with a function ``load()`` that returns a `Backend`, and one line in `_REGISTRY`.
Modules are imported at first use, so ``import swl`` imports none of the libraries behind them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np

from swl.errors import BackendUnavailable
from swl.targets import Target

__all__ = ["Backend", "BackendInfo", "Rows", "backends", "get", "resolve", "set_backend", "use_backend"]


class Rows(NamedTuple):
    """What a forward sweep leaves of each row; every field ``(N,)``, in float32 or, for float64 logits, float64.

    The last three are None unless they were asked for.
    """

    loss: Any  # A·S − d + λ·m·(M + S)², 0 for an ignored row
    row_max: Any  # M = max_c z_c
    log_sum: Any  # S = log Σ_c exp(z_c − M)
    target_dot: Any  # d = Σ_c y_c·(z_c − M)
    mass: Any  # A = Σ_c y_c
    entropy: Any = None  # −Σ_c p_c·log p_c, in nats
    log_prob: Any = None  # log p_t, or Σ_c q_c·log p_c; 0 for an ignored row
    argmax: Any = None  # int64


class Backend(Protocol):
    """The operations. Arguments were checked by the caller and are arrays of this backend, two-dimensional.

    Whoever chooses the backend of a call enters its `scope`, around everything that the call does: the functions, the
    layers and the optimisers. Nothing else in the library knows of devices and streams.

    Matrices may have any strides. ``acc`` below is float64 for float64 operands and float32 for all others; sums are
    formed in it and each result is rounded once, to the dtype of the array it is written to.
    """

    @property
    def name(self) -> str:
        """What the registry calls it."""

    @property
    def xp(self) -> ModuleType:
        """The array library whose arrays the backend works on: numpy or cupy."""

    def scope(self, stream: Any = None, /, **arrays: Any) -> AbstractContextManager[object]:
        """Within it, work goes to the device of `arrays`, and there to `stream` or else to the current stream.

        `arrays` may be of any library, on the host (they decide nothing), or no arrays at all. A device backend raises
        TypeError, naming both, for arrays on two devices; a host backend does for a stream.
        """

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        """Bring `x` to this backend, without a copy where it is there already."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Give an uninitialised C-ordered array for a result."""

    def affine_forward(self, x: Any, W: Any, b: Any | None, out: Any) -> None:
        """``out = x @ W + b`` for `x` (N, D), `W` (D, K), `b` (K,) or None, `out` (N, K)."""

    def affine_backward(
        self, dout: Any, x: Any, W: Any, dx: Any | None, dW: Any | None, db: Any | None, accumulate: int = 0
    ) -> None:
        """``dx = dout @ W.T``, ``dW = x.T @ dout``, ``db = Σ_n dout``: each into its array, or not at all if None.

        With `accumulate` above 0, `dW` and `db` are added to, `dW` in working memory of at most ``2·D·accumulate`` numbers;
        `dx` is always overwritten.
        """

    def prepare_ids(self, ids: Any, n_classes: int, ignore_index: int, weight: Any | None) -> tuple[Any, Any, Any]:
        """Check class ids of any integer dtype and bring them to the form of `Target.ids`.

        Returns the ids as int64, the row weights ``m_n`` (``w_{t_n}``, 0 for an ignored row; None if `weight` is None)
        and ``Σ_n m_n`` (a float on a host, a 0-d float64 array on a device). A host raises ValueError for an id outside
        ``[0, n_classes)``; a device writes `INVALID`, row weight 0, and sets its error flag.
        """

    def cross_entropy_forward(self, logits: Any, target: Target, stats: bool) -> Rows:
        """One sweep over the logits ``(N, C)``: the loss and what the backward sweep needs of each row."""

    def cross_entropy_backward(self, logits: Any, target: Target, rows: Rows, row_scale: Any, out: Any) -> None:
        """Write ``out = row_scale·((A + 2λ·m·(M + S))·p − y)·∂z/∂r``; only `row_max`, `log_sum` and `mass` are read.

        `row_scale` has shape ``(N,)`` or ``(1,)`` and dtype ``acc``. `out` may be `logits` itself. Ignored and invalid
        rows are written as 0.
        """

    def cross_entropy_forward_backward(
        self, logits: Any, target: Target, row_scale: Any, out: Any, stats: bool
    ) -> Rows:
        """Both sweeps in one, bitwise equal to calling them in turn."""

    def total(self, x: Any) -> Any:
        """Sum a vector, of dtype acc, in float64: a number on a host, a 0-d array on a device."""

    def plain_loss(self, logits: Any, ids: Any, ignore_index: int, out: Any | None) -> tuple[Any, float] | None:
        """Compute Σ loss over class ids without options, how many count, and the mean's gradient into `out` unless None.

        All in one call, for problems so small that calls are what takes time, and to the same bits as the operations above.
        Unlike theirs, the arguments were not checked: None, with nothing written, says that those operations must do it.
        """

    def check(self) -> None:
        """Wait for work under way and raise the ValueError of a class id out of range, if there was one."""

    def info(self) -> dict[str, str]:
        """Say what `swl info` prints of this backend."""


# name: (module, where its arrays live)
_REGISTRY: dict[str, tuple[str, Literal["host", "cuda"]]] = {
    "numpy": ("swl.backends._numpy", "host"),
    "numba": ("swl.backends._numba", "host"),
    "cupy": ("swl.backends._cupy", "cuda"),
}
_AUTO = "numba"
_loaded: dict[str, Backend] = {}
_chosen: str | None = None
_in_context: ContextVar[str | None] = ContextVar("swl_backend", default=None)


class BackendInfo(NamedTuple):
    """One line of `backends()`."""

    name: str
    usable: bool
    reason: str
    """Why it is not usable here; empty if it is."""


class _Nothing:
    """Do nothing in a ``with`` block, at half of what `contextlib.nullcontext` costs.

    ``"".format`` runs in C, takes whatever ``with`` gives it, and returns ``""``, which lets an exception pass.
    """

    __slots__ = ()
    __enter__ = __exit__ = "".format


NOTHING = cast("AbstractContextManager[object]", _Nothing())
"""The `Backend.scope` of a host."""


def scope(**arrays: Any) -> AbstractContextManager[object]:
    """Enter the `Backend.scope` of arrays of whatever backend; the first one decides which."""
    first = next(iter(arrays.values()))
    return NOTHING if type(first) is np.ndarray else resolve(None, {"array": first}).scope(**arrays)


def _known(name: object, source: str) -> str:
    if name == "auto":
        return _AUTO
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
        found = _loaded.get(name) or importlib.import_module(_REGISTRY[name][0]).load()
        _loaded[name] = found
    return found


def loaded() -> tuple[Backend, ...]:
    """Return the backends that have been used in this process."""
    return tuple(_loaded.values())


def backends() -> tuple[BackendInfo, ...]:
    """List every backend, whether it is usable here and, if not, why.

    Examples
    --------
    >>> import swl
    >>> [b.name for b in swl.backends() if b.usable][:2]
    ['numpy', 'numba']
    """

    def one(name: str) -> BackendInfo:
        try:
            get(name)
        except BackendUnavailable as error:
            return BackendInfo(name, False, str(error))
        return BackendInfo(name, True, "")

    return tuple(one(name) for name in _REGISTRY)


def active() -> str:
    """Name the active backend: `use_backend`, else `set_backend`, else ``SWL_BACKEND``, else numba."""
    name = _in_context.get() or _chosen
    if name is not None:
        return name
    return _known(os.environ.get("SWL_BACKEND") or "auto", "SWL_BACKEND")


def set_backend(name: str | None) -> None:
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
def use_backend(name: str) -> Iterator[None]:
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


def _home(x: Any) -> tuple[str, str] | None:
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


def on_device(x: Any) -> bool:
    """Tell whether `x` is an array in a CUDA device's memory."""
    home = _home(x)
    return home is not None and home[1] != "host"


def resolve(asked: str | None, arrays: dict[str, Any]) -> Backend:
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


_DEVICE = "cupy"
