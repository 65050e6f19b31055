"""benchmarks/bench_gpu.py from end to end on a simulated device: that it runs, and what it writes; no figure counts."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim.fixture import simulated_cupy  # noqa: F401
from sim.gpusaver_kernels import install
from sim.kernels import Kernel, Launch

FIGURES = {
    *("call", "fence", "durable", "cpu", "host_peak", "restore", "restore_peak", "training_call", "device_peak"),
    *("stall", "stall_noise", "step", "steps", "worst_step", "get_p99", "get_p99_before"),
}


@pytest.fixture
def bench(sim: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, benchmarks: Path) -> Any:
    """The script with small sizes, and what it needs of CuPy beyond what gpusaver does."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    install(sim)
    sim.kernels["change"] = Kernel(change, ("pointer",))
    sim.cupy.savez = lambda path, **arrays: np.savez(path, **{name: array.get() for name, array in arrays.items()})
    import bench_gpu
    import gpu_ceilings
    import gpu_state

    monkeypatch.setattr(bench_gpu, "SIZES", gpu_ceilings.Sizes(1 << 16, 1 << 16, 1 << 16, 1 << 16))
    monkeypatch.setattr(bench_gpu, "SIDE", 16)
    monkeypatch.setattr(bench_gpu, "BASELINE_STEPS", 3)
    if "plot" not in request.node.name:  # matplotlib takes seconds to begin
        monkeypatch.setattr(bench_gpu, "plot", lambda results, path: "No plot")
    shapes: dict[str, tuple[int, ...]] = {"layer/w": (60, 50), "layer/b": (50,), "scalar": ()}
    for name, count in (("gpt2", 1), ("small", 10), ("7b", 2)):
        some = {f"{number}/{key}": shape for number in range(count) for key, shape in shapes.items()}
        dtype = gpu_state.GPU_WORKLOADS[name].dtype
        if name == "7b":  # whole words
            some = {key: (*shape[:-1], 50) for key, shape in some.items()}
        workload = gpu_state.GpuWorkload(name, f"tiny {name}", some, dtype, 0.001, 2)
        monkeypatch.setitem(gpu_state.GPU_WORKLOADS, name, workload)
    return bench_gpu


def change(here: Launch, tiles: int) -> None:
    """As benchmarks/gpu_change.cu."""
    table = here.memory(tiles, 16 * here.grid[0]).view(np.uint64).reshape(-1, 2)
    for block, (pointer, count) in enumerate(table.tolist()):
        words = here.memory(pointer, 4 * count).view(np.uint32)
        words *= np.uint32(1664525)
        words += np.uint32(1013904223 + block) + np.arange(count, dtype=np.uint32)


def run(bench: Any, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    bench.main([f"--place={tmp_path / 'memory'}", f"--output={tmp_path / 'results' / 'bench.json'}", *arguments])
    return json.loads((tmp_path / "results" / "bench.json").read_text("utf-8"))


def test_everything(bench, sim, tmp_path, capsys):
    results = run(bench, tmp_path)
    assert set(results["ceilings"]["device"]) == {
        *("pinned D2H", "pinned H2D", "pageable D2H", "pageable H2D", "D2D", "device crc32c", "host crc32c", "pin")
    }
    assert all(rate > 0 for rate in results["ceilings"]["device"].values())
    assert len(results["devices"]) == 2
    assert set(results["workloads"]) == {"gpt2", "small", "7b"}
    for name, workload in results["workloads"].items():
        assert workload["null_capture"]["rate"] > 0
        for place, measured in workload["places"].items():
            assert results["ceilings"]["files"][place][name]["write"] > 0
            ours = {peer for peer, found in measured["peers"].items() if found["is_ours"]}
            assert len(ours) == (2 if name == "7b" else 5), measured["skipped"]
            assert name == "7b" or "cupy.savez" in measured["peers"], measured["skipped"]
            for peer, found in measured["peers"].items():
                assert set(found["figures"]) >= FIGURES, peer
                assert found["figures"]["steps"]["min"] >= bench.LEAST_STEPS
                assert len(found["figures"]["stall"]["values"]) == 2
                assert ("capture" in found["figures"]) == (found["is_ours"] and peer != "gpusaver blocking")
            for peer, reason in measured["skipped"].items():
                assert peer.startswith(("torch", "safetensors", "Orbax"))
                assert reason.startswith("cannot be imported: "), reason
    lines = {one["line"].partition(":")[0] for one in results["criteria"]}
    memory = str(tmp_path / "memory")
    assert {f"gpt2 in {memory}", f"small in {memory}", f"7b in {memory}", "gpt2", "7b"} <= lines
    assert all(isinstance(one["holds"], bool) for one in results["criteria"])
    shown = capsys.readouterr().out
    assert "Acceptance lines" in shown
    assert "gpusaver deferred" in shown
    assert not list((tmp_path / "memory").iterdir())
    sim.assert_quiescent()


def test_cut_down(bench, tmp_path):
    wanted = ["--peers=gpusaver deferred", "--rounds=1", f"--place={tmp_path / 'disk'}"]
    results = run(bench, tmp_path, "--workload=small", "--workload=7b", *wanted)
    assert set(results["workloads"]) == {"small", "7b"}
    assert len(results["workloads"]["7b"]["places"]) == 1
    places = results["workloads"]["small"]["places"]
    assert len(places) == 2
    for measured in places.values():
        assert set(measured["peers"]) == {"gpusaver deferred", "gpusaver deferred, ring"}
        assert measured["skipped"] == {}
        assert len(measured["peers"]["gpusaver deferred"]["figures"]["durable"]["values"]) == 1


def test_the_essential_part_with_its_plot(bench, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    bench.main(["--essential", "--rounds=1", f"--place={tmp_path / 'memory'}"])
    results = json.loads((tmp_path / "out" / "bench-gpu.json").read_text("utf-8"))
    assert (tmp_path / "out" / "bench-gpu.png").read_bytes().startswith(b"\x89PNG")
    measured = results["workloads"]["gpt2"]["places"][str(tmp_path / "memory")]
    assert len([peer for peer in measured["peers"].values() if peer["is_ours"]]) == 5
    assert "cupy.savez" not in measured["peers"]


def test_device_memory_that_is_kept_counts(bench, tmp_path):
    """The image of a snapshot stays with the Saver from the check on; what others have cached is not charged to it."""
    results = run(bench, tmp_path, "--workload=gpt2", "--peers=gpusaver,cupy", "--rounds=1")
    workload = results["workloads"]["gpt2"]
    for measured in workload["places"].values():
        peaks = {name: peer["figures"]["device_peak"]["median"] for name, peer in measured["peers"].items()}
        assert peaks["gpusaver snapshot"] >= workload["nbytes"]
        assert peaks["cupy.savez"] == 0


def test_traces(bench, tmp_path):
    run(bench, tmp_path, "--workload=gpt2", "--peers=gpusaver,cupy", "--rounds=1", f"--trace={tmp_path / 'traces'}")
    names = {"gpusaver-snapshot", "gpusaver-deferred", "gpusaver-deferred-ring", "gpusaver-recycle"}
    assert {path.name for path in (tmp_path / "traces").iterdir()} == {f"trace-gpt2-{name}.json" for name in names}
    assert all(json.loads(path.read_text("utf-8"))["traceEvents"] for path in (tmp_path / "traces").iterdir())


def test_saves_that_recycle_are_measured_over_old_files(bench, tmp_path, monkeypatch):
    from gpusaver.pipeline import recycling
    from gpusaver.storage import local

    reused: list[bool] = []
    reuse = local.LocalStorage.reuse

    def noted(storage: Any, *arguments: Any, **options: Any) -> Any:
        file = reuse(storage, *arguments, **options)
        reused.append(file is not None)
        return file

    monkeypatch.setattr(recycling, "RECYCLED_MIN_NBYTES", 1)
    monkeypatch.setattr(local, "file_system", lambda device: "ext4")
    monkeypatch.setattr(local.LocalStorage, "reuse", noted)
    results = run(bench, tmp_path, "--workload=gpt2", "--peers=gpusaver recycle", "--rounds=2")
    (measured,) = results["workloads"]["gpt2"]["places"].values()
    assert measured["peers"]["gpusaver recycle"]["recycles"]
    assert reused == [True] * 5  # the one that is checked, and two a round
    assert "gpt2" in {one["line"].partition(":")[0] for one in results["criteria"]}
    assert not any("durable, of its ceiling" in one["line"] for one in results["criteria"])


class Clock:
    """A device on which everything takes as long as is said: a product, and what is left of a step without any."""

    def __init__(self, product: float, rest: float) -> None:
        self.now, self.product, self.rest = 0.0, product, rest
        null = types.SimpleNamespace(synchronize=lambda: None)
        stream = types.SimpleNamespace(Stream=types.SimpleNamespace(null=null))
        self.cupy = types.SimpleNamespace(full=lambda *arguments: self, cuda=stream)

    def __matmul__(self, other: Clock) -> Clock:
        self.now += self.product
        return self

    def __getitem__(self, key: Any) -> Clock:
        return self

    def sum(self) -> Clock:
        return self

    def get(self) -> None: ...

    def change(self) -> None:
        self.now += self.rest

    def free_memory(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("wanted", "product", "rest"),
    [(0.3, 0.35e-3, 0.02), (0.05, 0.35e-3, 0.005), (0.02, 2e-6, 0.001), (0.02, 0.35e-3, 0.0001), (0.05, 0.05, 0.001)],
)
def test_a_step_is_as_long_as_wanted(bench, monkeypatch, wanted, product, rest):
    import gpu_state

    clock = Clock(product, rest)
    clock.workload = types.SimpleNamespace(step_seconds=wanted)
    monkeypatch.setattr(gpu_state, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    training = gpu_state.Training(clock, 2048)
    assert training.seconds == pytest.approx(wanted, rel=0.03)
    assert training.baseline(5).seconds == pytest.approx([wanted] * 5, rel=0.03)


def test_a_step_after_a_slow_start_is_as_long_as_wanted(bench, monkeypatch):
    """The device's clock rises while the first steps are measured."""
    import gpu_state

    clock = Clock(0.35e-3, 0.005)
    clock.workload = types.SimpleNamespace(step_seconds=0.05)

    def now() -> float:
        clock.product = 0.35e-3 if clock.now > 0.2 else 0.7e-3
        return clock.now

    monkeypatch.setattr(gpu_state, "time", types.SimpleNamespace(perf_counter=now))
    assert gpu_state.Training(clock, 2048).seconds == pytest.approx(0.05, rel=0.03)


def test_a_stall_and_its_noise(bench):
    from gpu_state import Steps, stalls

    before = Steps([0.3, 0.3, 0.9, 0.3, 0.31], [0.001] * 5)  # an outlier of the baseline is nobody's
    window, after = Steps([0.5, 0.3, 0.3, 0.32], [0.002] * 4), Steps([0.28, 0.3, 0.3, 0.29], [0.001] * 4)
    found = stalls(before, window, after)
    assert found["stall"] == pytest.approx(0.22)
    assert found["stall_noise"] == pytest.approx(0.03)
    assert (found["step"], found["steps"], found["worst_step"]) == (0.3, 4, 0.5)


@pytest.mark.parametrize("closes", [False, True], ids=["as-installed", "as-2.11"])
def test_dcp_saves_again_and_again(bench, tmp_path, monkeypatch, closes):
    """Also with the stager of PyTorch 2.11, which closes its inner one after every save; needs PyTorch."""
    pytest.importorskip("torch")
    import gpu_peers
    from torch.distributed.checkpoint.staging import DefaultStager

    stage = DefaultStager._stage

    def stage_and_close(self: Any, *arguments: Any, **named: Any) -> Any:
        staged = stage(self, *arguments, **named)
        self._state_dict_stager.close()
        return staged

    if closes:
        monkeypatch.setattr(DefaultStager, "_stage", stage_and_close)
    plain = {"a": np.arange(6, dtype=np.float32), "b": np.zeros((3, 2), np.float32)}
    workload = types.SimpleNamespace(dtype=np.float32)
    with gpu_peers.peer_of(
        "torch DCP async tuned", types.SimpleNamespace(plain=plain, workload=workload), tmp_path
    ) as dcp:
        for number in range(3):
            plain["b"][...] = number
            pending = dcp.begin()
            pending.fence()
            for array in plain.values():
                array.fill(-1)
            pending.result()
            assert pending.done()
            dcp.restore()
            assert plain["a"].tolist() == [0, 1, 2, 3, 4, 5]
            assert (plain["b"] == number).all()


def test_out_of_time(bench, tmp_path):
    results = run(bench, tmp_path, "--workload=gpt2", "--seconds=0.000001")
    for measured in results["workloads"]["gpt2"]["places"].values():
        assert measured["peers"] == {}
        assert set(measured["skipped"].values()) == {"out of time (--seconds 1e-06)"}


def test_a_library_that_loses_bytes_is_found_out(bench, tmp_path, monkeypatch):
    import gpu_peers

    monkeypatch.setattr(gpu_peers.CupySavez, "restore", lambda self: None)
    results = run(bench, tmp_path, "--workload=gpt2", "--peers=cupy", "--rounds=1")
    for measured in results["workloads"]["gpt2"]["places"].values():
        assert "after the restore" in measured["skipped"]["cupy.savez"]


def test_too_little_device_memory(bench, tmp_path, monkeypatch):
    workload = bench.GPU_WORKLOADS["gpt2"]
    large = type(workload)("gpt2", "too large", {"w": (1 << 24,)}, workload.dtype, 0.001, 1)
    monkeypatch.setitem(bench.GPU_WORKLOADS, "gpt2", large)
    results = run(bench, tmp_path, "--workload=gpt2")
    assert "67108864 bytes and a copy of them do not fit into" in results["workloads"]["gpt2"]["skipped"]


def test_without_a_device_it_says_why(bench, tmp_path, sim):
    sim.has_driver = False
    with pytest.raises(SystemExit, match="This needs an NVIDIA GPU and CuPy: CuPy is installed, but"):
        bench.main([f"--place={tmp_path}"])
    sim.has_driver = True
