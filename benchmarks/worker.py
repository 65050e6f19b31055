"""A peer in a process of its own: takes orders as lines on standard input, answers each with a line of JSON.

::

    save torch.save     ->  {"durable": 1.25, ...}

Orders: ``check`` (save, wipe, restore, compare), ``save``; of what was saved last ``restore``, ``cold`` (the same:
the driver has seen to it that no file is in the page cache), ``list`` (opened, and all names and shapes asked for) and
``some`` (1 % of the names restored); ``next``, which saves again beside it, and removes it when the new files are
durable, as a job that keeps one checkpoint does.  The end of the input ends the process.
The files are always those in the directory given; the driver empties it between orders.  Peers that need no library
share a process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
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
    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._kept = 0  # of memory, by what this peer has done so far

    def check(self) -> dict[str, Any]:
        expected = self._peer.digest()
        with self._watched({}, "check"):
            self._peer.save()
            self._peer.wait()
            if "restore" in self._peer.orders or not self._peer.is_ceiling:
                self._peer.clear()
                self._peer.restore()
        found = self._peer.digest()
        if found != expected:
            raise AssertionError(f"checksum {expected:#x} before the save, {found:#x} after the restore")
        return {"stored_files": len(os.listdir(self._peer.directory)), "versions": self._peer.versions()}

    def save(self) -> dict[str, Any]:
        sample: dict[str, Any] = {}
        with self._watched(sample, "save"):
            start = time.perf_counter()
            self._peer.save()
            sample["return"] = time.perf_counter() - start
            if self._peer.is_written:
                self._peer.wait()
                sync_tree(self._peer.directory)
                sample["durable"] = time.perf_counter() - start
        return sample

    def next(self) -> dict[str, Any]:
        peer, before, sample = self._peer, self._peer.directory, dict[str, Any]()
        if peer.keeps_one:
            peer.save()
        shutil.rmtree(before + ".next", ignore_errors=True)  # of a run that was killed
        with self._watched(sample, "next"):
            start = time.perf_counter()
            if not peer.keeps_one:
                peer.directory += ".next"
                os.mkdir(peer.directory)
            peer.save()
            peer.wait()
            sync_tree(peer.directory)
            if not peer.keeps_one:
                shutil.rmtree(before)
                os.rename(peer.directory, before)
                peer.directory = before
            sample["next"] = time.perf_counter() - start
        return sample

    def read(self, order: str) -> dict[str, Any]:
        calls = {"restore": self._peer.restore, "cold": self._peer.restore, "list": self._list, "some": self._some}
        sample: dict[str, Any] = {}
        with self._watched(sample, order):
            start = time.perf_counter()
            calls[order]()
            sample[order] = time.perf_counter() - start
        return sample

    def _list(self) -> None:
        count = self._peer.list_names()
        if count != len(self._peer.arrays):
            raise AssertionError(f"{count} names were listed, {len(self._peer.arrays)} saved")

    def _some(self) -> None:
        self._peer.restore_some(self._peer.some)

    @contextlib.contextmanager
    def _watched(self, sample: dict[str, Any], figure: str) -> Iterator[None]:
        """Adds CPU seconds, and the peak of memory beyond what the process would have held but for this peer."""
        gc.collect()
        reset_peak()
        before, cpu = resident("VmRSS"), time.process_time()
        yield
        sample[f"{figure}_cpu"] = time.process_time() - cpu
        peak, after = resident("VmHWM"), resident("VmRSS")
        if before is not None and peak is not None and after is not None:
            sample[f"{figure}_peak"] = max(0, peak - before + self._kept)
            self._kept += after - before


def main() -> None:
    workload_name, fd, directory, *names = sys.argv[1:]
    # Libraries print; the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        state = State(WORKLOADS[workload_name], int(fd))
        peers = {name: PEERS[name](state.arrays, state.block, directory) for name in names}
        workers = {name: Worker(peer) for name, peer in peers.items()}
        drops = os.environ.get(DROPS) == "1"
        if drops:
            state.drop()
        print(json.dumps({}), file=answers)
        for line in sys.stdin:
            order, _, name = line.rstrip("\n").partition(" ")
            worker = workers[name]
            state.fill()
            orders = {"check": worker.check, "save": worker.save, "next": worker.next}
            answer = orders[order]() if order in orders else worker.read(order)
            if drops:
                state.drop()
            print(json.dumps(answer), file=answers)
    except Exception:
        print(json.dumps({"error": traceback.format_exc()}), file=answers)
        sys.exit(1)


if __name__ == "__main__":
    main()
