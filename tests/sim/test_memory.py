"""The simulated CuPy itself: memory of devices and host, each hostile behaviour shown."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from sim.errors import CUDARuntimeError, OutOfMemoryError, SimulationError
from sim.fixture import every_schedule, installed, simulated_cupy  # noqa: F401
from sim.memory import address_of
from sim.tools import dragging, eager, expect_violation, late, pinned, racing, schedule, to_host, unpin


@late
def test_pinned_memory_is_read_late_and_other_memory_at_once(sim):
    stream = sim.cupy.cuda.Stream(non_blocking=True)
    hosts = pinned(sim, 4), np.zeros(4, np.uint8)
    for host, expected in zip(hosts, (9, 5), strict=True):
        array = sim.cupy.empty(4, np.uint8)
        host[:] = 5
        sim.cupy.cuda.runtime.memcpyAsync(array.data.ptr, host.ctypes.data, 4, 1, stream.ptr)
        host[:] = 9
        stream.synchronize()
        assert array.get().tolist() == [expected] * 4
    unpin(sim, hosts[0])


@late
def test_a_copy_to_other_memory_returns_when_it_is_done(sim):
    host = np.zeros(4, np.uint8)
    array = sim.cupy.full(4, 6, np.uint8)
    to_host(sim, array, host, sim.cupy.cuda.Stream.null)
    assert host.tolist() == [6] * 4


@late
def test_registered_memory(sim):
    runtime = sim.cupy.cuda.runtime
    pages = mmap.mmap(-1, 8192)
    address = address_of(pages)
    assert runtime.pointerGetAttributes(address).type == runtime.memoryTypeUnregistered
    runtime.hostRegister(address, 4096, 0)
    assert runtime.pointerGetAttributes(address + 4095).type == runtime.memoryTypeHost
    with pytest.raises(CUDARuntimeError, match="AlreadyRegistered"):
        runtime.hostRegister(address + 4095, 2, 0)
    with pytest.raises(CUDARuntimeError, match="InvalidValue"):  # from within
        runtime.hostUnregister(address + 1)
    array = sim.cupy.zeros(8192, np.uint8)
    with pytest.raises(CUDARuntimeError, match="InvalidValue"):  # pinned in part
        runtime.memcpyAsync(address, array.data.ptr, 8192, 2, 0)
    with pytest.raises(AssertionError, match="registered memory"):
        sim.assert_quiescent()
    runtime.memcpyAsync(address, array.data.ptr, 4096, 2, 0)
    with pytest.raises(SimulationError, match="while a copy"):
        runtime.hostUnregister(address)
    expect_violation(sim, "unregistered while a copy")
    with pytest.raises(CUDARuntimeError, match="NotRegistered"):
        runtime.hostUnregister(address)
    sim.cupy.cuda.Device().synchronize()
    sim.assert_quiescent(streams=0)


@late
def test_whole_pages_are_registered(sim):
    runtime, pages = sim.cupy.cuda.runtime, mmap.mmap(-1, 8192)
    address = address_of(pages)
    runtime.hostRegister(address + 100, 100, 0)
    with pytest.raises(CUDARuntimeError, match="AlreadyRegistered: part or all of the requested memory") as caught:
        runtime.hostRegister(address + 1000, 100, 0)
    assert caught.value.status == 712
    runtime.hostRegister(address + 4096, 100, 0)
    for place in (100, 4096):
        runtime.hostUnregister(address + place)
    with pytest.raises(CUDARuntimeError, match="NotRegistered") as caught:
        runtime.hostUnregister(address + 100)
    assert caught.value.status == 713


def test_memory_that_was_unmapped_stays_registered():
    """Until somebody unregisters it, which nobody can who has lost the address: that fails the test."""

    def forget() -> None:
        with installed() as sim:
            pages = mmap.mmap(-1, 8192)
            sim.cupy.cuda.runtime.hostRegister(address_of(pages), 8192, 0)

    with pytest.raises(AssertionError, match="still registered"):
        forget()


@late
def test_unmapped_memory_is_noticed_before_it_kills_the_process(sim):
    pages = mmap.mmap(-1, 4096)
    address = address_of(pages)
    sim.cupy.cuda.runtime.hostRegister(address, 4096, 0)
    array = sim.cupy.zeros(4096, np.uint8)
    sim.cupy.cuda.runtime.memcpyAsync(address, array.data.ptr, 4096, 2, 0)
    pages.close()
    with pytest.raises(SimulationError, match="was unmapped"):
        sim.cupy.cuda.Device().synchronize()


@dragging
def test_a_freed_block_is_reused_at_once(sim):
    """The copy stream lags behind; the caller frees the array, and its stream's next array takes the block."""
    copies, host = sim.cupy.cuda.Stream(non_blocking=True), pinned(sim, 512)
    array = sim.cupy.full(512, 1, np.uint8)
    copies.wait_event(sim.cupy.cuda.get_current_stream().record())
    to_host(sim, array, host, copies)
    pointer = array.data.ptr
    del array
    taken = sim.cupy.empty(16, np.uint8)
    assert taken.data.ptr == pointer
    copies.synchronize()
    assert host.tolist() == [0xDB] * 512
    unpin(sim, host)


@eager
def test_a_freed_block_of_another_stream_is_not_reused(sim):
    stream = sim.cupy.cuda.Stream(non_blocking=True)
    with stream:
        pointer = sim.cupy.empty(512, np.uint8).data.ptr
    assert sim.cupy.empty(512, np.uint8).data.ptr != pointer
    with stream:
        assert sim.cupy.empty(512, np.uint8).data.ptr == pointer


@late
def test_use_after_free(sim):
    runtime = sim.cupy.cuda.runtime
    pointer = sim.cupy.zeros(64, np.uint8).data.ptr
    with pytest.raises(SimulationError, match="were freed"):
        runtime.memsetAsync(pointer, 0, 64, 0)
    expect_violation(sim, "were freed")
    pointer = runtime.malloc(512)
    with pytest.raises(SimulationError):  # beyond its end
        runtime.memsetAsync(pointer + 1, 0, 512, 0)
    runtime.free(pointer)
    with pytest.raises(SimulationError):
        runtime.memsetAsync(pointer, 0, 512, 0)
    expect_violation(sim, "were freed")
    with pytest.raises(CUDARuntimeError):
        runtime.free(pointer)


@late
def test_a_stream_ordered_free_does_not_wait_for_other_streams(sim):
    runtime, stream = sim.cupy.cuda.runtime, sim.cupy.cuda.Stream(non_blocking=True)
    pointer, host = runtime.mallocAsync(512, 0), pinned(sim, 512)
    runtime.memcpyAsync(host.ctypes.data, pointer, 512, 2, stream.ptr)
    runtime.freeAsync(pointer, 0)
    runtime.streamSynchronize(0)
    with pytest.raises(CUDARuntimeError, match="IllegalAddress"):
        stream.synchronize()
    with pytest.raises(CUDARuntimeError, match="IllegalAddress"):  # for good
        sim.cupy.zeros(4)


@late
def test_devices_are_kept_apart(sim):
    cuda = sim.cupy.cuda
    with cuda.Device(1):
        array = sim.cupy.full(4, 5, np.uint8)
    host = np.zeros(4, np.uint8)
    with pytest.raises(SimulationError, match="touches memory of devices"):
        to_host(sim, array, host, cuda.Stream.null)
    sim.violations.clear()
    with pytest.raises(ValueError, match="different from the current device"):
        array.fill(1)
    with pytest.raises(ValueError, match="different from the current device"):
        sim.cupy.zeros(4) + array
    moved = sim.cupy.asarray(array)
    assert (moved.device.id, moved.get().tolist()) == (0, [5] * 4)
    assert array.get().tolist() == [5] * 4
    with pytest.raises(CUDARuntimeError, match="InvalidValue"):  # the direction is wrong
        cuda.runtime.memcpyAsync(moved.data.ptr, array.data.ptr, 4, 2, 0)


@schedule("late", capacity=64 * 1024)
def test_out_of_memory_and_the_pool(sim):
    cuda, pool = sim.cupy.cuda, sim.cupy.get_default_memory_pool()
    held = sim.cupy.empty(32 * 1024, np.uint8)
    assert (pool.used_bytes(), pool.total_bytes()) == (32 * 1024, 32 * 1024)
    assert cuda.runtime.memGetInfo() == (32 * 1024, 64 * 1024)
    with pytest.raises(OutOfMemoryError, match=r"Out of memory allocating 40,960 bytes") as caught:
        sim.cupy.empty(40 * 1024, np.uint8)
    assert isinstance(caught.value, cuda.memory.OutOfMemoryError)
    with pytest.raises(CUDARuntimeError, match="out of memory"):
        cuda.runtime.malloc(40 * 1024)
    del held
    assert (pool.used_bytes(), pool.total_bytes()) == (0, 32 * 1024)
    split = sim.cupy.empty(100, np.uint8)
    assert pool.used_bytes() == 512
    pool.free_all_blocks()
    assert pool.total_bytes() == 32 * 1024  # a part of the block is in use
    del split
    sim.cupy.empty(64 * 1024, np.uint8)  # the pool gives back what it has cached first
    pool.free_all_blocks()
    assert pool.total_bytes() == 0
    assert cuda.runtime.memGetInfo() == (64 * 1024, 64 * 1024)
    private = cuda.MemoryPool()
    with cuda.using_allocator(private.malloc):
        kept = sim.cupy.empty(512, np.uint8)
    assert (private.used_bytes(), pool.used_bytes()) == (512, 0)
    del kept


@every_schedule
def test_between_devices(sim):
    cuda, runtime = sim.cupy.cuda, sim.cupy.cuda.runtime
    with cuda.Device(1):
        source = sim.cupy.full(4, 5, np.uint8)
    target = sim.cupy.asarray(source)  # on the default streams of both: in order with either device's work
    with cuda.Device(1):
        source.fill(6)
    assert target.get().tolist() == [5] * 4
    assert runtime.deviceCanAccessPeer(0, 1) == 0
    with cuda.Device(1):
        event = cuda.get_current_stream().record()
    stream = cuda.Stream(non_blocking=True)
    stream.wait_event(event)
    runtime.memcpyPeerAsync(target.data.ptr, 0, source.data.ptr, 1, 4, stream.ptr)
    assert target.get(stream).tolist() == [6] * 4
    with pytest.raises(CUDARuntimeError, match="InvalidValue"):
        runtime.memcpyPeerAsync(target.data.ptr, 1, source.data.ptr, 0, 4, stream.ptr)


@every_schedule
def test_synchronous_copies(sim):
    runtime, host = sim.cupy.cuda.runtime, np.arange(8, dtype=np.uint8)
    array = sim.cupy.empty(8, np.uint8)
    runtime.memset(array.data.ptr, 3, 8)
    runtime.memcpy(array.data.ptr, host.ctypes.data, 4, 1)
    host[:] = 0
    runtime.memcpy(host.ctypes.data, array.data.ptr, 8, runtime.memcpyDefault)
    assert host.tolist() == [0, 1, 2, 3, 3, 3, 3, 3]


@racing
def test_stream_ordered_memory_is_not_there_before_its_turn(sim):
    runtime, stream = sim.cupy.cuda.runtime, sim.cupy.cuda.Stream(non_blocking=True)
    pointer, host = runtime.mallocAsync(4, 0), np.zeros(4, np.uint8)
    runtime.memsetAsync(pointer, 1, 4, stream.ptr)  # without waiting for stream 0
    runtime.memcpy(host.ctypes.data, pointer, 4, 2)
    assert host.tolist() == [0xDB] * 4
    runtime.freeAsync(pointer, 0)


@late
def test_pinned_memory_of_the_driver(sim):
    memory = sim.cupy.cuda.PinnedMemory(64)
    assert sim.cupy.cuda.runtime.pointerGetAttributes(memory.ptr).type == 1
    array = sim.cupy.full(64, 7, np.uint8)
    sim.cupy.cuda.runtime.memcpyAsync(memory.ptr, array.data.ptr, 64, 2, 0)
    with pytest.raises(AssertionError, match="pinned memory"):
        sim.assert_quiescent()
    sim.cupy.cuda.Device().synchronize()
    del memory
    sim.assert_quiescent()
