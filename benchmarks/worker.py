"""A peer in a process of its own: takes orders as lines on standard input, answers each with a line of JSON.

::

    save torch.save     ->  {"durable": 1.25, ...}

Orders: ``check`` (save, wipe, restore, compare), ``save``, ``restore``; the end of the input ends the process.
The files are always those in the directory given; the driver empties it between orders.  Peers that need no library
share a process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from typing import Any

from peers import PEERS, Peer
from workloads import WORKLOADS, State

#: Environment variable: "1" where memory does not suffice for the arrays of all processes at once.
DROPS = "GPUSAVER_BENCH_DROPS"


def sync_tree(directory: str) -> None:
    """Returns when every file under ``directory``, and every folder, is on stable storage."""
    for folder, _, files in os.walk(directory, topdown=False):
        for path in [os.path.join(folder, name) for name in files] + [folder]:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def resident(field: str) -> int | None:
    """VmRSS or VmHWM in bytes; None where the system does not say."""
    try:
        with open("/proc/self/status", "rb") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field.encode()))
    except OSError:
        return None


def reset_peak() -> None:
    """Sets VmHWM back to VmRSS."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Worker:
    def __init__(self, peer: Peer, state: State) -> None:
        self._peer = peer
        self._state = state
        self._resident_before = resident("VmRSS")

    def check(self) -> dict[str, Any]:
        expected = self._peer.digest()
        self._peer.save()
        self._peer.clear()
        self._peer.restore()
        found = self._peer.digest()
        if found != expected:
            raise AssertionError(f"checksum {expected:#x} before the save, {found:#x} after the restore")
        return {"stored_files": len(os.listdir(self._peer.directory)), "versions": self._peer.versions()}

    def save(self) -> dict[str, Any]:
        gc.collect()
        reset_peak()
        cpu, start = time.process_time(), time.perf_counter()
        self._peer.save()
        returned = time.perf_counter()
        sync_tree(self._peer.directory)
        durable = time.perf_counter()
        return {
            "return": returned - start,
            "durable": durable - start,
            "save_cpu": time.process_time() - cpu,
            "save_peak": self._peak(),
        }

    def restore(self) -> dict[str, Any]:
        gc.collect()
        reset_peak()
        cpu, start = time.process_time(), time.perf_counter()
        self._peer.restore()
        end = time.perf_counter()
        return {"restore": end - start, "restore_cpu": time.process_time() - cpu, "restore_peak": self._peak()}

    def _peak(self) -> int | None:
        """Bytes beyond what the process held, arrays included, before it first saved."""
        peak = resident("VmHWM")
        return None if peak is None or self._resident_before is None else max(0, peak - self._resident_before)


def main() -> None:
    workload_name, fd, directory, *names = sys.argv[1:]
    # Libraries print; the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        state = State(WORKLOADS[workload_name], int(fd))
        peers = {name: PEERS[name](state.arrays, state.block, directory) for name in names}
        workers = {name: Worker(peer, state) for name, peer in peers.items()}
        drops = os.environ.get(DROPS) == "1"
        if drops:
            state.drop()
        print(json.dumps({}), file=answers)
        for line in sys.stdin:
            order, _, name = line.rstrip("\n").partition(" ")
            orders = {"check": workers[name].check, "save": workers[name].save, "restore": workers[name].restore}
            state.fill()
            answer = orders[order]()
            if drops:
                state.drop()
            print(json.dumps(answer), file=answers)
    except Exception:
        print(json.dumps({"error": traceback.format_exc()}), file=answers)
        sys.exit(1)


if __name__ == "__main__":
    main()
