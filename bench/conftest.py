"""Hands the times that `swl.bench` measures, in blocks of all contenders of a case, to pytest-benchmark a row at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from pytest_benchmark.logger import PytestBenchmarkWarning

import swl
from swl.backends import active, get
from swl.bench import CASES, Case, measure, table
from swl.bench.timing import median

DONE: list[tuple[Case, dict[str, list[float]]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=3, help="blocks of each contender")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark compares
def pytest_configure(config: pytest.Config) -> None:
    try:
        get(active())
    except (ValueError, swl.BackendUnavailable) as error:
        raise pytest.UsageError(str(error)) from None
    # that the saved run was another machine's is worth a line, not an end
    warnings.simplefilter("default", PytestBenchmarkWarning)
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")


@lru_cache(maxsize=1)
def times(title: str, rounds: int) -> dict[str, list[float]]:
    """Measure a case once for all its contenders."""
    found = measure(CASES[title], rounds)
    DONE.append((CASES[title], found))
    return found


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Enter the times of a contender under its case."""

    def record(title: str, contender: str) -> None:
        case = CASES[title]
        found = times(title, 1 if benchmark.disabled else request.config.getoption("rounds"))
        if contender not in found:
            pytest.skip(f"needs {contender}")
        seconds = found[contender]
        benchmark.group = title
        benchmark.extra_info["contender"] = contender
        benchmark.extra_info["times_own"] = median(seconds) / median(found[case.own])
        if case.floor is not None:
            benchmark.extra_info["times_floor"] = median(seconds) / median(found[case.floor])
        clock = iter([value for s in seconds for value in (0.0, s)])
        benchmark._timer = lambda: next(clock)  # the calls were timed already, beside those of the other contenders
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return record


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if DONE:
        terminalreporter.section("milliseconds, and in brackets as a multiple of swl's own")
        terminalreporter.write_line(table(DONE))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Leave out what names the computer, of this run and of a comparison alike."""
    for name in ("node", "release"):
        machine_info.pop(name, None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Leave out what a comparison does not need."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        benchmark["options"] = {}
