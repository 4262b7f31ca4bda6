"""Train a small transformer language model in plain torch, once with torch's loss and once with swl's, and compare.

The text is this Python's own standard library, the tokens are pairs of bytes, and each run is a process of its own, so
that peak memory is its own too::

    python examples/transformer.py [--steps 20]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import swl.torch

VOCABULARY, WIDTH, CONTEXT, BATCH = 16_384, 64, 64, 16


class Model(nn.Module):
    """Embedding, two causal transformer layers, and a head in which all the losses differ."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.loss = loss
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss of the next tokens."""
        x = self.tokens(tokens) + self.places.weight
        x, target = self.body(x, mask=self.mask, is_causal=True).flatten(0, 1), target.flatten()
        if self.loss == "swl fused":
            return swl.torch.linear_cross_entropy(x, self.head.weight, target, memory_budget=32 * 2**20)
        cross_entropy = nn.functional.cross_entropy if self.loss == "torch" else swl.torch.cross_entropy
        return cross_entropy(self.head(x), target)


def corpus() -> Tensor:
    """Give the tokens of a few modules of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join((folder / f"{name}.py").read_bytes() for name in ("argparse", "datetime", "inspect", "typing"))
    pairs = torch.frombuffer(bytearray(text[: len(text) // 2 * 2]), dtype=torch.uint8).view(-1, 2).long()
    return (pairs[:, 0] % 128) * 128 + pairs[:, 1] % 128


def train(loss: str, steps: int) -> dict[str, Any]:
    """Train; give the loss of each step, the median seconds per step, and the peak memory in MiB."""
    torch.manual_seed(0)
    model, data = Model(loss), corpus()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, seconds = [], []
    for _ in range(steps):
        starts = torch.randint(0, len(data) - CONTEXT - 1, (BATCH,))
        window = torch.stack([data[s : s + CONTEXT + 1] for s in starts.tolist()])
        begin = time.perf_counter()
        value = model(window[:, :-1], window[:, 1:])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
        losses.append(value.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"losses": losses, "seconds": sorted(seconds)[steps // 2], "peak": peak}


def compare(steps: int) -> dict[str, Any]:
    """Run each loss in a process of its own and print the table."""
    runs = {}
    for loss in ("torch", "swl", "swl fused"):
        command = [sys.executable, __file__, "--steps", str(steps), "--loss", loss]
        runs[loss] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{'loss':<10} {'first':>8} {'last':>8} {'curve differs by':>17} {'ms per step':>12} {'peak MiB':>9}")
    for loss, run in runs.items():
        off = max(abs(a - b) for a, b in zip(run["losses"], runs["torch"]["losses"], strict=True))
        run["off"] = off
        first, last = run["losses"][0], run["losses"][-1]
        print(f"{loss:<10} {first:8.4f} {last:8.4f} {off:17.1e} {1000 * run['seconds']:12.0f} {run['peak']:9.0f}")
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--loss", choices=("torch", "swl", "swl fused"))
    args = parser.parse_args()
    if args.loss:
        print(json.dumps(train(args.loss, args.steps)))
    else:
        compare(args.steps)
