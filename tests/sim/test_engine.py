"""The simulated CuPy itself: streams, events, captures and failures, each hostile behaviour shown."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest

from sim.engine import Engine
from sim.errors import CUDARuntimeError, SimulationError
from sim.fixture import every_schedule, simulated_cupy  # noqa: F401
from sim.tools import dragging, late, pinned, racing, to_host, unpin

# --------------------------------------------------------------------------------------------------- streams and events


@late
def test_nothing_runs_before_somebody_waits_for_it(sim):
    stream = sim.cupy.cuda.Stream(non_blocking=True)
    with stream:
        array = sim.cupy.full(8, 7, np.uint8)
    host = pinned(sim, 8)
    to_host(sim, array, host, stream)
    assert host.tolist() == [0] * 8
    assert sim.pending() == ["fill", "copy D2H"]
    assert not stream.done
    stream.synchronize()
    assert host.tolist() == [7] * 8
    assert stream.done
    unpin(sim, host)
    sim.assert_quiescent()


@late
def test_waiting_runs_no_more_than_it_must(sim):
    first, second = sim.cupy.cuda.Stream(non_blocking=True), sim.cupy.cuda.Stream(non_blocking=True)
    with first:
        sim.cupy.zeros(8)
        event = first.record()
        sim.cupy.zeros(8)
    with second:
        sim.cupy.zeros(8)
    event.synchronize()
    assert len(sim.pending()) == 2


def copy_without_waiting(sim: Any, wait: bool) -> list[int]:
    """A copy stream reads what the caller's stream writes, after an event of it or not."""
    copies, host = sim.cupy.cuda.Stream(non_blocking=True), pinned(sim, 4)
    array = sim.cupy.full(4, 1, np.uint8)
    sim.cupy.cuda.Device().synchronize()
    array.fill(2)
    if wait:
        copies.wait_event(sim.cupy.cuda.get_current_stream().record())
    to_host(sim, array, host, copies)
    copies.synchronize()
    unpin(sim, host)
    return host.tolist()


@every_schedule
def test_a_wait_is_kept(sim):
    assert copy_without_waiting(sim, wait=True) == [2] * 4


@racing
def test_a_missing_wait_shows(sim):
    assert copy_without_waiting(sim, wait=False) == [1] * 4


@dragging
def test_a_missing_wait_of_the_caller_shows(sim):
    copies, host = sim.cupy.cuda.Stream(non_blocking=True), pinned(sim, 4)
    array = sim.cupy.full(4, 1, np.uint8)
    copies.wait_event(sim.cupy.cuda.get_current_stream().record())
    to_host(sim, array, host, copies)
    array.fill(2)  # without waiting for the copy
    copies.synchronize()
    assert host.tolist() == [2] * 4
    unpin(sim, host)


@late
def test_events(sim):
    stream = sim.cupy.cuda.Stream(non_blocking=True)
    event = sim.cupy.cuda.Event(block=True, disable_timing=True)
    assert event.done
    event.synchronize()
    stream.wait_event(event)  # never recorded: waits for nothing
    array = sim.cupy.zeros(4)
    event.record()
    stream.wait_event(event)  # for what is recorded now
    array.fill(1)
    event.record()
    assert not event.done
    stream.synchronize()
    assert sim.pending() == ["fill"]
    event.synchronize()
    assert event.done
    assert sim.pending() == []


@late
def test_the_time_between_events(sim):
    start, end = sim.cupy.cuda.Event(), sim.cupy.cuda.Event()
    start.record()
    end.record()
    with pytest.raises(CUDARuntimeError, match="NotReady"):
        sim.cupy.cuda.get_elapsed_time(start, end)
    end.synchronize()
    assert sim.cupy.cuda.get_elapsed_time(start, end) > 0
    untimed = sim.cupy.cuda.Event(disable_timing=True)
    untimed.record()
    with pytest.raises(CUDARuntimeError, match="InvalidResourceHandle"):
        sim.cupy.cuda.get_elapsed_time(start, untimed)


@late
def test_polling_ends_at_last(sim):
    sim.cupy.zeros(4)
    event = sim.cupy.cuda.get_current_stream().record()
    polls = 0
    while not event.done:
        polls += 1
    assert polls > 1


@late
def test_an_event_is_recorded_on_its_own_device_and_waited_for_on_any(sim):
    with sim.cupy.cuda.Device(1):
        other = sim.cupy.cuda.Stream(non_blocking=True)
    event = sim.cupy.cuda.Event()
    with pytest.raises(CUDARuntimeError, match="InvalidResourceHandle") as caught:
        event.record(other)
    assert caught.value.status == 400
    event.record()
    other.wait_event(event)


@late
def test_the_legacy_default_stream_synchronises_with_blocking_streams_alone(sim):
    blocking, free = sim.cupy.cuda.Stream(), sim.cupy.cuda.Stream(non_blocking=True)
    for stream in (blocking, free):
        with stream:
            sim.cupy.zeros(4)
    sim.cupy.cuda.Stream.null.synchronize()
    assert len(sim.pending()) == 1
    sim.cupy.zeros(4)
    blocking.synchronize()  # follows what the default stream got before
    assert len(sim.pending()) == 1
    free.synchronize()
    assert sim.pending() == []


@late
def test_current_device_and_stream_belong_to_the_thread(sim):
    cuda = sim.cupy.cuda
    stream = cuda.Stream(non_blocking=True)
    seen: list[Any] = []

    def look() -> None:
        seen.extend([cuda.runtime.getDevice(), cuda.get_current_stream()])

    with cuda.Device(1), cuda.Stream() as inner:
        assert cuda.get_current_stream() is inner
        assert cuda.get_current_stream(0) == cuda.Stream.null
        with pytest.raises(RuntimeError, match="does not match with the current device"):
            stream.use()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [0, cuda.Stream.null]
    stream.use()
    assert cuda.get_current_stream() is stream
    with pytest.raises(CUDARuntimeError, match="InvalidDevice"), cuda.Device(2):
        pass
    assert cuda.Stream.from_external(stream) == stream


@late
def test_each_thread_may_have_a_default_stream(sim):
    sim.per_thread_default_stream = True
    sim.cupy.zeros(4)
    other = threading.Thread(target=lambda: sim.cupy.cuda.get_current_stream().synchronize())
    other.start()
    other.join()
    assert sim.pending() == ["fill"]
    assert sim.cupy.cuda.get_current_stream().ptr == 2
    sim.cupy.cuda.get_current_stream().synchronize()
    assert sim.pending() == []


@late
def test_a_destroyed_stream_still_does_its_work(sim):
    stream, host = sim.cupy.cuda.Stream(non_blocking=True), pinned(sim, 4)
    array = sim.cupy.full(4, 3, np.uint8)
    sim.cupy.cuda.Stream.null.synchronize()
    to_host(sim, array, host, stream)
    handle = stream.ptr
    del stream
    with pytest.raises(CUDARuntimeError, match="InvalidResourceHandle"):
        sim.cupy.cuda.runtime.streamSynchronize(handle)
    sim.cupy.cuda.Device().synchronize()
    assert host.tolist() == [3] * 4
    unpin(sim, host)


def test_random_orders_differ_but_are_legal():
    orders = set()
    for seed in range(20):
        engine, order = Engine(seed), []
        streams = [engine.create_stream(blocking=False) for _ in range(3)]
        for step in range(4):
            for number, stream in enumerate(streams):
                engine.enqueue(stream, "note", functools.partial(order.append, (number, step)))
                engine.pump()
        engine.drain()
        for number in range(3):
            assert [step for stream, step in order if stream == number] == [0, 1, 2, 3]
        orders.add(tuple(order))
    assert len(orders) > 10


# ------------------------------------------------------------------------------------------------------------- failures


def train(sim: Any) -> None:
    stream, host = sim.cupy.cuda.Stream(non_blocking=True), np.zeros(4, np.float32)
    array = sim.cupy.zeros(4, np.float32)
    array += 1
    stream.wait_event(sim.cupy.cuda.get_current_stream().record())
    to_host(sim, array, host, stream)
    stream.synchronize()
    assert host.tolist() == [1] * 4


@pytest.mark.parametrize("sticky", [False, True])
def test_every_call_can_fail(sim, sticky):
    train(sim)
    calls = list(sim.calls)
    assert {
        "malloc",
        "fill",
        "arithmetic",
        "eventRecord",
        "streamWaitEvent",
        "memcpyAsync",
        "streamSynchronize",
    } <= set(calls)
    sim.cupy.get_default_memory_pool().free_all_blocks()
    for number in range(1, len(calls) + 1):
        sim.fail_at(number, sticky=sticky)
        with pytest.raises(CUDARuntimeError, match="unspecified launch failure"):
            train(sim)
        assert sim.has_failed
        if sticky:
            with pytest.raises(CUDARuntimeError):
                train(sim)
            sim.sticky = None  # a new process
        else:
            train(sim)
        sim.cupy.get_default_memory_pool().free_all_blocks()
    sim.fail_at(len(calls) + 1)
    train(sim)
    assert not sim.has_failed


def test_without_a_driver(sim):
    sim.has_driver = False
    assert not sim.cupy.cuda.is_available()
    with pytest.raises(CUDARuntimeError, match="InsufficientDriver"):
        sim.cupy.cuda.runtime.getDeviceCount()
    with pytest.raises(CUDARuntimeError, match="InsufficientDriver"):
        sim.cupy.zeros(4)


# ------------------------------------------------------------------------------------------------------------- captures


@late
def test_a_captured_graph_runs_when_it_is_launched(sim):
    stream, other = sim.cupy.cuda.Stream(non_blocking=True), sim.cupy.cuda.Stream(non_blocking=True)
    array = sim.cupy.zeros(4, np.int32)
    sim.cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        array += 1
        other.wait_event(stream.record())  # draws the other stream in
        with other:
            array *= 2
        assert other.is_capturing()
        stream.wait_event(other.record())
        graph = stream.end_capture()
        assert not stream.is_capturing()
        assert array.get().tolist() == [0] * 4
        graph.launch()
        graph.launch()
        assert array.get().tolist() == [6] * 4


@late
def test_what_breaks_a_capture(sim):
    cuda, runtime = sim.cupy.cuda, sim.cupy.cuda.runtime
    stream, other = cuda.Stream(non_blocking=True), cuda.Stream(non_blocking=True)
    recorded = cuda.Event()
    recorded.record()
    breaks = {
        "StreamCaptureUnsupported": stream.synchronize,
        "StreamCaptureIsolation": lambda: stream.wait_event(recorded),
        "CapturedEvent": lambda: stream.record().synchronize(),
    }
    for text, break_it in breaks.items():
        stream.begin_capture()
        with pytest.raises(CUDARuntimeError, match=text):
            break_it()
        with pytest.raises(CUDARuntimeError, match="CaptureInvalidated"):
            stream.record()
        with pytest.raises(CUDARuntimeError, match="CaptureInvalidated"):
            stream.end_capture()
    stream.begin_capture()
    other.wait_event(stream.record())
    with pytest.raises(CUDARuntimeError, match="StreamCaptureUnjoined"):
        stream.end_capture()
    blocking = cuda.Stream()
    blocking.begin_capture()
    with pytest.raises(CUDARuntimeError, match="StreamCaptureImplicit"):
        sim.cupy.zeros(4)
    with pytest.raises(CUDARuntimeError):
        blocking.end_capture()
    stream.begin_capture(runtime.streamCaptureModeGlobal)
    sim.exchange_capture_mode(2)
    runtime.free(runtime.malloc(512))  # this thread is relaxed about it
    sim.exchange_capture_mode(0)
    with pytest.raises(CUDARuntimeError, match="StreamCaptureUnsupported"):
        runtime.malloc(512)
    with pytest.raises(CUDARuntimeError, match="CaptureInvalidated"):
        stream.end_capture()
    sim.assert_quiescent()


def test_ranges_are_counted(sim):
    sim.cupy.cuda.nvtx.RangePush("copy")
    with pytest.raises(AssertionError, match="NVTX"):
        sim.assert_quiescent()
    sim.cupy.cuda.nvtx.RangePop()
    sim.assert_quiescent()
    with pytest.raises(SimulationError):
        sim.cupy.cuda.nvtx.RangePop()
    sim.violations.clear()
