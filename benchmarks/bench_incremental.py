"""What a save costs when 90 % of the state do not change: whole, incremental and "declared", one after the other.

    make bench-incremental

CPU time is that of the process until the checkpoint is durable, system calls included.  Medians; the first three saves
of each kind do not count (layouts are found, memory is touched, and nothing is deleted yet).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import gpusaver

KINDS: dict[str, Any] = {"whole": False, "incremental": True, "declared": "declared"}
SKIPPED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="a folder on the disk to be measured; default: a temporary one")
    options = parser.parse_args()
    each = options.megabytes * 1_000_000 // 100 // 4
    with gpusaver.variables():
        state = [
            gpusaver.Variable(np.random.default_rng(n).random(each, np.float32), name=f"w{n:02}", trainable=n < 10)
            for n in range(100)
        ]
    medians: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        for kind, mode in KINDS.items():
            walls, cpus = [], []
            with gpusaver.Saver(state, incremental=mode, max_to_keep=2) as saver:
                for number in range(options.rounds + SKIPPED):
                    for variable in state[:10]:
                        variable.value[...] += 1
                    wall, cpu = time.perf_counter(), time.process_time()
                    saver.save(f"{folder}/{kind}", number)
                    walls.append(time.perf_counter() - wall)
                    cpus.append(time.process_time() - cpu)
            medians[kind] = statistics.median(walls[SKIPPED:]), statistics.median(cpus[SKIPPED:])
            fastest = min(walls[SKIPPED:])
            wall, cpu = medians[kind]
            print(f"{kind:12} {wall:6.3f} s until durable (fastest {fastest:.3f}), {cpu:.3f} s CPU")
    for kind in ("incremental", "declared"):
        wall, cpu = (whole / part for whole, part in zip(medians["whole"], medians[kind], strict=True))
        together = sum(medians["whole"]) / sum(medians[kind])
        print(f"{kind}: {wall:.1f} times faster, {cpu:.1f} times less CPU time, both together {together:.1f}")


if __name__ == "__main__":
    main()
