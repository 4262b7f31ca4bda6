"""Tensors on the fake devices: torch here has no CUDA, so they are the CPU's, copied there and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import fake
from fakecuda import strict

from swl.backends import get
from swl.torch import _bridge, _linear, _loss


class Bridge(_bridge.Cuda):
    """`swl.torch`'s bridge but for DLPack, which only a card can show."""

    def __init__(self, device: int) -> None:
        self.backend, self.device = get(fake.NAME), device
        self.host = _bridge.Host(get("numpy"))
        self.writes: list[tuple[Any, Any]] = []

    def array(self, t: Any) -> Any:
        """Copy to the device."""
        with strict.unwatched():
            there = fake.cupy().asarray(self.host.array(t))
        assert there.device.id == self.device
        self.writes.append((t, there))
        return there

    def tensor(self, a: Any) -> Any:
        """Copy to the host."""
        assert a.device.id == self.device
        with strict.unwatched():
            return self.host.tensor(a.get())

    @contextmanager
    def scope(self) -> Iterator[None]:
        """On the way out, bring back what kernels wrote."""
        self.writes.clear()
        with super().scope():
            yield
            with strict.unwatched():
                for t, there in self.writes:
                    self.host.array(t)[...] = there.get()  # unseen by autograd, as the writes of a kernel are


def send(patch: pytest.MonkeyPatch, device: int, stream: int) -> None:
    """Have `swl.torch` work on tensors on a fake device, of which torch has `stream` as the current stream."""
    for module in (_loss, _linear):
        patch.setattr(module, "bridge", lambda _: Bridge(device))
    patch.setattr(torch.cuda, "current_stream", lambda index: {device: SimpleNamespace(cuda_stream=stream)}[index])
