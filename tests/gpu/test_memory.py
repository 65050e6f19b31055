"""Memory: all of it given back, none of it the user's, and what happens when there is none left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gpusaver
from gpu.tools import Gpu, assert_holds, contents, device_state, host_state, host_values, spoil

#: The driver gives memory out in pages of 2 MiB, and grows its own heaps now and then.
SLACK_NBYTES = 8 << 20
RING_NBYTES = 32 << 20


class Pinned:
    """Counts the page-locked bytes that CuPy's runtime is asked for."""

    def __init__(self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
        self.regions: dict[int, int] = {}
        self.peak = 0
        runtime = gpu.cupy.cuda.runtime
        register, unregister = runtime.hostRegister, runtime.hostUnregister

        def counted_register(pointer: int, nbytes: int, flags: int) -> None:
            register(pointer, nbytes, flags)
            self.regions[pointer] = nbytes
            self.peak = max(self.peak, sum(self.regions.values()))

        def counted_unregister(pointer: int) -> None:
            unregister(pointer)
            del self.regions[pointer]

        monkeypatch.setattr(runtime, "hostRegister", counted_register)
        monkeypatch.setattr(runtime, "hostUnregister", counted_unregister)


def test_memory_is_back_at_its_baseline_after_100_saves(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pinned = Pinned(gpu, monkeypatch)
    values = host_values(gpu, 0)
    state, expected = device_state(gpu, values), contents(host_state(values))
    with gpusaver.Saver(state) as saver:  # makes the context, compiles kernels
        saver.restore(saver.save_async(tmp_path / "first").result())
    before = gpu.free_nbytes()
    with gpusaver.Saver(state, max_to_keep=1) as saver:
        for number in range(gpu.rounds(100)):
            capture = ("snapshot", "deferred", "blocking")[number % 3]
            prefix = saver.save_async(tmp_path / "model", number, capture=capture).result()
            if number % 20 == 0:
                saver.restore(prefix)
    assert gpu.free_nbytes() >= before - (0 if gpu.is_simulated else SLACK_NBYTES)
    assert not pinned.regions
    assert 0 < pinned.peak <= RING_NBYTES
    assert contents(state) == expected


@pytest.mark.parametrize("capture", ["snapshot", "deferred", "blocking"])
def test_the_users_pool_is_left_alone(gpu: Gpu, tmp_path: Path, capture: str):
    state = device_state(gpu, host_values(gpu, 1))
    pool = gpu.cupy.get_default_memory_pool()
    gpu.synchronize()
    pool.free_all_blocks()
    before = pool.used_bytes(), pool.total_bytes()
    with gpusaver.Saver(state) as saver:
        prefix = saver.save_async(tmp_path / "model", capture=capture).result()
        saver.restore(prefix)
        gpu.synchronize()
        assert (pool.used_bytes(), pool.total_bytes()) == before


def test_without_device_memory_snapshot_is_refused_and_auto_blocks(
    gpu: Gpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    values = {"w": np.arange(gpu.size(1 << 26) // 4, dtype=np.float32), "b": np.arange(17)}
    state, expected = device_state_of(gpu, values), contents(values)
    with gpusaver.Saver(state, max_to_keep=None) as saver:
        saver.save(tmp_path / "warm")  # its kernels and their tables have their memory now
        leave = values["w"].nbytes // 2
        taken = gpu.cupy.cuda.Memory(gpu.free_nbytes() - leave)
        with pytest.raises(gpusaver.ResourceExhaustedError):
            saver.save_async(tmp_path / "no", capture="snapshot")
        pending = saver.save_async(tmp_path / "model", 1, capture="auto")
        assert pending.capture == "blocking"
        spoil(state)
        assert_holds(pending.result(), expected)
        saver.restore(pending.prefix)
        assert contents(state) == expected
        del taken
        gpu.free_nbytes()
        pending = saver.save_async(tmp_path / "model", 2, capture="snapshot")
        spoil(state)
        assert_holds(pending.result(), expected)
    assert not list(tmp_path.glob("no*"))
    assert "blocks instead" in caplog.text


def device_state_of(gpu: Gpu, values: dict[str, np.ndarray]) -> dict[str, object]:
    return {name: gpu.upload(value) for name, value in values.items()}


def test_after_a_warm_up_saves_and_restores_pin_nothing_more(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pinned = Pinned(gpu, monkeypatch)
    state = device_state(gpu, host_values(gpu, 2))
    with gpusaver.Saver(state) as saver:
        saver.warmup(tmp_path / "model")
        before = dict(pinned.regions)
        assert sum(before.values()) == RING_NBYTES
        for capture in ("snapshot", "deferred", "blocking"):
            saver.restore(saver.save_async(tmp_path / "model", capture=capture).result())
        assert pinned.regions == before
    assert not pinned.regions


def test_pinned_memory_never_exceeds_what_was_allowed(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pinned = Pinned(gpu, monkeypatch)
    staging = 48 << 20
    array = gpu.cupy.zeros((9 << 20) if gpu.is_simulated else (1 << 30), np.uint8)
    with gpusaver.Saver({"w": array}, staging_bytes=staging) as saver:
        for capture in ("deferred", "snapshot"):
            saver.save_async(tmp_path / "model", capture=capture).result()
    assert 0 < pinned.peak <= staging
    assert not pinned.regions
