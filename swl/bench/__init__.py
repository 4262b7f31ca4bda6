"""Benchmarks of swl beside its peers and beside the floors: what ``swl bench`` and ``pytest bench`` run.

Contenders that are called in turn disturb each other through threads that go on spinning, so each is measured in blocks
(`swl.bench.timing`). Every contender's result is checked before it is timed. Everything of swl goes through the public
functions.
"""

from __future__ import annotations

from swl.bench.cases import CASES, GROUPS
from swl.bench.report import plot, table
from swl.bench.timing import Case, Contender, measure

__all__ = ["CASES", "GROUPS", "Case", "Contender", "measure", "plot", "table"]
