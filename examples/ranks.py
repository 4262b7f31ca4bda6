"""Train a head whose classes are spread over MPI ranks: the losses are the same on any number of ranks.

Run it by ``mpiexec -n 4 python examples/ranks.py``.
"""

from __future__ import annotations

import numpy as np

import swl
from swl import distributed

ROWS, INPUTS, CLASSES, STEPS = 64, 32, 100_003, 5  # the classes need not divide evenly

with distributed.run() as comm:
    grid = distributed.Grid.of(comm, class_parallel=comm.size)  # all ranks share the classes
    counted = distributed.Counted(grid.classes)
    head = distributed.ClassParallelHead.init(counted, D=INPUTS, C=CLASSES, rng=0)
    optimizer = swl.SGD(lr=1.0)
    rng = np.random.default_rng(0)  # the same batch on all ranks
    x, t = rng.standard_normal((ROWS, INPUTS), np.float32), rng.integers(0, CLASSES, ROWS)
    for step in range(STEPS):
        before = counted.sent
        loss, dx = head.forward_backward(x, t)
        optimizer.update(head.parameters(), head.gradients())
        if comm.rank == 0:
            print(f"step {step}  loss {loss:.4f}  {counted.sent - before:,} bytes sent")
    if comm.rank == 0:
        print("classes of each rank:", *head.sizes)
