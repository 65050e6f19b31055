"""What queued work uses stays until somebody has waited for it, and no longer; and how much is queued at once."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import numpy as np
import pytest
from kernels.shim import need_compiler
from sim.errors import CUDARuntimeError
from sim.fixture import every_schedule, simulated_cupy  # noqa: F401
from sim.tools import chunks_of_kilobytes, late, on_device, on_host, stored  # noqa: F401

import gpusaver
from gpusaver.device import Transfer
from gpusaver.device.host import allocate_pages
from gpusaver.errors import ResourceExhaustedError
from gpusaver.saver import Saver
from gpusaver.storage.local import LocalStorage


def runtime_of(device: int = 0) -> Any:
    from gpusaver.device.cuda import cuda_runtime

    return cuda_runtime(device)


class Slot:
    """Page-locked memory as the ring's."""

    def __init__(self, sim: Any, nbytes: int = 8192) -> None:
        pages = allocate_pages(nbytes)
        self.view, self._address, self._sim = pages.data, pages.ctypes.data, sim
        sim.cupy.cuda.runtime.hostRegister(self._address, nbytes, 0)

    def free(self) -> None:
        self._sim.cupy.cuda.runtime.hostUnregister(self._address)


def state(sim: Any, count: int = 5) -> dict[str, Any]:
    """Large, small and strided ones."""
    rng = np.random.default_rng(8)
    variables = {f"large{n}": on_device(sim, rng.integers(0, 99, 9000 + n, np.uint8)) for n in range(count)}
    variables |= {f"small{n}": on_device(sim, rng.integers(0, 99, 50 + n, np.uint8)) for n in range(20)}
    variables["turned"] = on_device(sim, rng.integers(0, 99, (30, 20)).astype(np.int16)).T
    return variables


def contents(variables: dict[str, Any]) -> dict[str, bytes]:
    return {name: on_host(array) for name, array in variables.items()}


# ------------------------------------------------------------------------------------------------------- arrays, slots


@every_schedule
@pytest.mark.parametrize("how", ["direct", "gathered"])
def test_sources_of_a_copy(sim, small_chunks, how):
    runtime, slot = runtime_of(), Slot(sim)
    arrays = [sim.cupy.full(1000, n, np.uint8) for n in range(1 if how == "direct" else 5)]
    runtime.order_after_caller()
    event = runtime.to_slot([Transfer(array, 0, 1000 * n, 1000) for n, array in enumerate(arrays)], slot.view)
    count = len(arrays)
    del arrays
    for _ in range(count):
        sim.cupy.full(1000, 99, np.uint8)
    event.synchronize()
    for n in range(count):
        assert set(slot.view[1000 * n : 1000 * n + 1000]) == {n}
    slot.free()


@every_schedule
@pytest.mark.parametrize("how", ["direct", "scattered"])
def test_targets_of_a_copy(sim, small_chunks, how):
    """Whoever gets the memory of a target that was dropped would be overwritten."""
    runtime, slot = runtime_of(), Slot(sim)
    arrays = [sim.cupy.full(1000, n, np.uint8) for n in range(1 if how == "direct" else 5)]
    runtime.order_after_caller()
    event = runtime.from_slot([Transfer(array, 0, 1000 * n, 1000) for n, array in enumerate(arrays)], slot.view)
    count = len(arrays)
    del arrays
    others = [sim.cupy.full(1000, 98, np.uint8) for _ in range(count)]
    event.synchronize()
    assert all(set(other.get().tolist()) == {98} for other in others)
    slot.free()


@every_schedule
@pytest.mark.parametrize("to_slot", [True, False])
def test_the_slot_of_a_copy(sim, to_slot):
    runtime, array, slot = runtime_of(), sim.cupy.full(1000, 7, np.uint8), Slot(sim)
    runtime.order_after_caller()
    copy = runtime.to_slot if to_slot else runtime.from_slot
    event = copy([Transfer(array, 0, 0, 1000)], slot.view)
    slot.view = None
    gc.collect()
    event.synchronize()
    slot.free()


@every_schedule
def test_arrays_of_another_stream_may_be_freed_after_a_snapshot(sim, small_chunks):
    """CuPy lends their memory again in the order of the stream they were made in, which nobody holds back."""
    runtime, other, slot = runtime_of(), sim.cupy.cuda.Stream(non_blocking=True), Slot(sim)
    with other:
        arrays = [sim.cupy.full(1000, 5, np.uint8), sim.cupy.full(5000, 5, np.uint8)]
    other.synchronize()
    copies, _, _ = runtime.snapshot(arrays, np.array([0, 4096]), None)
    del arrays
    with other:
        for nbytes in (1000, 5000):
            sim.cupy.full(nbytes, 97, np.uint8)
        other.synchronize()
    runtime.to_slot([Transfer(copies[0], 0, 0, 1000)], slot.view).synchronize()
    assert set(slot.view[:1000]) == {5}
    runtime.to_slot([Transfer(copies[1], 0, 0, 5000)], slot.view).synchronize()
    assert set(slot.view[:5000]) == {5}
    slot.free()


@every_schedule
@pytest.mark.parametrize("how", ["direct", "scattered"])
def test_checksums_are_of_what_was_copied_before(sim, small_chunks, how):
    need_compiler()
    from gpusaver.bundle.crc import combine, crc32c

    runtime, slot = runtime_of(), Slot(sim)
    arrays = [sim.cupy.zeros(700, np.uint8) for _ in range(1 if how == "direct" else 5)]
    runtime.order_after_caller()
    slot.view[:3500] = bytes(range(250)) * 14
    checking = runtime.checking(arrays, combine)
    copied = runtime.from_slot([Transfer(array, 0, 700 * n, 700) for n, array in enumerate(arrays)], slot.view)
    checking.start()
    assert checking.result() == [crc32c(slot.view[700 * n : 700 * n + 700]) for n in range(len(arrays))]
    copied.synchronize()
    slot.free()


@every_schedule
def test_checksums_survive_what_is_queued_after_them(sim, small_chunks):
    """Another thread's failure gives up everything that has landed, with the tables in which results are."""
    need_compiler()
    from gpusaver.bundle.crc import combine, crc32c

    runtime, slot, array = runtime_of(), Slot(sim), sim.cupy.zeros(4000, np.uint8)
    runtime.order_after_caller()
    slot.view[:4000] = bytes([9]) * 4000
    runtime.from_slot([Transfer(array, 0, 0, 4000)], slot.view)
    first, second = runtime.checking([array], combine), runtime.checking([array], combine)
    first.start()
    runtime.synchronize()
    slot.view[:4000] = bytes([8]) * 4000
    runtime.from_slot([Transfer(array, 0, 0, 4000)], slot.view)
    second.start()
    third = runtime.checking([array], combine)
    third.start()
    assert third.result() == second.result() == [crc32c(bytes([8]) * 4000)]
    assert first.result() == [crc32c(bytes([9]) * 4000)]
    slot.free()


@late
def test_waiting_for_all_leaves_alone_what_is_being_queued(sim, small_chunks, monkeypatch):
    runtime, slot = runtime_of(), Slot(sim)
    arrays = [sim.cupy.full(700, n, np.uint8) for n in range(5)]
    runtime.order_after_caller()
    other = threading.Thread(target=runtime.synchronize)
    memcpy = sim.cupy.cuda.runtime.memcpyAsync

    def interrupted(target: int, origin: int, nbytes: int, kind: int, stream: int) -> None:
        if kind == 2 and other.ident is None:  # everything but the copy to the host is queued
            other.start()
            other.join(0.2)
            assert runtime._buffers._free == []
        memcpy(target, origin, nbytes, kind, stream)

    monkeypatch.setattr(sim.cupy.cuda.runtime, "memcpyAsync", interrupted)
    event = runtime.to_slot([Transfer(array, 0, 700 * n, 700) for n, array in enumerate(arrays)], slot.view)
    other.join()
    event.synchronize()
    assert bytes(slot.view[:3500]) == b"".join(bytes([n]) * 700 for n in range(5))
    slot.free()


# ------------------------------------------------------------------------------------------------ events and failures


@every_schedule
@pytest.mark.parametrize("named", [False, True])
def test_a_stream_is_held_back(sim, small_chunks, named):
    """It would change the array at once."""
    runtime, slot, array = runtime_of(), Slot(sim), on_device(sim, np.full(4000, 3, np.uint8))
    stream = sim.cupy.cuda.Stream(non_blocking=True)
    sim.set_speed(stream.ptr, 1.0)
    runtime.order_after_caller()
    event = runtime.to_slot([Transfer(array, 0, 0, 4000)], slot.view)
    with stream:
        event.hold_back(stream if named else None)
        array.fill(9)
    event.synchronize()
    assert set(slot.view[:4000]) == {3}
    slot.free()
    stream.synchronize()


@every_schedule
def test_another_threads_failure_lands_nothing_that_is_still_being_queued(sim, small_chunks, monkeypatch):
    """It gives up all work that it has waited for, with the buffers on loan."""
    need_compiler()
    runtime, slot = runtime_of(), Slot(sim)
    arrays = [sim.cupy.full(1000, n, np.uint8) for n in range(5)]
    runtime.order_after_caller()
    kernels = runtime.kernels()
    gather, seen = kernels.gather, []

    def disturbed(*arguments: Any) -> None:
        runtime.synchronize()
        seen.append((len(runtime._buffers._free), len(arguments[3]._kept)))
        gather(*arguments)

    monkeypatch.setattr(kernels, "gather", disturbed)
    runtime.to_slot([Transfer(array, 0, 1000 * n, 1000) for n, array in enumerate(arrays)], slot.view).synchronize()
    assert seen == [(0, 2)]
    assert bytes(slot.view[:5000]) == b"".join(bytes([n]) * 1000 for n in range(5))
    slot.free()


@every_schedule
def test_a_chunk_that_comes_in_anothers_midst_has_a_buffer_of_its_own(sim, small_chunks, monkeypatch):
    """Two readers queue in one stream, and nobody holds them apart."""
    need_compiler()
    runtime, slots = runtime_of(), [Slot(sim), Slot(sim)]
    arrays = [[sim.cupy.zeros(700, np.uint8) for _ in range(5)] for _ in slots]
    runtime.order_after_caller()
    kernels, events = runtime.kernels(), []
    scatter = kernels.scatter

    def restore(number: int) -> None:
        slots[number].view[:3500] = bytes([number + 1]) * 3500
        transfers = [Transfer(array, 0, 700 * n, 700) for n, array in enumerate(arrays[number])]
        events.append(runtime.from_slot(transfers, slots[number].view))

    def disturbed(*arguments: Any) -> None:
        monkeypatch.setattr(kernels, "scatter", scatter)
        restore(1)
        scatter(*arguments)

    monkeypatch.setattr(kernels, "scatter", disturbed)
    restore(0)
    for event in events:
        event.synchronize()
    for number, targets in enumerate(arrays):
        assert all(set(array.get().tolist()) == {number + 1} for array in targets)
    for slot in slots:
        slot.free()


@every_schedule
def test_what_nobody_waited_for_is_freed_when_the_runtime_is_trimmed(sim, small_chunks):
    need_compiler()
    runtime, slot = runtime_of(), Slot(sim)
    arrays = [sim.cupy.zeros(700, np.uint8) for _ in range(5)]
    runtime.trim()
    before = sim.memory[0].used
    runtime.order_after_caller()
    runtime.from_slot([Transfer(array, 0, 700 * n, 700) for n, array in enumerate(arrays)], slot.view)
    runtime.trim()
    assert (sim.memory[0].used, list(runtime._in_flight)) == (before, [])
    slot.free()
    sim.assert_quiescent()


@every_schedule
def test_checksums_of_tensors_that_borders_of_blocks_cut(sim, small_chunks):
    need_compiler()
    from gpusaver.bundle.crc import combine, crc32c

    runtime = runtime_of()
    sizes, places = [0, 12288, 1, 30_000, 0, 5000, 0], [0, 0, 12288, 16384, 46_384, 49_152, 54_152]
    models = [np.random.default_rng(n).integers(0, 256, nbytes, np.uint8) for n, nbytes in enumerate(sizes)]
    copies, image, _ = runtime.snapshot([on_device(sim, model) for model in models], np.array(places), None)
    checking = runtime.checking(copies, combine)
    checking.start()
    assert checking.result() == list(map(crc32c, models))
    checking.close()
    unused = runtime.checking(copies[3:4], combine)
    unused.close()
    assert image.nbytes >= 54_152


@late
def test_an_event_waits_for_its_copy(sim, small_chunks):
    runtime, slot, array = runtime_of(), Slot(sim), on_device(sim, np.full(4000, 3, np.uint8))
    runtime.order_after_caller()
    runtime.to_slot([Transfer(array, 0, 0, 4000)], slot.view).synchronize()
    assert set(slot.view[:4000]) == {3}
    runtime.from_slot([Transfer(array, 0, 0, 4000)], slot.view).synchronize()
    assert sim.pending() == []
    slot.free()


@every_schedule
def test_nothing_uses_the_slot_when_a_call_has_failed(sim, small_chunks):
    """Neither when queueing fails half-way nor when waiting does."""
    runtime, slot = runtime_of(), Slot(sim)
    arrays = [on_device(sim, np.full(3000, n, np.uint8)) for n in range(2)]
    parts = [Transfer(array, 0, 3000 * n, 3000) for n, array in enumerate(arrays)]
    for copy in (runtime.to_slot, runtime.from_slot):
        number, has_failed = 0, True
        while has_failed:
            number += 1
            runtime.order_after_caller()
            sim.fail_at(number)
            try:
                copy(parts, slot.view).synchronize()
            except CUDARuntimeError:
                assert [what for what in sim.pending() if what.startswith("copy")] == []
                slot.view[:] = bytes(8192)
            has_failed = sim.has_failed
            sim.fail_at(10**6)
        assert number > 4
    slot.free()
    runtime.trim()
    sim.assert_quiescent()


@every_schedule
def test_both_streams_have_ended_when_a_wait_has_failed(sim, small_chunks):
    from gpusaver.bundle.crc import combine

    runtime, slot, array = runtime_of(), Slot(sim), on_device(sim, np.full(4000, 3, np.uint8))
    copies, _, _ = runtime.snapshot([array], np.array([0]), None)
    checking = runtime.checking(copies, combine)
    checking.start()
    event = runtime.to_slot([Transfer(copies[0], 0, 0, 4000)], slot.view)
    sim.fail_at(1)
    with pytest.raises(CUDARuntimeError):
        event.synchronize()
    assert sim.pending() == []
    slot.free()
    runtime.trim()
    sim.assert_quiescent()


@late
def test_a_stream_that_will_not_be_waited_for(sim, monkeypatch):
    """Then the whole device is; if that fails as well, everything stays held."""
    runtime, slot, array = runtime_of(), Slot(sim), on_device(sim, np.full(4000, 3, np.uint8))
    runtime.order_after_caller()
    event = runtime.to_slot([Transfer(array, 0, 0, 4000)], slot.view)
    fail = sim.cupy.cuda.runtime.streamSynchronize, sim.cupy.cuda.runtime.deviceSynchronize
    held = list(runtime._in_flight)
    assert held
    for name in ("streamSynchronize", "deviceSynchronize"):
        monkeypatch.setattr(f"sim.runtime.{name}", refuse)
        monkeypatch.setattr(sim.cupy.cuda.runtime, name, refuse)
    runtime.synchronize()
    assert list(runtime._in_flight) == held
    monkeypatch.setattr(sim.cupy.cuda.runtime, "deviceSynchronize", fail[1])
    runtime.synchronize()
    assert (sim.pending(), list(runtime._in_flight)) == ([], [])
    monkeypatch.undo()
    event.synchronize()
    slot.free()


def refuse(*arguments: Any) -> None:
    raise CUDARuntimeError(719)


# ------------------------------------------------------------------------------------------- over many saves, and never


@every_schedule
@pytest.mark.parametrize("capture", ["snapshot", "deferred"])
def test_nothing_accumulates_over_saves(sim, tmp_path, small_chunks, capture):
    variables = state(sim)
    expected = contents(variables)
    most: list[tuple[int, int, int]] = []
    with Saver(variables) as saver:
        saver.warmup()
        for _ in range(6):
            prefix = saver.save_async(tmp_path / "model", capture=capture).result()
            saver.restore(prefix)
            assert runtime_of()._in_flight == set()
            most.append((sim.memory[0].used, len(sim.host.allocated), sum(sim.host.registered.values())))
    assert contents(variables) == expected
    assert len({*most}) == 1
    sim.assert_quiescent()


class FullStorage(LocalStorage):
    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
        raise ResourceExhaustedError("full")


class BrokenStorage(LocalStorage):
    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
        file = super().create(path, nbytes, direct=direct, target=target)
        file.write_at = fail_to_write  # type: ignore[method-assign]
        return file


def fail_to_write(offset: int, buffers: Any) -> None:
    raise ResourceExhaustedError("full")


@every_schedule
@pytest.mark.parametrize("capture", ["snapshot", "deferred"])
def test_no_copy_is_in_flight_when_writing_has_failed(sim, tmp_path, small_chunks, capture):
    with Saver(state(sim, 60), storage=BrokenStorage(), staging_bytes=1 << 20) as saver:
        for number in range(3):
            pending = saver.save_async(tmp_path / f"model{number}", capture=capture)
            assert isinstance(pending.exception(), ResourceExhaustedError)
            assert "copy D2H" not in sim.pending()
    sim.assert_quiescent()


@every_schedule
def test_a_snapshot_that_is_never_written(sim, tmp_path, small_chunks):
    variables = state(sim)
    with Saver(variables, storage=FullStorage()) as saver, pytest.raises(ResourceExhaustedError):
        saver.save_async(tmp_path / "model", capture="snapshot").result()
    sim.assert_quiescent()


@late
@pytest.mark.parametrize("capture", ["snapshot", "deferred"])
def test_at_most_four_chunks_wait_for_the_copy_engine(sim, tmp_path, small_chunks, monkeypatch, capture):
    import gpusaver.device.cuda as cuda

    waiting, most = [], []
    to_slot, synchronize = cuda.CudaRuntime.to_slot, cuda._Ended.synchronize

    def counted(self: Any, *arguments: Any) -> Any:
        event = to_slot(self, *arguments)
        waiting.append(event)
        most.append(len(waiting))
        return event

    def waited(self: Any) -> None:
        synchronize(self)
        if self in waiting:  # and not the end of a snapshot
            waiting.remove(self)

    monkeypatch.setattr(cuda.CudaRuntime, "to_slot", counted)
    monkeypatch.setattr(cuda._Ended, "synchronize", waited)
    with Saver(state(sim), staging_bytes=1 << 20) as saver:
        saver.save_async(tmp_path / "model", capture=capture).result()
    assert max(most) == 4


@every_schedule
def test_new_arrays_come_after_what_others_did_to_their_memory(sim, tmp_path, small_chunks):
    """CuPy lends a freed block at once; work that its last user has queued comes first in the caller's stream."""
    model = np.arange(5000, dtype=np.uint8)
    prefix = gpusaver.save(tmp_path / "model", {"w": model})
    before = sim.cupy.full(5000, 1, np.uint8)
    pointer = before.data.ptr
    del before
    value = gpusaver.load(prefix, device="cuda:0")["w"]
    assert value.data.ptr == pointer
    assert on_host(value) == stored(model)


@late
def test_a_forked_child_calls_nothing(sim, tmp_path, small_chunks, monkeypatch):
    from gpusaver.device.cuda_memory import DeviceBuffer, PinnedBuffer, Table

    buffers = [PinnedBuffer(8192), DeviceBuffer(4096), Table(4096)]
    again = [PinnedBuffer(8192), DeviceBuffer(4096), Table(4096)]
    process = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    for buffer in buffers:
        buffer.free()
    del buffers, buffer
    assert (len(sim.host.registered), len(sim.host.allocated)) == (2, 2)
    monkeypatch.setattr(os, "getpid", lambda: process)
    for buffer in again:
        buffer.free()
        buffer.free()
    assert (len(sim.host.registered), len(sim.host.allocated)) == (1, 1)
    assert sim.memory[0].used == 8192
    sim.cupy.cuda.runtime.hostUnregister(*sim.host.registered)


@late
def test_destructors_say_nothing_when_modules_are_empty(sim, monkeypatch):
    """As they may be at the end of the interpreter; pytest would report it."""
    from gpusaver.device import cuda_memory

    buffers = [cuda_memory.PinnedBuffer(8192), cuda_memory.DeviceBuffer(4096), cuda_memory.Table(4096)]
    for name in vars(cuda_memory):
        if not name.startswith("__"):
            monkeypatch.setattr(cuda_memory, name, None)
    del buffers
    gc.collect()
    monkeypatch.undo()
    sim.cupy.cuda.runtime.hostUnregister(*sim.host.registered)
