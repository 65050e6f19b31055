"""``cupy.cuda.runtime`` of the simulated CuPy: CUDA's runtime calls under CuPy's names and signatures."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from sim.engine import Engine, Event, Stream
from sim.errors import CUDARuntimeError
from sim.memory import check_mapped
from sim.state import active

__all__ = ["CUDARuntimeError"]

is_hip = False
memcpyHostToHost, memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault = range(5)
streamDefault, streamNonBlocking, streamLegacy, streamPerThread = 0, 1, 1, 2
eventDefault, eventBlockingSync, eventDisableTiming, eventInterprocess = 0, 1, 2, 4
hostAllocDefault, hostAllocPortable, hostAllocMapped, hostAllocWriteCombined = 0, 1, 2, 4
memoryTypeUnregistered, memoryTypeHost, memoryTypeDevice, memoryTypeManaged = range(4)
streamCaptureModeGlobal, streamCaptureModeThreadLocal, streamCaptureModeRelaxed = range(3)
cudaDevAttrMultiProcessorCount, cudaDevAttrAsyncEngineCount, cudaDevAttrMemoryPoolsSupported = 16, 40, 115
_ATTRIBUTES = {16: 132, 40: 3, 115: 1}


class PointerAttributes(NamedTuple):
    device: int
    devicePointer: int
    hostPointer: int
    type: int


# ------------------------------------------------------------------------------------------------------------ devices


def getDeviceCount() -> int:
    if not active().has_driver:
        raise CUDARuntimeError(35)
    return len(active().memory) or _fail(100)


def getDevice() -> int:
    return active().device


def setDevice(device: int) -> None:
    if not 0 <= device < getDeviceCount():
        raise CUDARuntimeError(101)
    active().local.device = device


def deviceSynchronize() -> None:
    with active().calling("deviceSynchronize") as engine:
        engine.synchronize_device(engine.device)


def memGetInfo() -> tuple[int, int]:
    with active().calling("memGetInfo", counted=False) as engine:
        memory = engine.memory[engine.device]
        return memory.capacity - memory.used, memory.capacity


def deviceCanAccessPeer(device: int, peerDevice: int) -> int:
    return 0


def deviceGetAttribute(attrib: int, device: int) -> int:
    return _ATTRIBUTES[attrib]


def deviceGetPCIBusId(device: int) -> str:
    return f"0000:{device + 1:02X}:00.0"


def getDeviceProperties(device: int) -> dict[str, Any]:
    memory = active().memory[device]
    return {"name": b"Simulated GPU", "totalGlobalMem": memory.capacity, "major": 9, "minor": 0, "asyncEngineCount": 3}


def runtimeGetVersion() -> int:
    return 13000


def driverGetVersion() -> int:
    return 13000


# ------------------------------------------------------------------------------------------------------------- memory


def malloc(size: int) -> int:
    with active().calling("malloc", unsafe=True) as engine:
        return engine.memory[engine.device].allocate(size)


def free(ptr: int) -> None:
    """Waits for all work of the device, as CUDA's does."""
    with active().calling("free", counted=False, unsafe=True) as engine:
        device = engine.device_of(ptr)
        if device is None:
            raise CUDARuntimeError(1)
        engine.finish_device(device)
        engine.memory[device].release(ptr)


def mallocAsync(size: int, stream: int) -> int:
    with active().calling("mallocAsync") as engine:
        queue = engine.stream(stream)
        pointer = engine.memory[queue.device].allocate(size)
        engine.poison(queue, pointer, size)  # whoever wrote to it before its turn in the stream has lost
        return pointer


def freeAsync(ptr: int, stream: int) -> None:
    """The memory is gone when its turn in the stream has come, whoever still reads it."""
    with active().calling("freeAsync", counted=False) as engine:
        queue = engine.stream(stream)
        if not engine.memory[queue.device].is_live(ptr, 1):
            raise CUDARuntimeError(1)
        engine.enqueue(queue, "free", lambda: engine.memory[queue.device].release(ptr))


def mallocManaged(size: int, flags: int = 1) -> int:
    """Memory that the driver moves; here it stays on the device."""
    return malloc(size)


def hostAlloc(size: int, flags: int) -> int:
    with active().calling("hostAlloc", unsafe=True) as engine:
        return engine.host.allocate(size)


def freeHost(ptr: int) -> None:
    with active().calling("freeHost", counted=False, unsafe=True) as engine:
        _refuse_in_use(engine, ptr, engine.host.release(ptr), "freed")


def hostRegister(ptr: int, size: int, flags: int) -> None:
    with active().calling("hostRegister", unsafe=True) as engine:
        engine.host.register(ptr, size)


def hostUnregister(ptr: int) -> None:
    with active().calling("hostUnregister", counted=False, unsafe=True) as engine:
        _refuse_in_use(engine, ptr, engine.host.unregister(ptr), "unregistered")


def pointerGetAttributes(ptr: int) -> PointerAttributes:
    with active().calling("pointerGetAttributes", counted=False) as engine:
        device = engine.device_of(ptr)
        if device is not None:
            return PointerAttributes(device, ptr, 0, memoryTypeDevice)
        if engine.host.is_pinned(ptr, 1):
            return PointerAttributes(engine.device, ptr, ptr, memoryTypeHost)
        return PointerAttributes(-2, 0, ptr, memoryTypeUnregistered)


# ------------------------------------------------------------------------------------------------------------- copies


def memcpyAsync(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    with active().calling("memcpyAsync") as engine:
        _copy(engine, dst, src, size, kind, engine.stream(stream))


def memcpy(dst: int, src: int, size: int, kind: int) -> None:
    """On the legacy default stream; between devices or within one it does not wait either."""
    with active().calling("memcpy", unsafe=True) as engine:
        stream = engine.stream(streamLegacy)
        _copy(engine, dst, src, size, kind, stream)
        if engine.device_of(dst) is None or engine.device_of(src) is None:
            engine.synchronize(stream)


def memcpy2DAsync(
    dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: int, stream: int
) -> None:
    """``height`` rows of ``width`` bytes, as one operation would."""
    with active().calling("memcpy2DAsync") as engine:
        if width > min(dpitch, spitch) or max(dpitch, spitch) >= 1 << 31:
            raise CUDARuntimeError(12)
        for row in range(height):
            _copy(engine, dst + row * dpitch, src + row * spitch, width, kind, engine.stream(stream))


def memcpyPeerAsync(dst: int, dstDevice: int, src: int, srcDevice: int, size: int, stream: int) -> None:
    with active().calling("memcpyPeerAsync") as engine:
        if (engine.device_of(dst), engine.device_of(src)) != (dstDevice, srcDevice):
            raise CUDARuntimeError(1)
        _copy(engine, dst, src, size, memcpyDeviceToDevice, engine.stream(stream))


def memsetAsync(ptr: int, value: int, size: int, stream: int) -> None:
    with active().calling("memsetAsync") as engine:
        queue = engine.stream(stream)
        target = _on_device(engine, queue, ptr, size)
        if size:
            engine.enqueue(queue, "memset", lambda: target().fill(value))


def memset(ptr: int, value: int, size: int) -> None:
    memsetAsync(ptr, value, size, streamLegacy)


def _copy(engine: Engine, dst: int, src: int, size: int, kind: int, stream: Stream) -> None:
    devices = engine.device_of(dst), engine.device_of(src)
    found = (devices[0] is not None) + 2 * (devices[1] is not None)
    if kind not in (found, memcpyDefault) or size < 0:
        raise CUDARuntimeError(1)
    if found == memcpyHostToHost:
        engine.synchronize(stream)
        ctypes.memmove(dst, src, size)
    elif stream.device not in devices:
        engine.refuse(f"a copy on device {stream.device}'s stream touches memory of devices {devices} alone")
    elif size and found == memcpyHostToDevice:
        _copy_to_device(engine, dst, src, size, stream)
    elif size and found == memcpyDeviceToHost:
        _copy_to_host(engine, dst, src, size, stream)
    elif size:
        source, target = _on_device(engine, None, src, size), _on_device(engine, None, dst, size)

        def run() -> None:
            target()[:] = source()

        _between(engine, devices, stream, run)


def _between(engine: Engine, devices: tuple[Any, Any], stream: Stream, run: Callable[[], None]) -> None:
    """Between devices the default stream's copy also synchronises with the other device's work; no other stream's."""
    others = [engine.legacy[device] for device in {*devices} - {stream.device}]
    if stream.handle or not others:
        engine.enqueue(stream, "copy D2D", run)
        return
    before = [engine.enqueue(other, "wait", None) for other in others]
    copied = engine.enqueue(stream, "copy D2D", run, after=[op for op in before if op is not None])
    for other in others:
        engine.enqueue(other, "wait", None, after=[copied] if copied is not None else [])


def _copy_to_device(engine: Engine, dst: int, src: int, size: int, stream: Stream) -> None:
    """Pinned memory is read when the copy runs, other memory at once."""
    target = _on_device(engine, stream, dst, size)
    if engine.host.is_pinned(src, size):

        def run() -> None:
            check_mapped(src, size)
            ctypes.memmove(target().ctypes.data, src, size)

        engine.enqueue(stream, "copy H2D", run, host=range(src, src + size))
        return
    staged = ctypes.string_at(src, size)

    def run_staged() -> None:
        ctypes.memmove(target().ctypes.data, staged, size)

    engine.enqueue(stream, "copy H2D", run_staged)


def _copy_to_host(engine: Engine, dst: int, src: int, size: int, stream: Stream) -> None:
    """Returns before pinned memory is written, and after other memory is."""
    source = _on_device(engine, stream, src, size)

    def run() -> None:
        check_mapped(dst, size)
        ctypes.memmove(dst, source().ctypes.data, size)

    if engine.host.is_pinned(dst, size):
        engine.enqueue(stream, "copy D2H", run, host=range(dst, dst + size))
    elif stream.capture is not None:
        raise CUDARuntimeError(900)
    else:
        engine.force(engine.enqueue(stream, "copy D2H", run))


def _on_device(engine: Engine, stream: Stream | None, pointer: int, size: int) -> Callable[[], Any]:
    """The memory at the time of the call of the result: an illegal address if it was given back to the driver."""
    device = engine.device_of(pointer)
    if device is None:
        raise CUDARuntimeError(1)
    if stream is not None and device != stream.device:
        engine.refuse(f"device {device}'s memory is used in a stream of device {stream.device}")
    memory = engine.memory[device]
    if not memory.is_live(pointer, size):
        engine.refuse(f"{size} bytes at {pointer:#x} on device {device} are not allocated, or were freed")

    def view() -> Any:
        if not memory.is_allocated(pointer, size):
            raise CUDARuntimeError(700)
        return memory.view(pointer, size)

    return view


def _refuse_in_use(engine: Engine, pointer: int, size: int, what: str) -> None:
    used = engine.host_ranges_in_flight()
    if any(part.start < pointer + size and pointer < part.stop for part in used):
        engine.refuse(f"pinned memory at {pointer:#x} was {what} while a copy to or from it is under way")


# -------------------------------------------------------------------------------------------------- streams and events


def streamCreateWithFlags(flags: int) -> int:
    with active().calling("streamCreate") as engine:
        return engine.create_stream(blocking=not flags & streamNonBlocking).handle


def streamCreateWithPriority(flags: int, priority: int) -> int:
    handle = streamCreateWithFlags(flags)
    active().streams[handle].priority = priority
    return handle


def streamCreate() -> int:
    return streamCreateWithFlags(streamDefault)


def streamDestroy(stream: int) -> None:
    """What is queued still runs."""
    if active().streams.pop(stream, None) is None:
        raise CUDARuntimeError(400)


def streamGetFlags(stream: int) -> int:
    return 0 if active().stream(stream).blocking else streamNonBlocking


def streamGetPriority(stream: int) -> int:
    return active().stream(stream).priority


def streamSynchronize(stream: int) -> None:
    with active().calling("streamSynchronize") as engine:
        engine.synchronize(engine.stream(stream))


def streamQuery(stream: int) -> int:
    with active().calling("streamQuery", unsafe=True) as engine:
        last = engine.stream(stream).last
        return 0 if last is None or last.is_done else 600


def streamWaitEvent(stream: int, event: int, flags: int = 0) -> None:
    with active().calling("streamWaitEvent") as engine:
        engine.wait(engine.stream(stream), _event(engine, event))


def streamBeginCapture(stream: int, mode: int = streamCaptureModeRelaxed) -> None:
    with active().calling("streamBeginCapture", counted=False) as engine:
        engine.begin_capture(engine.stream(stream), mode)


def streamEndCapture(stream: int) -> int:
    with active().calling("streamEndCapture", counted=False) as engine:
        return engine.end_capture(engine.stream(stream))


def streamIsCapturing(stream: int) -> bool:
    """Of the legacy default stream it cannot say while a stream that synchronises with it is being captured."""
    with active().calling("streamIsCapturing", counted=False) as engine:
        queue = engine.stream(stream)
        if queue is engine.legacy[queue.device] and any(
            capture.origin.blocking and capture.origin.device == queue.device for capture in engine.captures
        ):
            raise CUDARuntimeError(906)
        return queue.capture is not None


def graphLaunch(graphExec: int, stream: int) -> None:
    with active().calling("graphLaunch") as engine:
        for what, run in engine.graphs[graphExec]:
            engine.enqueue(engine.stream(stream), what, run)


def launchHostFunc(stream: int, callback: Callable[[Any], None], arg: Any) -> None:
    with active().calling("launchHostFunc") as engine:
        engine.enqueue(engine.stream(stream), "host function", lambda: callback(arg))


def eventCreateWithFlags(flags: int) -> int:
    with active().calling("eventCreate") as engine:
        handle = engine.new_handle()
        engine.events[handle] = Event(engine.device, flags)
        return handle


def eventCreate() -> int:
    return eventCreateWithFlags(eventDefault)


def eventDestroy(event: int) -> None:
    if active().events.pop(event, None) is None:
        raise CUDARuntimeError(400)


def eventRecord(event: int, stream: int) -> None:
    with active().calling("eventRecord") as engine:
        engine.record(_event(engine, event), engine.stream(stream))


def eventSynchronize(event: int) -> None:
    with active().calling("eventSynchronize") as engine:
        engine.synchronize_event(_event(engine, event))


def eventQuery(event: int) -> int:
    """CUDA's status, not an exception: 600 while it has not happened."""
    with active().calling("eventQuery", unsafe=True) as engine:
        return 0 if engine.is_done(_event(engine, event)) else 600


def eventElapsedTime(start: int, end: int) -> float:
    with active().calling("eventElapsedTime", counted=False) as engine:
        events = _event(engine, start), _event(engine, end)
        if any(event.flags & eventDisableTiming or event.mark is None for event in events):
            raise CUDARuntimeError(400)
        if not all(engine.is_done(event) for event in events):
            raise CUDARuntimeError(600)
        return 0.5


def _event(engine: Engine, handle: int) -> Event:
    if handle not in engine.events:
        raise CUDARuntimeError(400)
    return engine.events[handle]


def _fail(status: int) -> int:
    raise CUDARuntimeError(status)
