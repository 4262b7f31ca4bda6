"""The same computations in other libraries; each function gives nothing where its library is not installed.

Calls of losses give ``(loss, gradient)``, or ``(loss,)`` where only that is asked for.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

from swl.backends.host.threads import POOL
from swl.bench.timing import Call

__all__ = [
    "book_loss",
    "jax_losses",
    "numpy_head",
    "numpy_kl",
    "numpy_log_prob",
    "numpy_loss",
    "numpy_losses",
    "torch_head",
    "torch_kl",
    "torch_log_prob",
    "torch_loss_of_rows",
    "torch_losses",
]


# ------------------------------------------------------------------------------------------------ PyTorch


def torch_losses(z: Any, t: Any, *, grad: bool, compiled: bool) -> dict[str, Call]:
    """Give PyTorch's cross-entropy, eager and compiled."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(POOL.threads)
    tt = torch.from_numpy(t)
    is_bfloat16 = z.dtype.name == "bfloat16"
    zt = torch.from_numpy(z.astype(np.float32)).bfloat16() if is_bfloat16 else torch.from_numpy(z)
    zt.requires_grad_(grad)

    def of(loss: Any) -> Call:
        def both() -> Any:
            zt.grad = None
            value = loss(zt, tt)
            value.backward()
            return value, zt.grad

        def forward() -> Any:
            with torch.inference_mode():
                return (loss(zt, tt),)

        return both if grad else forward

    loss = torch.nn.functional.cross_entropy
    calls = {"torch": of(loss)}
    if compiled:
        torch._dynamo.reset()  # each shape is compiled for itself
        call = of(torch.compile(loss, dynamic=False))
        try:
            # what torch keeps on disk may be compiled for another ATEN_CPU_CAPABILITY, and then corrupts memory
            with torch.compiler.config.patch(force_disable_caches=True), warnings.catch_warnings(action="ignore"):
                call()
        except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, say
            print(f"torch.compile is left out: {type(error).__name__}", file=sys.stderr)
        else:
            calls["torch.compile"] = call
    return calls


def torch_loss_of_rows(z: Any, q: Any) -> dict[str, Call]:
    """Give PyTorch's cross-entropy of probabilities."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(POOL.threads)
    zt, qt = torch.from_numpy(z).requires_grad_(), torch.from_numpy(q)

    def call() -> Any:
        value = torch.nn.functional.cross_entropy(zt, qt)
        return value, *torch.autograd.grad(value, zt)

    return {"torch": call}


def torch_head(x: Any, W: Any, t: Any) -> dict[str, Call]:
    """Give PyTorch's `linear_cross_entropy`, with its defaults and in chunks; or its parts, where PyTorch has none yet."""
    try:
        import torch
    except ImportError:
        return {}
    F = torch.nn.functional
    torch.set_num_threads(POOL.threads)
    xt, tt = torch.from_numpy(x).requires_grad_(), torch.from_numpy(t)
    Wt = torch.from_numpy(W.T.copy()).requires_grad_()
    fused, options = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)

    def of(loss: Any) -> Call:
        def call() -> Any:
            xt.grad = Wt.grad = None
            value = loss()
            value.backward()
            return value, xt.grad, Wt.grad.T

        return call

    calls = {"torch": of(lambda: fused(xt, Wt, tt) if fused else F.cross_entropy(xt @ Wt.T, tt))}
    if fused and options:
        calls["torch, in chunks"] = of(lambda: fused(xt, Wt, tt, options=options()))
    return calls


def torch_log_prob(x: Any, W: Any, t: Any, dentropy: float) -> dict[str, Call]:
    """Give the lines that trainers write in PyTorch for log-probabilities and entropies."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(POOL.threads)
    xt, tt = torch.from_numpy(x).requires_grad_(), torch.from_numpy(t)
    Wt = torch.from_numpy(W.T.copy()).requires_grad_()

    def call() -> Any:
        log_p = torch.log_softmax(xt @ Wt.T, dim=-1)
        chosen, entropy = log_p.gather(1, tt[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        dx, dW = torch.autograd.grad(chosen.sum() + dentropy * entropy.sum(), (xt, Wt))
        return chosen, entropy, dx, dW.T

    return {"torch": call}


def torch_kl(x: Any, W: Any, teacher_x: Any, teacher_W: Any) -> dict[str, Call]:
    """Give PyTorch's `kl_div` of two heads."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(POOL.threads)
    xt, xs = torch.from_numpy(x).requires_grad_(), torch.from_numpy(teacher_x)
    Wt, Ws = torch.from_numpy(W.T.copy()).requires_grad_(), torch.from_numpy(teacher_W.T.copy())

    def call() -> Any:
        student, teacher = torch.log_softmax(xt @ Wt.T, dim=-1), torch.log_softmax(xs @ Ws.T, dim=-1)
        loss = torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        dx, dW = torch.autograd.grad(loss, (xt, Wt))
        return loss, dx, dW.T

    return {"torch": call}


# ------------------------------------------------------------------------------------------------ JAX


def jax_losses(z: Any, t: Any, *, grad: bool) -> dict[str, Call]:
    """Give JAX under jit: ``jax.nn.log_softmax`` at the target, and the difference from ``logsumexp`` that optax takes."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return {}
    if z.dtype == np.float64 or not z.size:
        return {}  # float64 is a setting of the whole process there

    def at(values: Any, t: Any) -> Any:
        return jnp.take_along_axis(values, t[:, None], axis=1)[:, 0]

    def log_softmax(z: Any, t: Any) -> Any:
        return -at(jax.nn.log_softmax(z), t).mean()

    def logsumexp(z: Any, t: Any) -> Any:
        return (jax.nn.logsumexp(z, axis=1) - at(z, t)).mean()

    zj, tj = jnp.asarray(z), jnp.asarray(t)

    def of(loss: Any) -> Call:
        if grad:
            both = jax.jit(jax.value_and_grad(loss))
            return lambda: jax.block_until_ready(both(zj, tj))
        forward = jax.jit(loss)
        return lambda: (jax.block_until_ready(forward(zj, tj)),)

    return {"JAX jit, log_softmax": of(log_softmax), "JAX jit, logsumexp": of(logsumexp)}


# ------------------------------------------------------------------------------------------------ NumPy, by hand


def numpy_loss(z: Any, t: Any) -> tuple[Any, Any]:
    """Compute mean loss and gradient by the lines of the book, done right; the gradient of 16-bit logits in float32."""
    rows = np.arange(len(z))
    if z.dtype not in (np.float32, np.float64):
        z = z.astype(np.float32)
    u = z - z.max(axis=1, keepdims=True)
    p = np.exp(u)
    s = p.sum(axis=1, keepdims=True)
    loss = (np.log(s[:, 0]) - u[rows, t]).mean()
    p /= s
    p[rows, t] -= 1
    p /= len(z)
    return loss, p


def book_loss(z: Any, t: Any) -> tuple[Any, Any]:
    """Compute mean loss and gradient of one-hot rows by the lines of the book."""
    rows = np.arange(len(z))
    z = z - z.max(axis=-1, keepdims=True)
    y = np.exp(z) / np.sum(np.exp(z), axis=-1, keepdims=True)
    return -np.sum(np.log(y[rows, t.argmax(axis=1)] + 1e-7)) / len(z), (y - t) / len(z)


def numpy_losses(z: Any, t: Any, *, grad: bool) -> dict[str, Call]:
    """Give that, and its first half."""

    def forward() -> Any:
        u = z - z.max(axis=1, keepdims=True)
        return ((np.log(np.exp(u).sum(axis=1)) - u[np.arange(len(z)), t]).mean(),)

    return {"NumPy by hand": (lambda: numpy_loss(z, t)) if grad else forward}


def numpy_head(x: Any, W: Any, t: Any) -> tuple[Any, Any, Any]:
    """Compute loss, dx and dW of the head."""
    loss, dlogits = numpy_loss(x @ W, t)
    return loss, dlogits @ W.T, x.T @ dlogits


def _log_softmax(x: Any, W: Any) -> Any:
    z = x @ W
    u = z - z.max(axis=1, keepdims=True)
    return u - np.log(np.exp(u).sum(axis=1, keepdims=True))


def numpy_log_prob(x: Any, W: Any, t: Any, dentropy: Any) -> tuple[Any, ...]:
    """Compute log-probabilities, entropies, and dx and dW of ``Σ log p_t + dentropy·Σ H``."""
    rows, log_p = np.arange(len(x)), _log_softmax(x, W)
    p = np.exp(log_p)
    H = -(p * log_p).sum(axis=1)
    G = -p - dentropy * p * (log_p + H[:, None])
    G[rows, t] += 1
    return log_p[rows, t], H, G @ W.T, x.T @ G


def numpy_kl(x: Any, W: Any, teacher_x: Any, teacher_W: Any) -> tuple[Any, Any, Any]:
    """Compute the mean of KL(teacher ‖ student), dx and dW."""
    log_p, log_q = _log_softmax(x, W), _log_softmax(teacher_x, teacher_W)
    q = np.exp(log_q)
    G = (np.exp(log_p) - q) / np.float32(len(x))
    return (q * (log_q - log_p)).sum(axis=1).mean(), G @ W.T, x.T @ G
