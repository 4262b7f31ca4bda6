"""What every script here begins with: this process among those that `tests/test_torch_class_parallel.py` has started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextlib.contextmanager
def processes(timeout: float = 60) -> Iterator[None]:
    """Know the others by gloo; they meet in a file."""
    store = dist.FileStore(os.environ["MEETING"], SIZE)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=SIZE, timeout=timedelta(seconds=timeout))
    yield
    dist.barrier()
    dist.destroy_process_group()


def once(*words: Any) -> None:
    """Print on rank 0 alone."""
    if RANK == 0:
        print(*words, flush=True)
