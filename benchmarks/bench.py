"""``make bench``: gpusaver against other libraries' ways to save, and against raw writes and reads.

Every library is a process of its own (:mod:`worker`), in an environment that has it, and all have the same values in
arrays of their own (:mod:`workloads`).  First each proves that what it restores is what it saved; that was also its
warm-up.  Then rounds: in each, every peer saves once and restores once, in turn, each round starting with another one.

Between two measurements, outside of the clock: the last files are removed and the folder is synced, so that none pays
for the removal of older ones (but for "next", which counts it); what is restored from the page cache is read into it
anew, whoever wrote it and how; and before a save, before that, and before a restore from the disk, twice as much memory
is taken and given back.  So each finds as much that was in use a moment before.  (What stayed unused a virtual machine
gives back to its host, and whoever comes first pays for every page: copies out of such a page cache took 1.5 s for 1.5
GB, for some libraries and raw reads, in some rounds.)  Just before the clock starts every array is written, as by a
training step.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from machine import ROOT, commit, describe_machine, host_kind
from peers import PEERS
from report import print_tables
from worker import DROPS, sync_tree
from workloads import LISTED_ONLY, WORKLOADS, Workload, create_block

_ORBAX = os.path.join(ROOT, ".venv-orbax", "bin", "python")
RESULTS = os.path.join(ROOT, "benchmarks", "results")
FULL, QUICK = ("gpt2", "small", "gpt2-async", "gpt2-memory"), ("gpt2-quick", "small-quick")
MORE = tuple(name for name in WORKLOADS if name not in FULL + QUICK)
_READ = ("restore", "restore_cpu")
#: Where the files of a workload in memory go.
_MEMORY = "/dev/shm/gpusaver-bench"
_HUGE_PAGE_NBYTES = 2 << 20
#: What --quick leaves out: slow to start, or close to a neighbour.
_NOT_QUICK = (
    "np.savez",
    "TensorFlow",
    "Orbax",
    "PyTorch DCP x4",
    "raw page cache x4",
    "raw O_DIRECT x1",
)


class WorkerError(Exception):
    pass


class WorkerProcess:
    """The driver's end of a :mod:`worker`; raises WorkerError for whatever goes wrong at the other end."""

    def __init__(self, python: str, peers: Sequence[str], workload: Workload, fd: int, directory: str) -> None:
        self.peers = peers
        self._process = subprocess.Popen(
            [python, os.path.join(ROOT, "benchmarks", "worker.py"), workload.name, str(fd), directory, *peers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[fd],
            env={**os.environ, "PYTHONPATH": ROOT},
        )

    def wait_ready(self) -> None:
        self._answer()

    def ask(self, order: str, peer: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(order, peer, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise WorkerError(f"{', '.join(self.peers)}: {answer['error']}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def read_into_page_cache(directory: str) -> None:
    buffer = bytearray(8 << 20)
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def drop_from_page_cache(directory: str) -> None:
    """Requires: the files are synced."""
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def empty(directory: str) -> None:
    """Leaves an empty folder, and no work for the file system to catch up on."""
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    sync_tree(os.path.dirname(directory))


def take_memory(nbytes: int) -> None:
    """So much is free, in pages of either size, and in use until now; or half of what there is."""
    nbytes = min(nbytes, memory_available() // 2)
    with mmap.mmap(-1, nbytes + _HUGE_PAGE_NBYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1


def run_workload(
    workload: Workload, peers: Sequence[str], pythons: dict[str, str], rounds: int, directory: str
) -> dict[str, Any]:
    """The measurements of one workload: see ``summarize`` for their form."""
    say(f"{workload.title}: {len(workload.shapes)} tensors, {workload.nbytes / 1e6:,.1f} MB")
    directory = os.path.join(_MEMORY if workload.in_memory else directory, "files")
    fd = create_block(workload)
    groups = group_by_process(
        [peer for peer in peers if (peer not in LISTED_ONLY if workload.peers is None else peer in workload.peers)]
    )
    # TensorFlow and Orbax have copies of their own, and saves take memory too; pages given back cost raw writes nothing
    # but slow all others down on a virtual machine.
    states = len(groups) + (12 if {"TensorFlow", "Orbax"} & set(itertools.chain(*groups)) else 8)
    os.environ.pop(DROPS, None)
    if (needed := states * workload.nbytes) > memory_available():
        os.environ[DROPS] = "1"
        say(f"  {needed / 1e9:.0f} GB of memory are not available: arrays are dropped between measurements")
    workers: list[WorkerProcess] = []
    try:
        for names in groups:
            python = pythons[PEERS[names[0]].environment]
            workers.append(WorkerProcess(python, names, workload, fd, directory))
            workers[-1].wait_ready()
        turns = [(worker, peer) for worker in workers for peer in worker.peers]
        checked = {}
        for worker, peer in turns:
            empty(directory)
            checked[peer] = worker.ask("check", peer)
            read_into_page_cache(directory)
        say(f"  correct and warm: {', '.join(checked)}")
        samples: dict[str, list[dict[str, Any]]] = {peer: [] for _, peer in turns}
        for number in range(rounds):
            start = time.perf_counter()
            first = number * len(turns) // rounds
            for worker, peer in turns[first:] + turns[:first]:
                samples[peer].append(measure(worker, peer, workload, directory))
            say(f"  round {number + 1} of {rounds}: {time.perf_counter() - start:.1f} s")
    finally:
        for worker in workers:
            worker.close()
        os.close(fd)
        shutil.rmtree(directory, ignore_errors=True)
    return summarize(workload, checked, samples)


def memory_available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def group_by_process(peers: Sequence[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for peer in peers:
        groups.setdefault(PEERS[peer].process or peer, []).append(peer)
    return list(groups.values())


def measure(worker: WorkerProcess, peer: str, workload: Workload, directory: str) -> dict[str, Any]:
    empty(directory)
    take_memory(2 * workload.nbytes)  # for whoever needs some beside the files
    sample = worker.ask("save", peer)
    drop_from_page_cache(directory)
    take_memory(2 * workload.nbytes)
    read_into_page_cache(directory)
    for order in workload.orders:
        if order != "save" and order in PEERS[peer].orders:
            if order in ("cold", "next"):
                drop_from_page_cache(directory)
                take_memory(2 * workload.nbytes)
            sample |= worker.ask(order, peer)
    if PEERS[peer].keeps_one:  # the first save, of a new file, is like another peer's
        return {"next": sample["next"], "save_cpu": sample["next_cpu"], "save_peak": sample["next_peak"]}
    return sample


def summarize(
    workload: Workload, checked: dict[str, dict[str, Any]], samples: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Seconds and bytes: for each peer and figure median, min, max and all values; ratios to the best raw medians."""
    peers: dict[str, Any] = {}
    for peer, rounds in samples.items():
        figures = {}
        for figure in rounds[0]:
            values = [sample[figure] for sample in rounds]
            figures[figure] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "values": values,
            }
        peers[peer] = {"is_ceiling": PEERS[peer].is_ceiling, **checked[peer], "figures": figures}
    ceilings = {}
    related_to = {
        "durable": ("return", "durable", "save_cpu"),
        "next": ("next",),
        "restore": _READ,
        "cold": ("cold",),
    }
    for figure, related in related_to.items():
        raw = [name for name, peer in peers.items() if peer["is_ceiling"] and figure in peer["figures"]]
        if not raw:
            continue
        best = min(raw, key=lambda name: peers[name]["figures"][figure]["median"])
        ceilings[figure] = best
        for one in related:
            base = peers[best]["figures"][one if one.endswith("cpu") else figure]["median"]
            for peer in peers.values():
                if one in peer["figures"] and base:
                    peer["figures"][one]["ratio"] = peer["figures"][one]["median"] / base
    return {
        "title": workload.title,
        "tensors": len(workload.shapes),
        "nbytes": workload.nbytes,
        "rounds": len(next(iter(samples.values()))),
        "ceilings": ceilings,
        "peers": peers,
    }


def write(results: dict[str, Any], output: str | None) -> None:
    if output is not None:
        os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
        with open(output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
            file.write("\n")


def check_ahead(results: dict[str, Any], wanted: float) -> None:
    """Raises SystemExit if gpusaver was not so many times as fast as torch.save, durable, in some workload."""
    for workload in results["workloads"].values():
        ours, theirs = (workload["peers"][name]["figures"]["durable"]["median"] for name in ("gpusaver", "torch.save"))
        say(f"{workload['title']}: durable {theirs / ours:.2f} times as fast as torch.save")
        if theirs < wanted * ours:
            raise SystemExit(f"expected at least {wanted} times")


def find_pythons(tensorflow: str) -> dict[str, str]:
    """By environment, those that there are."""
    pythons = {"bench": sys.executable, "tensorflow": tensorflow, "orbax": _ORBAX}
    return {environment: python for environment, python in pythons.items() if os.path.exists(python)}


def choose_peers(wanted: str | None, pythons: dict[str, str], quick: bool) -> list[str]:
    """Those named, whole or by their beginnings; raises SystemExit for a name that fits none."""
    available = [name for name, peer in PEERS.items() if peer.environment in pythons]
    if wanted is None:
        return [name for name in available if not (quick and name in _NOT_QUICK)]
    chosen: set[str] = set()
    for prefix in (prefix.strip().lower() for prefix in wanted.split(",")):
        exact = [name for name in available if name.lower() == prefix]
        found = exact or [name for name in available if name.lower().startswith(prefix)]
        if not found:
            raise SystemExit(f"--peers: {prefix!r} fits none of {', '.join(available)}")
        chosen.update(found)
    return [name for name in available if name in chosen]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures gpusaver against other libraries and against raw writes.")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="may be repeated")
    parser.add_argument("--peers", help="names, or beginnings of several, by comma: gpusaver,torch,raw")
    parser.add_argument("--rounds", type=int, help="default 5; with --quick 2")
    parser.add_argument("--directory", default=os.path.join(ROOT, "build", "bench"), help="where the files go")
    parser.add_argument("--quick", action="store_true", help="a minute: smaller workloads, fewer peers and rounds")
    parser.add_argument("--more", action="store_true", help="the other workloads")
    parser.add_argument("--ahead", type=float, help="fail unless durable so many times as fast as torch.save")
    parser.add_argument("--output", help="the JSON file; default benchmarks/results/<date>-<machine>.json if complete")
    parser.add_argument(
        "--tensorflow-python",
        default=os.environ.get("GPUSAVER_TF_PYTHON", os.path.join(ROOT, ".venv-tf", "bin", "python")),
        help="a Python that has TensorFlow, which is left out if there is none; default $GPUSAVER_TF_PYTHON",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the workers are ended, too
    pythons = find_pythons(options.tensorflow_python)
    peers = choose_peers(options.peers, pythons, options.quick)
    for environment, python in (("tensorflow", options.tensorflow_python), ("orbax", _ORBAX)):
        if environment not in pythons:
            say(f"Without {environment}: there is no {python} (make bench makes it).")
    rounds = options.rounds or (2 if options.quick else 5)
    directory = os.path.abspath(options.directory)
    os.makedirs(directory, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    results: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "python": sys.version.split()[0],
        "machine": describe_machine(directory),
        "workloads": {},
    }
    is_complete = not (options.quick or options.workload or options.peers)
    name = f"{now.date()}-{host_kind()}{'-more' if options.more else ''}.json"
    output = options.output or (os.path.join(RESULTS, name) if is_complete else None)
    for name in options.workload or (QUICK if options.quick else MORE if options.more else FULL):
        if not WORKLOADS[name].in_memory or os.path.isdir(os.path.dirname(_MEMORY)):
            results["workloads"][name] = run_workload(WORKLOADS[name], peers, pythons, rounds, directory)
            print_tables({**results, "workloads": {name: results["workloads"][name]}})
            write(results, output)  # what was measured is there, whatever becomes of the next
    if options.ahead is not None:
        check_ahead(results, options.ahead)
    if output is not None:
        say(f"Written: {output}. For the documents: {os.path.relpath(sys.executable)} benchmarks/report.py")


if __name__ == "__main__":
    main()
