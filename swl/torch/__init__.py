"""The classifier head for PyTorch: torch's own signatures over swl's kernels, without copies.

CPU tensors run on the active host backend, CUDA tensors on the CuPy backend, on torch's current stream.
"""

from swl.torch._affine import affine
from swl.torch._bridge import share_memory_pool
from swl.torch._class_parallel import ClassParallelLinearCrossEntropyLoss, class_parallel_linear_cross_entropy
from swl.torch._cross_entropy import cross_entropy
from swl.torch._huggingface import apply_to
from swl.torch._kl import linear_kl
from swl.torch._linear import linear_cross_entropy
from swl.torch._log_prob import linear_log_prob
from swl.torch._modules import Affine, CrossEntropyLoss, LinearCrossEntropyLoss
from swl.torch._patch import Report, patch

__all__ = [
    "Affine",
    "ClassParallelLinearCrossEntropyLoss",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "Report",
    "affine",
    "apply_to",
    "class_parallel_linear_cross_entropy",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_kl",
    "linear_log_prob",
    "patch",
    "share_memory_pool",
]
