"""Every comparison of `swl.bench`, a row for each contender: ``pytest bench``, ``pytest bench -k losses``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swl.bench import CASES


@pytest.mark.filterwarnings("default")  # of what the peers do
@pytest.mark.parametrize(
    ("case", "contender"),
    [
        pytest.param(title, name, id=f"{title} | {name}".replace("×", "x"))
        for title, case in CASES.items()
        for name in case.names
    ],
)
def test_contender(case: str, contender: str, record: Callable[[str, str], None]) -> None:
    record(case, contender)
