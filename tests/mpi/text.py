"""Run on every rank: the language model over data × classes learns what it learns in one process, uneven shares included."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

import swl
from swl import distributed
from swl.demos import text
from swl.distributed import training

SETTINGS = text.Settings(
    hidden=12, epochs=2, dtype="float64", embedding=5, context=3, memory_budget=6000, lr=0.02, seed=4
)


def words() -> text.Corpus:
    return text.corpus(
        f"the {a} sees the {b} and the {b} flees" for a in ("cat", "dog", "fox") for b in ("hen", "fly") * 4
    )


ROWS: list[int] = []
"""Of this rank, step by step."""


class Watched(distributed.DataParallel):
    def forward_backward(self, x: Any, t: Any, dout: Any = 1) -> tuple[Any, Any]:
        ROWS.append(len(x))
        return super().forward_backward(x, t, dout)


training.DataParallel = Watched


def main() -> None:
    with distributed.run() as comm:
        found = words()
        rows = len(found.train) - SETTINGS.context
        ids = found.train, found.held_out, len(found.vocabulary)
        results = []
        for backend, size in (("numpy", rows - 1), ("numba", 50)):  # the last batch has one row; has fewer than others
            with swl.use_backend(backend):
                settings = SETTINGS._replace(batch_size=size)
                want: list[Any] = []
                alone = text.train(*ids, settings, on_step=want.append)
                for class_parallel in (k for k in range(1, comm.size + 1) if comm.size % k == 0):
                    grid = distributed.Grid.of(comm, class_parallel)
                    got: list[Any] = []
                    ROWS.clear()
                    spread = text.train(*ids, settings, on_step=got.append, grid=grid)
                    assert sum(grid.data.allgather(sum(ROWS))) == settings.epochs * rows, "not shared out"
                    np.testing.assert_allclose(got, want, rtol=1e-9)
                    np.testing.assert_allclose(spread.history, alone.history, rtol=1e-9)
                    np.testing.assert_allclose(spread.perplexity, alone.perplexity, rtol=1e-9)
                    bits = np.array([*got, *spread.history, spread.perplexity]).tobytes()
                    digest = hashlib.sha256(bits).hexdigest()
                    assert set(comm.allgather(digest)) == {digest}, "ranks differ"
                    results.append(digest)
        if comm.rank == 0:
            print(len(results), "runs", hashlib.sha256("".join(results).encode()).hexdigest())


if __name__ == "__main__":
    main()
