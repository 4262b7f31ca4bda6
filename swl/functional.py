"""The operations as functions. Gradients are with respect to the sum of ``dout · loss``, as everywhere in the library."""

from swl.ops.affine import affine, affine_backward
from swl.ops.cross_entropy import cross_entropy, cross_entropy_value_and_grad
from swl.ops.kl import linear_kl, linear_kl_value_and_grad
from swl.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_value_and_grad
from swl.ops.log_prob import linear_log_prob, linear_log_prob_value_and_grad
from swl.ops.loss import RowStats

__all__ = [
    "RowStats",
    "affine",
    "affine_backward",
    "cross_entropy",
    "cross_entropy_value_and_grad",
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "linear_kl",
    "linear_kl_value_and_grad",
    "linear_log_prob",
    "linear_log_prob_value_and_grad",
]
