"""How planning, merging and committing grow, up to 4,096 ranks and 1,000,000 tensors of 10 TB, without their bytes.

One process plays all ranks, one after the other.  What each of them does for itself (``a rank``) is timed on one; what
rank 0 does for all of them is timed whole.  Prints a table; fails when a bound of docs/distributed.md does not hold.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).parents[1]))
from machine import ROOT, commit, describe_machine
from report import print_table
from worker import reset_peak, resident

TENSOR_NBYTES = 10_000_000
#: (layout, ranks, tensors or parts of tensors in all)
CASES = [
    ("own", 4096, 10_000),
    ("own", 4096, 100_000),
    ("own", 64, 1_000_000),
    ("own", 4096, 1_000_000),
    ("parts", 4096, 1_000_000),
    ("replicated", 4096, 100_000),
    ("one process", 1, 1_000_000),
]
LAYOUTS = {
    "own": "each tensor is one rank's",
    "parts": "each tensor has a part on every rank",
    "replicated": "each tensor is on every rank",
    "one process": "all in one process, as without MPI",
}
PLAN_SECONDS, PEAK_BYTES, OPEN_SECONDS, LOOKUPS = 60.0, 2 << 30, 1.0, 100


class Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started_at = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started_at


def name_of(number: int) -> str:
    return f"model/layers_{number // 12:06d}/block_{number % 12:02d}/kernel"


def array_of(shape: tuple[int, ...]) -> Any:
    """An array that takes no memory, and shares its element with no other."""
    import numpy as np

    return np.broadcast_to(np.zeros(1, np.float32), shape)


def state_of(layout: str, ranks: int, count: int, rank: int) -> dict[str, Any]:
    from gpusaver import PartitionedVariable, TensorSlice

    shape = (TENSOR_NBYTES // 4 // 100, 100)
    if layout == "parts":
        full_shape, rows = (shape[0] * ranks, shape[1]), TensorSlice(((shape[0] * rank, shape[0]), None))
        return {name_of(n): PartitionedVariable(full_shape, rows, array_of(shape)) for n in range(count // ranks)}
    numbers = range(count) if layout != "own" else range(count * rank // ranks, count * (rank + 1) // ranks)
    return {name_of(number): array_of(shape) for number in numbers}


def run_case(layout: str, ranks: int, count: int, directory: str) -> dict[str, Any]:
    """In a process of its own: seconds by stage, and the peak of memory in bytes."""
    import numpy as np

    from gpusaver.bundle.index import BundleIndex, encode_index
    from gpusaver.bundle.merge import merge_indexes
    from gpusaver.distributed.planning import assign
    from gpusaver.pipeline.commit import BundleCommit, ShardFiles
    from gpusaver.pipeline.plan import plan_save
    from gpusaver.reader import CheckpointReader
    from gpusaver.storage.local import LocalStorage
    from gpusaver.variables import flatten

    clock = Clock()
    storage, prefix = LocalStorage(), os.path.join(directory, "k")
    before = resident("VmRSS") or 0
    # Memory of what a rank has for itself is given back before the next one comes, and not counted for rank 0.
    described: list[bytes] = []
    distinct = 1 if layout == "replicated" else ranks
    for rank in range(distinct):
        gc.disable()
        stage = "a rank: describe" if rank == 0 else "(others)"
        state = state_of(layout, ranks, count, rank)
        with clock.timed(stage):
            plan = plan_save(flatten(state), sharded=False, cached=None).plan
            described.append(plan.index(1, {}))
        del state, plan
        gc.enable()
        gc.collect() if rank % 256 == 0 else None
    reset_peak()
    with clock.timed("plan"):
        indexes = [BundleIndex(data, f"rank {rank}") for rank, data in enumerate(described)]
        ranks_of = [list(range(ranks))] if layout == "replicated" else [[rank] for rank in range(ranks)]
        assignment = assign(indexes, ranks_of)
    nbytes = assignment.nbytes
    del indexes
    # What the ranks have written: checksums that are not zero, and only what is theirs.
    written = described
    if layout == "replicated":
        items = list(BundleIndex(described[0], "all").items())
        written = [encode_index(1, [items[i] for i in np.flatnonzero(mine)]) for mine in assignment.is_written]
        del items
    first_shards, num_shards = assignment.first_shards, assignment.num_shards
    del assignment, described
    with clock.timed("merge"):
        inputs = [BundleIndex(data, f"rank {rank}") for rank, data in enumerate(written)]
        merged = merge_indexes(inputs, first_shards)
        del inputs
    with clock.timed("encode"):
        index = encode_index(num_shards, merged.entries)
    del merged
    peak = (resident("VmHWM") or 0) - before
    with clock.timed("commit"):
        bundle = BundleCommit(storage, prefix, [0] * num_shards, direct=False, elsewhere=range(1, num_shards))
    for shard in range(1, num_shards):
        ShardFiles(storage, prefix, bundle.num_shards, bundle.token, {shard: 0}, direct=False).sync()
    bundle.sync()
    with clock.timed("commit"):
        bundle.publish(index)
    with clock.timed("open, look up"):
        reader = CheckpointReader(prefix)
        names = random.Random(0).choices(range(count // ranks if layout == "parts" else count), k=LOOKUPS)
        assert all(reader.find(name_of(number)) is not None for number in names)
    return {"seconds": clock.seconds, "peak": peak, "index": len(index), "shards": num_shards, "nbytes": nbytes}


def in_child(layout: str, ranks: int, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpusaver-scale-") as directory:
        command = [sys.executable, __file__, "--case", layout, str(ranks), str(count), directory]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=4, metavar=("LAYOUT", "RANKS", "COUNT", "DIRECTORY"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a tenth of the ranks and of the tensors")
    parser.add_argument("--json", help="also write the figures there")
    options = parser.parse_args()
    if options.case:
        layout, ranks, count, directory = options.case
        print(json.dumps(run_case(layout, int(ranks), int(count), directory)))
        return 0
    scale = 10 if options.quick else 1
    cases = [(layout, max(1, ranks // scale), count // scale) for layout, ranks, count in CASES]
    results = [(case, in_child(*case)) for case in cases]
    rows, complaints = [], []
    for (layout, ranks, count), result in results:
        seconds = result["seconds"]
        planned = seconds["plan"] + seconds["merge"] + seconds["encode"]
        if layout == "one process":
            planned = seconds["a rank: describe"] + seconds["encode"]
        rows.append(
            [
                LAYOUTS[layout],
                f"{ranks:,}",
                f"{count:,}",
                f"{result['nbytes'] / 1e12:.2f}",
                *(f"{seconds[stage]:.2f}" for stage in ("a rank: describe", "plan", "merge", "encode", "commit")),
                f"{result['peak'] / 2**20:,.0f}",
                f"{result['index'] / 1e6:.1f}",
                f"{seconds['open, look up']:.3f}",
            ]
        )
        for what, found, bound in (
            ("plan, merge and encode, seconds", planned, PLAN_SECONDS),
            ("memory, bytes", result["peak"], PEAK_BYTES),
            ("open and look up, seconds", seconds["open, look up"], OPEN_SECONDS),
        ):
            if found > bound:
                complaints.append(
                    f"{LAYOUTS[layout]}, {ranks} ranks, {count} tensors: {what}: {found:.3g} > {bound:.3g}"
                )
    head = "layout|ranks|tensors|TB|a rank s|plan s|merge s|encode s|commit s|peak MiB|index MB|open + 100 s".split("|")
    print_table("Planning, merging and committing, without the bytes of the tensors", head, rows)
    if options.json:
        figures = {"commit": commit(), "machine": describe_machine("."), "cases": results}
        Path(options.json).write_text(json.dumps(figures, indent=1))
    print("\n".join(complaints) or "all bounds hold")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
