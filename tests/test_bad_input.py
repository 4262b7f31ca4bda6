"""Bad input gets an error that names the argument, what came and what is legal, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cases import FLOATS

import swl
from swl.distributed import Checkpoints

CE = swl.cross_entropy_value_and_grad
GOOD = {"logits": np.zeros((3, 4), np.float32), "target": np.array([0, 1, 2])}
NAN, INF = float("nan"), float("inf")


def call(backend: Any, **changes: Any) -> Any:
    args = {k: backend.array(v) if isinstance(v, np.ndarray) else v for k, v in {**GOOD, **changes}.items()}
    return swl.cross_entropy_value_and_grad(args.pop("logits"), args.pop("target"), **args)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        # shapes
        ({"logits": np.zeros((3, 0), np.float32)}, ValueError, "logits.*at least one class.*3, 0"),
        ({"logits": np.float32(1).reshape(())}, ValueError, r"logits.*\(\)"),
        ({"target": np.array([0, 1])}, ValueError, r"target.*\(3,\).*\(3, 4\).*\(2,\)"),
        ({"target": np.zeros((3, 5))}, ValueError, r"target.*\(3, 4\).*\(3, 5\)"),
        ({"target": np.zeros((3, 4, 1))}, ValueError, r"target.*\(3, 4, 1\)"),
        ({"weight": np.ones(3, np.float32)}, ValueError, r"weight.*\(4,\).*\(3,\)"),
        ({"weight": np.ones((4, 1), np.float32)}, ValueError, r"weight.*\(4,\).*\(4, 1\)"),
        ({"sample_weight": np.ones(4, np.float32)}, ValueError, r"sample_weight.*\(3,\).*\(4,\)"),
        ({"dout": np.ones(3, np.float32)}, ValueError, r"dout.*\(3,\)"),
        ({"dout": np.ones(4, np.float32), "reduction": "none"}, ValueError, r"dout.*\(3,\).*\(4,\)"),
        ({"out": np.zeros((3, 5), np.float32)}, ValueError, r"out.*\(3, 4\).*\(3, 5\)"),
        # dtypes
        ({"logits": np.zeros((3, 4), np.int64)}, TypeError, "logits.*float.*int64"),
        ({"logits": np.zeros((3, 4), complex)}, TypeError, "logits.*complex"),
        ({"target": np.array([0.0, 1.0, 2.0])}, TypeError, "target.*integer.*float64"),
        ({"target": np.array([True, False, True])}, TypeError, "target.*integer.*bool"),
        ({"target": np.zeros((3, 4), complex)}, TypeError, "target.*complex"),
        ({"weight": np.ones(4, complex)}, TypeError, "weight.*complex"),
        ({"sample_weight": np.ones(3, complex)}, TypeError, "sample_weight.*complex"),
        ({"dout": np.ones((), complex)}, TypeError, "dout.*complex"),
        ({"out": np.zeros((3, 4), np.float64)}, TypeError, "out.*float32.*float64"),
        # options
        ({"reduction": "avg"}, ValueError, "reduction.*'avg'.*'mean'"),
        ({"reduction": None}, ValueError, "reduction"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing.*\[0, 1\).*1.0"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing.*-0.1"),
        ({"label_smoothing": NAN}, ValueError, "label_smoothing.*nan"),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing.*'0.1'"),
        ({"label_smoothing": None}, TypeError, "label_smoothing.*None"),
        ({"z_loss": NAN}, ValueError, "z_loss.*nan"),
        ({"z_loss": -1.0}, ValueError, "z_loss.*-1.0"),
        ({"z_loss": INF}, ValueError, "z_loss.*inf"),
        ({"softcap": 0.0}, ValueError, "softcap.*0.0"),
        ({"softcap": -5.0}, ValueError, "softcap.*-5.0"),
        ({"softcap": NAN}, ValueError, "softcap.*nan"),
        ({"softcap": INF}, ValueError, "softcap.*inf"),
        ({"softcap": True}, TypeError, "softcap.*True"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature.*-1.0"),
        ({"temperature": None}, TypeError, "temperature.*None"),
        ({"denominator": 0}, ValueError, "denominator.*0"),
        ({"denominator": -2.0}, ValueError, "denominator.*-2.0"),
        ({"denominator": NAN}, ValueError, "denominator.*nan"),
        ({"denominator": 2.0, "reduction": "sum"}, ValueError, "denominator.*'mean'.*'sum'"),
        ({"denominator": np.ones(3)}, TypeError, "denominator"),
        ({"denominator": np.array(1 + 2j)}, TypeError, "denominator.*complex"),
        # numbers that are others in the arithmetic's dtype
        ({"softcap": 1e-46}, ValueError, r"softcap.*\[9.86e-32, 1.01e\+31\].*float32.*1e-46"),
        ({"softcap": 1e-40}, ValueError, "softcap.*float32.*1e-40"),
        ({"softcap": 1e300}, ValueError, r"softcap.*float32.*1e\+300"),
        ({"z_loss": 1e-46}, ValueError, "z_loss must be 0 or.*float32.*1e-46"),
        ({"z_loss": 1e300}, ValueError, r"z_loss.*float32.*1e\+300"),
        ({"label_smoothing": 1e-46}, ValueError, r"label_smoothing.*, 1\).*float32.*1e-46"),
        ({"temperature": 1e-46}, ValueError, r"temperature must be in \[9.86e-32.*float32.*1e-46"),
        ({"denominator": 1e-300}, ValueError, r"denominator must be in \[.*float32.*1e-300"),
        ({"denominator": 1e300}, ValueError, r"denominator.*float32.*1e\+300"),
        ({"logits": np.zeros((3, 4)), "softcap": 1e-300}, ValueError, "softcap.*float64.*1e-300"),
        ({"logits": np.zeros((3, 4)), "z_loss": 1e300}, ValueError, r"z_loss.*float64.*1e\+300"),
        # what is no number, or none that Python can bring to a float
        *(
            ({name: value}, error, name)
            for name in ("label_smoothing", "z_loss", "softcap", "temperature", "denominator")
            for value, error in (
                (10**400, ValueError),
                (-(10**5000), ValueError),  # which Python refuses to print
                (Fraction(10**400), ValueError),
                (Decimal("0.5"), TypeError),
                ("0.5", TypeError),
                (np.ones(3), TypeError),
                ([1.0], TypeError),
                (1j, TypeError),
            )
        ),
        ({"weight": [[1.0, 2.0], [3.0]]}, TypeError, "weight.*array of numbers"),
        ({"check": np.ones(3)}, TypeError, "check"),
        ({"dout": 10**400}, ValueError, "dout"),
        ({"dout": Decimal(1)}, TypeError, "dout"),
        ({"dout": "1"}, TypeError, "dout"),
        ({"ignore_index": Fraction(1)}, TypeError, "ignore_index"),
        ({"ignore_index": "1"}, TypeError, "ignore_index"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index.*1.0"),
        ({"ignore_index": True}, TypeError, "ignore_index.*True"),
        ({"check": "yes"}, TypeError, "check.*'yes'"),
        ({"smoothing": 0.1}, TypeError, "smoothing.*label_smoothing"),
        # what is no array, or has a shape that is nearly right
        ({"logits": None}, TypeError, "logits must be an array of numbers, got None"),
        ({"logits": "abc"}, TypeError, "logits must be an array of numbers, got 'abc'"),
        ({"target": None}, TypeError, "target must be an array of numbers, got None"),
        ({"target": "abc"}, TypeError, "target must be an array of numbers, got 'abc'"),
        ({"target": 1}, ValueError, r"target must have shape \(3,\).*\(3, 4\).*got \(\)"),
        ({"target": np.array([[0], [1], [2]])}, ValueError, r"target.*\(3, 1\); target.reshape\(-1\) has the shape"),
        ({"target": np.array([[0, 1, 2]])}, ValueError, r"target.*\(1, 3\); target.reshape\(-1\) has the shape"),
        (
            {"logits": np.zeros((1, 4)), "target": np.array([[2]])},
            ValueError,
            r"target.*\(1, 1\); target.reshape\(-1\)",
        ),
        (
            {"logits": np.zeros((2, 2, 4)), "target": np.zeros(4, int)},
            ValueError,
            r"\(4,\); target.reshape\(\(2, 2\)\)",
        ),
        ({"weight": "abc"}, TypeError, "weight must be an array of numbers, got 'abc'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_the_error_names_argument_what_came_and_what_is_legal(
    backend: Any, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=rf"(?s){words}"):
        call(backend, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"denominator": np.array(-2.0)}, "denominator.*-2.0"),
        ({"denominator": np.array(NAN)}, "denominator.*nan"),
        ({"denominator": np.array(1e-46)}, "denominator.*float32.*1e-46"),
        ({"reduction": np.array(["mean", "sum"])}, "reduction.*'mean'"),
    ],
)
def test_an_option_in_an_array_is_checked_where_it_can_be_looked_at(
    host_backend: Any, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        call(host_backend, **changes)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("bad", [4, -1, 100, -99, -128])
def test_a_class_id_out_of_range(backend: Any, bad: int, dtype: Any) -> None:
    """Named with row, value and range; on a host before anything is written."""
    target = np.array([1, -100, bad], dtype)
    words = rf"target\[2\] is {bad}.*\[0, 4\).*ignore_index=-100"
    out = backend.array(np.full((3, 4), 7, np.float32), writeable=True)
    with pytest.raises(ValueError, match=words):
        call(backend, target=target, out=out, check=True)
    if backend.is_host:
        assert np.all(backend.numpy(out) == 7)
        with pytest.raises(ValueError, match=words):
            swl.cross_entropy(GOOD["logits"], target)
        return
    loss, grad = call(backend, target=target, reduction="none")
    assert np.isnan(backend.numpy(loss)[2])
    assert np.all(backend.numpy(grad)[2] == 0)
    assert np.all(np.isfinite(backend.numpy(loss)[:2]))
    with pytest.raises(ValueError, match=words):
        swl.check()


@pytest.mark.parametrize("bad", [2**32, 2**31, -(2**32), 2**63 - 1, -(2**63)])
def test_a_class_id_that_is_legal_modulo_two_to_the_32(backend: Any, bad: int) -> None:
    with pytest.raises(ValueError, match=rf"target\[0\] is {bad}"):
        call(backend, target=np.array([bad, 0, 1]), check=True)


def test_a_class_id_past_int64(backend: Any) -> None:
    with pytest.raises(ValueError, match=r"target\[0\]"):
        call(backend, target=np.array([2**64 - 1, 0, 1], np.uint64), check=True)


def test_the_first_bad_row_is_named_in_any_leading_shape(backend: Any) -> None:
    logits, target = np.zeros((2, 2, 4), np.float32), np.array([[0, 1], [9, 7]])
    with pytest.raises(ValueError, match=r"target.* is 9"):
        call(backend, logits=logits, target=target, check=True)


def test_an_ignore_index_outside_the_classes_is_legal_and_only_it(backend: Any) -> None:
    call(backend, target=np.array([0, 255, 1]), ignore_index=255, check=True)
    with pytest.raises(ValueError, match=r"target\[1\] is -100"):
        call(backend, target=np.array([0, -100, 1]), ignore_index=255, check=True)


def test_out_that_overlaps_the_logits_without_being_them(backend: Any) -> None:
    base = backend.array(np.zeros((4, 4), np.float32), writeable=True)
    target = backend.array(np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="out overlaps logits"):
        swl.cross_entropy_value_and_grad(base[:3], target, out=base[1:])
    with pytest.raises(ValueError, match="out overlaps logits"):
        swl.cross_entropy_value_and_grad(base, backend.array(np.array([0, 1, 2, 3])), out=base.T)
    with pytest.raises(ValueError, match="out overlaps logits"):
        swl.cross_entropy_value_and_grad(base[:3], target, out=base[2::-1])


def test_out_that_is_another_view_of_the_logits_is_in_place(backend: Any) -> None:
    base = backend.array(np.eye(3, 4, dtype=np.float32), writeable=True)
    _, want = call(backend, logits=np.eye(3, 4, dtype=np.float32))
    swl.cross_entropy_value_and_grad(base[:], backend.array(GOOD["target"]), out=base[:])
    np.testing.assert_array_equal(backend.numpy(base), backend.numpy(want))


def test_out_that_overlaps_another_operand(backend: Any) -> None:
    logits = backend.array(GOOD["logits"])
    q = backend.array(np.full((3, 4), 0.25, np.float32), writeable=True)
    with pytest.raises(ValueError, match="out overlaps target"):
        swl.cross_entropy_value_and_grad(logits, q, out=q)
    base = backend.array(np.ones(16, np.float32), writeable=True)
    with pytest.raises(ValueError, match="out overlaps weight"):
        swl.cross_entropy_value_and_grad(
            logits, backend.array(GOOD["target"]), weight=base[:4], out=base[:12].reshape(3, 4)
        )
    with pytest.raises(ValueError, match="out overlaps dout"):
        swl.cross_entropy_value_and_grad(
            logits, backend.array(GOOD["target"]), reduction="none", dout=base[8:11], out=base[:12].reshape(3, 4)
        )


@pytest.mark.parametrize("C", [4, 300, 9001])
@pytest.mark.parametrize("beside", ["side by side", "interleaved", "row by row"])
def test_out_beside_the_logits_in_one_buffer(backend: Any, beside: str, C: int) -> None:
    """Two parts of one array lie between each other's bounds and share nothing."""
    z = np.random.default_rng(0).normal(size=(3, C)).astype(np.float32)
    _, want = swl.cross_entropy_value_and_grad(backend.array(z), backend.array(GOOD["target"]))
    shape = (6, C) if beside == "row by row" else (3, 2 * C)
    here, there = {
        "side by side": ((slice(None), slice(C)), (slice(None), slice(C, None))),
        "interleaved": ((slice(None), slice(0, None, 2)), (slice(None), slice(1, None, 2))),
        "row by row": (slice(0, None, 2), slice(1, None, 2)),
    }[beside]
    both = np.zeros(shape, np.float32)
    both[here] = z
    base = backend.array(both, writeable=True)
    swl.cross_entropy_value_and_grad(base[here], backend.array(GOOD["target"]), out=base[there])
    both[there] = backend.numpy(want)
    np.testing.assert_allclose(backend.numpy(base), both, rtol=1e-6, atol=1e-7)
    logits, out = (base.reshape(-1)[start:][: 3 * C].reshape(3, C) for start in (0, 3 * C - 1))
    with pytest.raises(ValueError, match="out overlaps logits"):  # by one element
        swl.cross_entropy_value_and_grad(logits, backend.array(GOOD["target"]), out=out)


def test_out_of_overlapping_elements(backend: Any) -> None:
    """A stride of 0 would give several gradients one place."""
    if not backend.is_host:
        base = backend.array(np.zeros((1, 4), np.float32))
        out = backend.ops.xp.broadcast_to(base, (3, 4))
    else:
        out = np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (3, 4), (0, 4))
    with pytest.raises(ValueError, match="out"):
        swl.cross_entropy_value_and_grad(backend.array(GOOD["logits"]), backend.array(GOOD["target"]), out=out)


def test_out_of_another_kind(backend: Any) -> None:
    with pytest.raises(TypeError, match=r"out.*list"):
        swl.cross_entropy_value_and_grad(
            backend.array(GOOD["logits"]), backend.array(GOOD["target"]), out=[[0.0] * 4] * 3
        )


def test_out_that_is_read_only(host_backend: Any) -> None:
    with pytest.raises(ValueError, match="out is read-only"):
        call(host_backend, out=np.zeros((3, 4), np.float32))


def test_streams_are_for_devices(host_backend: Any) -> None:
    x, W, t = np.zeros((2, 3)), np.zeros((3, 4)), np.array([0, 1])
    calls = {
        swl.affine: (x, W),
        swl.affine_backward: (x @ W, x, W),
        swl.cross_entropy: (x, t),
        swl.cross_entropy_value_and_grad: (x, t),
        swl.linear_cross_entropy: (x, W, t),
        swl.linear_cross_entropy_value_and_grad: (x, W, t),
    }
    for function, operands in calls.items():
        with pytest.raises(TypeError, match=f"stream is for arrays on a device, .*{host_backend.name}"):
            function(*operands, stream=0)


# ------------------------------------------------------------------------------------------------ everything else

X, W, IDS = np.zeros((3, 4), np.float32), np.ones((4, 2), np.float32), np.array([0, 1, 1])
HUGE = 10**400


def masked(x: Any) -> Any:
    return np.ma.masked_array(x, mask=np.arange(x.size).reshape(x.shape) == 0)


def trained() -> Any:
    """A layer with gradients."""
    layer = swl.Affine(W.copy(), np.zeros(2, np.float32))
    layer.backward(layer.forward(X))
    return layer


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    return np.lib.stride_tricks.as_strided(np.zeros(64, np.float32), shape, strides)


CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # masked arrays, whose mask would be dropped
    (lambda: swl.cross_entropy(masked(X), IDS), TypeError, "logits is a masked array.*logits.filled"),
    (lambda: swl.cross_entropy(X, masked(IDS)), TypeError, "target is a masked array.*ignore_index"),
    (lambda: swl.cross_entropy(X, IDS, weight=masked(np.ones(4))), TypeError, "weight is a masked array"),
    (lambda: swl.cross_entropy(X, IDS, sample_weight=masked(np.ones(3))), TypeError, "sample_weight is a masked array"),
    (lambda: swl.cross_entropy(X, masked(np.full((3, 4), 0.25))), TypeError, "target is a masked array"),
    (lambda: swl.linear_cross_entropy(masked(X), W, IDS), TypeError, "x is a masked array"),
    (lambda: swl.linear_cross_entropy(X, masked(W), IDS), TypeError, "W is a masked array"),
    (lambda: swl.affine(masked(X), W), TypeError, "x is a masked array"),
    (lambda: swl.affine(X, W, masked(np.ones(2))), TypeError, "b is a masked array"),
    (lambda: swl.affine_backward(masked(np.ones((3, 2))), X, W), TypeError, "dout is a masked array"),
    (lambda: swl.Affine(masked(W)), TypeError, "W is a masked array"),
    (lambda: swl.Affine(W).forward(masked(X)), TypeError, "x is a masked array"),
    (lambda: trained().backward(masked(np.ones((3, 2)))), TypeError, "dout is a masked array"),
    (lambda: swl.ReLU().forward(masked(X)), TypeError, "x is a masked array"),
    (lambda: swl.Sigmoid().forward(masked(X)), TypeError, "x is a masked array"),
    (lambda: swl.SoftmaxWithLoss().forward(masked(X), IDS), TypeError, "(x|logits) is a masked array"),
    (lambda: swl.SoftmaxWithLoss().forward(X, masked(IDS)), TypeError, "t is a masked array"),
    (lambda: swl.Embedding(W).forward(masked(IDS)), TypeError, "x is a masked array"),
    (lambda: swl.AffineSoftmaxWithLoss(W).forward(masked(X), IDS), TypeError, "x is a masked array"),
    (
        lambda: swl.SGD().update({"W": np.ones(3)}, {"W": masked(np.ones(3))}),
        TypeError,
        r"grads\['W'\] is a masked array",
    ),
    (lambda: swl.AdamW().update({"W": masked(np.ones(3))}, {"W": np.ones(3)}), TypeError, r"params\['W'\] is a masked"),
    (lambda: swl.Affine(W).load_state_dict({"W": masked(W)}), TypeError, r"state\['W'\] is a masked array"),
    (lambda: swl.asarray(masked(X)), TypeError, "x is a masked array"),
    # what is no array, and what is no backend
    (lambda: swl.cross_entropy(X, IDS, backend="zz"), ValueError, "backend is 'zz'; legal names are 'numpy'"),
    (lambda: swl.affine(None, W), TypeError, "x must be an array of numbers, got None"),
    (lambda: swl.affine(X, None), TypeError, "W must be an array of numbers, got None"),
    (lambda: swl.affine(X, W, "b"), TypeError, "b must be an array of numbers, got 'b'"),
    (lambda: swl.affine_backward(None, X, W), TypeError, "dout must be an array of numbers, got None"),
    (lambda: swl.linear_cross_entropy(X, "W", IDS), TypeError, "W must be an array of numbers, got 'W'"),
    (lambda: swl.linear_cross_entropy(X, W, None), TypeError, "target must be an array of numbers, got None"),
    (lambda: swl.Affine(None), TypeError, "W must be an array of numbers, got None"),
    (lambda: swl.ReLU().forward(None), TypeError, "x must be an array of numbers, got None"),
    (lambda: swl.ReLU().forward("x"), TypeError, "x must be an array of numbers, got 'x'"),
    (lambda: swl.asarray([[1], [2, 3]]), TypeError, "x must be an array of numbers: "),
    (lambda: swl.asarray([1], "foo"), TypeError, "dtype one that it can be brought to.*foo"),
    (lambda: swl.cross_entropy(X, [[0], [1, 2]]), TypeError, "target must be an array of numbers: "),
    (lambda: swl.cross_entropy([[None, 1.0]], [0]), TypeError, "logits must be float16.*got object"),
    (lambda: swl.cross_entropy(np.zeros(3, "f4,f4"), IDS), TypeError, r"logits must be float16.*got \[\('f0'"),
    (
        lambda: swl.cross_entropy(np.zeros((3, 4), "M8[s]"), IDS),
        TypeError,
        r"logits must be float16.*got datetime64\[s\]",
    ),
    # yes or no beside logits of one class
    (
        lambda: swl.cross_entropy(X[:, :1], IDS[:, None]),
        ValueError,
        r"target.*\(3, 1\), dtype int64.*one class.*\(3,\)",
    ),
    (lambda: swl.cross_entropy(X[:, :1], IDS[:, None] > 0), ValueError, r"target.*dtype bool.*one class"),
    # an array whose elements share memory
    (lambda: CE(X, IDS, out=strided((3, 4), (4, 4))), ValueError, r"out must have a place for every element.*\(4, 4\)"),
    (lambda: CE(X, IDS, out=strided((3, 4), (8, 4))), ValueError, "out must have a place for every element"),
    (lambda: CE(X, IDS, out=strided((3, 4), (-4, 4))), ValueError, "out must have a place for every element"),
    (lambda: CE(X, IDS, out=strided((3, 4), (16, 2))), ValueError, "out must have a place for every element"),
    # sizes, numbers and seeds
    (lambda: swl.plan(1.5, 2, 3), TypeError, "N must be an integer, got 1.5"),
    (lambda: swl.plan(1, "2", 3), TypeError, "D must be an integer, got '2'"),
    (lambda: swl.plan(1, 2, True), TypeError, "C must be an integer, got True"),
    (lambda: swl.plan(1, 2, np.ones(2)), TypeError, r"C must be an integer, got an array of shape \(2,\)"),
    (lambda: swl.plan(1, 2, -HUGE), ValueError, "C must be at least 0, got -1000"),
    (lambda: swl.plan(1, 2, 3, dtype="int8"), TypeError, "dtype must be float16.*got 'int8'"),
    (lambda: swl.plan(1, 2, 3, dtype="foo"), TypeError, "dtype must be float16.*got 'foo'"),
    (lambda: swl.plan(1, 2, 3, needs=3), TypeError, "needs must be a collection of 'dx', 'dW' and 'db', got 3"),
    (lambda: swl.plan(1, 2, 3, needs=["dx", 3]), ValueError, "needs may name 'dx', 'dW' and 'db' only"),
    (lambda: swl.plan(1, 2, 3, memory_budget=1.5), TypeError, "memory_budget.*integer, got 1.5"),
    (lambda: swl.plan(1, 2, 3, memory_budget=0), ValueError, "memory_budget must be above 0 bytes, got 0"),
    (lambda: swl.Affine.init(2.5, 3), TypeError, "D must be an integer, got 2.5"),
    (lambda: swl.Affine.init("2", 3), TypeError, "D must be an integer, got '2'"),
    (lambda: swl.Affine.init(2, 0), ValueError, "K must be at least 1, got 0"),
    (
        lambda: swl.Affine.init(2, 3, rng="a"),
        TypeError,
        "rng must be a numpy.random.Generator, a seed or None, got 'a'",
    ),
    (lambda: swl.Affine.init(2, 3, rng=-1), TypeError, "rng must be.*got -1"),
    (lambda: swl.Affine.init(2, 3, dtype="int8"), TypeError, "dtype must be float16.*got 'int8'"),
    (lambda: swl.Affine.init(2, 3, dtype="foo"), TypeError, "dtype must be float16.*got 'foo'"),
    (lambda: swl.Embedding.init(2.0, 3), TypeError, "V must be an integer, got 2.0"),
    (lambda: swl.Embedding.init(2, 3, dtype=complex), TypeError, "dtype must be float16.*complex"),
    (lambda: swl.SGD(lr=HUGE), ValueError, r"lr must be in \[0, inf\), got 1000"),
    (lambda: swl.SGD(lr="0.1"), TypeError, r"lr must be a real number, in \[0, inf\), got '0.1'"),
    (lambda: swl.SGD(lr=None), TypeError, "lr must be a real number.*got None"),
    (lambda: swl.SGD(lr=np.ones(2)), TypeError, r"lr must be a real number.*got an array of shape \(2,\)"),
    (lambda: swl.SGD(lr=INF), ValueError, "lr must be in.*got inf"),
    (lambda: swl.SGD(momentum=1), ValueError, r"momentum must be in \[0, 1\), got 1"),
    (lambda: swl.SGD(weight_decay=NAN), ValueError, "weight_decay must be in.*got nan"),
    (lambda: swl.AdamW(betas=0.9), TypeError, "betas must be two numbers, got 0.9"),
    (lambda: swl.AdamW(betas=(0.9,)), TypeError, r"betas must be two numbers, got \(0.9,\)"),
    (lambda: swl.AdamW(betas=(0.9, "b")), TypeError, r"betas\[1\] must be a real number.*got 'b'"),
    (lambda: swl.AdamW(betas=(1.0, 0.9)), ValueError, r"betas\[0\] must be in \[0, 1\), got 1.0"),
    (lambda: swl.AdamW(eps=1j), TypeError, "eps must be a real number.*got 1j"),
    (lambda: swl.set_num_threads(1.5), TypeError, "n must be an integer above 0 or None, got 1.5"),
    (lambda: swl.set_num_threads(0), ValueError, "n must be above 0, got 0"),
    (lambda: swl.set_backend("zz"), ValueError, "backend is 'zz'; legal names are"),
    (lambda: swl.set_backend(3), ValueError, "backend is 3; legal names are"),
    (lambda: swl.warmup("int8"), ValueError, "dtypes may name 'float32'.*got 'int8'"),
    # optimisers
    (
        lambda: swl.SGD().update(None, None),
        TypeError,
        "params and grads must both be mappings.*got NoneType and NoneType",
    ),
    (lambda: swl.SGD().update("W", "W"), TypeError, "params and grads must both be mappings.*got str and str"),
    (lambda: swl.SGD().update({"W": W}, [W]), TypeError, "params and grads must both be.*got dict and list"),
    (
        lambda: swl.SGD().update([1.0], [2.0]),
        TypeError,
        r"params\[0\] and its gradient must be arrays, got float, float",
    ),
    (lambda: swl.SGD().update([W], [W, W]), ValueError, "params and grads must be of one length, got 1 and 2"),
    (lambda: swl.SGD().update({"a": W}, {"b": W}), ValueError, r"same keys, got \['a'\] and \['b'\]"),
    (
        lambda: swl.SGD().update([W], [W[:1]]),
        ValueError,
        r"grads\[0\] must have the shape of its parameter, \(4, 2\), got",
    ),
    (lambda: swl.SGD().update([IDS], [IDS]), TypeError, r"params\[0\] must be of a floating dtype, got int64"),
    (
        lambda: swl.SGD().update([np.ones(3)], [np.ones(3) * 1j]),
        TypeError,
        r"grads\[0\] must hold real numbers, got complex",
    ),
    (lambda: swl.AdamW().update([np.ones(1)], [np.array([None])]), TypeError, r"grads\[0\] must hold real.*got object"),
    (lambda: swl.AdamW().update([np.broadcast_to(1.0, 3)], [np.ones(3)]), ValueError, r"params\[0\] is read-only"),
    # layers
    (lambda: swl.Affine(np.ones((2, 2, 2))), ValueError, r"W must have shape \(D, K\), got \(2, 2, 2\)"),
    (lambda: swl.Affine(W, np.ones(3)), ValueError, r"b must have shape \(2,\).*got \(3,\)"),
    (lambda: swl.Affine(W, needs_dx="no"), TypeError, "needs_dx must be True or False, got 'no'"),
    (lambda: swl.Affine(W).backward(X), RuntimeError, "Affine.backward was called before forward"),
    (lambda: swl.Affine(W).gradients(), RuntimeError, "Affine has no gradients: call backward first"),
    (
        lambda: swl.Affine(W).load_state_dict(None),
        TypeError,
        "state must be a mapping of names to arrays, got NoneType",
    ),
    (lambda: swl.Affine(W).load_state_dict({"V": W}), ValueError, r"missing are \['W'\], unknown are \['V'\]"),
    (
        lambda: swl.Affine(W).load_state_dict({"W": W[:1]}),
        ValueError,
        r"state\['W'\] must have shape \(4, 2\).*\(1, 2\)",
    ),
    (
        lambda: swl.Affine(W).load_state_dict({"W": W * 1j}),
        TypeError,
        r"state\['W'\] must hold real numbers, got complex",
    ),
    (lambda: swl.Affine(W).load_state_dict({"W": W.astype(str)}), TypeError, r"state\['W'\] must hold real.*got <U"),
    (
        lambda: swl.Affine(W).load_state_dict({"W": W.astype(object)}),
        TypeError,
        r"state\['W'\] must hold real.*got object",
    ),
    (lambda: swl.Sequential(), ValueError, "Sequential needs at least one layer"),
    (lambda: swl.Sequential(None), TypeError, "layer 0 must have the methods forward and backward, got None"),
    (lambda: swl.Sequential(swl.ReLU), TypeError, r"layer 0 must be a layer, got the class ReLU: write ReLU\(...\)"),
    (lambda: swl.SoftmaxWithLoss(smoothing=1), TypeError, "unknown option 'smoothing'; legal options are weight"),
    (lambda: swl.AffineSoftmaxWithLoss(W, memory_budget="a"), TypeError, "memory_budget.*got 'a'"),
    (lambda: swl.AffineSoftmaxWithLoss(W).top_k(X, 0), ValueError, r"k must be in \[1, 2\].*got 0"),
    (lambda: swl.AffineSoftmaxWithLoss(W).top_k(X, 1.5), TypeError, "k must be an integer, got 1.5"),
    (lambda: swl.Embedding(W).forward(X), TypeError, "x must hold ids of an integer dtype, got float32"),
    # differences
    (lambda: swl.numerical_gradient(lambda x: 0, [1.0]), TypeError, "x must be an array of a floating dtype, got list"),
    (lambda: swl.numerical_gradient(3, np.ones(1)), TypeError, "f must be a function of x, got 3"),
    (lambda: swl.numerical_gradient(lambda x: 0.0, np.ones(1), h="a"), TypeError, "h must be a real number.*got 'a'"),
    (lambda: swl.numerical_gradient(lambda x: 0.0, np.ones(1), h=0), ValueError, "h must be finite and above 0, got 0"),
    (
        lambda: swl.numerical_gradient(lambda x: x, np.ones(2)),
        ValueError,
        r"f must return a single number, got shape \(2,\)",
    ),
    (lambda: swl.check_gradients(3), TypeError, "of must be a layer, a pair of functions or a function, got 3"),
    (
        lambda: swl.check_gradients(swl.ReLU(), X, tol="a"),
        TypeError,
        r"tol must be a real number, in \(0, 1\), got 'a'",
    ),
    (lambda: swl.check_gradients(swl.ReLU(), X, tol=2), ValueError, r"tol must be in \(0, 1\), got 2"),
    (lambda: swl.check_gradients(swl.ReLU(), X, projections=1.5), TypeError, "projections must be an integer, got 1.5"),
    (lambda: swl.check_gradients(swl.ReLU(), X, seed="a"), TypeError, "seed must be an integer, got 'a'"),
    (lambda: swl.numerical_gradient(lambda x: 0.0, masked(np.ones(2))), TypeError, "x is a masked array"),
    # what is read off scores, and the books' layers
    (lambda: CE(X, IDS, dout=None), TypeError, "dout must be a number or an array, got None"),
    (lambda: swl.cross_entropy(X, IDS, reduction=HUGE), ValueError, "reduction is 1000.*; legal are 'mean'"),
    (lambda: swl.softmax(IDS), TypeError, "x must be float16.*got int64"),
    (lambda: swl.softmax(np.float32(1)), ValueError, r"x must have at least one axis, got shape \(\)"),
    (lambda: swl.softmax(X, axis="a"), ValueError, r"axis must be an integer in \[-2, 2\).*got 'a'"),
    (lambda: swl.accuracy("a", IDS), TypeError, "scores must be an array of numbers, got 'a'"),
    (lambda: swl.accuracy(X, IDS, ignore_index="a"), TypeError, "ignore_index must be an integer, got 'a'"),
    (lambda: swl.accuracy(X, X[:, 0]), TypeError, "target of class ids must be of an integer dtype, got float32"),
    (lambda: swl.Dropout("a"), TypeError, r"dropout_ratio must be a real number, in \[0, 1\), got 'a'"),
    (lambda: swl.Dropout().forward(IDS), TypeError, "x must be float16.*got int64"),
    (lambda: swl.BatchNormalization(W, W), ValueError, r"gamma must have shape \(D,\), got \(4, 2\)"),
    (lambda: swl.BatchNormalization(W[0], W[0], momentum=2), ValueError, r"momentum must be in \[0, 1\], got 2"),
    (
        lambda: swl.BatchNormalization(W[0], W[0], 0.9, W[0]),
        TypeError,
        "running_mean and running_var must both be given",
    ),
    (
        lambda: swl.BatchNormalization(W[0], W[0], 0.9, W[:, 0], W[0]),
        ValueError,
        r"running_mean must have shape \(2,\).*got \(4,\)",
    ),
    # files
    (lambda: Checkpoints("folder", keep=0), ValueError, "keep must be an integer of at least 1, got 0"),
    (lambda: Checkpoints("folder", keep=1.5), ValueError, "keep must be an integer of at least 1, got 1.5"),
]


@pytest.mark.parametrize(("bad", "error", "words"), CALLS, ids=[words for _, _, words in CALLS])
def test_every_error_names_argument_what_came_and_what_is_legal(
    bad: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=rf"(?s){words}") as found:
        bad()
    assert type(found.value) is error
    assert len(str(found.value)) < 400


def test_strides_that_interlock_without_sharing_are_taken() -> None:
    """Elements 0, 8, … of rows 12 bytes apart: between each other's bounds, but none shares memory with another."""
    out = strided((3, 4), (4, 12))
    _, want = CE(X, IDS)
    CE(X, IDS, out=out)
    np.testing.assert_array_equal(out, want)
    out = strided((2, 4), (12, 8))  # 0 8 16 24, 12 20 28 36
    CE(X[:2], IDS[:2], out=out)
    np.testing.assert_array_equal(out, CE(X[:2], IDS[:2])[1])


def test_lists_are_taken_where_arrays_are(backend: Any) -> None:
    loss = swl.cross_entropy([[0.0, 0.0], [0.0, 0.0]], [0, 1], weight=[1, 3], sample_weight=[1, 2])
    np.testing.assert_allclose(backend.numpy(loss), np.log(2))


# ------------------------------------------------------------------------------------------------ affine


def affine(backend: Any, x: Any, W: Any, b: Any = None) -> Any:
    return swl.affine(*(None if a is None else backend.array(a) for a in (x, W, b)))


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((np.ones((2, 3)), np.ones((4, 5))), ValueError, r"x.*4.*\(2, 3\)"),
        ((np.ones(()), np.ones((4, 5))), ValueError, r"x.*\(\)"),
        ((np.ones((2, 3)), np.ones(3)), ValueError, r"W.*\(D, K\).*\(3,\)"),
        ((np.ones((2, 3)), np.ones((3, 5)), np.ones(4)), ValueError, r"b.*\(5,\).*\(4,\)"),
        ((np.ones((2, 3)), np.ones((3, 5)), np.ones((1, 5))), ValueError, r"b.*\(5,\).*\(1, 5\)"),
        ((np.ones((2, 3), complex), np.ones((3, 5))), TypeError, "x.*complex"),
        ((np.ones((2, 3)), np.ones((3, 5), np.int64)), TypeError, "W.*int64"),
        ((np.ones((2, 3)), np.ones((3, 5)), np.ones(5, np.int32)), TypeError, "b.*int32"),
    ],
)
def test_affine_names_argument_what_came_and_what_is_legal(
    backend: Any, args: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        affine(backend, *args)


def test_affine_backward_names_argument_what_came_and_what_is_legal(backend: Any) -> None:
    x, W = backend.array(np.ones((2, 3))), backend.array(np.ones((3, 5)))
    with pytest.raises(ValueError, match=r"dout.*\(2, 5\).*\(2, 4\)"):
        swl.affine_backward(backend.array(np.ones((2, 4))), x, W)
    with pytest.raises(TypeError, match=r"dout.*int64"):
        swl.affine_backward(backend.array(np.ones((2, 5), np.int64)), x, W)
    with pytest.raises(ValueError, match=r"needs.*'dw'"):
        swl.affine_backward(backend.array(np.ones((2, 5))), x, W, needs=("dw",))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_underflows_is_no_error_of_the_callers_errstate(host_backend: Any, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, W, t = (
        (20 * rng.standard_normal((6, 4))).astype(dtype),
        (9 * rng.standard_normal((4, 9))).astype(dtype),
        np.arange(6),
    )
    dense, loss, sigmoid, fused = (
        swl.Affine(W.copy()),
        swl.SoftmaxWithLoss(),
        swl.Sigmoid(),
        swl.AffineSoftmaxWithLoss(W),
    )
    z = swl.affine(x, W)
    for _ in range(2):
        with np.errstate(under="raise"):
            loss.forward(dense.forward(x), t)
            dense.backward(loss.backward(1e-4))
            sigmoid.backward(sigmoid.forward(z))
            fused.forward(x, t)
            fused.backward()
            assert loss.y.shape == z.shape == swl.softmax(z).shape
            for options in ({}, {"z_loss": 0.1}, {"softcap": 3.0}, {"temperature": 0.2}, {"weight": np.full(9, 1e-20)}):
                swl.cross_entropy_value_and_grad(z, t, stats=True, **options)
                swl.cross_entropy_value_and_grad(z, rng.dirichlet(np.ones(9), 6), **options)
                swl.linear_cross_entropy_value_and_grad(x, W, t, memory_budget=300, **options)
            swl.linear_log_prob_value_and_grad(x, W, t, dentropy=1e-3)
            swl.linear_kl_value_and_grad(x, W, x, -W, direction="jsd")
            for optimiser in (swl.SGD(momentum=0.9, weight_decay=1e-3), swl.AdamW()):
                for _ in range(3):
                    optimiser.update([W.copy()], [dense.dW])
