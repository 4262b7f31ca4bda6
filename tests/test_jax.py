"""swl.jax against losses written in JAX itself."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swl.jax

RNG = np.random.default_rng(0)
X, W, B = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((6, 4), (4, 5), (5,)))
Z = X @ W + B
IDS, Q = jnp.array([0, 1, -100, 4, 2, 2]), jax.nn.softmax(jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32))


def reference(z: Any, target: Any) -> Any:
    log_p = jax.nn.log_softmax(z)
    if target.ndim == z.ndim:
        return -(target * log_p).sum(-1).mean()
    counts = target != -100
    picked = jnp.take_along_axis(log_p, jnp.where(counts, target, 0)[..., None], -1)[..., 0]
    return -(picked * counts).sum() / counts.sum()


def close(a: Any, b: Any) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("target", [IDS, Q], ids=["ids", "probabilities"])
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_value_and_gradient(target: Any, jit: Any) -> None:
    ours = jit(jax.value_and_grad(lambda z: 3.0 * swl.jax.cross_entropy(z, target)))(Z)
    theirs = jax.value_and_grad(lambda z: 3.0 * reference(z, target))(Z)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("bias", [True, False])
def test_fused_head(bias: bool) -> None:
    args = (X, W, B) if bias else (X, W)

    def ours(x: Any, W: Any, b: Any = None) -> Any:
        return swl.jax.linear_cross_entropy(x, W, IDS, b, memory_budget=64)

    def theirs(x: Any, W: Any, b: Any = 0.0) -> Any:
        return reference(x @ W + b, IDS)

    wrt = tuple(range(len(args)))
    close(ours(*args), theirs(*args))
    for a, b in zip(jax.jit(jax.grad(ours, wrt))(*args), jax.grad(theirs, wrt)(*args), strict=True):
        close(a, b)


def test_vmap() -> None:
    z, t = jnp.stack([Z, 2 * Z, -Z]), jnp.stack([IDS, IDS[::-1], IDS])
    close(jax.vmap(swl.jax.cross_entropy)(z, t), jax.vmap(reference)(z, t))
    close(jax.jit(jax.vmap(jax.grad(swl.jax.cross_entropy)))(z, t), jax.vmap(jax.grad(reference))(z, t))


def test_options_and_rows() -> None:
    w, s = jnp.arange(1.0, 6.0), jnp.arange(6.0)
    options = {
        "weight": w,
        "sample_weight": s,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
        "temperature": 0.7,
    }
    want, dz = swl.cross_entropy_value_and_grad(
        np.asarray(Z), np.asarray(IDS), reduction="none", dout=np.asarray(s),
        **{k: np.asarray(v) if k in ("weight", "sample_weight") else v for k, v in options.items()},
    )  # fmt: skip
    got, back = jax.vjp(jax.jit(lambda z: swl.jax.cross_entropy(z, IDS, reduction="none", **options)), Z)
    close(got, want)
    close(back(s)[0], dz)
    close(swl.jax.cross_entropy(Z, IDS, denominator=2.0), swl.jax.cross_entropy(Z, IDS, reduction="sum") / 2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_16_bits(dtype: Any) -> None:
    z = Z.astype(dtype)
    got, dz = jax.value_and_grad(swl.jax.cross_entropy)(z, IDS)
    want, exact = jax.value_and_grad(reference)(z.astype(jnp.float32), IDS)
    close(got, want)
    assert dz.dtype == dtype
    np.testing.assert_allclose(dz.astype(jnp.float32), exact, rtol=jnp.finfo(dtype).eps, atol=1e-6)


def test_errors() -> None:
    with pytest.raises(NotImplementedError, match="with respect to target"):
        jax.grad(swl.jax.cross_entropy, 1)(Z, Q)
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        swl.jax.cross_entropy(Z, IDS, reduction="avg")
    with pytest.raises(TypeError, match="no option 'check'"):
        swl.jax.cross_entropy(Z, IDS, check=True)
    with pytest.raises(Exception, match=r"target\[0\] is 9"):  # JAX chooses the type of a callback's error
        jax.block_until_ready(swl.jax.cross_entropy(Z, IDS.at[0].set(9)))


# ------------------------------------------------------------------------------------------------ many devices, one processor

SHARDED = """
import numpy as np
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import swl.jax

assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("rows",))
rng = np.random.default_rng(0)
x, W, weight = (jnp.asarray(rng.uniform(size=shape), jnp.float32) for shape in ((8, 5), (5, 7), 7))
t = jnp.arange(8) % 7

def fused(x, W, t):
    return swl.jax.linear_cross_entropy(x, W, t, weight=weight, reduction="sum")

def stored(x, W, t):
    return swl.jax.cross_entropy(x @ W, t, weight=weight, reduction="sum", label_smoothing=0.1)

for loss in (fused, stored):
    want = jax.value_and_grad(loss, argnums=(0, 1))(x, W, t)
    mapped = jax.shard_map(
        lambda *a: jax.lax.psum(loss(*a), "rows"), mesh=mesh, in_specs=(P("rows"), P(), P("rows")), out_specs=P()
    )
    got = jax.value_and_grad(mapped, argnums=(0, 1))(x, W, t)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    there = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, P("rows")), (W, P()), (t, P("rows")))]
    got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*there)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
print("the same")
"""

ONE_PROCESSOR = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import numpy as np
import jax
import jax.numpy as jnp
import swl.jax

z, t = jnp.zeros((20_000, 500), jnp.float32), jnp.zeros(20_000, int)
loss, gradient = jax.jit(jax.value_and_grad(swl.jax.cross_entropy))(z, t)
np.testing.assert_allclose(loss, np.log(500), rtol=1e-6)
print("the same")
"""


@pytest.mark.parametrize("script", [SHARDED, ONE_PROCESSOR], ids=["two devices", "one processor"])
def test_in_a_process_of_its_own(script: str) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.stdout.endswith("the same\n"), done.stderr[-3000:]
