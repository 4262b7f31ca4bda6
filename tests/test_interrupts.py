"""Signal handlers that call swl or raise amid its own lines, and a system that gives no more threads or memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, takewhile
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from needs import ROOT

import swl
from swl.backends.host import blas
from swl.backends.host.threads import Pool, _Job

needs_timers = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@needs_timers
@pytest.mark.parametrize(
    "program", ["handled_everywhere", "handled_at_random", "raised_everywhere", "raised_at_random"]
)
def test_signal_handlers_may_come_anywhere(program: str) -> None:
    """They call swl, which must neither hang nor change a bit of what they interrupt; or raise, and leave all in order."""
    command = [sys.executable, str(Path(__file__).with_name("interrupted.py")), program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[1]) > 50


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool()
    pool.resize(3)
    yield pool
    pool.resize(1)


@pytest.mark.parametrize("preempted", ["the caller", "a thread of the pool"])
def test_no_range_is_lost_wherever_another_thread_goes_ahead(preempted: str) -> None:
    """Before each instruction of one thread's, the other does all there is to do."""

    def preempted_at(step: int) -> bool:
        ended: list[int] = []
        job = _Job(lambda begin, end: ended.append(begin), 3, 3)
        returned: list[list[int]] = []

        def call() -> None:
            job.work_off()
            job.wait()
            returned.append(sorted(ended))

        first, second = (call, job.assist) if preempted == "the caller" else (job.assist, call)
        other = threading.Thread(target=second)

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal step
            frame.f_trace_opcodes = True
            if event == "opcode":
                step -= 1
                if step == 0:
                    other.start()
                    other.join(0.02)  # it may have to wait for this one
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        first()
        sys.settrace(before)
        if other.ident is None:
            return False
        other.join()
        assert returned == [[0, 1, 2]]
        return True

    assert sum(1 for _ in takewhile(preempted_at, count(1))) > 30


@needs_timers
def test_an_interrupted_call_waits_for_the_ranges_begun_through_further_interrupts(pool: Pool) -> None:
    caller, begun, ended = threading.get_ident(), threading.Event(), []
    interrupts = []

    def handler(*_: Any) -> None:
        interrupts.append(True)
        if len(interrupts) < 50:
            raise KeyboardInterrupt

    def work(begin: int, end: int) -> None:
        if threading.get_ident() == caller:
            assert begun.wait(30)
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.01)
            return
        begun.set()
        time.sleep(0.3)
        ended.append(begin)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.run(work, 2)
        assert ended
    finally:
        with suppress(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_error_waits_for_the_ranges_begun_and_begins_no_other(pool: Pool) -> None:
    caller, begun, ended, total = threading.get_ident(), threading.Event(), [], []

    def work(begin: int, end: int) -> None:
        total.append(begin)
        if threading.get_ident() == caller:
            assert begun.wait(30)
            raise ZeroDivisionError
        begun.set()
        time.sleep(0.1)
        ended.append(begin)

    with pytest.raises(ZeroDivisionError):
        pool.run(work, 24)
    assert 1 <= len(ended) == len(total) - 1 <= 2


def _squares(pool: Pool) -> None:
    out = np.zeros(40)

    def work(begin: int, end: int) -> None:
        out[begin:end] = np.arange(begin, end) ** 2

    pool.run(work, 40)
    assert (out == np.arange(40) ** 2).all()


def test_a_call_works_with_the_threads_there_are(pool: Pool) -> None:
    """The system grants no stack of so many bytes, and so no thread."""
    before = threading.stack_size(1 << 46)
    try:
        with pytest.raises(RuntimeError, match="can't start"):
            threading.Thread(target=print).start()
        for _ in range(3):
            _squares(pool)
        assert pool._crew.jobs.qsize() == 0  # where nobody would take them
    finally:
        threading.stack_size(before)
    _squares(pool)
    deadline = time.monotonic() + 30
    while len(pool._crew.workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(pool._crew.workers) == 2  # later calls try again


LIMITED = """
import os, resource, threading
import numpy as np
import swl

def call():
    out = swl.cross_entropy_value_and_grad(np.ones((600, 1000), np.float32), np.zeros(600, int))[1]
    assert np.isfinite(out).all()

swl.set_num_threads(1)
call()  # compiled
os.setuid(64321)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    threading.Thread(target=int).start()
except RuntimeError:
    pass
else:
    raise SystemExit("no limit here")
swl.set_num_threads(4)
for _ in range(3):
    call()
print("worked")
"""


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason=f"{ROOT}, who may become a user without processes"
)
def test_a_call_works_where_a_user_may_have_no_more_processes() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    if "no limit here" in done.stderr:
        pytest.skip("this system does not count the threads of a user")
    assert done.stdout == "worked\n", done.stderr[-2000:]


def _in_child(call: Callable[[], object]) -> int:
    """Return 0 if a call gives something true in a forked process, which is killed if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python and JAX warn of forks in threaded processes: that is the test
        child = os.fork()
    if not child:
        signal.alarm(60)
        with suppress(BaseException):
            os._exit(0 if call() else 1)
        os._exit(2)
    return os.waitpid(child, 0)[1]


@needs_fork
@pytest.mark.skipif(blas.control() is None, reason="this NumPy has another BLAS than OpenBLAS")
def test_a_forked_process_has_the_users_threads_of_blas_back() -> None:
    """Though another thread held BLAS to one each, and stayed with the parent, amid any line."""
    control = blas.control()
    assert control is not None
    before = control.get()
    control.set(2)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with blas.one_thread_each(1), blas._lock:
            held.set()
            over.wait(60)

    def use() -> bool:
        assert control.get() == 2
        with blas.one_thread_each(1):
            assert control.get() == 1
        return control.get() == 2

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    try:
        assert control.get() == 1
        assert _in_child(use) == 0
    finally:
        over.set()
        thread.join()
        assert control.get() == 2
        control.set(before)


def test_blas_is_held_until_the_last_of_many_threads_has_left() -> None:
    control = blas.control()
    if control is None:
        pytest.skip("this NumPy has another BLAS than OpenBLAS")
    before, wrong = control.get(), []
    control.set(2)

    def hold() -> None:
        for _ in range(300):
            with blas.one_thread_each(1):
                if control.get() != 1:
                    wrong.append(True)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, control.get()) == ([], 2)
    control.set(before)


SHORT = """
import resource, sys
import numpy as np
import swl
from swl.backends.host.memory import MEMORY
from swl.backends.numba.products import product

swl.set_num_threads(2)
MIB = 1 << 20

def result(n):  # of 152 MiB
    x, W = np.ones((n, 8), np.float32), np.ones((8, 10_000), np.float32)
    return lambda: swl.affine(x, W)

def ids(n):  # and rows of intermediate results
    x, t, w = np.ones((1000 * n, 2), np.float32), np.ones(1000 * n, np.int16), np.ones(2, np.float32)
    return lambda: swl.cross_entropy(x, t, weight=w)

def half_weights(n):
    x, W, out = np.ones((n, 8000), np.float16), np.ones((8000, 6000), np.float16), np.empty((n, 6000), np.float16)
    return lambda: product(x, W, out)

def unaligned(n):
    x = np.ones(8_000 * n + 1, np.uint8)[1:].view(np.float32).reshape(-1, 2000)
    W, out = np.ones((2000, 1000), np.float32), np.empty((len(x), 1000), np.float32)
    return lambda: product(x, W, out)

make = globals()[sys.argv[1]]
for n in (300, 4000):
    call = make(n)
    if n == 300:
        call()  # everything is compiled, and threads are there
swl.cross_entropy(np.ones((300, 2000), np.float32), np.zeros(300, int))
kept = MEMORY.empty((400 * MIB,), np.uint8)
del kept
assert swl.memory_use().kept >= 400 * MIB
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 20 * MIB
resource.setrlimit(resource.RLIMIT_AS, (held, held))
y = call()
print(swl.memory_use().kept)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell how much memory is mapped")
@pytest.mark.parametrize("call", ["result", "ids", "half_weights", "unaligned"])
def test_where_memory_is_short_the_pool_keeps_none(call: str) -> None:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "SWL_BACKEND": "numba", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", SHORT, call]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 400 << 20


NO_ROOM = """
import resource
import numpy as np
import swl

swl.set_num_threads(2)
x, W = np.ones((16_000, 2000), np.float32), np.ones((2000, 1000), np.float32)
swl.affine(x[:8], W)  # BLAS on one thread
swl.cross_entropy(np.ones((300, 2000), np.float32), np.zeros(300, int))  # two threads, but without BLAS
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (16_000_000 * 4 + (20 << 20))
resource.setrlimit(resource.RLIMIT_AS, (held, held))
try:
    swl.affine(x, W)  # there is room for the result, but not for what BLAS wants beside it
except MemoryError as error:
    print("no memory:", error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell how much memory is mapped")
def test_where_blas_finds_no_memory_it_is_an_error() -> None:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "SWL_BACKEND": "numba", "NUMBA_CPU_NAME": "haswell"}
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("no memory: Unable to allocate")


def test_an_allocation_that_fails_though_nothing_is_kept_fails() -> None:
    with pytest.raises(MemoryError):
        swl.backends.host.memory.HostPool().empty((1 << 60,), np.uint8)
