"""The options and the one form that every target is brought to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import INTEGERS

import swl
from swl.backends.protocol import IGNORED, INVALID, Target
from swl.ops.cross_entropy import check
from swl.options import Options


def spec(backend: Any, target: Any, C: int = 4, **options: Any) -> Target:
    logits = np.zeros((*np.shape(target)[:1], C), np.float32)
    options = {k: backend.array(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    problem = check(backend.array(logits), backend.array(target), Options.checked(options))
    return problem.target


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_any_integer_dtype_become_int64(backend: Any, dtype: Any) -> None:
    ids = backend.numpy(spec(backend, np.array([3, 0, 2, 1], dtype), ignore_index=2).ids)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, [3, 0, IGNORED, 1])


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_numbers_beyond_int64(name: str) -> None:
    z, ids, largest = np.zeros((2, 4), np.float32), np.array([1, 2**64 - 1], np.uint64), 2**63 - 1
    with swl.use_backend(name):
        assert float(swl.cross_entropy(z, ids, ignore_index=2**64 - 1, reduction="sum")) == pytest.approx(np.log(4))
        with pytest.raises(ValueError, match=rf"target\[1\] is {2**64 - 1}; .*ignore_index={largest}"):
            swl.cross_entropy(z, ids, ignore_index=largest)
        for ignore_index in (-(2**70), 2**63, 2**70):
            assert float(swl.cross_entropy(z, np.array([1, 2]), ignore_index=ignore_index)) == pytest.approx(np.log(4))


@pytest.mark.parametrize("layout", ["strided", "backwards", "broadcast"])
def test_ids_of_any_layout(backend: Any, layout: str) -> None:
    ids = backend.array(np.array([1, 9, 3, 9, 0]))
    view, want = {
        "strided": (ids[::2], [1, 3, 0]),
        "backwards": (ids[::-2], [0, 3, 1]),
        "broadcast": (backend.ops.xp.broadcast_to(ids[:1], (3,)), [1, 1, 1]),
    }[layout]
    clean, row_weight, counted = backend.ops.prepare_ids(view, 4, -100, None)
    np.testing.assert_array_equal(backend.numpy(clean), want)
    assert row_weight is None
    assert float(backend.numpy(counted)) == 3.0


def test_row_weights_are_the_classes_weights_and_0_where_ignored(backend: Any) -> None:
    w = backend.array(np.array([0.5, 2.0, 4.0, 8.0], np.float32))
    ids, m, counted = backend.ops.prepare_ids(backend.array(np.array([3, -100, 0, 1])), 4, -100, w)
    np.testing.assert_array_equal(backend.numpy(ids), [3, IGNORED, 0, 1])
    np.testing.assert_array_equal(backend.numpy(m), np.array([8, 0, 0.5, 2], np.float32))
    assert float(backend.numpy(counted)) == 10.5


def test_the_count_of_the_weights_is_formed_in_float64(backend: Any) -> None:
    """2**24 + 1 has no float32."""
    w = backend.array(np.array([2.0**24, 1.0], np.float32))
    _, _, counted = backend.ops.prepare_ids(backend.array(np.array([0, 1])), 2, -100, w)
    assert float(backend.numpy(counted)) == 2.0**24 + 1


def test_smoothing_is_split_over_the_classes(backend: Any) -> None:
    target = spec(backend, np.array([0, 1]), C=5, label_smoothing=0.1)
    assert target.hot == 0.9
    assert target.rest == 0.1 / 5


def test_probabilities_stay_as_they_are(backend: Any) -> None:
    """No copy and no conversion: a kernel reads any real dtype and any strides."""
    q = backend.array(np.ones((3, 8), np.float16))[:, ::2]
    problem = check(backend.array(np.zeros((3, 4), np.float32)), q, Options())
    assert problem.target.probs.dtype == np.float16
    assert problem.target.probs.strides == q.strides
    assert problem.target.ids is None


def test_cutting_out_rows() -> None:
    target = Target(ids=np.arange(6), row_weight=np.arange(6.0), weight=np.arange(9.0), first_class=2)
    part = target.rows(2, 4)
    np.testing.assert_array_equal(part.ids, [2, 3])
    np.testing.assert_array_equal(part.row_weight, [2.0, 3.0])
    assert part.weight is target.weight
    assert part.first_class == 2
    np.testing.assert_array_equal(Target(probs=np.eye(4)).rows(1, 3).probs, np.eye(4)[1:3])


def test_cutting_out_classes() -> None:
    target = Target(probs=np.eye(6), weight=np.arange(6.0), bias=np.arange(6.0), row_weight=np.ones(6))
    part = target.classes(1, 5).classes(1, 3)  # counted from the first class of what is cut
    np.testing.assert_array_equal(part.probs, np.eye(6)[:, 2:4])
    np.testing.assert_array_equal(part.weight, [2.0, 3.0])
    np.testing.assert_array_equal(part.bias, [2.0, 3.0])
    assert part.first_class == 2
    assert part.row_weight is target.row_weight
    assert Target(ids=np.arange(3)).classes(4, 9).first_class == 4


def test_the_marks_of_ids_differ_from_every_class_and_each_other() -> None:
    assert len({IGNORED, INVALID, 0}) == 3
    assert max(IGNORED, INVALID) < 0


def test_no_options_are_the_defaults_of_torch() -> None:
    assert Options.checked({}) == Options(
        weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, sample_weight=None,
        z_loss=0.0, softcap=None, temperature=1.0, denominator=None, backend=None, check=None,
    )  # fmt: skip


def test_options_accept_numpy_numbers() -> None:
    options = Options.checked(
        {
            "label_smoothing": np.float32(0.5),
            "ignore_index": np.int32(-1),
            "z_loss": np.float64(1.0),
            "softcap": 30,
            "denominator": np.float32(2.0),
            "check": False,
        }
    )
    assert options.label_smoothing == 0.5


def test_an_id_out_of_range_on_a_device_is_marked_and_reported(backend: Any) -> None:
    """No synchronisation: the row's loss is NaN, its gradient 0, and `swl.check` raises later, once."""
    if backend.is_host:
        with pytest.raises(ValueError, match=r"target\[1\] is 4"):
            spec(backend, np.array([0, 4]))
        return
    logits, target = backend.array(np.zeros((3, 4), np.float32)), backend.array(np.array([0, 4, 1]))
    loss, grad = swl.cross_entropy_value_and_grad(logits, target, reduction="none")
    np.testing.assert_array_equal(np.isnan(backend.numpy(loss)), [False, True, False])
    assert not np.isnan(backend.numpy(grad)).any()
    assert np.all(backend.numpy(grad)[1] == 0)
    with pytest.raises(ValueError, match=r"target\[1\] is 4"):
        swl.check()
    swl.check()
