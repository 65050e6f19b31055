"""Devices, streams, events and graphs of the simulated CuPy, as its Python objects."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from sim import runtime
from sim.engine import Engine
from sim.state import active


class Device:
    def __init__(self, device: int | Device | None = None) -> None:
        self.id = active().device if device is None else int(device)
        self._outer: list[int] = []

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __enter__(self) -> Device:
        self._outer.append(active().device)
        self.use()
        return self

    def __exit__(self, *args: object) -> None:
        runtime.setDevice(self._outer.pop())

    def use(self) -> None:
        runtime.setDevice(self.id)

    def synchronize(self) -> None:
        with self:
            runtime.deviceSynchronize()

    @property
    def mem_info(self) -> tuple[int, int]:
        with self:
            return runtime.memGetInfo()

    @property
    def pci_bus_id(self) -> str:
        return runtime.deviceGetPCIBusId(self.id)

    @property
    def compute_capability(self) -> str:
        return "90"


def _current() -> dict[int, list[Any]]:
    """Per device the streams entered by this thread, the current one last."""
    local = active().local
    if not hasattr(local, "streams"):
        default = Stream.ptds if active().per_thread_default_stream else Stream.null
        local.streams = {device: [default] for device in range(len(active().memory))}
        local.entered = []
    return local.streams  # type: ignore[no-any-return]


def get_current_stream(device_id: int = -1) -> Any:
    return _current()[active().device if device_id < 0 else device_id][-1]


class _BaseStream:
    def __init__(self, ptr: int, device_id: int) -> None:
        self.ptr, self.device_id = ptr, device_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BaseStream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return self.ptr

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def __enter__(self) -> _BaseStream:
        streams = _current()[self._check_device()]
        streams.append(self)
        active().local.entered.append(streams)
        return self

    def __exit__(self, *args: object) -> None:
        active().local.entered.pop().pop()

    def use(self) -> _BaseStream:
        _current()[self._check_device()][-1] = self
        return self

    def _check_device(self) -> int:
        device = active().device
        if self.device_id not in (-1, device):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id})"
                f" does not match with the current device ({device})"
            )
        return device

    @property
    def done(self) -> bool:
        return runtime.streamQuery(self.ptr) == 0

    @property
    def is_non_blocking(self) -> bool:
        return bool(runtime.streamGetFlags(self.ptr))

    @property
    def priority(self) -> int:
        return runtime.streamGetPriority(self.ptr)

    def synchronize(self) -> None:
        runtime.streamSynchronize(self.ptr)

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        runtime.eventRecord(event.ptr, self.ptr)
        return event

    def wait_event(self, event: Event) -> None:
        runtime.streamWaitEvent(self.ptr, event.ptr)

    def launch_host_func(self, callback: Callable[[Any], None], arg: Any) -> None:
        runtime.launchHostFunc(self.ptr, callback, arg)

    def is_capturing(self) -> bool:
        return runtime.streamIsCapturing(self.ptr)

    def begin_capture(self, mode: int | None = None) -> None:
        if self.ptr in (0, 1):
            raise RuntimeError("cannot capture on the default (legacy) stream")
        runtime.streamBeginCapture(self.ptr, runtime.streamCaptureModeRelaxed if mode is None else mode)

    def end_capture(self) -> Graph:
        return Graph(runtime.streamEndCapture(self.ptr))


class Stream(_BaseStream):
    null: Stream
    ptds: Stream

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        self._engine: Engine | None = None
        self.ptr = 0
        if null or ptds:
            super().__init__(0 if null else runtime.streamPerThread, -1)
            return
        self.ptr = runtime.streamCreateWithPriority(int(non_blocking), priority or 0)
        super().__init__(self.ptr, active().device)
        self._engine = active()

    def __del__(self) -> None:
        if self._engine is not None:
            self._engine.streams.pop(self.ptr, None)

    @classmethod
    def from_external(cls, obj: Any) -> Stream:
        version, pointer = obj.__cuda_stream__()
        if version != 0:
            raise ValueError(f"__cuda_stream__() returned unsupported version {version}, only version 0 is supported")
        stream = cls(null=True)
        _BaseStream.__init__(stream, pointer, active().device)
        stream._foreign = obj  # type: ignore[attr-defined]
        return stream


Stream.null = Stream(null=True)
Stream.ptds = Stream(ptds=True)


class ExternalStream(_BaseStream):
    def __init__(self, ptr: int, device_id: int = -1) -> None:
        warnings.warn("ExternalStream is deprecated. Use Stream.from_external()", DeprecationWarning, stacklevel=2)
        super().__init__(ptr, device_id)


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self._engine = active()
        self.ptr = 0
        self.ptr = runtime.eventCreateWithFlags(block | disable_timing << 1 | interprocess << 2)

    def __del__(self) -> None:
        self._engine.events.pop(self.ptr, None)

    @property
    def done(self) -> bool:
        return runtime.eventQuery(self.ptr) == 0

    def record(self, stream: _BaseStream | None = None) -> None:
        runtime.eventRecord(self.ptr, (stream or get_current_stream()).ptr)

    def synchronize(self) -> None:
        runtime.eventSynchronize(self.ptr)


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    return runtime.eventElapsedTime(start_event.ptr, end_event.ptr)


class Graph:
    def __init__(self, handle: int) -> None:
        self.graph = self.graphExec = handle

    def launch(self, stream: _BaseStream | None = None) -> None:
        runtime.graphLaunch(self.graphExec, (stream or get_current_stream()).ptr)
