"""A small process on each machine that says which of its ranks was the first to end without warning.

A killed process cannot say a last word, and ``mpiexec`` gives its signal but not its rank. Each rank holds the only writing
end of a pipe; a byte through it is a farewell, a hang-up without one is a death. The other ranks are killed next, by
``mpiexec``, so the order counts: epoll gives hang-ups in the order in which they happened.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
from typing import Any

__all__ = ["Watcher"]

FAREWELL, SILENCE = b"f", b"s"


class Watcher:
    """Being watched, from construction to `dismiss`. Without epoll, on one rank alone, nobody is.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All ranks of the job.
    shared : int
        ``MPI.COMM_TYPE_SHARED``.
    """

    def __init__(self, comm: Any, shared: int) -> None:
        self.pipe, self.process = -1, None
        if comm.size == 1 or not hasattr(select, "epoll"):
            return
        self.machine = comm.Split_type(shared)
        folder = self.machine.bcast(tempfile.mkdtemp(prefix="swl-ranks-") if self.machine.rank == 0 else None, 0)
        path = os.path.join(folder, str(self.machine.rank))
        os.mkfifo(path)
        names = self.machine.gather(f"rank {comm.rank} of {comm.size}, process {os.getpid()},", 0)
        if names is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-E", __file__, folder, *names],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.pipe = os.open(path, os.O_WRONLY)  # waits for the reader

    def silence(self) -> None:
        """Let no rank of this machine be reported: the cause has been."""
        if self.pipe >= 0:
            with contextlib.suppress(BrokenPipeError):  # another rank's end was reported before
                os.write(self.pipe, SILENCE)

    def dismiss(self) -> None:
        """Say farewell, at the good end of the run."""
        if self.pipe < 0:
            return
        self.machine.Barrier()  # a rank that is still at work may yet die
        os.write(self.pipe, FAREWELL)
        os.close(self.pipe)
        if self.process is not None:
            self.process.wait()


def watch(folder: str, names: list[str]) -> None:
    """Wait for the ends of the ranks, whose pipes are called 0, 1, ... in `folder`; removes it."""
    events, ranks = select.epoll(), {}
    for i, name in enumerate(names):
        pipe = os.open(os.path.join(folder, str(i)), os.O_RDONLY | os.O_NONBLOCK)
        ranks[pipe] = name
        events.register(pipe, select.EPOLLIN | select.EPOLLHUP)
    while ranks:
        ((pipe, _),) = events.poll(maxevents=1)
        word = os.read(pipe, 1)
        if word != FAREWELL:
            if word != SILENCE:
                print(f"swl: {ranks[pipe]} ended without warning: it was killed or crashed", file=sys.stderr)
            break
        events.unregister(pipe)
        del ranks[pipe]
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2:])
