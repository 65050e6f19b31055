"""``make bench-gpu``: gpusaver against cupy.savez, PyTorch, safetensors and Orbax on an NVIDIA GPU.

First the ceilings, in the same run: links, device memory, checksums, raw files.  Then, for each workload and folder,
every library in turn, all in this process and on the same device memory.  First each proves that what it restores is
what it saved; that was also its warm-up.  Then rounds: a save and restores with nothing else going on, and a save
during training, whose every step is timed from the call until the checkpoint is durable, and steps before and after it.

What cannot run, or does not fit into the time (``--seconds``), is listed with its reason.  The JSON file is written
anew after every library, so that a run that is cut off has told what it knew.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from machine import ROOT, commit, describe_machine

sys.path.insert(0, ROOT)

from bench import RESULTS, empty, read_into_page_cache, say
from gpu_ceilings import Sizes, device_ceilings, drop_from_page_cache, file_ceilings
from gpu_peers import GPU_PEERS, GpuPeer, Pending, peer_of
from gpu_report import add_expected_stalls, bounds, criteria, plot, print_gpu_tables, ratios, summarize_peers
from gpu_state import GPU_WORKLOADS, GpuWorkload, State, Steps, Training, stalls
from null_storage import NullStorage
from worker import reset_peak, resident, sync_tree

SIZES = Sizes()
SIDE = 2048
BASELINE_STEPS, LEAST_STEPS = 20, 5
#: A window this long has lost its save.
WINDOW_SECONDS = 120.0
#: What --essential measures, in this order: what the acceptance lines need most comes before the time is up.
ESSENTIAL = {
    "small": ("gpusaver snapshot", "gpusaver deferred, ring", "gpusaver blocking", "torch.save", "safetensors"),
    "7b": ("gpusaver deferred",),
    "gpt2": ("gpusaver", "torch DCP async tuned", "safetensors tuned", "torch.save tuned", "Orbax async tuned"),
}
ESSENTIAL_ROUNDS = 2
#: 14 GB each: the libraries that do not go through pageable memory.
LARGE = ("gpusaver snapshot", "gpusaver deferred", "torch.save tuned", "torch DCP async tuned", "safetensors tuned")


class Bench:
    """One run: its options, what it has found so far, and the time that is left."""

    def __init__(self, options: argparse.Namespace, cupy: Any) -> None:
        import gpusaver
        from gpusaver.device.nvml import driver_version

        self.options = options
        self.cupy = cupy
        self.deadline = time.monotonic() + options.seconds if options.seconds else float("inf")
        self.results: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "python": sys.version.split()[0],
            "cupy": cupy.__version__,
            "cuda": {"runtime": cupy.cuda.runtime.runtimeGetVersion(), "driver": cupy.cuda.runtime.driverGetVersion()},
            "model": gpusaver.devices()[0].model,
            "driver": driver_version(),
            "devices": [str(device) for device in gpusaver.devices()],
            "machine": describe_machine(options.place[0]),
            "ceilings": {"device": {}, "files": {}},
            "workloads": {},
        }

    def run(self) -> dict[str, Any]:
        say("ceilings")
        ceilings = self.results["ceilings"]
        ceilings["device"] = device_ceilings(self.cupy, SIZES)
        for name in self.options.workload:
            workload = GPU_WORKLOADS[name]
            if reason := self.lacks_room(workload):
                say(f"{name}: {reason}")
                self.results["workloads"][name] = {"title": workload.title, "skipped": reason}
                continue
            self.run_workload(workload)
            self.cupy.get_default_memory_pool().free_all_blocks()
        self.write()
        return self.results

    def lacks_room(self, workload: GpuWorkload) -> str:
        free = int(self.cupy.cuda.runtime.memGetInfo()[0])
        if free < 2.2 * workload.nbytes:
            return f"{workload.nbytes} bytes and a copy of them do not fit into {free} bytes of device memory"
        return ""

    def run_workload(self, workload: GpuWorkload) -> None:
        state = State(workload)
        say(f"{workload.title}: {len(workload.shapes)} tensors, {workload.nbytes / 1e6:,.1f} MB")
        training = Training(state, SIDE)
        say(f"  a training step takes {training.seconds:.4f} s, {workload.step_seconds:.4f} s are wanted")
        found: dict[str, Any] = {
            "title": workload.title,
            "tensors": len(workload.shapes),
            "nbytes": workload.nbytes,
            "null_capture": null_capture(state),
            "places": {},
        }
        self.results["workloads"][workload.name] = found
        places = self.options.place if workload.name != "7b" else self.options.place[:1]
        for place in places:
            directory = os.path.join(place, "gpusaver-bench", "files")
            os.makedirs(directory, exist_ok=True)
            try:
                files = self.results["ceilings"]["files"].setdefault(place, {})
                free = shutil.disk_usage(directory).free
                if free < 1.2 * workload.nbytes:
                    found["places"][place] = {"skipped": f"{free} bytes are free in {place}"}
                    continue
                threads = (1, 2, 4) if workload.name != "7b" else (2,) if self.options.essential else (2, 4)
                files[workload.name] = file_ceilings(directory, workload.nbytes, threads)
                self.run_place(state, training, directory, found["places"].setdefault(place, {}))
            finally:
                shutil.rmtree(os.path.dirname(directory), ignore_errors=True)

    def run_place(self, state: State, training: Training, directory: str, found: dict[str, Any]) -> None:
        samples: dict[str, list[dict[str, Any]]] = {}
        found |= {"peers": {}, "skipped": {}}
        for name in self.peers(state.workload):
            if time.monotonic() > self.deadline:
                found["skipped"][name] = f"out of time (--seconds {self.options.seconds:g})"
                continue
            empty(directory)
            free = free_memory(state, training)
            try:
                with peer_of(name, state, directory) as peer:
                    versions, staging = peer.versions(), peer.staging_nbytes
                    check(peer, state)
                    rounds = self.options.rounds or state.workload.rounds
                    samples[name] = []
                    while len(samples[name]) < rounds and (not samples[name] or time.monotonic() < self.deadline):
                        samples[name].append(measure(peer, state, training, free, directory))
                    self.trace(name, peer)
            except ImportError as error:
                found["skipped"][name] = f"cannot be imported: {error}"
            except Exception as error:
                found["skipped"][name] = f"failed: {type(error).__name__}: {error}"
                say(traceback.format_exc())
            if samples.get(name):
                found["peers"][name] = summarize_peers(samples[name]) | {
                    "versions": versions,
                    "is_ours": GPU_PEERS[name].is_ours,
                    "is_tuned": GPU_PEERS[name].is_tuned,
                    "recycles": GPU_PEERS[name].recycles,
                    "staging_nbytes": staging,
                }
            say(f"  {name}: {found['skipped'].get(name) or brief(samples[name][-1])}")
            self.write()

    def trace(self, name: str, peer: GpuPeer) -> None:
        if self.options.trace and peer.report is not None:
            os.makedirs(self.options.trace, exist_ok=True)
            file = "-".join(f"trace {peer.state.workload.name} {name}.json".replace(",", "").split())
            peer.report.write_trace(os.path.join(self.options.trace, file))

    def peers(self, workload: GpuWorkload) -> list[str]:
        names = [name for name in GPU_PEERS if workload.name != "7b" or name in LARGE]
        wanted = self.options.peers.split(",") if self.options.peers else None
        if wanted is None and self.options.essential:
            wanted = list(ESSENTIAL.get(workload.name, ("gpusaver",)))
        if wanted is None:
            return names
        return [name for name in names if name.lower().startswith(tuple(one.strip().lower() for one in wanted))]

    def write(self) -> None:
        for name, workload in self.results["workloads"].items():
            for place, measured in workload.get("places", {}).items():
                best = bounds(self.results, workload, name, place)
                measured["ratios"] = ratios(measured, best)
                add_expected_stalls(measured, workload["nbytes"], best.get("durable"))
        self.results["criteria"] = criteria(self.results)
        os.makedirs(os.path.dirname(os.path.abspath(self.options.output)), exist_ok=True)
        with open(self.options.output, "w", encoding="utf-8") as file:
            json.dump(self.results, file, indent=1)
            file.write("\n")


def check(peer: GpuPeer, state: State) -> None:
    """What is restored is what was saved, bit for bit, whatever happens to the arrays after the fence."""
    state.change()
    expected = state.digest()
    pending = peer.begin()
    pending.fence()
    state.clear()
    pending.result()
    peer.restore()
    state.synchronize()
    found = state.digest()
    if found != expected:
        raise AssertionError(f"checksum {expected:#x} before the save, {found:#x} after the restore")


def free_memory(state: State, training: Training) -> int:
    """Of the device, when nothing is kept there but the state and what training needs."""
    gc.collect()
    state.cupy.get_default_memory_pool().free_all_blocks()
    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()
    training.baseline(1)
    return state.free_memory()


def measure(peer: GpuPeer, state: State, training: Training, free: int, directory: str) -> dict[str, Any]:
    """One round: a save and restores on an idle device, and a save during training.  Seconds and bytes.

    ``free``: of device memory before the peer was made.
    """
    if not peer.recycles:
        empty(directory)
    sample = quiet_save(peer, state, directory)
    read_into_page_cache(directory)
    sample["restore"], sample["restore_peak"] = restore(peer, state)
    if not is_memory(directory) and drop_from_page_cache(directory):
        sample["restore_cold"], _ = restore(peer, state)
    if not peer.recycles:
        empty(directory)
    return sample | save_during_training(peer, training, free)


def quiet_save(peer: GpuPeer, state: State, directory: str) -> dict[str, Any]:
    state.synchronize()
    reset_peak()
    before, cpu, start = resident("VmRSS"), time.process_time(), time.perf_counter()
    pending = peer.begin()
    called = time.perf_counter()
    pending.fence()
    fenced = time.perf_counter()
    pending.result()
    sync_tree(directory)
    durable = time.perf_counter()
    peak = resident("VmHWM")
    peer.report = report = pending.report
    return {
        "call": called - start,
        "fence": fenced - start,
        "durable": durable - start,
        "capture": report.captured_seconds if report is not None else None,
        "background": report.background_seconds if report is not None else None,
        "cpu": time.process_time() - cpu,
        "host_peak": None if before is None or peak is None else max(0, peak - before),
    }


def restore(peer: GpuPeer, state: State) -> tuple[float, int | None]:
    """Seconds until the arrays are there, and the peak of host memory beyond what was there."""
    reset_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    peer.restore()
    state.synchronize()
    seconds, peak = time.perf_counter() - start, resident("VmHWM")
    return seconds, None if before is None or peak is None else max(0, peak - before)


def save_during_training(peer: GpuPeer, training: Training, free: int) -> dict[str, Any]:
    """From the call until the library says durable, and at least a few steps; without a save before and after.

    ``device_peak``: what is missing of ``free``, be it that the library keeps it between saves or caches it.
    """
    before, steps = training.baseline(BASELINE_STEPS), Steps()
    started: list[Pending] = []
    call: list[float] = []

    def begin() -> None:
        start = time.perf_counter()
        started.append(peer.begin())
        call.append(time.perf_counter() - start)

    training.step(steps, begin, lambda: started[0].fence())
    until = time.perf_counter() + WINDOW_SECONDS
    while (not started[0].done() or len(steps.seconds) < LEAST_STEPS) and time.perf_counter() < until:
        training.step(steps)
    started[0].result()
    found = stalls(before, steps, training.baseline(len(steps.seconds)))
    return found | {"training_call": call[0], "device_peak": max(0, free - steps.least_free)}


def null_capture(state: State) -> dict[str, float]:
    """How fast a deferred save reads the state when nothing is written, with as much pinned memory as it takes."""
    import gpusaver

    with gpusaver.Saver(dict(state.arrays), storage=NullStorage(), staging_bytes=state.nbytes + (32 << 20)) as saver:
        saver.warmup()
        seconds = []
        for _ in range(3):
            pending = saver.save_async("/null/model.ckpt", capture="deferred", write_state=False)
            assert pending is not None
            pending.fence()
            pending.result()
            assert pending.report is not None
            seconds.append(pending.report.captured_seconds)
    return {"seconds": min(seconds[1:]), "rate": state.nbytes / min(seconds[1:])}


def is_memory(directory: str) -> bool:
    return str(describe_machine(directory)["file_system"]) in ("tmpfs", "ramfs")


def brief(sample: dict[str, Any]) -> str:
    return ", ".join(f"{name} {sample[name]:.3f} s" for name in ("call", "stall", "durable", "restore"))


def default_places() -> list[str]:
    """Memory first, where the disk does not hide what a library costs; then the disk."""
    places = ["/dev/shm"] if os.access("/dev/shm", os.W_OK) else []
    return [*places, os.path.join(ROOT, "build")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures gpusaver and other libraries on an NVIDIA GPU.")
    parser.add_argument("--workload", action="append", choices=list(GPU_WORKLOADS), help="may be repeated")
    parser.add_argument("--peers", help="beginnings of their names, by comma: gpusaver,torch")
    parser.add_argument("--rounds", type=int, help="default 3, of 7b 1, with --essential 2")
    parser.add_argument("--place", action="append", help="folders; default /dev/shm and build/")
    parser.add_argument("--essential", action="store_true", help="what the acceptance lines need, in /dev/shm alone")
    parser.add_argument("--seconds", type=float, default=0.0, help="start nothing new after this; default no limit")
    parser.add_argument("--trace", help="a folder for the stages of gpusaver's last saves, for ui.perfetto.dev")
    parser.add_argument("--output", help="the JSON file, and beside it a PNG")
    options = parser.parse_args(arguments)
    options.workload = options.workload or list(ESSENTIAL if options.essential else GPU_WORKLOADS)
    options.rounds = options.rounds or (ESSENTIAL_ROUNDS if options.essential else None)
    options.place = options.place or default_places()[: 1 if options.essential else None]
    for place in options.place:
        os.makedirs(place, exist_ok=True)
    return options


def default_output(model: str, *, is_complete: bool) -> str:
    """benchmarks/results/gpu for a complete run, else build/; $OUT, where it is set, for every one."""
    if os.environ.get("OUT"):
        return os.path.join(os.environ["OUT"], "bench-gpu.json")
    if not is_complete:
        return os.path.join(ROOT, "build", "bench-gpu.json")
    today = datetime.datetime.now(datetime.UTC).date()
    return os.path.join(RESULTS, "gpu", f"{today}-{model.lower().replace(' ', '-') or 'unknown'}.json")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    import gpusaver
    from gpusaver.device.inventory import why_no_devices

    if reason := why_no_devices():
        sys.exit(f"This needs an NVIDIA GPU and CuPy: {reason}")
    import cupy

    is_complete = len(options.workload) == len(GPU_WORKLOADS) and not (options.peers or options.essential)
    options.output = options.output or default_output(gpusaver.devices()[0].model, is_complete=is_complete)
    results = Bench(options, cupy).run()
    print_gpu_tables(results)
    say(f"Written: {options.output}")
    say(plot(results, os.path.splitext(options.output)[0] + ".png"))


if __name__ == "__main__":
    main()
