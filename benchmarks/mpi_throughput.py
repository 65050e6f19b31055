"""Four ranks on one machine against one process with four writers: the same bytes, the same prefix, turn by turn.

Run by ``mpiexec -n 4``; prints the median of the rounds, and fails when the ranks reach less than 90 % of the process.
The process is rank 0 alone, the others waiting; it writes as many data files (``sharded=True``) with as many threads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from mpi4py import MPI

import gpusaver
from gpusaver import PartitionedVariable, saving

TENSORS, ROUNDS, BOUND = 32, 7, 0.9


def parts(arrays: list[np.ndarray], rank: int, count: int, total_rows: int) -> dict[str, PartitionedVariable]:
    rows = slice(total_rows * rank // count, total_rows * (rank + 1) // count)
    shape = (total_rows, arrays[0].shape[1])
    return {f"t{number}": PartitionedVariable(shape, (rows, slice(None)), array) for number, array in enumerate(arrays)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nbytes", type=int, default=1 << 30, help="of the whole checkpoint")
    parser.add_argument("--directory", help="where to write; default: a temporary one")
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    rank, count = comm.rank, comm.size
    holder = tempfile.TemporaryDirectory(dir=options.directory, prefix="gpusaver-mpi-") if rank == 0 else None
    directory = Path(comm.bcast(holder.name if holder else None))
    columns = 4096
    total_rows = max(count, options.nbytes // (TENSORS * columns * 4) // count * count)
    random = np.random.default_rng(rank)
    mine = [random.random((total_rows // count, columns), np.float32) for _ in range(TENSORS)]
    everything = [random.random((total_rows, columns), np.float32) for _ in range(TENSORS)] if rank == 0 else []
    ranks = gpusaver.Saver(parts(mine, rank, count, total_rows), comm=comm, max_to_keep=None)
    alone = None
    if rank == 0:
        with gpusaver.variables():
            alone = gpusaver.Saver(
                [gpusaver.Variable(array, f"t{n}", device=f"cpu:{n % count}") for n, array in enumerate(everything)],
                sharded=True,
                max_to_keep=None,
            )
    seconds: dict[str, list[float]] = {"ranks": [], "process": []}
    for number in range(ROUNDS + 1):
        for who in ("ranks", "process"):
            comm.Barrier()
            started_at = time.perf_counter()
            if who == "ranks":
                ranks.save(directory / "ranks", write_state=False, write_meta_graph=False)
            elif alone is not None:
                with mock.patch.multiple(saving, _THREADS=count, _STAGED_THREADS=count):
                    alone.save(directory / "process", write_state=False, write_meta_graph=False)
            wait_for_all(comm)
            if number:  # the first round makes files and memory
                seconds[who].append(time.perf_counter() - started_at)
    ranks.close()
    if alone is None or holder is None:
        return 0
    alone.close()
    holder.cleanup()
    nbytes = TENSORS * total_rows * columns * 4
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    for who, values in seconds.items():
        shown = " ".join(f"{value:.2f}" for value in sorted(values))
        print(f"{who:8} {nbytes / medians[who] / 1e9:6.2f} GB/s   median of {shown} s")
    ratio = medians["process"] / medians["ranks"]
    print(f"{count} ranks reach {100 * ratio:.0f} % of one process with {count} writers, expected {100 * BOUND:.0f} %")
    return 0 if ratio >= BOUND else 1


def wait_for_all(comm: MPI.Comm) -> None:
    """Without taking a processor from those that still work, as a blocking barrier would."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.001)


if __name__ == "__main__":
    code = main()
    MPI.COMM_WORLD.Barrier()
    sys.exit(code)
