"""The classifier head: Affine, softmax and cross-entropy on NumPy, Numba and CUDA behind one API."""

from __future__ import annotations

import numpy as np

from swl.backends import active, available_backends, get, loaded, set_backend, use_backend
from swl.backends.host.memory import empty_cache, memory_use
from swl.backends.host.threads import get_num_threads, set_num_threads
from swl.errors import BackendUnavailable
from swl.functional import (
    RowStats,
    affine,
    affine_backward,
    cross_entropy,
    cross_entropy_value_and_grad,
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    linear_kl,
    linear_kl_value_and_grad,
    linear_log_prob,
    linear_log_prob_value_and_grad,
)
from swl.nn.activations import ReLU, Relu, Sigmoid
from swl.nn.affine import Affine
from swl.nn.book import BatchNormalization, Dropout, MatMul, TimeAffine, TimeEmbedding, TimeSoftmaxWithLoss
from swl.nn.differences import numerical_gradient
from swl.nn.embedding import Embedding
from swl.nn.fused_head import AffineSoftmaxWithLoss
from swl.nn.gradcheck import check_gradients
from swl.nn.losses import SoftmaxWithLoss
from swl.nn.optim import SGD, AdamW
from swl.nn.sequential import Sequential
from swl.ops import checks
from swl.ops.chunks import Plan, plan
from swl.ops.scores import accuracy, softmax
from swl.typing import Array, ArrayLike, DTypeLike
from swl.warmup import warmup

__version__ = "0.1.0"


def asarray(x: ArrayLike, dtype: DTypeLike | None = None) -> Array:
    """Bring `x` to the active backend, without a copy where it is there already."""
    checks.require_plain("x", x)
    backend = get(active())
    if dtype is None:
        return checks.any_array(backend, "x", x)
    try:
        return backend.asarray(x, np.dtype(dtype))
    except (TypeError, ValueError) as error:
        raise TypeError(f"x must be an array of numbers, and dtype one that it can be brought to: {error}") from None


def check() -> None:
    """Wait for the devices in use and raise the ValueError of a class id out of range, if there was one."""
    for backend in loaded():
        backend.check()


def info() -> None:
    """Print versions, backends, threads and the memory that is kept, as the command ``swl info`` does."""
    from swl.cli import main

    main(["info"])


__all__ = [
    "SGD",
    "AdamW",
    "Affine",
    "AffineSoftmaxWithLoss",
    "BackendUnavailable",
    "BatchNormalization",
    "Dropout",
    "Embedding",
    "MatMul",
    "Plan",
    "ReLU",
    "Relu",
    "RowStats",
    "Sequential",
    "Sigmoid",
    "SoftmaxWithLoss",
    "TimeAffine",
    "TimeEmbedding",
    "TimeSoftmaxWithLoss",
    "accuracy",
    "affine",
    "affine_backward",
    "asarray",
    "available_backends",
    "check",
    "check_gradients",
    "cross_entropy",
    "cross_entropy_value_and_grad",
    "empty_cache",
    "get_num_threads",
    "info",
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "linear_kl",
    "linear_kl_value_and_grad",
    "linear_log_prob",
    "linear_log_prob_value_and_grad",
    "memory_use",
    "numerical_gradient",
    "plan",
    "set_backend",
    "set_num_threads",
    "softmax",
    "use_backend",
    "warmup",
]


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__version__"]
