"""What is compared: every case by its title, in groups."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

import swl
from swl.backends import get, host_backend
from swl.backends.host.threads import POOL
from swl.backends.numba.products import product
from swl.backends.registry import SPECIFICATION
from swl.bench import peers
from swl.bench.timing import Call, Case, Contender
from swl.ops.chunks import DEFAULT_BUDGET

__all__ = ["CASES", "GROUPS", "logits_case"]

Built = tuple[dict[str, Contender], tuple[Any, ...], float]

OURS = host_backend()
"""The backend that is plain "swl": the active one of the hosts."""
OTHERS = tuple(f"swl ({info.name})" for info in swl.available_backends() if info.name != OURS)
"""The other backends of the registry."""
TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


def on(backend: str, call: Call) -> Call:
    """Make a call run on a backend, and wait for its device if it has one; ours is active anyway while measuring."""
    if backend == OURS:
        return call

    def called() -> Any:
        with swl.use_backend(backend):
            result = call()
            get(backend).check()
            return result

    return called


def backends(build: Any, specification: bool = True) -> dict[str, Call]:
    """Give the calls of every usable backend, or of all but the specification, which takes long.

    `build` gives those of the active backend by the ends of their names; but for ours, only the first counts.
    """
    calls = {}
    for info in swl.available_backends():
        if info.usable and (specification or info.name != SPECIFICATION):
            with swl.use_backend(info.name):
                for end, call in build().items():
                    name = "swl" if info.name == OURS else f"swl ({info.name})"
                    if info.name == OURS or not end:
                        calls[name + end] = on(info.name, call)
    return calls


def contenders(*calls: dict[str, Call]) -> dict[str, Contender]:
    """Make contenders of calls."""
    return {name: Contender(call) for some in calls for name, call in some.items()}


# ------------------------------------------------------------------------------------------------ the loss


def loss(N: int, C: int, dtype: str, grad: bool, every: bool) -> Built:
    """Compare cross-entropy over class ids: swl writing into a given array and into a new one, peers, a copy of the logits."""
    rng = np.random.default_rng(0)
    z, t = rng.standard_normal((N, C), np.float32), rng.integers(0, C, N)
    if dtype == "bfloat16":
        import ml_dtypes

        z = z.astype(ml_dtypes.bfloat16)
    z = z if dtype == "bfloat16" else z.astype(dtype)
    copied = np.empty_like(z)

    def ours() -> dict[str, Call]:
        here, ids = swl.asarray(z), swl.asarray(t)
        if not grad:
            return {"": lambda: (swl.cross_entropy(here, ids),)}
        out = swl.asarray(np.empty_like(z))
        return {
            "": lambda: swl.cross_entropy_value_and_grad(here, ids, out=out),
            ", new array": lambda: swl.cross_entropy_value_and_grad(here, ids),
        }

    compiled = grad and dtype == "float32" and N * C > 10_000
    calls = contenders(
        backends(ours, specification=every),
        peers.torch_losses(z, t, grad=grad, compiled=compiled),
        peers.jax_losses(z, t, grad=grad),
        peers.numpy_losses(z, t, grad=grad) if dtype in ("float32", "float64") else {},
    )
    if grad:
        share = max(1, N // POOL.threads)  # in large pieces, which the C library copies past the caches
        calls = {"copy": Contender(lambda: POOL.run(lambda a, b: np.copyto(copied[a:b], z[a:b]), N, share)), **calls}
    value, gradient = peers.numpy_loss(z, t)
    return calls, (value, gradient) if grad else (value,), TOLERANCE[dtype]


def one_hot(N: int, C: int) -> Built:
    """Compare the loss of one-hot rows, as the book has them, and its gradient."""
    rng = np.random.default_rng(0)
    z, t = rng.standard_normal((N, C), np.float32), rng.integers(0, C, N)
    q = np.eye(C, dtype=np.float32)[t]

    def ours() -> dict[str, Call]:
        here, rows, out = swl.asarray(z), swl.asarray(q), swl.asarray(np.empty_like(z))
        return {"": lambda: swl.cross_entropy_value_and_grad(here, rows, out=out)}

    calls = backends(ours) | peers.torch_loss_of_rows(z, q) | {"NumPy by hand": lambda: peers.numpy_loss(z, t)}
    return contenders(calls), peers.numpy_loss(z, t), 1e-4


def logits_case(group: str, N: int, C: int, dtype: str = "float32", grad: bool = True, every: bool = True) -> Case:
    """Describe `loss`."""
    ours = ("copy", "swl", "swl, new array") if grad else ("swl",)
    names = (*ours, *OTHERS, "torch", "torch.compile", "JAX jit, log_softmax", "JAX jit, logsumexp", "NumPy by hand")
    what = "forward + backward" if grad else "forward"
    title = f"{N} × {C}, {dtype}, {what}"
    return Case(title, group, names, partial(loss, N, C, dtype, grad, every), floor="copy" if grad else None)


# ------------------------------------------------------------------------------------------------ products


def affine(N: int, D: int, K: int, grad: bool) -> Built:
    """Compare affine maps, or their gradients."""
    rng = np.random.default_rng(0)
    x, W, b, dout = (rng.standard_normal(shape, np.float32) for shape in ((N, D), (D, K), (K,), (N, K)))

    def ours() -> dict[str, Call]:
        x_, W_, b_, dout_ = (swl.asarray(a) for a in (x, W, b, dout))
        return {"": (lambda: swl.affine_backward(dout_, x_, W_)) if grad else (lambda: (swl.affine(x_, W_, b_),))}

    def by_hand() -> Any:
        return (dout @ W.T, x.T @ dout, dout.sum(axis=0)) if grad else (x @ W + b,)

    calls = backends(ours) | {"NumPy by hand": by_hand}
    try:
        import torch
    except ImportError:
        pass
    else:
        xt, Wt, bt = (torch.from_numpy(a).requires_grad_() for a in (x, W, b))
        y, dt = torch.addmm(bt, xt, Wt), torch.from_numpy(dout)

        def forward() -> Any:
            with torch.inference_mode():
                return (torch.addmm(bt, xt, Wt),)

        calls["torch"] = (lambda: torch.autograd.grad(y, (xt, Wt, bt), dt, retain_graph=True)) if grad else forward
    wide = [a.astype(np.float64) for a in (x, W, b, dout)]
    expected = (
        (wide[3] @ wide[1].T, wide[0].T @ wide[3], wide[3].sum(axis=0)) if grad else (wide[0] @ wide[1] + wide[2],)
    )
    return contenders(calls), expected, 1e-4


def products(N: int, D: int, C: int, which: str) -> Built:
    """Compare one of the three products of a head, each into memory that is there."""
    rng = np.random.default_rng(0)
    x, W, G = (rng.standard_normal(shape, np.float32) for shape in ((N, D), (D, C), (N, C)))
    a, b = {"x·W": (x, W), "G·Wᵀ": (G, W.T), "xᵀ·G": (x.T, G)}[which]
    out, expected = (np.empty((a.shape[0], b.shape[1]), np.float32) for _ in range(2))
    np.matmul(a, b, out=expected)

    def of(multiply: Any) -> Call:
        def call() -> Any:
            multiply()
            return (out,)

        return call

    calls = {"swl": of(lambda: product(a, b, out)), "numpy.matmul": of(lambda: np.matmul(a, b, out=out))}
    try:
        import torch
    except ImportError:
        pass
    else:
        left, right, result = (torch.from_numpy(matrix) for matrix in (a, b, out))
        calls["torch"] = of(lambda: torch.mm(left, right, out=result))
    return contenders(calls), (expected,), 1e-4


def head(N: int, D: int, C: int) -> Built:
    """Compare heads: fused within two budgets, and unfused; loss, dx and dW. The floor is the bare products of these shapes."""
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((N, D), np.float32), rng.standard_normal((D, C), np.float32) / np.float32(D**0.5)
    t = rng.integers(0, C, N)
    logits, dx, dW = np.empty((N, C), np.float32), np.empty_like(x), np.empty_like(W)
    rng.standard_normal(out=logits, dtype=np.float32)

    def products() -> None:
        np.matmul(x, W, out=logits)
        np.matmul(logits, W.T, out=dx)
        np.matmul(x.T, logits, out=dW)

    def ours() -> dict[str, Call]:
        x_, W_, t_ = (swl.asarray(a) for a in (x, W, t))

        def fused(budget: int) -> Any:
            loss, gradients = swl.linear_cross_entropy_value_and_grad(x_, W_, t_, memory_budget=budget)
            return loss, *gradients[:2]

        def unfused() -> Any:
            loss, dlogits = swl.cross_entropy_value_and_grad(swl.affine(x_, W_), t_)
            return loss, *swl.affine_backward(dlogits, x_, W_, needs=("dx", "dW"))[:2]

        return {
            "": partial(fused, DEFAULT_BUDGET),
            ", 64 MiB": partial(fused, 64 * 2**20),
            ", unfused": unfused,
        }

    calls = contenders(
        {"three products": products},
        backends(ours, specification=False),
        peers.torch_head(x, W, t),
        {"NumPy by hand": lambda: peers.numpy_head(x, W, t)},
    )
    return calls, peers.numpy_head(x, W, t), 1e-4


def head_16_bit(N: int, D: int, C: int) -> Built:
    """Compare the fused head in three dtypes, and with its weight stored as (C, D)."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((N, D), np.float32), rng.standard_normal((D, C), np.float32) / np.float32(D**0.5)
    t, calls = rng.integers(0, C, N), {}

    def both(x: Any, W: Any) -> Any:
        loss, gradients = swl.linear_cross_entropy_value_and_grad(x, W, t, needs=("dx", "dW"))
        return loss, *gradients[:2]

    for name, dtype in (("float32", np.float32), ("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        for end, stored in (("", W.astype(dtype)), (", (C, D)", np.ascontiguousarray(W.T, dtype).T)):
            calls[name + end] = on(OURS, partial(both, x.astype(dtype), stored))
    return contenders(calls), peers.numpy_head(x, W, t), TOLERANCE["bfloat16"]


def log_prob(N: int, D: int, C: int) -> Built:
    """Compare log-probabilities and entropies of the rows, and their gradients, with the fused loss's."""
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((N, D), np.float32), rng.standard_normal((D, C), np.float32) / np.float32(D**0.5)
    t, dentropy = rng.integers(0, C, N), np.float32(0.01)

    def ours() -> dict[str, Call]:
        x_, W_, t_ = (swl.asarray(a) for a in (x, W, t))

        def both() -> Any:
            found = swl.linear_log_prob_value_and_grad(x_, W_, t_, dentropy=dentropy, needs=("dx", "dW"))
            return *found[:2], *found[2][:2]

        return {"": both}

    calls = contenders(backends(ours, specification=False), peers.torch_log_prob(x, W, t, float(dentropy)))
    return calls, peers.numpy_log_prob(x, W, t, dentropy), 1e-4


def kl(N: int, D: int, teacher_D: int, C: int) -> Built:
    """Compare the divergence from a teacher and its gradients; both heads' logits are formed anew."""
    rng = np.random.default_rng(0)
    x, W, teacher_x, teacher_W = (
        rng.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5 if shape[1] == C else 1)
        for shape in ((N, D), (D, C), (N, teacher_D), (teacher_D, C))
    )

    def ours() -> dict[str, Call]:
        operands = [swl.asarray(a) for a in (x, W, teacher_x, teacher_W)]

        def both() -> Any:
            loss, gradients = swl.linear_kl_value_and_grad(*operands, needs=("dx", "dW"))
            return loss, *gradients[:2]

        return {"": both}

    calls = contenders(backends(ours, specification=False), peers.torch_kl(x, W, teacher_x, teacher_W))
    return calls, peers.numpy_kl(x, W, teacher_x, teacher_W), 1e-4


# ------------------------------------------------------------------------------------------------ together


def after_product(N: int, C: int) -> Built:
    """Compare a loss alone with one right after a product that NumPy does on BLAS's threads, or swl on its own."""
    rng = np.random.default_rng(0)
    z, t, out = rng.standard_normal((N, C), np.float32), rng.integers(0, C, N), np.empty((N, C), np.float32)
    a, b = (rng.standard_normal((400, 400), np.float32) for _ in range(2))
    x, W, y = rng.standard_normal((N, 256), np.float32), rng.standard_normal((256, C), np.float32), np.empty_like(z)
    call = on(OURS, lambda: swl.cross_entropy_value_and_grad(z, t, out=out))
    calls = {
        "swl": Contender(call),
        "after a 400³ product": Contender(call, before=lambda: np.matmul(a, b)),
        "after numpy.matmul of its logits": Contender(call, before=lambda: np.matmul(x, W, out=y)),
        "after swl.affine of its logits": Contender(call, before=on(OURS, lambda: swl.affine(x, W))),
    }
    return calls, peers.numpy_loss(z, t), 1e-4


def threads(N: int, C: int, dtype: str, options: dict[str, Any]) -> Built:
    """Compare one thread with all that there are."""
    rng = np.random.default_rng(0)
    z, t = rng.standard_normal((N, C)).astype(dtype), rng.integers(0, C, N)
    out, all_of_them = np.empty_like(z), POOL.threads
    call = on(OURS, lambda: swl.cross_entropy_value_and_grad(z, t, out=out, **options))
    with swl.use_backend(SPECIFICATION):
        expected = swl.cross_entropy_value_and_grad(z, t, **options)
    calls = {
        "one thread": Contender(call, enter=lambda: swl.set_num_threads(1)),
        "all threads": Contender(call, enter=lambda: swl.set_num_threads(all_of_them)),
    }
    return calls, expected, 1e-4


def training_step(N: int, D: int, H: int, C: int, book: bool = False) -> Built:
    """Compare steps of a network of two layers: forward, loss, backward, SGD. Checked are the gradients.

    In float32 over class ids; or with the types that the book's code gives, float64 parameters and one-hot rows.
    """
    rng, dtype = np.random.default_rng(0), np.dtype(np.float64 if book else np.float32)
    x, ids = rng.standard_normal((N, D), np.float32), rng.integers(0, C, N)
    t: Any = np.eye(C)[ids] if book else ids
    start = [
        (rng.standard_normal(shape) / shape[0] ** 0.5).astype(dtype) if len(shape) == 2 else np.zeros(shape, dtype)
        for shape in ((D, H), (H,), (H, C), (C,))
    ]
    lr = dtype.type(1e-6)  # the numbers stay what they are, however many steps

    W1, b1, W2, b2 = (p.copy() for p in start)

    def by_hand() -> Any:
        h = x @ W1 + b1
        positive = h > 0
        h *= positive
        _, dz = peers.book_loss(h @ W2 + b2, t) if book else peers.numpy_loss(h @ W2 + b2, t)
        dh = dz @ W2.T
        dh *= positive
        gradients = x.T @ dh, dh.sum(axis=0), h.T @ dz, dz.sum(axis=0)
        for p, g in zip((W1, b1, W2, b2), gradients, strict=True):
            p -= lr * g
        return gradients

    with swl.use_backend(OURS):
        first = swl.Affine(start[0].copy(), start[1].copy(), needs_dx=False)
        second = swl.Affine(start[2].copy(), start[3].copy())
        net, optimizer = swl.Sequential(first, swl.ReLU(), second, swl.SoftmaxWithLoss()), swl.SGD(lr=float(lr))
        parameters = net.parameters()

    def ours() -> Any:
        net.forward_backward(x, t)
        optimizer.update(parameters, net.gradients())
        return first.dW, first.db, second.dW, second.db

    calls = {"swl": on(OURS, ours), "NumPy by hand": by_hand}
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.set_num_threads(POOL.threads)
        module = torch.nn.Sequential(torch.nn.Linear(D, H), torch.nn.ReLU(), torch.nn.Linear(H, C))
        with torch.no_grad():
            for p, value in zip(module.parameters(), start, strict=True):
                p.copy_(torch.from_numpy(value.T.copy() if value.ndim == 2 else value))
        module = module.to(torch.from_numpy(start[0]).dtype)
        xt, tt = torch.from_numpy(x.astype(dtype)), torch.from_numpy(t)
        sgd = torch.optim.SGD(module.parameters(), lr=float(lr))

        def eager() -> Any:
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(module(xt), tt).backward()
            sgd.step()
            return [p.grad.mT if p.ndim == 2 else p.grad for p in module.parameters()]

        calls["torch"] = eager
    return contenders(calls), by_hand(), 1e-4


# ------------------------------------------------------------------------------------------------ all of them

LARGE = ((512, 50257), (2048, 32000), (64, 128256), (4096, 1000), (128, 10))
SMALL = ((1, 10), (32, 10), (100, 100), (64, 1000))
ONE_HOT = ((100, 10), (4096, 1000))
IN_DTYPES = ((512, 50257), (4096, 1000))
AFFINE = ((100, 784, 50), (256, 1024, 1000), (512, 768, 4096))
PRODUCTS = ((64, 768, 50257), (256, 768, 50257), (1024, 768, 50257), (1024, 1024, 1024))
HEADS = ((256, 2048, 1000), (1024, 768, 8192), (1024, 768, 50257))
AFTER = ((100, 10), (256, 1000), (512, 50257))
SCALED: tuple[tuple[int, int, str, dict[str, Any]], ...] = (
    (512, 50257, "float32", {}),
    (512, 2000, "float32", {}),
    (512, 2000, "float64", {}),
    (512, 2000, "float32", {"label_smoothing": 0.1, "softcap": 30.0}),
)


def _cases() -> Iterator[Case]:
    for N, C in LARGE:
        yield logits_case("losses", N, C)
    for N, C in LARGE:
        yield logits_case("forward", N, C, grad=False)
    for dtype in ("float64", "float16", "bfloat16"):
        for N, C in IN_DTYPES:
            yield logits_case("dtypes", N, C, dtype, every=False)
    for N, C in SMALL:
        yield logits_case("small", N, C)
    names: tuple[str, ...] = ("swl", *OTHERS, "torch", "NumPy by hand")
    for N, C in ONE_HOT:
        yield Case(f"{N} × {C}, one-hot", "one-hot", names, partial(one_hot, N, C))
    for N, D, C in AFFINE:
        for what, grad in (("forward", False), ("backward", True)):
            yield Case(f"{N} × {D} × {C}, {what}", "affine", names, partial(affine, N, D, C, grad))
    for N, D, C in PRODUCTS:
        for which in ("x·W", "G·Wᵀ", "xᵀ·G"):
            case = partial(products, N, D, C, which)
            yield Case(f"{N} × {D} × {C}, {which}", "products", ("swl", "numpy.matmul", "torch"), case)
    ours = ("swl", "swl, 64 MiB", "swl, unfused", *OTHERS)
    names = ("three products", *ours, "torch", "torch, in chunks", "NumPy by hand")
    for N, D, C in HEADS:
        yield Case(f"{N} × {D} × {C}", "head", names, partial(head, N, D, C), floor="three products")
    names = tuple(f"{dtype}{end}" for dtype in ("float32", "float16", "bfloat16") for end in ("", ", (C, D)"))
    for N, D, C in HEADS[1:]:
        yield Case(f"{N} × {D} × {C}", "head16", names, partial(head_16_bit, N, D, C), own="float32")
    for N, D, C in HEADS[1:]:
        yield Case(f"{N} × {D} × {C}", "log_prob", ("swl", *OTHERS, "torch"), partial(log_prob, N, D, C))
        yield Case(f"{N} × {D} × {C}, teacher of {2 * D}", "kl", ("swl", *OTHERS, "torch"), partial(kl, N, D, 2 * D, C))
    names = ("swl", "after a 400³ product", "after numpy.matmul of its logits", "after swl.affine of its logits")
    for N, C in AFTER:
        yield Case(f"{N} × {C} after a product", "after", names, partial(after_product, N, C))
    names = ("one thread", "all threads")
    for N, C, dtype, options in SCALED:
        title = ", ".join((f"{N} × {C}", dtype, *options))
        yield Case(title, "threads", names, partial(threads, N, C, dtype, options), own="all threads")
    names = ("swl", "NumPy by hand", "torch")
    for title, book in (("784-50-10, batch of 100", False), ("784-50-10, batch of 100, the book's types", True)):
        yield Case(title, "step", names, partial(training_step, 100, 784, 50, 10, book))


CASES = {f"{case.group}: {case.title}": case for case in _cases()}
GROUPS = tuple(dict.fromkeys(case.group for case in CASES.values()))
