"""Run on every rank: what differs between ranks, or is wrong on one, is an error on all, by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import wrong_on_the_last

from swl import distributed


def main() -> None:
    with distributed.run() as comm:
        last = comm.rank == comm.size - 1
        where, raises = f"rank {comm.size - 1}", wrong_on_the_last(comm.rank, comm.size)
        W = np.ones((3, 4))

        def head(**keywords: Any) -> Any:
            return distributed.ClassParallelHead(comm, **{"W": W, **keywords})

        with pytest.raises(ValueError, match=rf"ranks disagree.*{where} has .*'label_smoothing': 0.5"):
            head(label_smoothing=0.5 if last else 0.1)
        with pytest.raises(ValueError, match=rf"{where} has W of 5 inputs"):
            head(W=np.ones((5, 4)) if last else W)
        with pytest.raises(ValueError, match=rf"{where} has W of 3 inputs and float32"):
            head(W=W.astype(np.float32) if last else W)
        with pytest.raises(ValueError, match=rf"{where} has .*b absent"):
            head(b=None if last else np.ones(4))
        with pytest.raises(ValueError, match=rf"{where} has .*memory_budget 7"):
            head(memory_budget=7 if last else 8)

        with raises(ValueError, "label_smoothing must be in"):
            head(label_smoothing=3.0 if last else 0.0)
        with raises(ValueError, "weight must have shape"):
            head(weight=np.ones(99 if last else 4))
        good = head()
        x, t = np.ones((5, 3)), np.arange(5)
        with raises(ValueError, r"target\[2\] is 999"):
            good.forward(x, np.where((t == 2) & last, 999, t))
        with raises(ValueError, "x must have shape"):
            good.forward(np.ones((5, 2)) if last else x, t)
        with pytest.raises(ValueError, match=rf"{where} has x of shape \(4, 3\)"):
            good.forward(x[:4] if last else x, t[:4] if last else t)
        with pytest.raises(ValueError, match=rf"{where} has .*checksum"):
            good.forward(x, t[::-1] if last else t)
        with raises(ValueError, "k must be at least 1"):
            good.top_k(x, 0 if last else 1)
        assert np.isfinite(good.forward(x, t))  # and the head is as good as before
        if comm.rank == 0:
            print("all found")


if __name__ == "__main__":
    main()
