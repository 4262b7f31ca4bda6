"""`swl.warmup`: after it a training loop compiles nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import swl
from swl.backends import active
from swl.cli import main

LOOP = """
import gc, sys
import numpy as np, swl
from numba.core.dispatcher import Dispatcher

def kernels():
    return sum(len(o.signatures) for o in gc.get_objects() if isinstance(o, Dispatcher))

name = sys.argv[1]
if name == "bfloat16":
    import ml_dtypes
    dtype = np.dtype(ml_dtypes.bfloat16)
else:
    dtype = np.dtype(name)
before = kernels()
if sys.argv[2] == "warm":
    swl.warmup(name, progress=False)
warm = kernels()
rng = np.random.default_rng(0)
for batch, C in ((100, 10), (300, 1009)):  # one thread, and all
    x = rng.standard_normal((batch, 20)).astype(dtype)
    q = rng.dirichlet(np.ones(C), batch)
    weight = rng.random(C).astype(np.float32).astype(dtype)
    for t in (rng.integers(0, C, batch), rng.integers(0, C, batch).astype(np.int32), q.astype(dtype), q):
        for options in ({}, dict(weight=weight, label_smoothing=0.1), dict(z_loss=1, softcap=20, ignore_index=np.int8(-1))):
            body = [swl.Affine.init(20, 16, rng=rng, dtype=dtype), swl.ReLU()]
            for head in (
                [swl.Affine.init(16, C, rng=rng, dtype=dtype), swl.SoftmaxWithLoss(**options)],
                [swl.AffineSoftmaxWithLoss(swl.Affine.init(16, C, rng=rng, dtype=dtype).W, memory_budget=2**18, **options)],
            ):
                net, optimizer = swl.Sequential(*body, *head), swl.SGD(0.1)
                for step in range(2):
                    net.forward_backward(x, t)
                    optimizer.update(net.parameters(), net.gradients())
                net.forward(x, t)
                net.backward()
            z = rng.standard_normal((batch, C)).astype(dtype)
            swl.cross_entropy(z, t, stats=True, **options)
            swl.cross_entropy_value_and_grad(z, t, out=z, reduction="sum", dout=0.5, **options)
x, W = np.ones((700, 64), dtype), np.ones((64, 15001), dtype)
for budget in (2**28, 2**24):
    for weights in (W, W.T.copy().T):
        swl.linear_cross_entropy_value_and_grad(x, weights, np.arange(700), memory_budget=budget)
        swl.affine_backward(swl.affine(x, weights, weights[0]), x, weights)
print(before, warm, kernels())
"""


def kernels(dtype: str, how: str) -> list[int]:
    """Count what is compiled or loaded before warming up, after it, and after a training loop."""
    done = subprocess.run([sys.executable, "-c", LOOP, dtype, how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(count) for count in done.stdout.split()]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_training_loop_compiles_nothing_after_it(dtype: str) -> None:
    before, warm, after = kernels(dtype, "warm")
    assert before == 0  # importing compiles nothing
    assert warm > 0
    assert after == warm


def test_without_it_the_loop_compiles() -> None:
    before, warm, after = kernels("float32", "cold")
    assert before == warm == 0
    assert after > 0


@pytest.mark.parametrize("bar", ["tqdm", "none"])
def test_the_bar_reaches_its_end_with_tqdm_and_without(capsys: Any, monkeypatch: pytest.MonkeyPatch, bar: str) -> None:
    if bar == "none":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    swl.warmup(["float32"], ids="int64")
    err = capsys.readouterr().err
    assert "swl.warmup" in err
    if bar == "none":
        last = err.strip().rpartition("\r")[2].removeprefix("swl.warmup: ")
        done, total = last.split("/")
        assert done == total != "0"
    swl.warmup(progress=False)
    assert capsys.readouterr().err == ""


def test_it_serves_the_backend_asked_for_and_leaves_the_active_one() -> None:
    was = active()
    swl.warmup(backend="numpy", progress=False)
    assert active() == was


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"dtypes": "int8"},
            ValueError,
            "dtypes may name 'float32', 'float64', 'float16', 'bfloat16' only, got 'int8'",
        ),
        ({"dtypes": ["float32", "nonsense"]}, ValueError, "got 'nonsense'"),
        ({"ids": "float32"}, TypeError, "ids must name integer dtypes, got 'float32'"),
        ({"backend": "nonsense"}, ValueError, "nonsense"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        swl.warmup(**arguments, progress=False)


def test_the_command_says_where_kernels_are_kept(capsys: Any) -> None:
    assert main(["warmup", "--dtype", "float32", "--dtype", "float16"]) == 0
    out, err = capsys.readouterr()
    assert "swl.warmup" in err
    assert out.startswith("compiled for float32, float16 on numba; kernels are kept in ")
    assert main(["warmup", "--backend", "nonsense"]) == 2
