"""The gradient check passes right gradients and fails wrong ones, and says which element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import swl
from swl.nn.gradcheck import GradientError


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


# ------------------------------------------------------------------------------------------------ numerical_gradient


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 4)], ids=str)
def test_numerical_gradient_of_a_polynomial(backend: Any, shape: tuple[int, ...]) -> None:
    x = rng().normal(size=shape)
    here = backend.array(x, writeable=True)
    got = swl.numerical_gradient(lambda x: (x**3).sum(), here)
    np.testing.assert_allclose(backend.numpy(got), 3 * x**2, rtol=1e-8, atol=1e-9)
    np.testing.assert_array_equal(backend.numpy(here), x)
    assert type(got) is type(here)


def test_the_function_may_ignore_its_argument() -> None:
    W = np.array([[1.0, 2.0]])
    np.testing.assert_allclose(swl.numerical_gradient(lambda _: float((W**2).sum()), W), 2 * W, rtol=1e-8)


@pytest.mark.parametrize("layout", ["transposed", "strided", "Fortran"])
def test_numerical_gradient_of_strided_arrays(layout: str) -> None:
    base = rng().normal(size=(6, 4))
    x = {"transposed": base.T, "strided": base[::2, 1::2], "Fortran": np.asfortranarray(base)}[layout]
    np.testing.assert_allclose(swl.numerical_gradient(lambda x: (x**2).sum(), x), 2 * x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_the_array_is_restored_when_the_function_raises(fail_at: int) -> None:
    x = rng().normal(size=4)
    before, calls = x.copy(), []

    def f(x: Any) -> float:
        calls.append(1)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return float(x.sum())

    with pytest.raises(KeyboardInterrupt):
        swl.numerical_gradient(f, x)
    np.testing.assert_array_equal(x, before)


def test_numerical_gradient_in_float32_and_with_a_step_of_ones_own() -> None:
    x = np.array([1.0, -2.0], np.float32)
    got = swl.numerical_gradient(lambda x: (x**2).sum(dtype=np.float64), x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, 2 * x, rtol=1e-3)
    np.testing.assert_allclose(
        swl.numerical_gradient(lambda x: (x**2).sum(), x.astype(float), h=1e-4), 2 * x, rtol=1e-7
    )


def test_a_step_is_measured_after_rounding() -> None:
    x = np.array([1e6])
    np.testing.assert_allclose(swl.numerical_gradient(lambda x: x[0], x, h=3e-10), [1], rtol=1e-12)  # 2.6 units of x
    with pytest.raises(ValueError, match="lost in rounding"):
        swl.numerical_gradient(lambda x: x[0], np.array([1e16]), h=1e-3)


def test_numerical_gradient_refuses() -> None:
    frozen = np.ones(2)
    frozen.flags.writeable = False
    for x, error, words in [
        (np.array([1, 2]), TypeError, "floating dtype, got int64"),
        ([1.0], TypeError, "floating dtype, got list"),
        (frozen, ValueError, "x is read-only"),
    ]:
        with pytest.raises(error, match=words):
            swl.numerical_gradient(np.sum, x)
    with pytest.raises(ValueError, match=r"single number, got shape \(2,\)"):
        swl.numerical_gradient(lambda x: x, np.ones(2))
    with pytest.raises(ValueError, match="h must be finite and above 0"):
        swl.numerical_gradient(np.sum, np.ones(2), h=0)


# ------------------------------------------------------------------------------------------------ right gradients

MODES = pytest.mark.parametrize("projections", [None, 3])


def net(loss: bool = True, dtype: Any = np.float32) -> swl.Sequential:
    r = rng()
    layers = [
        swl.Affine.init(6, 5, rng=r, dtype=dtype),
        swl.ReLU(),
        swl.Affine.init(5, 4, rng=r, dtype=dtype),
        swl.Sigmoid(),
    ]
    return swl.Sequential(*layers, *([swl.SoftmaxWithLoss()] if loss else []))


@MODES
def test_a_network(backend: Any, projections: int | None) -> None:
    x, t = rng().normal(size=(4, 6)), np.array([0, 1, 2, 3])
    layers = net()
    state = layers.state_dict()
    report = swl.check_gradients(layers, x, t, projections=projections)
    assert report.worst <= report.tol == 1e-6
    sizes = {"x": 24, "0.W": 30, "0.b": 5, "2.W": 20, "2.b": 4}
    assert report.compared == (sizes if projections is None else dict.fromkeys(sizes, 3))
    assert str(report).startswith("gradients agree: worst relative error")
    for name, p in layers.parameters().items():  # the check worked on a copy in float64
        assert p.dtype == np.float32
        np.testing.assert_array_equal(backend.numpy(p), state[name])
    with pytest.raises(RuntimeError, match="before forward"):
        layers.backward()


@MODES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 3.0},
        {"reduction": "sum", "weight": [0.5, 1.0, 2.0, 1.5, 1.0], "ignore_index": 1},
        {"reduction": "none", "sample_weight": [1.0, 2.0, 0.5, 0.0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["ids", "probabilities"])
def test_the_loss(backend: Any, kind: str, options: dict[str, Any], projections: int | None) -> None:
    z, t = backend.array(rng().normal(size=(4, 5)) * 2), np.array([0, 1, 4, 2])
    t = backend.array(t if kind == "ids" else rng().dirichlet(np.ones(5), 4))
    options = {k: backend.array(v) if isinstance(v, list) else v for k, v in options.items()}
    assert swl.check_gradients(swl.SoftmaxWithLoss(**options), z, t, projections=projections).compared.keys() == {"x"}
    report = swl.check_gradients(swl.cross_entropy_value_and_grad, z, t, projections=projections, **options)
    assert report.compared.keys() == {"logits"}


@MODES
@pytest.mark.parametrize("bias", [True, False])
def test_a_pair_of_functions(backend: Any, bias: bool, projections: int | None) -> None:
    r = rng()
    arrays = [backend.array(r.normal(size=shape)) for shape in ((4, 6), (6, 3), (3,))]
    report = swl.check_gradients((swl.affine, swl.affine_backward), *arrays, projections=projections)
    assert list(report.compared) == ["x", "W", "b"]


def test_lists_and_float32_inputs_become_float64() -> None:
    x = rng().normal(size=(4, 3)).astype(np.float32)
    assert swl.check_gradients(swl.Sigmoid(), x).worst < 1e-6
    assert swl.check_gradients(swl.Sigmoid(), [[0.5, 1.0]]).worst < 1e-6


def test_masks_saturation_and_kinks_near_a_point_do_no_harm() -> None:
    z = np.array([[0.0, -np.inf, 1.0], [1e4, 0.0, -1e4]])
    swl.check_gradients(swl.SoftmaxWithLoss(), z, np.array([0, 0]))
    swl.check_gradients(swl.Sigmoid(), np.array([-800.0, -50.0, 40.0, 800.0]))
    swl.check_gradients(swl.ReLU(), np.array([1e-6, -1e-6, 3e-7, 1.0]))


def test_large_and_tiny_losses_are_held_to_the_same_relative_tolerance() -> None:
    for scale in (1e-12, 1.0, 1e12):
        right = lambda x, scale=scale: (scale * (x**3).sum(), scale * 3 * x**2)  # noqa: E731 - a pair in one line
        assert swl.check_gradients(right, rng().normal(size=5)).worst < 1e-6
        wrong = lambda x, scale=scale: (scale * (x**3).sum(), scale * 3.0001 * x**2)  # noqa: E731 - likewise
        with pytest.raises(GradientError):
            swl.check_gradients(wrong, rng().normal(size=5))


# ------------------------------------------------------------------------------------------------ wrong gradients


def spoiled(change: Any) -> Any:
    """The cube, whose gradient `change` spoils."""

    def backward(dout: Any, x: Any) -> Any:
        return change(3 * x**2 * dout)

    return (lambda x: x**3), backward


def one_element(factor: float) -> Any:
    def change(g: Any) -> Any:
        g = g.copy()
        g[2, 1] *= factor
        return g

    return change


@MODES
@pytest.mark.parametrize("factor", [0.5, 1 + 1e-4, -1.0, 0.0, np.nan, np.inf])
def test_a_failure_names_the_element_both_values_and_the_tolerance(factor: float, projections: int | None) -> None:
    x = rng().uniform(1, 2, size=(4, 3))
    with pytest.raises(GradientError, match=r"gradient of x at \[2, 1\]: backward gives") as caught:
        swl.check_gradients(spoiled(one_element(factor)), x, projections=projections)
    text = str(caught.value)
    assert "central differences give" in text
    assert "tolerance 1e-06" in text
    assert isinstance(caught.value, AssertionError)
    numeric = float(text.split("differences give ")[1].split()[0])
    dout = np.random.default_rng(0).standard_normal((4, 3))
    np.testing.assert_allclose(numeric, (3 * x**2 * dout)[2, 1], rtol=1e-6)


@MODES
@pytest.mark.parametrize(
    "change",
    [
        lambda g: 0 * g,
        lambda g: -g,
        lambda g: g * 1.00001,
        lambda g: g + 1e-5,
        lambda g: np.full_like(g, np.nan),
        np.roll,
    ],
    ids=["zero", "sign", "scale", "offset", "NaN", "shifted"],
)
def test_gradients_wrong_everywhere(change: Any, projections: int | None) -> None:
    with pytest.raises(GradientError):
        swl.check_gradients(
            spoiled(change if change is not np.roll else lambda g: np.roll(g, 1)),
            rng().normal(size=(4, 3)),
            projections=projections,
        )


class DropsUpstream(swl.Sigmoid):
    def backward(self, dout: Any) -> Any:
        return super().backward(np.ones_like(dout))


class ForgetsBias(swl.Affine):
    def backward(self, dout: Any) -> Any:
        dx = super().backward(dout)
        self.db = self.db / 2
        return dx


class DropsScale(swl.SoftmaxWithLoss):
    def backward(self, dout: Any = 1) -> Any:
        return super().backward()


@MODES
def test_wrong_layers(projections: int | None) -> None:
    x = rng().normal(size=(4, 3))
    with pytest.raises(GradientError, match="gradient of x"):
        swl.check_gradients(DropsUpstream(), x, projections=projections)
    with swl.use_backend("numpy"):
        head = ForgetsBias(np.ones((3, 2)), np.ones(2))
    with pytest.raises(GradientError, match="gradient of b at"):
        swl.check_gradients(head, x, projections=projections)
    with pytest.raises(GradientError, match=r"gradient of 1\.b at"):
        swl.check_gradients(swl.Sequential(swl.Sigmoid(), head), x, projections=projections)
    with pytest.raises(GradientError, match="gradient of x"):
        swl.check_gradients(DropsScale(), x, np.zeros(4, int), projections=projections)


def test_a_dropped_upstream_gradient_of_a_plain_number_fails() -> None:
    with pytest.raises(GradientError):
        swl.check_gradients((lambda x: float((x**2).sum()), lambda dout, x: 2 * x), np.ones(2))


def test_a_value_of_nan_fails() -> None:
    with pytest.raises(GradientError, match="nan"):
        swl.check_gradients(lambda x: (np.nan, np.zeros_like(x)), np.ones(2))


def test_a_gradient_of_another_shape_fails() -> None:
    with pytest.raises(GradientError, match=r"gradient of x has shape \(3,\), but x has \(2, 3\)"):
        swl.check_gradients(lambda x: (x.sum(), np.ones(3)), np.ones((2, 3)))


def test_the_same_seed_takes_the_same_directions() -> None:
    x = rng().normal(size=(4, 3))
    reports = [swl.check_gradients(swl.Sigmoid(), x, projections=2, seed=seed) for seed in (1, 1, 2)]
    assert reports[0] == reports[1] != reports[2]


def test_what_cannot_be_checked_is_refused() -> None:
    x = np.ones((2, 3))
    for call, error, words in [
        (lambda: swl.check_gradients("relu", x), TypeError, "of must be a layer"),
        (lambda: swl.check_gradients(swl.ReLU(), x, tol=0), ValueError, "tol must be in"),
        (lambda: swl.check_gradients(swl.ReLU(), x, projections=0), ValueError, "projections must be"),
        (lambda: swl.check_gradients(swl.ReLU(), x, wrt=[0]), TypeError, "for functions, not for layers"),
        (lambda: swl.check_gradients(lambda x: x, x), TypeError, r"must return \(value, gradients\)"),
        (lambda: swl.check_gradients(lambda x: (x, x), x), TypeError, "must take dout"),
        (lambda: swl.check_gradients(lambda x, y: (x.sum(), x), x, x), ValueError, "1 gradients came back for the 2"),
    ]:
        with pytest.raises(error, match=words):
            call()
    assert swl.check_gradients(lambda x, y: ((x * y).sum(), y), x, 2 * x, wrt=[0]).compared == {"x": 6}
