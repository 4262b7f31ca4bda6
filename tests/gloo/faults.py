"""Run on every rank: the last one is killed (``killed``) or comes no more (``absent``), in forward or in backward."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from processes import RANK, SIZE, processes

import swl.torch


def main() -> None:
    what, where = sys.argv[1:]
    with processes(timeout=600 if what == "killed" else 3):
        x, W = torch.ones(5, 3, requires_grad=True), torch.ones(4, 3)
        for step in range(3):
            last = step == 1 and RANK == SIZE - 1
            for place in ("forward", "backward"):
                if last and place == where:
                    if what == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(60)  # until it is ended too
                if place == "forward":
                    loss = swl.torch.class_parallel_linear_cross_entropy(x, W, torch.arange(5))
                else:
                    loss.backward()
    print("went on")


if __name__ == "__main__":
    main()
