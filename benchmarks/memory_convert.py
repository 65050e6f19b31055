"""Peak memory of converting a checkpoint of 2 GB (``--gigabytes``) to each format and back; fails when over the bound.

Half of the bytes are one tensor, a quarter is partitioned: holding a tensor at a time would not do.  Each conversion is
a process of its own; what it holds beyond Python and its modules, and files' pages that it maps, count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from typing import Any

from machine import ROOT
from report import print_table
from worker import reset_peak, resident

_BOUND_NBYTES = 256 * 2**20
_SMALL = 40


def make(prefix: str, nbytes: int) -> None:
    import numpy as np

    import gpusaver

    random = np.random.default_rng(0)
    block = random.standard_normal(1 << 20, dtype=np.float32)
    state = {"large": np.resize(block, nbytes // 8)}
    state |= {f"small/{n}": np.resize(block, nbytes // 16 // _SMALL) for n in range(_SMALL)}
    rows = np.resize(block, (512, nbytes // 16 // 512))
    parts = [gpusaver.PartitionedVariable(rows.shape, cut, rows[cut]) for cut in (np.s_[:200, :], np.s_[200:, :])]
    gpusaver.save(prefix, {**state, "parts": parts})


def run(source: str, destination: str) -> dict[str, Any]:
    """In the child process."""
    from gpusaver.conversion import convert

    reset_peak()
    before = resident("VmRSS")
    done = convert(source, destination)
    peak = resident("VmHWM")
    if before is None or peak is None:
        raise SystemExit("This needs Linux: /proc/self/status tells the peak.")
    return {"nbytes": done.nbytes, "extra": peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of converting 2 GB.")
    parser.add_argument("--directory", default=os.path.join(ROOT, "build", "bench-convert"), help="where the files go")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--run", nargs=2, metavar=("SOURCE", "DESTINATION"), help="this one, in this process, as JSON")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(*options.run)))
        return
    os.makedirs(options.directory, exist_ok=True)
    paths = [os.path.join(options.directory, name) for name in ("a", "b.safetensors", "c", "d.npz", "e", "f.npz", "g")]
    steps = [(0, 1), (1, 2), (0, 3), (3, 4), (1, 5), (0, 6)]
    table, is_over = [], False
    try:
        make(paths[0], int(options.gigabytes * 1e9))
        for source, destination in steps:
            command = [sys.executable, __file__, "--run", paths[source], paths[destination]]
            child = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT}
            )
            found = json.loads(child.stdout)
            is_over |= found["extra"] > _BOUND_NBYTES
            title = " -> ".join(os.path.splitext(paths[n])[1] or "TensorFlow" for n in (source, destination))
            numbers = [f"{number / 2**20:,.0f}" for number in (found["nbytes"], found["extra"], _BOUND_NBYTES)]
            table.append([title, *numbers, "OVER" if found["extra"] > _BOUND_NBYTES else "within"])
    finally:
        shutil.rmtree(options.directory)
    print_table("Peak memory of a conversion", ["", "MiB", "extra MiB", "bound MiB", ""], table)
    sys.exit(is_over)


if __name__ == "__main__":
    main()
