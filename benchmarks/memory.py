"""Peak memory of saving and restoring 1 GB of NumPy arrays, beyond the arrays themselves; fails when over the bound.

Each case is a process of its own that saves or restores once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from machine import ROOT
from report import print_table
from worker import reset_peak, resident

MB = 1e6
_ARRAYS, _ARRAY_NBYTES, _SMALL_ARRAYS = 10, 100_000_000, 1000
#: The ring of slots (docs/design.md, invariant 3), and what Python, its threads and its allocator take along.
_RING_NBYTES, _PYTHON_NBYTES = 6 * 8 * 2**20, 8 * 2**20

#: Case: what it shows, and the bound in bytes.
CASES = {
    "save-cached": ("save through the page cache", 64 * 2**20),
    "save-direct": ("save with O_DIRECT: the ring", _RING_NBYTES + _PYTHON_NBYTES),
    "restore": ("restore: no copy of the state", _RING_NBYTES + _PYTHON_NBYTES),
    "restore-before": ('restore, verify="before"', _RING_NBYTES + _PYTHON_NBYTES),
}


def _state() -> dict[str, Any]:
    import numpy as np

    random = np.random.default_rng(0)
    state: dict[str, Any] = {
        f"large_{i}": random.standard_normal(_ARRAY_NBYTES // 4, dtype=np.float32) for i in range(_ARRAYS)
    }
    return state | {f"small_{i}": random.standard_normal(100, dtype=np.float32) for i in range(_SMALL_ARRAYS)}


def run_case(case: str, prefix: str) -> dict[str, Any]:
    """In the child process: the state's size and the peak beyond what the process held before the call, in bytes."""
    import gpusaver

    state = _state()
    saver = gpusaver.Saver(state, direct_io=case == "save-direct")
    call: Callable[[], object]
    if case.startswith("save"):
        call = lambda: saver.save(prefix)  # noqa: E731
    else:
        call = lambda: saver.restore(prefix, verify="before" if case == "restore-before" else "during")  # noqa: E731
    reset_peak()
    before = resident("VmRSS")
    call()
    peak = resident("VmHWM")
    if before is None or peak is None:
        raise SystemExit("This needs Linux: /proc/self/status tells the peak.")
    return {"state": sum(array.nbytes for array in state.values()), "extra": peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of saving and restoring 1 GB.")
    parser.add_argument("--directory", default=os.path.join(ROOT, "build", "bench-memory"), help="where the files go")
    parser.add_argument("--case", choices=list(CASES), help="only this one, in this process, as JSON")
    options = parser.parse_args()
    prefix = os.path.join(os.path.abspath(options.directory), "model.ckpt")
    if options.case:
        print(json.dumps(run_case(options.case, prefix)))
        return
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    table, is_over = [], False
    for case, (title, bound) in CASES.items():
        command = [sys.executable, __file__, "--directory", options.directory, "--case", case]
        child = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT}
        )
        found = json.loads(child.stdout)
        is_over |= found["extra"] > bound
        numbers = [f"{found['state'] / MB:,.0f}", f"{found['extra'] / MB:.1f}", f"{bound / MB:.1f}"]
        table.append([title, *numbers, "OVER" if found["extra"] > bound else "within"])
    shutil.rmtree(os.path.dirname(prefix))
    print_table("Peak memory", ["", "state MB", "extra MB", "bound MB", ""], table)
    sys.exit(is_over)


if __name__ == "__main__":
    main()
