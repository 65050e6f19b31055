"""Memory: all of it given back, none of it the user's, and what happens when there is none left."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gated_storage import GatedStorage

import gpusaver
from gpu.tools import Gpu, assert_holds, contents, device_state, host_state, host_values, in_child, spoil
from gpusaver.device import Transfer

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


# ------------------------------------------------------------------------- Savers that nobody closes, and their buffers


def await_the_end_of_savers() -> None:
    """Of those that nobody has, also of one that a thread still saves with."""
    for thread in threading.enumerate():
        if thread.name == "gpusaver-save":
            thread.join()
    gc.collect()


@pytest.mark.parametrize("is_cyclic", [False, True], ids=["by-count", "by-collector"])
def test_a_saver_that_is_dropped_gives_its_memory_back(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cyclic: bool
):
    """Over and over: memory that was unmapped, but not unregistered, cannot be registered when it is mapped again."""
    pinned = Pinned(gpu, monkeypatch)
    values = host_values(gpu, 3)
    state, expected = device_state(gpu, values), contents(host_state(values))
    before = None
    for _ in range(gpu.rounds(20)):
        saver: Any = gpusaver.Saver(state)
        if is_cyclic:
            saver.itself = saver
        saver.restore(saver.save_async(tmp_path / "model", capture="snapshot").result())
        assert pinned.regions
        del saver
        await_the_end_of_savers()
        assert not pinned.regions
        free = gpu.free_nbytes()
        before = before or free
        assert free >= before - (0 if gpu.is_simulated else SLACK_NBYTES)
    assert contents(state) == expected


@pytest.mark.parametrize("at", ["create", "replace"])
@pytest.mark.parametrize("capture", ["snapshot", "deferred"])
def test_a_saver_that_is_dropped_while_it_saves(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capture: Any, at: str
):
    """The save goes on, its memory stays as long as that takes, and no longer."""
    pinned, storage = Pinned(gpu, monkeypatch), GatedStorage()
    storage.hold(at)
    values = host_values(gpu, 4)
    state, expected = device_state(gpu, values), contents(host_state(values))
    saver = gpusaver.Saver(state, storage=storage)
    pending = saver.save_async(tmp_path / "model", capture=capture)
    assert storage.arrived.wait(60)
    before = dict(pinned.regions)
    del saver
    gc.collect()
    assert pinned.regions == before
    assert bool(before) == (at == "replace")
    storage.let_go()
    assert_holds(pending.result(), expected)
    await_the_end_of_savers()
    assert not pinned.regions


def test_savers_of_the_tensorflow_1_front_end_are_dropped(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As its scripts do, which know of no ``close``."""
    import gpusaver.compat.v1 as tf

    pinned = Pinned(gpu, monkeypatch)
    value = np.arange(3000, dtype=np.float32)
    with tf.Graph().as_default(), tf.Session() as session:
        variable = tf.get_variable("w", initializer=value)
        session.run(tf.global_variables_initializer())
        assert isinstance(next(iter(session.variables.values())), gpu.cupy.ndarray)
        saver = tf.train.Saver()
        prefix = saver.save(session, str(tmp_path / "model"))
        saver.restore(session, prefix)
        assert pinned.regions
        assert session.run(variable).tobytes() == value.tobytes()
    del saver
    gc.collect()
    assert not pinned.regions


@pytest.mark.parametrize("to_slot", [True, False])
def test_a_slot_stays_registered_while_it_is_copied(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, to_slot: bool):
    """Whoever has dropped it, and whatever the collector does."""
    from gpusaver.device.cuda import cuda_runtime

    pinned, runtime = Pinned(gpu, monkeypatch), cuda_runtime(0)
    array = gpu.upload(np.full(1 << 20, 7, np.uint8))
    slot = runtime.allocate(1 << 20)
    slot.view[:] = b"\7" * (1 << 20)
    runtime.order_after_caller()
    event = (runtime.to_slot if to_slot else runtime.from_slot)([Transfer(array, 0, 0, 1 << 20)], slot.view)
    assert event is not None
    del slot
    gc.collect()
    assert len(pinned.regions) == 1
    event.synchronize()
    gc.collect()
    assert not pinned.regions
    assert (array.get() == 7).all()


def test_the_collector_leaves_a_capture_alone(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the thread that it happens to run in."""
    pinned = Pinned(gpu, monkeypatch)
    array, stream = gpu.upload(np.zeros(1000, np.float32)), gpu.cupy.cuda.Stream(non_blocking=True)
    saver: Any = gpusaver.Saver({"w": array})
    saver.itself = saver
    saver.restore(saver.save(tmp_path / "model"))
    gpu.synchronize()
    with stream:
        stream.begin_capture(gpu.cupy.cuda.runtime.streamCaptureModeGlobal)
        array += 1
        del saver
        gc.collect()
        graph = stream.end_capture()
        assert not pinned.regions
        graph.launch()
        assert (array.get() == 1).all()


def test_a_program_that_closes_nothing_ends_in_peace(gpu: Gpu, tmp_path: Path):
    """And the save that it has started is complete."""
    script = Path(__file__).with_name("left_open.py")
    options = ["simulated"] if gpu.is_simulated else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(script), str(tmp_path), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr, done.stderr
    assert gpusaver.load(str(tmp_path / "last"))["w"].tolist() == list(range(100_000))


def mapped_at(address: int, nbytes: int) -> list[np.ndarray[Any, Any]]:
    """New memory full of threes, in pieces, wherever there is none yet."""
    system_mmap = ctypes.CDLL(None).mmap
    system_mmap.restype = ctypes.c_void_p
    length, protection = 1 << 18, mmap.PROT_READ | mmap.PROT_WRITE
    rest = ctypes.c_size_t(length), protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0)
    found = []
    for place in range(address, address + nbytes, length):
        if system_mmap(ctypes.c_void_p(place), *rest) == place:
            found.append(np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(place)))
            found[-1][:] = 3
    return found


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_saver_that_is_dropped_in_a_forked_child(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """There its buffers are not mapped: what lies at their addresses is the child's own and stays."""
    from gpusaver.device import cuda_memory

    pinned = Pinned(gpu, monkeypatch)
    state = device_state(gpu, host_values(gpu, 5))
    savers = [gpusaver.Saver(state)]
    prefix = savers[0].save_async(tmp_path / "model", capture="snapshot").result()
    savers[0].restore(prefix)
    await_the_end_of_savers()
    registered = dict(pinned.regions)

    def drop() -> bool:
        entered: list[int] = []
        monkeypatch.setattr(cuda_memory, "on_device", entered.append)
        own = [array for address, nbytes in registered.items() for array in mapped_at(address, nbytes)]
        assert own
        savers.clear()
        gc.collect()
        assert all((array == 3).all() for array in own)
        return not entered and pinned.regions == registered

    assert in_child(drop) == 0
    savers[0].restore(prefix)
    assert pinned.regions == registered
    savers.clear()
    gc.collect()
    assert not pinned.regions
