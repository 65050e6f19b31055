"""What each rank runs under mpiexec: saves, restores, and dies where it is told to.

::

    rank_script.py save PREFIX                 what the ranks have, twice under the same prefix
    rank_script.py restore PREFIX ...          each by one rank, by two, by three ... by all, cut otherwise
    rank_script.py kill DIRECTORY POINT ...    in groups of three ranks, a point and a directory of its own for each

A point is RANK:NUMBER: the rank of the group that gets SIGKILL, and before which of its operations on messages and
files, counted from the beginning of its second save on.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from rank_states import GROUP, state_of

import gpusaver
from gpusaver import PartitionedVariable
from gpusaver.distributed.mpi import MpiTransport
from gpusaver.storage.local import LocalStorage

#: Of ranks that wait for a killed one.  Others of this machine must not make them miss it.
KILL_DEADLINE_SECONDS = 4.0


def save(prefix: str) -> None:
    comm = MPI.COMM_WORLD
    state = state_of(1, comm.rank, comm.size)
    with gpusaver.Saver(state, comm=comm, comm_deadline=60) as saver:
        assert saver.save(prefix) == prefix
        state.update(state_of(2, comm.rank, comm.size))
        pending = saver.save_async(prefix)
        assert pending is not None
        assert pending.result() == prefix


def restore(*prefixes: str) -> None:
    world = MPI.COMM_WORLD
    for count in range(1, world.size + 1):
        comm = world.Split(0 if world.rank < count else MPI.UNDEFINED)
        if comm != MPI.COMM_NULL:
            for prefix in prefixes:
                restore_by(comm, prefix)


def restore_by(comm: Any, prefix: str) -> None:
    state, expected = (state_of(version, comm.rank, comm.size) for version in (0, 2))
    with gpusaver.Saver(state, comm=comm, comm_deadline=60) as saver:
        report = saver.restore(prefix)
    assert report.needed_nbytes
    for name, value in expected.items():
        found = state[name]
        if isinstance(value, PartitionedVariable):
            found, value = found.value, value.value
        np.testing.assert_array_equal(found, value)


class Point:
    """Counts this rank's operations; kills it before its last."""

    def __init__(self, number: int | None) -> None:
        self.names: list[str] = []
        self.is_armed = False
        self._number = number
        self._count = itertools.count()

    def pass_by(self, name: str) -> None:
        if self.is_armed:
            self.names.append(name)
            if next(self._count) == self._number:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, owner: Any, name: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.pass_by(name)
            return method(*args, **kwargs)

        setattr(owner, name, call)


class CountedStorage(LocalStorage):
    def __init__(self, point: Point) -> None:
        super().__init__()
        self._point = point
        for name in ("lock", "replace", "sync_directory", "remove"):
            point.counted(self, name)

    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
        self._point.pass_by("create")
        file = super().create(path, nbytes, direct=direct, target=target)
        for name in ("write_at", "sync"):
            self._point.counted(file, name)
        return file


class CountedTransport(MpiTransport):
    def __init__(self, comm: Any, point: Point) -> None:
        super().__init__(comm)
        self._point = point

    def send(self, message: bytes, to: int) -> None:
        self._point.pass_by("send")
        super().send(message, to)

    def receive(self) -> tuple[int, bytes] | None:
        found = super().receive()
        if found is not None:
            self._point.pass_by("receive")
        return found


def kill(directory: Path, points: list[str]) -> None:
    """Writes what came of it to RANK.json; ends without MPI's own end, which would wait for the dead."""
    world = MPI.COMM_WORLD
    rank, number = map(int, points[world.rank // GROUP].split(":"))
    comm = world.Split(world.rank // GROUP)
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    directory = directory / points[world.rank // GROUP]
    point = Point(number if comm.rank == rank else None)
    saver = gpusaver.Saver(
        state_of(1, comm.rank, GROUP),
        comm=CountedTransport(comm, point),
        comm_deadline=60,
        storage=CountedStorage(point),
    )
    saver.save(directory / "k", 1)
    saver.close()
    world.Barrier()  # none dies while others still begin
    state = state_of(2, comm.rank, GROUP)
    transport = CountedTransport(comm, point)
    saver = gpusaver.Saver(state, comm=transport, comm_deadline=KILL_DEADLINE_SECONDS, storage=CountedStorage(point))
    point.is_armed = True
    outcome: dict[str, Any] = {}
    try:
        outcome["saved"] = saver.save(directory / "k", 2)
    except gpusaver.Error as error:
        outcome["error"] = [type(error).__name__, str(error), getattr(error, "__notes__", [])]
    outcome["operations"] = point.names
    (directory / f"{comm.rank}.json").write_text(json.dumps(outcome))
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), sys.argv[3:])
    else:
        {"save": save, "restore": restore}[sys.argv[1]](*sys.argv[2:])
