"""The pool that large results take their memory from: never two live results in one block, and nothing is lost."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

import swl
from swl.backends.host.memory import _ALIGN, SMALLEST, HostPool
from swl.backends.host.threads import Pool

LIMIT = 6 * SMALLEST


def place(x: Any) -> tuple[int, int]:
    """Give the addresses of the first byte of a contiguous array and of the one after its last."""
    start = x.__array_interface__["data"][0]
    return start, start + x.nbytes


def result(n: int = 300) -> Any:
    """Compute a gradient of more than 1 MiB."""
    with swl.use_backend("numba"):
        return swl.cross_entropy_value_and_grad(np.ones((n, 1000), np.float32), np.zeros(n, int))[1]


@pytest.fixture
def emptied() -> Iterator[None]:
    gc.collect()
    swl.empty_cache()
    yield
    swl.empty_cache()


# ------------------------------------------------------------------------------------------------ one block, one result


class Results(RuleBasedStateMachine):
    """Arrays come, are written to, viewed and dropped in any order; what is alive keeps its place and its content."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = HostPool(LIMIT)
        self.stamps: dict[int, tuple[Any, int]] = {}  # of each array or view held: itself, and the number written to it
        self.names = iter(range(1, 10**6))

    def hold(self, x: Any, stamp: int) -> int:
        name = next(self.names)
        self.stamps[name] = x, stamp
        return name

    @rule(target=held, rows=st.sampled_from([9, 2048, 2100]), dtype=st.sampled_from(["u1", "u2"]))
    def take(self, rows: int, dtype: str) -> int:
        x = self.pool.empty((rows, 512), dtype)
        assert x.flags.c_contiguous
        assert x.flags.writeable
        assert x.flags.aligned
        if x.nbytes >= SMALLEST:
            assert place(x)[0] % _ALIGN == 0
        name = self.hold(x, 0)
        x[...] = stamp = name % 251
        self.stamps[name] = x, stamp
        return name

    @rule(target=held, name=held, how=st.sampled_from(["rows", "columns", "transpose", "one", "flat"]))
    def view(self, name: int, how: str) -> Any:
        if name not in self.stamps:
            return multiple()
        x, stamp = self.stamps[name]
        part = {
            "rows": lambda: x[len(x) // 2 :], "columns": lambda: x[..., :1], "transpose": lambda: x.T,
            "one": lambda: x[-1:], "flat": lambda: x.reshape(-1),
        }[how]()  # fmt: skip
        return self.hold(part, stamp)

    @rule(name=consumes(held))
    def drop(self, name: int) -> None:
        self.stamps.pop(name, None)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert self.pool.use().kept == 0

    @invariant()
    def everything_alive_is_as_it_was(self) -> None:
        for x, stamp in self.stamps.values():
            assert x.flat[0] == x.flat[x.size - 1] == stamp

    @invariant()
    def the_count_is_right(self) -> None:
        roots = {id(root): root for x, _ in self.stamps.values() if (root := base(x)) is not None}
        use = self.pool.use()
        assert use.in_use == sum(root._memory.size for root in roots.values())
        assert 0 <= use.kept <= LIMIT


def base(x: Any) -> Any:
    """Give the block that an array is a view of; None for an array too small for the pool."""
    while isinstance(x, np.ndarray):
        x = x.base
    return x


TestResults = Results.TestCase
TestResults.settings = settings(max_examples=60, stateful_step_count=40)


@pytest.mark.usefixtures("emptied")
def test_memory_comes_back_when_the_last_view_dies() -> None:
    first = result()
    where, corner, want = place(first), first[7:8, 3:5], first[7:8, 3:5].copy()
    use = swl.memory_use()
    assert use.in_use >= first.nbytes
    del first
    second = result()
    assert place(second) != where  # a corner of it is still looked at
    second[...] = -1
    np.testing.assert_array_equal(corner, want)
    assert swl.memory_use() == (2 * use.in_use, 0)
    del corner
    assert swl.memory_use() == (use.in_use, use.in_use)
    third = result()
    assert place(third) == where
    assert not np.shares_memory(second, third)
    del second, third
    assert swl.memory_use() == (0, 2 * use.in_use)
    swl.empty_cache()
    assert swl.memory_use() == (0, 0)


@pytest.mark.usefixtures("emptied")
def test_a_training_loop_takes_no_new_memory() -> None:
    net = swl.Sequential(swl.Affine.init(20, 2000, dtype="float32", rng=0), swl.SoftmaxWithLoss())
    x, t = np.ones((300, 20), np.float32), np.zeros(300, int)
    with swl.use_backend("numba"):
        for _ in range(3):
            net.forward_backward(x, t)
        before = sum(swl.memory_use())
        for _ in range(20):
            net.forward_backward(x, t)
        assert sum(swl.memory_use()) == before


def test_the_oldest_blocks_go_first_where_the_limit_is_passed() -> None:
    pool = HostPool(limit=5 * SMALLEST + 2 * _ALIGN)
    arrays = [pool.empty((k, SMALLEST), np.uint8) for k in (1, 2, 3)]
    places = [place(x) for x in arrays]
    while arrays:
        arrays.pop(0)
    assert pool.use() == (0, pool.limit)  # those of 2 and 3 MiB
    again = [pool.empty((k, SMALLEST), np.uint8) for k in (2, 3)]
    assert [place(x) for x in again] == places[1:]
    assert pool.use() == (pool.limit, 0)
    big = pool.empty((6, SMALLEST), np.uint8)
    del big
    assert pool.use() == (pool.limit, 0)  # larger than all that may be kept


# ------------------------------------------------------------------------------------------------ threads, forks, finalisers


def test_threads_never_share_a_block() -> None:
    pool, failures = HostPool(4 * SMALLEST), []

    def work(seed: int) -> None:
        rng, mine = random.Random(seed), []
        for step in range(150):
            x = pool.empty((rng.choice((1, 2)), SMALLEST), np.uint8)
            x[:, ::4096] = stamp = (seed * 31 + step) % 251
            mine.append((x[:, ::4096], stamp))
            if len(mine) > 3:
                mine.pop(rng.randrange(4))
            for view, want in mine:
                if not (view == want).all():
                    failures.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pool.use().in_use == 0


def test_work_that_failed_lets_go_of_its_arrays_too() -> None:
    """By reference counts alone: a circle of error, traceback and job would hold them until garbage is collected."""
    pool = Pool()
    pool.resize(2)
    x = np.ones(16)
    alive = weakref.ref(x)

    def work(begin: int, end: int, x: Any = x) -> None:
        raise KeyError(begin)

    gc.disable()
    try:
        with pytest.raises(KeyError) as caught:
            pool.run(work, 16)
        del x, work, caught
        deadline = time.monotonic() + 10
        while alive() is not None and time.monotonic() < deadline:  # the other thread may be about to leave the job
            time.sleep(0.001)
        assert alive() is None
    finally:
        gc.enable()
        pool.resize(1)


def test_threads_that_come_late_keep_nothing_alive() -> None:
    """Else the results of all calls that the caller's thread did alone would wait in the queue with their jobs."""
    pool, gate = Pool(), threading.Event()
    pool.resize(2)
    busy = threading.Thread(target=pool.run, args=(lambda begin, end: gate.wait(60), 2))
    busy.start()  # it takes one range, the pool's only thread the other
    x = np.ones(3)
    alive = weakref.ref(x)

    def work(begin: int, end: int, x: Any = x) -> None:
        x[begin:end] = 2

    pool.run(work, 3)
    assert x.tolist() == [2, 2, 2]
    del x, work
    assert alive() is None
    gate.set()
    busy.join()
    pool.resize(1)


def test_a_finaliser_may_run_amid_the_pools_own_lines() -> None:
    """As garbage collection does: before each instruction of the pool's, a result dies."""
    pool = HostPool()
    dying = [pool.empty((SMALLEST,), np.uint8) for _ in range(1000)]

    def trace(frame: Any, event: str, arg: Any) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode" and dying and "self" in frame.f_locals and frame.f_locals["self"] is pool:
            dying.pop()
        return trace

    sys.settrace(trace)
    x = pool.empty((SMALLEST,), np.uint8)
    use = pool.use()
    pool.clear()
    sys.settrace(None)
    assert 0 < len(dying) < 950
    assert use.in_use >= x.nbytes
    assert pool.use().in_use == (len(dying) + 1) * (SMALLEST + _ALIGN)


def _in_child(queue: Any) -> None:
    queue.put(float(np.abs(result()).sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_does_not_wait_for_the_parents_threads() -> None:
    want = float(np.abs(result()).sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python and JAX warn of forks in threaded processes: that is the test
        child.start()
    try:
        assert queue.get(timeout=60) == want
    finally:
        child.kill()
        child.join()


def test_results_alive_at_exit_are_no_error() -> None:
    code = (
        "import numpy as np, swl, sys\n"
        "kept = [swl.cross_entropy_value_and_grad(np.ones((300, 1000), np.float32), np.zeros(300, int)) for _ in range(3)]\n"
        "kept.append(kept); sys.kept = kept; del kept[0]\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------ results are ordinary arrays


@pytest.mark.usefixtures("emptied")
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_results_can_be_pickled_and_copied(protocol: int) -> None:
    first = result()
    use = swl.memory_use()
    for other in (pickle.loads(pickle.dumps(first, protocol)), copy.deepcopy(first), first.copy()):
        np.testing.assert_array_equal(other, first)
        assert other.flags.writeable
        assert not np.shares_memory(other, first)
    assert swl.memory_use() == use


@pytest.mark.usefixtures("emptied")
def test_info_tells_what_the_pool_holds(capsys: Any) -> None:
    kept = result()
    result()
    swl.info()
    line = next(line for line in capsys.readouterr().out.splitlines() if "swl.empty_cache()" in line)
    assert line.split(maxsplit=1)[1].startswith("1 MiB in results, 1 MiB kept for later ones of at most 1,024 MiB")
    del kept


# ------------------------------------------------------------------------------------------------ the fused head's plan


@pytest.mark.usefixtures("emptied")
@pytest.mark.parametrize(("rows", "adds_up"), [(100, True), (1024, False)])
def test_a_plan_tells_what_16_bit_weights_take_beside_the_budget(rows: int, adds_up: bool) -> None:
    N, D, C = 1024, 64, 8000
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((N, D)).astype(np.float16), (rng.standard_normal((D, C)) / 8).astype(np.float16)
    t, budget = rng.integers(0, C, N), 4 * rows * C + 2**20
    plan = swl.plan(N, D, C, dtype=np.float16, memory_budget=budget)
    assert plan.accumulators == (4 * D * C if adds_up else 0)
    assert ("dW is added up in 2.0 MiB beside it" in str(plan)) == adds_up
    assert swl.plan(N, D, C, memory_budget=budget).accumulators == 0  # float32
    assert swl.plan(N, D, C, dtype=np.float16, needs=["dx"], memory_budget=budget).accumulators == 0

    def peak() -> int:
        """Bytes above inputs and outputs."""
        swl.empty_cache()
        tracemalloc.start()
        try:
            with swl.use_backend("numba"):
                _, (dx, dW, _) = swl.linear_cross_entropy_value_and_grad(x, W, t, memory_budget=budget)
            return tracemalloc.get_traced_memory()[1] - dx.nbytes - dW.nbytes
        finally:
            tracemalloc.stop()

    peak()
    copies = 2 * 4 * (x.size + W.size)  # of an operand and of a transposed one
    assert plan.bytes + plan.accumulators <= peak() * 1.01 + 2 * D * C  # the narrow dW comes after the chunk is gone
    assert peak() <= plan.bytes + plan.accumulators + copies + 2**19
