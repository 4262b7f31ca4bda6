"""What every benchmark shares: the backends to run, torch beside them, and a check before any timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import swl

UNUSABLE = {info.name: info.reason for info in swl.backends() if not info.usable}
CONTENDERS = [info.name for info in swl.backends()]


@pytest.fixture(params=[*CONTENDERS, "torch"])
def contender(request: pytest.FixtureRequest) -> Any:
    """Each backend of the registry, and torch eager."""
    name = request.param
    if name == "torch":
        pytest.importorskip("torch", reason="torch is not installed")
        yield name
        return
    if name in UNUSABLE:
        pytest.skip(UNUSABLE[name])
    with swl.use_backend(name):
        yield name


def to_host(x: Any) -> Any:
    """Bring an array of any contender to float64 NumPy."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    return np.asarray(x.get() if hasattr(x, "get") else x).astype(np.float64)


def waiting(contender: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Make a call wait for its device, if it has one."""
    if contender != "cupy":
        return call
    import cupy

    def called() -> Any:
        result = call()
        cupy.cuda.get_current_stream().synchronize()
        return result

    return called


@pytest.fixture
def measure(benchmark: Any, contender: str) -> Callable[..., None]:
    """Check a call against the expected arrays, which also compiles it, then time it."""

    def measure(call: Callable[[], tuple[Any, ...]], expected: tuple[Any, ...], group: str) -> None:
        for got, want in zip(call(), expected, strict=True):
            scale = np.abs(want).max()
            assert np.all(np.abs(to_host(got) - want) <= 1e-4 * scale), f"{contender} computes something else"
        benchmark.group = group
        benchmark.extra_info["contender"] = contender
        benchmark.pedantic(waiting(contender, call), rounds=7, iterations=1, warmup_rounds=2)

    return measure
