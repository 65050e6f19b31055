"""Trains on as many ranks as there are, saves, and resumes on another number of them.

    mpiexec -n 4 python examples/mpi/reshard.py run --steps 5
    mpiexec -n 2 python examples/mpi/reshard.py run --steps 10
    python examples/mpi/reshard.py run --steps 15              # one process, without MPI

A table of weights is cut by rows, a part on each rank, as with ZeRO or FSDP; what is small is on every rank.  Each step
is the same whatever the number of ranks, so a run that changes it ends with the same numbers.
"""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import numpy as np

import gpusaver

ROWS, COLUMNS = 1000, 64


def world() -> Any:
    """The communicator, None without MPI."""
    try:
        from mpi4py import MPI
    except ImportError:
        return None
    return MPI.COMM_WORLD if MPI.COMM_WORLD.size > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=5, help="where to end, from the beginning on")
    options = parser.parse_args()
    comm = world()
    rank, size = (comm.rank, comm.size) if comm is not None else (0, 1)

    rows = np.s_[ROWS * rank // size : ROWS * (rank + 1) // size, :]
    table = np.zeros((ROWS, COLUMNS), np.float32)[rows].copy()
    state = {
        "table": gpusaver.PartitionedVariable((ROWS, COLUMNS), rows, table),
        "scale": np.ones(COLUMNS, np.float32),
        "step": 0,
    }
    with gpusaver.Saver(state, comm=comm, max_to_keep=2) as saver:
        report = saver.restore_latest(options.directory)
        if report is not None and rank == 0:
            print(f"{size} ranks resume at step {state['step']}")
        for step in range(int(state["step"]), options.steps):
            numbers = np.arange(ROWS, dtype=np.float32)[rows[0], None]
            table += np.sin(numbers + step) * state["scale"]
            state["scale"] *= np.float32(0.75)
            state["step"] = step + 1
            # Goes on in the background; the next save, or the end of the `with`, commits it on all ranks.
            saver.save_async(f"{options.directory}/model.ckpt", step + 1)
    if rank == 0:
        values = gpusaver.load(options.directory)
        digest = hashlib.sha256(b"".join(values[name].tobytes() for name in ("scale", "table"))).hexdigest()
        print(f"step {values['step']}, weights {digest[:16]}")


if __name__ == "__main__":
    main()
