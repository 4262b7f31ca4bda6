"""Run on every rank: what device arrays travel by is chosen on all ranks alike, and refused on all where it is not there."""

from __future__ import annotations

import os
from typing import Any

import devices
import numpy as np
import pytest

import swl
from swl import distributed
from swl.distributed import transport


def head(comm: Any) -> str:
    W = swl.asarray(np.ones((3, 2), np.float32))
    return type(distributed.ClassParallelHead(comm, W).transport).__name__


def main() -> None:
    with distributed.run() as comm:
        devices.install()
        several, last = comm.size > 1, comm.rank == comm.size - 1
        where = rf"\(rank {comm.size - 1} of {comm.size}\)"
        with swl.use_backend("numpy"):
            assert distributed.ClassParallelHead(comm, np.ones((3, 2))).transport is comm
        with swl.use_backend(devices.NAME):
            assert head(comm) == ("ThroughNccl" if several else "ThroughHost")
            os.environ["SWL_TRANSPORT"] = ""  # counts as unset
            assert head(comm) == ("ThroughNccl" if several else "ThroughHost")
            os.environ["SWL_TRANSPORT"] = "pigeon"
            with pytest.raises(ValueError, match="SWL_TRANSPORT is 'pigeon'; legal are auto, host, mpi, nccl"):
                head(comm)
            if several:
                os.environ["SWL_TRANSPORT"] = "mpi" if last else "host"
                with pytest.raises(
                    ValueError, match=r"ranks disagree\. Rank 0 has SWL_TRANSPORT host.*has SWL_TRANSPORT mpi"
                ):
                    head(comm)

                os.environ["SWL_TRANSPORT"] = "nccl"
                devices.bus_ids[:] = ["0000:00:00.0"] * 2
                with pytest.raises(swl.BackendUnavailable, match=f"{comm.size} ranks on 1 devices"):
                    head(comm)
                del os.environ["SWL_TRANSPORT"]
                assert head(comm) == "ThroughHost"  # several ranks share a device
                devices.bus_ids[:] = [f"0000:{comm.rank:02x}:00.0"] * 2
                assert head(comm) == "ThroughNccl"

                devices.nccl.available = not last
                assert head(comm) == "ThroughHost"
                os.environ["SWL_TRANSPORT"] = "nccl"
                with pytest.raises(swl.BackendUnavailable, match=f"pip install nvidia-nccl.*{where}"):
                    head(comm)

            os.environ["SWL_TRANSPORT"] = "mpi"
            assert head(comm) == "ThroughMpi"
            transport._why_not_mpi = devices.why_not_mpi  # that of the library: this MPI says no
            with pytest.raises(swl.BackendUnavailable, match="cannot read device memory"):
                head(comm)
            os.environ["SWL_TRANSPORT"] = "host"
            assert head(comm) == "ThroughHost"
        if comm.rank == 0:
            print("all chosen")


if __name__ == "__main__":
    main()
