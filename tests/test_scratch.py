"""The memory that compiled kernels work in: never their own, and nothing beside it is touched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import swl
from swl.backends.numba.scratch import KEPT, LINE, scratch

F32 = np.dtype(np.float32)

COMPILED = """
from swl.backends.numba import cache

made, kept = [], cache.kept
def recorded(function, *files):
    made.append(kept(function, *files))
    return made[-1]
cache.kept, cache._folder = recorded, lambda source: None  # compiled here: what is on disk has no source left

import numpy as np, swl
from swl.backends.numba.gemm import gemm

swl.set_backend("numba")
swl.warmup(("float32", "float64", "float16"), ids=("int64", "uint8"), progress=False)
for dtype in ("float32", "float64"):
    a = np.zeros((9, 9), dtype)
    gemm(a, a.copy(), np.empty_like(a))
for kernel in made:
    assert kernel.overloads, kernel
    for signature, compiled in kernel.overloads.items():
        print(compiled.library.get_llvm_str())
"""


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(["-c", program] if "\n" in program else [program]), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_kernels_allocate_nothing_and_count_references_to_their_arguments_only() -> None:
    """What compiled code allocates is freed after the last use that Numba knows of, and a view is none."""
    done = run(COMPILED)
    assert done.returncode == 0, done.stderr[-2000:]
    functions = re.findall(
        r'^define [^\n]*?@("[^"]+"|[^\s(]+)\([^\n]*\{\n(.*?)^\}', done.stdout, re.MULTILINE | re.DOTALL
    )
    inside = {name: body for name, body in functions if not name.startswith(("NRT_", "_ZN7cpython", "cfunc."))}
    for kernel in ("sweep", "plain_loss", "plain_loss_of_rows", "prepare_ids", "total", "convert", "_gemm"):
        assert any(re.search(rf"\d{kernel}_[0-9a-f]{{12}}", name) for name in inside), kernel
    for name, body in inside.items():
        for line in re.findall(r"[^\n]*@NRT_[^\n]*", body):
            # an argument is held by who calls, so the count never reaches 0 here; LLVM may name it as the source does
            of_argument = re.search(rf"@NRT_(incref|decref)\(ptr %(arg\.|({ARGUMENTS})\.sroa)", line)
            assert of_argument or "@NRT_Free(" in line, (name, line)


ARGUMENTS = "logits|out|ids|probs|weight|row_weight|bias|row_scale|rows|argmax|numbers|clean|room|source|target|x"
"""What the kernels call their arrays; none of these names is given to another."""

MIXED = """
import sys, threading, time
import numpy as np, swl

rng = np.random.default_rng(0)
jobs = []
def job(call, *arguments, **options):
    jobs.append(lambda: call(*arguments, **options))
for dtype in (np.float32, np.float64):
    for N, C in ((1500, 64), (300, 1000), (70, 3), (33, 9000)):
        z, t = rng.standard_normal((N, C)).astype(dtype), rng.integers(0, C, N)
        t[::7] = -100
        job(swl.cross_entropy, z, t, stats=True)
        job(swl.cross_entropy_value_and_grad, z, t)
        job(swl.cross_entropy_value_and_grad, z, t, label_smoothing=0.1, softcap=5.0, z_loss=0.1, stats=True)
    x, W = rng.standard_normal((200, 30)).astype(dtype), rng.standard_normal((30, 50)).astype(dtype)
    job(swl.linear_cross_entropy_value_and_grad, x, W, rng.integers(0, 50, 200), memory_budget=20_000)

def bits(result):
    if isinstance(result, tuple):
        return b"".join(map(bits, result))
    return np.asarray(result).tobytes()

swl.set_backend("numba")
expected = [bits(job()) for job in jobs]
stop, results, wrong = time.monotonic() + float(sys.argv[1]), [0], [0]

def work(seed):
    order = np.random.default_rng(seed)
    while time.monotonic() < stop:
        k = order.integers(len(jobs))
        wrong[0] += bits(jobs[k]()) != expected[k]
        results[0] += 1

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(wrong[0], "wrong of", results[0])
"""


def test_threads_that_mix_operations_get_the_bits_of_one_thread() -> None:
    """Under an allocator that gives freed memory to the next thread, and writes over it before."""
    done = run(MIXED, "8", MALLOC_ARENA_MAX="1", MALLOC_PERTURB_="165")
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    wrong, _, _, results = done.stdout.split()
    assert int(wrong) == 0, done.stdout
    assert int(results) > 50


@pytest.mark.skipif(sys.platform == "win32", reason="memory is protected by another call there")
def test_no_kernel_touches_what_lies_beside_its_arrays() -> None:
    done = run(str(Path(__file__).with_name("guarded.py")), "losses")
    assert done.stdout == "survived\n", (done.returncode, done.stderr[-2000:])


def test_scratch_is_used_again_grown_on_demand_and_bounded() -> None:
    first = scratch(100, F32)
    assert scratch(50, F32) is first
    grown = scratch(2 * first.size, F32)
    assert grown.size >= 2 * first.size
    assert scratch(100, F32) is grown
    assert grown.ctypes.data % LINE == 0
    large = scratch(KEPT // 4 + 1, F32)
    assert scratch(KEPT // 4 + 1, F32) is not large
    assert scratch(100, F32) is grown


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signal")
def test_a_signal_handler_may_compute_while_a_call_has_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the same memory, between two kernels; what the call returns is not in it."""
    rng = np.random.default_rng(0)
    z, t = rng.standard_normal((40, 10), np.float32), rng.integers(0, 10, 40)
    other = rng.standard_normal((20, 500), np.float32)
    calls: list[Any] = []

    def handler(*_: Any) -> None:
        calls.append(None)
        calls[0] = swl.cross_entropy_value_and_grad(other, np.arange(20), stats=True)

    def interrupted(size: int, dtype: Any) -> Any:
        room = scratch(size, dtype)
        if not calls:
            signal.raise_signal(signal.SIGUSR1)
        return room

    with swl.use_backend("numba"):
        expected = [np.asarray(x).tobytes() for x in swl.cross_entropy_value_and_grad(z, t)]
        before = signal.signal(signal.SIGUSR1, handler)
        try:
            monkeypatch.setattr("swl.backends.numba.backend.scratch", interrupted)
            got = [np.asarray(x).tobytes() for x in swl.cross_entropy_value_and_grad(z, t)]
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert calls
    assert got == expected
