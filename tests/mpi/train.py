"""Run on every rank: train with checkpoints, and be killed at a given moment.

    train.py FOLDER CLASS_PARALLEL [KILL]

KILL is RANK:STEP:PLACE. That rank kills itself in that step: in the backward pass (``step``), while it writes its shard
(``shard``), before the manifest (``manifest``), or as the old checkpoint is deleted (``delete``); or raises there
(``raise``), or exits (``exit``). The last line is a checksum of parameters and losses.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

import swl
from swl import distributed
from swl.distributed import checkpoint

D, H, C, N, STEPS, EVERY = 5, 8, 13, 24, 9, 2


def main(folder: str, class_parallel: int, kill: str = "-1:0:") -> None:
    rank, moment, place = kill.split(":")
    with distributed.run() as comm:

        def die(here: str, step: int) -> None:
            if (comm.rank, step, here) != (int(rank), int(moment), place):
                return
            Path(folder, "died").touch()
            if here == "raise":
                raise ValueError("the disk is on fire")
            if here == "exit":
                sys.exit(3)
            os.kill(os.getpid(), signal.SIGKILL)

        now = 0

        def dying(original: Any, here: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                die(here(*args), now)
                return original(*args, **kwargs)

            return call

        checkpoint.os.replace = dying(os.replace, lambda a, b: "manifest" if "manifest" in str(b) else "shard")
        shutil.rmtree = dying(shutil.rmtree, lambda a: "delete")

        grid = distributed.Grid.of(comm, class_parallel)
        rng = np.random.default_rng(0)
        body = swl.Affine.init(D, H, rng=1, dtype=np.float64)
        body.backward = dying(body.backward, lambda dout: place if place in ("step", "raise", "exit") else "step")
        head = distributed.ClassParallelHead.init(grid.classes, H, C, rng=2, dtype=np.float64, label_smoothing=0.1)
        net = distributed.DataParallel(swl.Sequential(body, swl.ReLU(), head), grid.data)
        optimizer = swl.AdamW(1e-2)
        checkpoints = distributed.Checkpoints(folder, grid)
        found = checkpoints.load(net, optimizer)
        start, losses = (0, []) if found is None else (found[0], found[1]["losses"])
        if comm.rank == 0:
            print("from step", start, flush=True)
        for now in range(1, STEPS + 1):
            batch, ids = rng.standard_normal((N, D)), rng.integers(0, C, N)
            if now <= start:
                continue  # the generator goes on as it did
            rows = slice(N * grid.data.rank // grid.data.size, N * (grid.data.rank + 1) // grid.data.size)
            loss, _ = net.forward_backward(batch[rows], ids[rows])
            optimizer.update(net.parameters(), net.gradients())
            losses.append(float(loss))
            if now % EVERY == 0:
                checkpoints.save(now, net, optimizer, {"losses": losses})
        W, b = head.gather()
        if comm.rank == 0:
            results = [np.array(losses), body.W, body.b, W, b]
            print("losses", *(f"{value:.12f}" for value in losses))
            print("parameters", *(f"{np.abs(a).sum():.10f}" for a in results))
            print("checksum", hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in results)).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
