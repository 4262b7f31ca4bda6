"""Bad input to swl.torch, and torch's tensors where NumPy's arrays are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import swl
import swl.torch

Z, IDS = torch.zeros(3, 4), torch.tensor([0, 1, 2])

CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: swl.torch.cross_entropy(Z, IDS.numpy()), TypeError, "target must be a torch.Tensor, got numpy.ndarray"),
    (lambda: swl.torch.cross_entropy(Z, Z.numpy()), TypeError, "target must be a torch.Tensor, got numpy.ndarray"),
    (lambda: swl.torch.cross_entropy(Z.numpy(), IDS), TypeError, "input must be a torch.Tensor, got numpy.ndarray"),
    (
        lambda: swl.torch.cross_entropy([[0.0, 1.0]], [0]),
        TypeError,
        "input must be a torch.Tensor, got list: .*swl.cross_entropy takes arrays",
    ),
    (lambda: swl.torch.affine(Z.numpy(), Z), TypeError, "input must be.*got numpy.ndarray.*swl.affine takes"),
    (lambda: swl.torch.affine(Z, [[0.0] * 4]), TypeError, "weight must be a torch.Tensor, got list"),
    (lambda: swl.torch.linear_cross_entropy(Z, Z, [0, 1, 2]), TypeError, "target must be a torch.Tensor, got list"),
    (
        lambda: swl.torch.linear_cross_entropy(Z, Z.numpy(), IDS),
        TypeError,
        "linear_weight must be.*got numpy.ndarray.*swl.linear_cross_entropy takes",
    ),
    (
        lambda: swl.torch.cross_entropy(Z, IDS, weight=np.ones(4, np.float32)),
        TypeError,
        "weight must be a torch.Tensor, got numpy.ndarray: torch.as_tensor makes one",
    ),
    (
        lambda: swl.torch.cross_entropy(Z, IDS.float()),
        TypeError,
        "target of class ids must be of an integer dtype.*float32",
    ),
    (lambda: swl.torch.cross_entropy(Z.long(), IDS), TypeError, "input must be float16.*got torch.int64"),
    (lambda: swl.torch.cross_entropy(Z[:, :1], IDS[:, None]), TypeError, "target of probabilities.*floating.*int64"),
    (lambda: swl.torch.cross_entropy(Z, IDS[:2]), ValueError, r"target must have shape \(3,\).*got \(2,\)"),
    (lambda: swl.torch.cross_entropy(Z, IDS, reduction="avg"), ValueError, "reduction is 'avg'; legal are 'mean'"),
    (
        lambda: swl.torch.cross_entropy(Z, IDS, label_smoothing=10**400),
        ValueError,
        "label_smoothing must be in.*got 1000",
    ),
    (lambda: swl.cross_entropy(Z.clone().requires_grad_(), IDS), TypeError, "logits is a torch tensor.*swl.torch"),
    (lambda: swl.Affine(torch.ones(4, 2, requires_grad=True)), TypeError, r"W is a torch tensor.*W.detach\(\)"),
]


@pytest.mark.parametrize(("bad", "error", "words"), CALLS, ids=[words for _, _, words in CALLS])
def test_every_error_names_argument_what_came_and_what_is_legal(
    bad: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as found:
        bad()
    assert len(str(found.value)) < 400
