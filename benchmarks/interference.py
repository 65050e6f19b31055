"""``make bench-interference``: how much a training loop slows down while a save of its host arrays drains.

The loop multiplies matrices with NumPy, in one thread; the save has 1.49 GB to copy (the call) and write (the drain).
Turn by turn: the steps of one second without a save, then those between the return of ``save_async`` and the end of the
save.  Medians over ``--rounds``.  The call is compared with one copy of the same arrays into memory that was in use.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from machine import ROOT
from report import print_table
from workloads import WORKLOADS, Arrays, State, create_block

import gpusaver

_WIDTH = 384
#: NumPy's libraries read it when they are loaded.
_ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "MKL", "OMP")}


def run_steps(is_over: Callable[[], bool]) -> float:
    """Seconds a step, at least one."""
    left, right = (np.random.default_rng(seed).standard_normal((_WIDTH, _WIDTH), np.float32) for seed in (0, 1))
    product = np.empty_like(left)
    steps, start = 0, time.perf_counter()
    while not steps or not is_over():
        np.matmul(left, right, out=product)
        steps += 1
    return (time.perf_counter() - start) / steps


def run_for(seconds: float) -> float:
    end = time.perf_counter() + seconds
    return run_steps(lambda: time.perf_counter() > end)


def measure(arrays: Arrays, rounds: int, directory: str) -> list[list[float]]:
    """Per round: seconds of a copy, of the call, of the drain; how much slower a step is meanwhile."""
    copies = {name: array.copy() for name, array in arrays.items()}
    found = []
    with gpusaver.Saver(dict(arrays), max_to_keep=1) as saver:
        saver.save_async(os.path.join(directory, "warm.ckpt"), capture="snapshot").result()
        for number in range(rounds):
            start = time.perf_counter()
            for name, array in arrays.items():
                np.copyto(copies[name], array)
            memcpy = time.perf_counter() - start
            alone = run_for(1.0)
            start = time.perf_counter()
            pending = saver.save_async(os.path.join(directory, "model.ckpt"), number, capture="snapshot")
            called = time.perf_counter()
            beside = run_steps(pending.done)
            found.append([memcpy, called - start, time.perf_counter() - called, beside / alone])
            pending.result()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=os.path.join(ROOT, "build", "bench"), help="where the files go")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not _ONE_THREAD.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ONE_THREAD})
    directory = os.path.join(options.directory, "interference")
    workload = WORKLOADS["gpt2"]
    arrays = State(workload, create_block(workload)).arrays
    os.makedirs(directory)
    try:
        memcpy, call, drain, slower = zip(*measure(arrays, options.rounds, directory), strict=True)
    finally:
        shutil.rmtree(directory)
    body = [
        [title, f"{statistics.median(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}"]
        for title, values in (
            ("one copy of the arrays, s", memcpy),
            ("save_async returns, s", call),
            ("  copies", [one / statistics.median(memcpy) for one in call]),
            ("then durable after, s", drain),
            ("a step meanwhile, steps without a save", slower),
        )
    ]
    print_table("A loop beside a save of 1.49 GB", ["", "median", "min", "max"], body)


if __name__ == "__main__":
    main()
