"""Be one of the processes that `tests/test_torch_class_parallel.py` starts, and run the scripts here that it names.

A script has a ``main`` which all ranks call and which says what it has found; rank 0 prints that.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextlib.contextmanager
def processes(timeout: float = 60) -> Iterator[None]:
    """Know the others by gloo; they meet in a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.environ["MEETING"], SIZE)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=SIZE, timeout=timedelta(seconds=timeout))
    yield
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with processes():
        for name in sys.argv[1:]:
            found = importlib.import_module(name).main()
            if RANK == 0:
                print(f"{name}: {found}", flush=True)
