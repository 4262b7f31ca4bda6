"""Hypothesis strategies: logits of every dtype, shape and layout, targets of every kind, options in combination."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import oracle
from hypothesis import strategies as st

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
INTEGERS = [np.dtype(code) for code in ("i1", "u2", "u4", "u8", "u1", "i2", "i4", "i8")]
PROBABILITIES = [*FLOATS, np.dtype(np.uint8), np.dtype(bool), np.dtype(np.int64)]


def acc_dtype(dtype: Any) -> Any:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


# ------------------------------------------------------------------------------------------------ layouts


class Layout(NamedTuple):
    """A way of lying in memory: `store` gives the array to allocate, `view` the wanted one out of it.

    What lies between the elements is NaN (or the type's largest value), so that reading it shows.
    """

    name: str
    store: Any
    view: Any

    def __repr__(self) -> str:
        return self.name


def _filled(x: Any, shape: tuple[int, ...]) -> Any:
    poison = np.nan if x.dtype.kind == "f" or x.dtype == BFLOAT16 else x.dtype == bool or np.iinfo(x.dtype).max
    return np.full(shape, poison, dtype=x.dtype)


def _spread(x: Any) -> Any:
    base = _filled(x, (*x.shape[:-1], 2 * x.shape[-1] + 1))
    base[..., 1::2] = x
    return base


def _padded(x: Any) -> Any:
    base = _filled(x, (*x.shape[:-1], x.shape[-1] + 3))
    base[..., 1:-2] = x
    return base


def _every_other_row(x: Any) -> Any:
    base = _filled(x, (2 * x.shape[0], *x.shape[1:]))
    base[::2] = x
    return base


CONTIGUOUS = Layout("contiguous", lambda x: x, lambda a: a)
LAYOUTS = [
    CONTIGUOUS,
    Layout("transposed", lambda x: x.swapaxes(0, -1), lambda a: a.swapaxes(0, -1)),
    Layout("every other class", _spread, lambda a: a[..., 1::2]),
    Layout("padded rows", _padded, lambda a: a[..., 1:-2]),
    Layout("every other row", _every_other_row, lambda a: a[::2]),
    Layout("classes backwards", lambda x: x[..., ::-1], lambda a: a[..., ::-1]),
    Layout("rows backwards", lambda x: x[::-1], lambda a: a[::-1]),
]


def place(backend: Any, x: Any, layout: Layout, *, writeable: bool = False) -> Any:
    """Bring `x` to the backend in the given layout; read-only on a host unless `writeable`."""
    if x.ndim == 0:
        return backend.array(x)
    view = layout.view(backend.array(np.ascontiguousarray(layout.store(x)), writeable=writeable))
    assert view.shape == x.shape
    return view


def repeat_first(backend: Any, x: Any, axis: int) -> Any:
    """Broadcast the first slice of `x` along `axis`, with stride 0."""
    one = backend.array(np.ascontiguousarray(x.take([0], axis=axis)))
    return backend.ops.xp.broadcast_to(one, x.shape)


# ------------------------------------------------------------------------------------------------ cross-entropy


@dataclass
class Case:
    """One call of the loss: NumPy arrays, and how logits and target are to lie in memory."""

    logits: Any
    target: Any
    layout: Layout = CONTIGUOUS
    options: dict[str, Any] = field(default_factory=dict)
    dout: Any = 1.0

    @property
    def dtype(self) -> Any:
        return self.logits.dtype

    @property
    def acc(self) -> Any:
        return acc_dtype(self.logits.dtype)

    def on(self, backend: Any) -> tuple[Any, Any, dict[str, Any], Any]:
        """Bring everything to the backend: logits and target read-only, then options and dout."""

        def vector(x: Any) -> Any:
            return backend.array(x, writeable=True) if isinstance(x, np.ndarray) else x

        options = {name: vector(value) for name, value in self.options.items()}
        dout = vector(self.dout)
        return (
            place(backend, self.logits, self.layout),
            place(backend, self.target, self.layout),
            options,
            dout,
        )

    def answer(self) -> oracle.Answer:
        return oracle.cross_entropy(self.logits, self.target, dout=self.dout, **self.options)


CLASSES = st.one_of(
    st.integers(1, 40),
    st.sampled_from([63, 64, 65, 127, 128, 129, 255, 257, 511, 513, 1000, 1023, 1024, 1025, 2049]),
)
LEADING = st.one_of(
    st.tuples(st.integers(0, 9)),
    st.sampled_from([(), (1,), (2, 3), (1, 4, 2), (2, 0), (33,)]),
)
SIZES = st.sampled_from([0.0, 1.0, 5.0, 30.0, 160.0, 1e4])


def random_logits(rng: Any, shape: tuple[int, ...], dtype: Any, size: float) -> Any:
    """Normal numbers of standard deviation `size`, now and then with equal maxima."""
    z = (size * rng.standard_normal(shape)).astype(dtype)
    return np.round(z.astype(np.float64)).astype(dtype) if rng.random() < 0.2 else z


def random_ids(rng: Any, leading: tuple[int, ...], C: int, dtype: Any, ignored: float, ignore_index: int) -> Any:
    if not np.iinfo(dtype).min <= ignore_index <= np.iinfo(dtype).max:
        ignore_index, ignored = 0, 0
    largest = min(C, np.iinfo(dtype).max + 1)
    ids = np.asarray(rng.integers(0, largest, leading)).astype(dtype)
    return np.where(rng.random(leading) < ignored, np.asarray(ignore_index).astype(dtype), ids)


def random_probabilities(rng: Any, leading: tuple[int, ...], C: int, dtype: Any) -> Any:
    if dtype.kind in "biu":
        return (np.arange(C) == np.asarray(rng.integers(0, C, leading))[..., None]).astype(dtype)
    q = rng.exponential(size=(*leading, C)) * (rng.random((*leading, C)) < 0.8)
    return (q / np.maximum(q.sum(axis=-1, keepdims=True), 1e-3)).astype(dtype)


@st.composite
def cases(draw: Any, dtypes: Any = FLOATS, kinds: Any = ("ids", "probabilities")) -> Case:
    """Draw a call with every option on or off by itself.

    Backends compile for dtypes and layouts, so only some pairs of them are drawn; every single one has its own test.
    """
    dtype = draw(st.sampled_from(dtypes))
    acc = acc_dtype(dtype)
    layout = draw(st.sampled_from(LAYOUTS))
    leading, C = draw(LEADING), draw(CLASSES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = random_logits(rng, (*leading, C), dtype, draw(SIZES))
    options: dict[str, Any] = {}
    if draw(st.sampled_from(kinds)) == "ids":
        id_dtype = draw(st.sampled_from(INTEGERS[-4:]))
        ignore_index = draw(st.sampled_from([-100, 0, C - 1, C, 99]))
        target = random_ids(rng, leading, C, id_dtype, draw(st.sampled_from([0.0, 0.3, 1.0])), ignore_index)
        if ignore_index != -100:
            options["ignore_index"] = ignore_index
    else:
        of = draw(st.sampled_from([dtype, *PROBABILITIES[-3:]])) if layout is CONTIGUOUS else dtype
        target = random_probabilities(rng, leading, C, of)
    on = st.booleans()
    if draw(on):
        options["weight"] = (rng.random(C) * (rng.random(C) < 0.9)).astype(acc)
    if draw(on):
        options["label_smoothing"] = draw(st.sampled_from([0.1, 0.5, 0.99]))
    if draw(on):
        options["sample_weight"] = np.asarray(rng.random(leading)).astype(draw(st.sampled_from([acc, FLOATS[0]])))
    if draw(on):
        options["z_loss"] = draw(st.sampled_from([1e-4, 0.3]))
    if draw(on):
        options["softcap"] = draw(st.sampled_from([1.5, 30.0]))
    if draw(on):
        options["temperature"] = draw(st.sampled_from([0.7, 3.0]))
    options["reduction"] = reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    if reduction == "mean" and draw(on):
        options["denominator"] = draw(st.sampled_from([7, 0.3]))
    dout: Any = draw(st.sampled_from([1.0, 1, -2.5, 0.0]))
    if reduction == "none" and draw(on):
        dout = np.asarray(rng.standard_normal(leading)).astype(acc)
    return Case(logits, target, layout, options, dout)
