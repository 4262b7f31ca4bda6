"""Train a small network whose classes are spread over processes; more of them compute the same in less memory each.

    torchrun --nproc-per-node 4 examples/class_parallel_torch.py

Every process has the whole body and the rows of the batch, and a share of the head's classes. The gradient of the head's input is
the same on all of them, so the bodies stay equal without any further exchange.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn

import swl.torch

TOKENS, WIDTH = 256, 64


def main() -> None:
    """Train, and print how on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=256)
    args = parser.parse_args()

    dist.init_process_group()  # gloo for tensors of the CPU, NCCL for those of CUDA devices
    rank, size = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device("cuda")
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    whole = 0.1 * torch.randn(args.classes, WIDTH)
    head = nn.Parameter(whole.tensor_split(size)[rank].clone())
    loss_of = swl.torch.ClassParallelLinearCrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.Adam([*body.parameters(), head], lr=0.01)

    losses = []
    for _ in range(args.steps):
        tokens = torch.randint(0, TOKENS, (args.rows,))
        loss = loss_of(body(tokens), head, tokens * 7919 % args.classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if rank == 0:
        print(f"processes: {size}; classes of the first: {head.shape[0]:,} of {args.classes:,}")
        print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
