"""A classifier for scikit-learn: softmax regression, whose loss and gradient are the fused head's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from swl.ops.checks import require_integer
from swl.ops.chunks import DEFAULT_BUDGET
from swl.ops.linear_cross_entropy import linear_cross_entropy_value_and_grad
from swl.ops.scores import softmax
from swl.options import require_number
from swl.typing import Array, ArrayLike

__all__ = ["LinearClassifier"]


class LinearClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Softmax regression with an L2 penalty, by L-BFGS; the logits of all rows and classes are never stored.

    It minimises, over weights ``W`` and intercepts ``b`` in float64::

        C·Σ_n s_n·w_(t_n)·cross_entropy(x_n·W + b, t_n) + ½·‖W‖²

    with sample weights s and class weights w, which is the objective of `sklearn.linear_model.LogisticRegression`: of two
    classes, too, there is one vector of weights, and the score of the first class is 0.

    Parameters
    ----------
    C : float
        Inverse strength of the penalty, above 0.
    fit_intercept : bool
    class_weight : dict, "balanced" or None
        Weights of the classes.
    tol : float
        The fit ends where no derivative of the mean loss is larger.
    max_iter : int
        Iterations of L-BFGS.
    memory_budget : int
        Bytes of working memory, as for `swl.linear_cross_entropy`.

    Attributes
    ----------
    classes_ : array, shape (K,)
    coef_ : array, shape (K, D), or (1, D) for two classes
    intercept_ : array, shape (K,) or (1,)
    n_iter_ : array, shape (1,)
        Iterations that were made.
    n_features_in_ : int
    feature_names_in_ : array of str
        Where `fit` was given names.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from swl.sklearn import LinearClassifier
    >>> x, t = load_iris(return_X_y=True)
    >>> model = LinearClassifier().fit(x, t)
    >>> round(model.score(x, t), 3), model.predict_proba(x[:1]).round(2)
    (0.973, array([[0.98, 0.02, 0.  ]]))
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        fit_intercept: bool = True,
        class_weight: Mapping[Any, float] | str | None = None,
        tol: float = 1e-6,
        max_iter: int = 1000,
        memory_budget: int = DEFAULT_BUDGET,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.memory_budget = memory_budget

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Find the weights.

        Parameters
        ----------
        X : array, shape (N, D)
        y : array, shape (N,)
            Labels of any kind.
        sample_weight : array, shape (N,), optional

        Returns
        -------
        LinearClassifier
            Itself.
        """
        require_number("C", self.C, "above 0", lambda v: 0 < v < np.inf)
        require_number("tol", self.tol, "above 0", lambda v: 0 < v < np.inf)
        require_integer("max_iter", self.max_iter, 1)
        X, y = validate_data(self, X, y, dtype=np.float64, order="C")
        check_classification_targets(y)
        self.classes_, ids = np.unique(y, return_inverse=True)
        K, D = len(self.classes_), X.shape[1]
        if K < 2:
            raise ValueError(f"y must hold at least two classes, got one class, {self.classes_[0]!r}")
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        per_class = compute_class_weight(self.class_weight, classes=self.classes_, y=y, sample_weight=weights)
        weights = weights * per_class[ids]
        total = weights.sum()
        if not total > 0:
            raise ValueError("sample_weight and class_weight must leave a weight above 0, got a sum of 0")
        used = slice(1, None) if K == 2 else slice(None)  # of two classes, the first one's score is 0
        W, b = np.zeros((D, K)), np.zeros(K)
        penalty = 1 / (self.C * total)
        columns = 1 if K == 2 else K

        def place(parameters: Any) -> None:
            table = parameters.reshape(-1, columns)
            W[:, used] = table[:D]
            if self.fit_intercept:
                b[used] = table[D]

        def objective(parameters: Any) -> tuple[float, Array]:
            """Mean loss and penalty, and their gradient."""
            place(parameters)
            loss, (_, dW, db) = linear_cross_entropy_value_and_grad(
                X, W, ids, b, needs=("dW", "db"), memory_budget=self.memory_budget,
                reduction="sum", sample_weight=weights / total,
            )  # fmt: skip
            gradient = np.vstack([dW[:, used] + penalty * W[:, used], db[None, used]][: 1 + self.fit_intercept])
            return float(loss) + 0.5 * penalty * float((W**2).sum()), gradient.ravel()

        found = minimize(
            objective,
            np.zeros((D + bool(self.fit_intercept)) * columns),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": self.max_iter, "gtol": self.tol, "ftol": 64 * np.finfo(float).eps, "maxls": 50},
        )
        if found.nit >= self.max_iter and not found.success:
            warnings.warn(
                f"the fit has not converged in max_iter={self.max_iter} iterations: raise it, or scale the features",
                ConvergenceWarning,
                stacklevel=2,
            )
        place(found.x)
        self.coef_, self.intercept_ = W[:, used].T.copy(), b[used].copy()
        self.n_iter_ = np.array([found.nit], np.int32)
        return self

    def decision_function(self, X: ArrayLike) -> Array:
        """Compute the scores: shape (N, K), or (N,) of the second of two classes."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: ArrayLike) -> Array:
        """Compute the probabilities of the classes, shape (N, K)."""
        scores = self.decision_function(X)
        return softmax(np.stack([np.zeros_like(scores), scores], axis=1) if scores.ndim == 1 else scores)

    def predict_log_proba(self, X: ArrayLike) -> Array:
        """Compute their logarithms."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def predict(self, X: ArrayLike) -> Array:
        """Find the most probable class of each row, shape (N,)."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]
