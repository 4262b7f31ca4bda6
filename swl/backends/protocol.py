"""The seam between the library and its kernels: the operations that a backend has, and what goes in and out of them.

Each row of logits has a target row ``y``, most of it implied::

    class id t         y_c = (1−ε)·w_t·[c = t] + (ε/C)·w_c        m = w_t
    probabilities q    y_c = w_c·((1−ε)·q_c + ε/C)                m = 1
    ignored            y_c = 0                                    m = 0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np

from swl.typing import Array, ArrayLike, DTypeLike, Stream

__all__ = ["IGNORED", "INVALID", "TF32", "Backend", "Rows", "Target", "host_scope", "joined"]

IGNORED = -1
"""In `Target.ids`: the row does not count."""
INVALID = -2
"""In `Target.ids`, on a device only: the id was out of range; the row's loss is NaN and its gradient 0."""


class Target(NamedTuple):
    """What a kernel needs beside the logits. Arrays are the backend's own; see `swl.backends.Backend`."""

    ids: Array = None  # (N,) int64, contiguous: class ids, IGNORED or INVALID; or None
    probs: Array = None  # (N, C), any real dtype, any strides; None where ids is given
    weight: Array = None  # w (C,), dtype acc, contiguous; None: 1
    row_weight: Array = None  # m (N,), dtype acc, contiguous; None: 1 for a row that counts
    hot: float = 1.0  # 1−ε
    rest: float = 0.0  # ε/C, C counting the classes of all shards
    softcap: float = 0.0  # κ of z = κ·tanh(r/κ); 0: off
    z_loss: float = 0.0  # λ
    temperature: float = 1.0  # τ of r = (logits + bias)/τ; `row_scale` has its 1/τ
    bias: Array = None  # (C,), dtype acc, contiguous, added to the logits before all else; None: 0
    first_class: int = 0  # the class id of column 0; an id outside the columns hits none of them, but its row counts

    def rows(self, start: int, stop: int) -> Target:
        """Cut out the rows ``[start, stop)``."""
        return self._replace(
            ids=None if self.ids is None else self.ids[start:stop],
            probs=None if self.probs is None else self.probs[start:stop],
            row_weight=None if self.row_weight is None else self.row_weight[start:stop],
        )

    def classes(self, start: int, stop: int) -> Target:
        """Cut out the classes ``[start, stop)``, counted from `first_class`."""
        return self._replace(
            probs=None if self.probs is None else self.probs[:, start:stop],
            weight=None if self.weight is None else self.weight[start:stop],
            bias=None if self.bias is None else self.bias[start:stop],
            first_class=self.first_class + start,
        )


class Rows(NamedTuple):
    """What a forward sweep leaves of each row; every field ``(N,)``, in float32 or, for float64 logits, float64.

    The last three are None unless they were asked for.
    """

    loss: Array  # A·S − d + λ·m·(M + S)², 0 for an ignored row
    row_max: Array  # M = max_c z_c
    log_sum: Array  # S = log Σ_c exp(z_c − M)
    target_dot: Array  # d = Σ_c y_c·(z_c − M)
    mass: Array  # A = Σ_c y_c
    entropy: Array = None  # −Σ_c p_c·log p_c, in nats
    log_prob: Array = None  # log p_t, or Σ_c q_c·log p_c; 0 for an ignored row
    argmax: Array = None  # int64

    def cut(self, start: int, stop: int) -> Rows:
        """Cut out the rows ``[start, stop)``."""
        return Rows(*(None if field is None else field[start:stop] for field in self))

    @classmethod
    def joined(cls, xp: ModuleType, parts: Sequence[Rows]) -> Rows:
        """Join parts that follow one another."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(None if field[0] is None else joined(xp, field) for field in zip(*parts, strict=True)))

    @classmethod
    def of_none(cls, xp: ModuleType, acc: DTypeLike, stats: bool) -> Rows:
        """Make the rows of a loss that has none."""
        empty = xp.zeros(0, acc)
        extra = (empty, empty, xp.zeros(0, np.int64)) if stats else ()
        return cls(empty, empty, empty, empty, empty, *extra)


def joined(xp: ModuleType, parts: Sequence[Array], axis: int = 0) -> Array:
    """Join arrays of one dtype along `axis`.

    CuPy's `concatenate` copies a table of addresses from the host, which a captured graph would find overwritten.
    """
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    out, start = xp.empty(tuple(shape), dtype=parts[0].dtype), 0
    for part in parts:
        stop = start + part.shape[axis]
        out[(slice(None),) * axis + (slice(start, stop),)] = part
        start = stop
    return out


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

    def scope(self, stream: Stream | None = None, /, **arrays: ArrayLike) -> AbstractContextManager[object]:
        """Within it, work goes to the device of `arrays`, and there to `stream` or else to the current stream.

        `arrays` may be of any library, on the host (they decide nothing), or no arrays at all. A device backend raises
        TypeError, naming both, for arrays on two devices; a host backend does for a stream.
        """

    def owns(self, x: Array) -> bool:
        """Tell whether `x` is an array of this backend, which `asarray` would return as it is."""

    def asarray(self, x: ArrayLike, dtype: DTypeLike | None = None) -> Array:
        """Bring `x` to this backend, without a copy where it is there already."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Give an uninitialised C-ordered array for a result."""

    def rounded(self, a: Array, dtype: DTypeLike) -> Array:
        """Bring an array to another dtype, in the same layout; itself if it is of it."""

    def affine_forward(self, x: Array, W: Array, b: Array | None, out: Array) -> None:
        """``out = x @ W + b`` for `x` (N, D), `W` (D, K), `b` (K,) or None, `out` (N, K)."""

    def affine_backward(
        self, dout: Array, x: Array, W: Array, dx: Array | None, dW: Array | None, db: Array | None, accumulate: int = 0
    ) -> None:
        """``dx = dout @ W.T``, ``dW = x.T @ dout``, ``db = Σ_n dout``: each into its array, or not at all if None.

        With `accumulate` above 0, all are added to: `dW` in working memory of at most ``2·D·accumulate`` numbers, `dx` in as
        much as it takes itself.
        """

    def prepare_ids(
        self, ids: Array, n_classes: int, ignore_index: int, weight: Array | None
    ) -> tuple[Array, Array, Array]:
        """Check class ids of any integer dtype and bring them to the form of `Target.ids`.

        Returns the ids as int64, the row weights ``m_n`` (``w_{t_n}``, 0 for an ignored row; None if `weight` is None)
        and ``Σ_n m_n`` (a float on a host, a 0-d float64 array on a device). A host raises ValueError for an id outside
        ``[0, n_classes)``; a device writes `INVALID`, row weight 0, and sets its error flag.
        """

    def cross_entropy_forward(self, logits: Array, target: Target, stats: bool) -> Rows:
        """One sweep over the logits ``(N, C)``: the loss and what the backward sweep needs of each row."""

    def gradient_over(self, logits: Array, x: Array, W: Array) -> Array:
        """Give the array, over the memory of ``logits = x·W``, whose dtype the products of the logits' gradient take.

        Logits are rows without gaps. On a host this is `logits` itself. A device gives an array of the dtype of 16-bit `x` and
        `W`, each of its rows at the start of a row of the logits. The sweeps below take it for `out`.
        """

    def cross_entropy_backward(self, logits: Array, target: Target, rows: Rows, row_scale: Array, out: Array) -> None:
        """Write ``out = row_scale·((A + 2λ·m·(M + S))·p − y)·∂z/∂r``; only `row_max`, `log_sum` and `mass` are read.

        `row_scale` has shape ``(N,)`` or ``(1,)`` and dtype ``acc``. `out` may be `logits` itself, or `gradient_over` it.
        Ignored and invalid rows are written as 0.
        """

    def cross_entropy_forward_backward(
        self, logits: Array, target: Target, row_scale: Array, out: Array, stats: bool
    ) -> Rows:
        """Both sweeps in one, bitwise equal to calling them in turn."""

    def total(self, x: Array) -> Array:
        """Sum a vector, of dtype acc, in float64: a number on a host, a 0-d array on a device."""

    def plain_loss(
        self, logits: Array, target: Array, ignore_index: int, out: Array | None
    ) -> tuple[Array, float] | None:
        """Compute Σ loss without options, how many rows count, and the mean's gradient into `out` unless None.

        All in one call, for problems so small that calls are what takes time, and to the same bits as the operations above.
        Unlike theirs, the arguments were not checked: None, with nothing written, says that those operations must do it.
        """

    def by_rows(self, work: Callable[[int, int], object], n_rows: int, row_size: int) -> None:
        """Call ``work(begin, end)`` for ranges of rows that cover `n_rows`, perhaps several at a time.

        For what is written with `xp` over rows of `row_size` numbers: a range is so small that temporaries of its size cost little.
        """

    def check(self) -> None:
        """Wait for work under way and raise the ValueError of a class id out of range, if there was one."""

    def info(self) -> dict[str, str]:
        """Say what `swl info` prints of this backend."""


TF32: ContextVar[bool | None] = ContextVar("swl_tf32", default=None)
"""Whether a device may multiply float32 with TF32's 10 bits behind the point; None: as its array library does."""


def host_scope() -> AbstractContextManager[object]:
    """Give the `Backend.scope` of a host: what underflows is 0, and no error, whatever `numpy.errstate` the caller has set."""
    return np.errstate(under="ignore")
