"""Heads sharded over classes and data, on an MPI that exists: every rank runs the same program on its part.

``pip install mpi4py mpich`` brings mpi4py and an MPI; ``mpiexec -n 4 python script.py`` runs a script on four ranks::

    from swl import distributed

    with distributed.run() as comm:
        grid = distributed.Grid.of(comm, class_parallel=2)  # 2 × 2: rows of a batch × classes
        head = distributed.ClassParallelHead.init(grid.classes, D=64, C=1_000_000, rng=0)
        net = distributed.DataParallel(swl.Sequential(swl.Affine.init(32, 64, rng=1), swl.ReLU(), head), grid.data)
        loss, _ = net.forward_backward(x, t)
        optimizer.update(net.parameters(), net.gradients())

Sums over ranks are formed in the order of the ranks, so all ranks get the same bits, in every run. Nothing here imports
mpi4py but `run`; a communicator comes from the caller.
"""

from __future__ import annotations

from swl.distributed.checkpoint import Checkpoints
from swl.distributed.comm import Counted, Grid, run
from swl.distributed.data import DataParallel
from swl.distributed.head import ClassParallelHead
from swl.distributed.transport import own_device

__all__ = ["Checkpoints", "ClassParallelHead", "Counted", "DataParallel", "Grid", "own_device", "run"]
