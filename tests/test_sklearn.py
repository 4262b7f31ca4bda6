"""The classifier for scikit-learn: its conventions, and the numbers of LogisticRegression."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from swl.sklearn import LinearClassifier


@pytest.mark.filterwarnings("ignore")
def test_it_passes_the_checks_of_scikit_learn() -> None:
    results = check_estimator(LinearClassifier(), on_skip=None, on_fail=None)
    failed = [(found["check_name"], str(found["exception"])) for found in results if found["status"] == "failed"]
    assert not failed
    assert len(results) > 40


def data(name: str) -> tuple[Any, Any]:
    load = {"iris": load_iris, "digits": load_digits, "two classes": load_breast_cancer}[name]
    x, t = load(return_X_y=True)
    return StandardScaler().fit_transform(x), t


@pytest.mark.parametrize("name", ["iris", "digits", "two classes"])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_agrees_with_logistic_regression(name: str, weighted: bool) -> None:
    x, t = data(name)
    options: dict[str, Any] = {"C": 0.1, "tol": 1e-7, "max_iter": 3000}
    weights = None
    if weighted:
        options["class_weight"] = "balanced"
        weights = np.random.default_rng(0).uniform(0, 2, len(x))
    with np.errstate(all="ignore"):
        want = LogisticRegression(**options).fit(x, t, weights)
    got = LinearClassifier(**options).fit(x, t, weights)
    np.testing.assert_allclose(got.predict_proba(x), want.predict_proba(x), atol=1e-5)
    np.testing.assert_allclose(got.decision_function(x), want.decision_function(x), atol=1e-3)
    assert got.coef_.shape == want.coef_.shape
    np.testing.assert_array_equal(got.predict(x), want.predict(x))
    np.testing.assert_allclose(np.exp(got.predict_log_proba(x)), got.predict_proba(x))


def test_a_small_budget_and_no_intercept_change_only_what_they_should() -> None:
    x, t = data("iris")
    names = np.array(["a", "b", "c"])[t]
    model = make_pipeline(StandardScaler(), LinearClassifier(memory_budget=1000)).fit(x, names)
    np.testing.assert_allclose(model.predict_proba(x), LinearClassifier().fit(x, t).predict_proba(x), atol=1e-6)
    assert set(model.predict(x)) <= {"a", "b", "c"}
    assert not LinearClassifier(fit_intercept=False).fit(x, t).intercept_.any()


def test_bad_arguments_are_named() -> None:
    x, t = data("iris")
    for model, error, words in (
        (LinearClassifier(C=0), ValueError, "C must be above 0, got 0"),
        (LinearClassifier(C="1"), TypeError, "C must be a real number, above 0, got '1'"),
        (LinearClassifier(tol=-1), ValueError, "tol must be above 0, got -1"),
        (LinearClassifier(max_iter=1.5), TypeError, "max_iter must be an integer, got 1.5"),
    ):
        with pytest.raises(error, match=words):
            model.fit(x, t)
    with pytest.raises(ValueError, match="y must hold at least two classes, got one class"):
        LinearClassifier().fit(x, np.zeros(len(x), int))
    with pytest.raises(ValueError, match="at least one non-zero"):
        LinearClassifier().fit(x, t, np.zeros(len(x)))
    with pytest.warns(ConvergenceWarning, match="not converged in max_iter=2"):
        LinearClassifier(max_iter=2).fit(x, t)
