"""Bad input gets an error that names the argument, what came and what is legal, before anything is written."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import swl

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
        ({"denominator": 1e-300}, ValueError, "denominator.*float32.*1e-300"),
        ({"denominator": 1e300}, ValueError, r"denominator.*float32.*1e\+300"),
        ({"logits": np.zeros((3, 4)), "softcap": 1e-300}, ValueError, "softcap.*float64.*1e-300"),
        ({"logits": np.zeros((3, 4)), "z_loss": 1e300}, ValueError, r"z_loss.*float64.*1e\+300"),
        # what is no number, or none that Python can bring to a float
        *(
            ({name: value}, error, name)
            for name in ("label_smoothing", "z_loss", "softcap", "denominator")
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
