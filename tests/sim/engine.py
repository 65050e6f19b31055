"""Time on the simulated devices: streams, events, captures, and who runs what when.

Every piece of work is an operation that knows which others it must follow: the one before it in its stream, what its
stream was told to wait for, and what the legacy default stream synchronises with.  An operation runs when somebody
waits for it, or earlier if the schedule says so; every order that the graph allows is legal on a real device.

==============  ===================================================================================================
schedule        what runs without being waited for
==============  ===================================================================================================
``"late"``      nothing
``"eager"``     everything, at once
``"racing"``    non-blocking streams (a library's own) run ahead, all others lag behind
``"dragging"``  non-blocking streams lag behind, all others run ahead
a number        the seed of random speeds and orders
==============  ===================================================================================================
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from sim.errors import CUDARuntimeError, SimulationError
from sim.memory import POISON, DeviceMemory, HostMemory

Run = Callable[[], None]
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
#: A program that polls gets there at last, however slow the device.
_POLLS_UNTIL_DONE = 16


class Operation:
    """``after`` are operations that must be done before; ``host`` is the pinned memory that it uses."""

    __slots__ = ("after", "host", "is_done", "run", "stream", "what")

    def __init__(self, stream: Stream, what: str, run: Run | None, after: list[Operation], host: range | None) -> None:
        self.stream, self.what, self.run, self.after, self.host = stream, what, run, after, host
        self.is_done = False


class Stream:
    """The driver's side of a stream.  ``speed`` is the chance that its next operation runs unasked."""

    def __init__(self, handle: int, device: int, *, blocking: bool, speed: float) -> None:
        self.handle, self.device, self.blocking, self.speed = handle, device, blocking, speed
        self.priority = 0
        self.pending: deque[Operation] = deque()
        self.last: Operation | None = None
        self.capture: Capture | None = None


class Event:
    def __init__(self, device: int, flags: int) -> None:
        self.device, self.flags = device, flags
        self.mark: Operation | Mark | None = None
        self.polls = 0


class Capture:
    """A CUDA graph in the making, in the order in which its nodes were issued."""

    def __init__(self, origin: Stream, mode: int, thread: int) -> None:
        self.origin, self.mode, self.thread = origin, mode, thread
        self.is_valid = True
        self.nodes: list[tuple[str, Run | None]] = []
        #: Number of nodes in the capture when the stream got its last one; the origin must wait for the others'.
        self.unjoined: dict[Stream, int] = {}

    def add(self, stream: Stream, what: str, run: Run | None) -> None:
        self.nodes.append((what, run))
        if stream is not self.origin:
            self.unjoined[stream] = len(self.nodes)


class Mark:
    """Where in a capture an event was recorded."""

    def __init__(self, capture: Capture, stream: Stream) -> None:
        self.capture, self.stream, self.position = capture, stream, len(capture.nodes)


class Engine:
    """The simulated driver.  Everything in it may be used from any thread.

    ``capacity`` is the memory of a device in bytes.  What tests look at: ``calls`` (the names of the runtime calls that
    can fail, in order), ``violations``, ``compiled`` (source and options of every module), ``ranges`` (NVTX, per name).
    What they set: ``kernels``, ``has_nvrtc``, ``has_driver``, ``has_driver_library``, ``per_thread_default_stream``.
    """

    def __init__(self, schedule: str | int = 0, devices: int = 2, capacity: int = 64 << 20) -> None:
        self.lock = threading.RLock()
        self.schedule = schedule
        self.random = random.Random(schedule if isinstance(schedule, int) else 0)
        self.memory = [DeviceMemory(device, capacity) for device in range(devices)]
        self.host = HostMemory()
        self.legacy = [Stream(0, device, blocking=True, speed=self._speed(True)) for device in range(devices)]
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, list[tuple[str, Run | None]]] = {}
        self.streams: dict[int, Stream] = {}
        self._per_thread: dict[tuple[int, int], Stream] = {}
        #: Streams with operations that have not run, also those destroyed meanwhile.
        self._busy: dict[Stream, None] = {}
        self.captures: list[Capture] = []
        self.local = threading.local()
        self.new_handle = itertools.count(0x10000, 16).__next__
        #: What destructors want done: they run at any point, also inside the engine.
        self.dropped: deque[Run] = deque()
        self.calls: list[str] = []
        self.violations: list[str] = []
        self.sticky: BaseException | None = None
        self.has_surfaced = True
        self._failures: dict[int, tuple[int, bool]] = {}
        self.kernels: dict[str, Any] = {}
        self.compiled: list[tuple[str, tuple[str, ...]]] = []
        self.ranges: dict[str, int] = {}
        self.has_nvrtc = self.has_driver = self.has_driver_library = True
        self.per_thread_default_stream = False

    # ------------------------------------------------------------------------------------------------- for tests

    def fail_at(self, n: int, status: int = 719, *, sticky: bool = False) -> None:
        """The n-th runtime call from now on (1 is the next) fails; with ``sticky`` all later ones too."""
        self._failures = {len(self.calls) + n: (status, sticky)}

    @property
    def has_failed(self) -> bool:
        """Whether the call that :meth:`fail_at` meant has come."""
        return not self._failures

    def set_speed(self, handle: int, speed: float) -> None:
        """How fast a stream runs unasked: 1 at once, 0 never."""
        self.stream(handle).speed = speed

    def pending(self) -> list[str]:
        """What moves bytes and has not run yet."""
        with self.lock:
            return [op.what for stream in self._busy for op in stream.pending if op.run and op.what != "poison"]

    def drain(self) -> None:
        """Runs everything; raises what went wrong on the devices and was never reported."""
        with self.lock:
            self._drop()
            for stream in list(self._busy):
                self._finish(stream.last)
            if not self.has_surfaced and self.sticky is not None:
                self.has_surfaced = True
                raise self.sticky

    def assert_quiescent(self, streams: int | None = None) -> None:
        """No work, no page-locked memory, no capture is left, nor more than ``streams`` streams."""
        with self.lock:
            self._drop()
            left = {
                "pending work": self.pending(),
                "registered memory": self.host.registered,
                "pinned memory": self.host.allocated,
                "captures": self.captures,
                "streams": list(self.streams)[streams:] if streams is not None else [],
                "open NVTX ranges": {name: depth for name, depth in self.ranges.items() if depth},
                "violations": self.violations,
            }
        left = {name: what for name, what in left.items() if what}
        assert not left, left

    # --------------------------------------------------------------------------------------------------- the calls

    @contextlib.contextmanager
    def calling(self, name: str, *, counted: bool = True, unsafe: bool = False) -> Iterator[Engine]:
        """Around every runtime call.  ``unsafe`` ones may not be made during a capture unless it is relaxed."""
        with self.lock:
            self._drop()
            if not self.has_driver:
                raise CUDARuntimeError(35)
            self._raise_sticky()
            if counted:
                self.calls.append(name)
                status, sticky = self._failures.pop(len(self.calls), (0, False))
                if status:
                    self.sticky = CUDARuntimeError(status) if sticky else None
                    raise CUDARuntimeError(status)
            if unsafe:
                self._refuse_during_capture()
            self.pump()
            try:
                yield self
            finally:
                self.pump()

    def refuse(self, message: str) -> NoReturn:
        self.violations.append(message)
        raise SimulationError(message)

    @property
    def device(self) -> int:
        return getattr(self.local, "device", 0)

    def device_of(self, pointer: int) -> int | None:
        """The device whose memory the pointer is in, None for the host's."""
        return next((number for number, memory in enumerate(self.memory) if memory.owns(pointer)), None)

    # ----------------------------------------------------------------------------------------------------- streams

    def create_stream(self, *, blocking: bool) -> Stream:
        stream = Stream(self.new_handle(), self.device, blocking=blocking, speed=self._speed(blocking))
        self.streams[stream.handle] = stream
        return stream

    def stream(self, handle: int) -> Stream:
        """The default streams, 0 to 2, are those of the current device, the last one also of this thread."""
        if handle in (0, 1):
            return self.legacy[self.device]
        if handle == 2:
            key = (self.device, threading.get_ident())
            if key not in self._per_thread:
                self._per_thread[key] = Stream(2, self.device, blocking=True, speed=self._speed(True))
            return self._per_thread[key]
        if handle not in self.streams:
            raise CUDARuntimeError(400)
        return self.streams[handle]

    def enqueue(
        self, stream: Stream, what: str, run: Run | None, *, after: Sequence[Operation] = (), host: range | None = None
    ) -> Operation | None:
        """Queues an operation (None while the stream is being captured; ``run`` is None for what moves no bytes)."""
        if stream.capture is not None:
            self._check_capture(stream.capture)
            stream.capture.add(stream, what, run)
            return None
        predecessors = [op for op in (*self._predecessors(stream), *after) if not op.is_done]
        stream.last = Operation(stream, what, run, predecessors, host)
        stream.pending.append(stream.last)
        self._busy[stream] = None
        return stream.last

    def record(self, event: Event, stream: Stream) -> None:
        if event.device != stream.device:
            raise CUDARuntimeError(400)
        mark = self.enqueue(stream, "record", None)
        event.mark = Mark(stream.capture, stream) if stream.capture is not None else mark

    def wait(self, stream: Stream, event: Event) -> None:
        """An event that was never recorded is not waited for; one recorded again later is, as it is now."""
        if isinstance(event.mark, Mark):
            self._join(stream, event.mark)
        elif stream.capture is not None:
            if event.mark is not None:
                self._invalidate(stream.capture, 905)
        elif event.mark is not None:
            self.enqueue(stream, "wait", None, after=[event.mark])

    def is_done(self, event: Event) -> bool:
        if isinstance(event.mark, Mark):
            self._invalidate(event.mark.capture, 907)
        event.polls += 1
        if event.mark is not None and event.polls % _POLLS_UNTIL_DONE == 0:
            self.force(event.mark)
        return event.mark is None or event.mark.is_done

    def synchronize_event(self, event: Event) -> None:
        if isinstance(event.mark, Mark):
            self._invalidate(event.mark.capture, 907)
        self.force(event.mark)

    def synchronize(self, stream: Stream) -> None:
        if stream.capture is not None:
            self._invalidate(stream.capture, 900)
        self.force(self.enqueue(stream, "synchronize", None))

    def synchronize_device(self, device: int) -> None:
        for capture in self.captures:
            if capture.origin.device == device:
                self._invalidate(capture, 900)
        self.finish_device(device)

    def finish_device(self, device: int) -> None:
        for stream in list(self._busy):
            if stream.device == device:
                self.force(stream.last)

    def host_ranges_in_flight(self) -> list[range]:
        """Pinned memory that copies still have to read or write."""
        return [op.host for stream in self._busy for op in stream.pending if op.host is not None]

    def poison(self, stream: Stream, pointer: int, size: int) -> None:
        """What the next user of a block that a pool got back may do to it, in the stream it was allocated in."""
        if stream.capture is None:
            block = self.memory[stream.device].view(pointer, size)
            self.enqueue(stream, "poison", lambda: block.fill(POISON))

    def _predecessors(self, stream: Stream) -> list[Operation]:
        streams = [stream]
        legacy = self.legacy[stream.device]
        if stream is legacy:
            streams += [other for other in self._busy if other.device == stream.device and other.blocking]
            for capture in self.captures:
                if capture.origin.device == stream.device and capture.origin.blocking:
                    self._invalidate(capture, 906)
        elif stream.blocking:
            streams.append(legacy)
        return [one.last for one in dict.fromkeys(streams) if one.last is not None]

    def _speed(self, blocking: bool) -> float:
        fixed = {"late": 0.0, "eager": 1.0, "racing": 1.0 - blocking, "dragging": 0.0 + blocking}
        if isinstance(self.schedule, str):
            return fixed[self.schedule]
        return self.random.choice((0.0, 0.3, 1.0))

    # --------------------------------------------------------------------------------------------------- the clock

    def pump(self) -> None:
        """Runs what the schedule wants to run unasked."""
        progressed = True
        while progressed:
            progressed = False
            for stream in self.random.sample(list(self._busy), len(self._busy)):
                while stream.pending and self.random.random() < stream.speed:
                    if not all(op.is_done for op in stream.pending[0].after):
                        break
                    self._run(stream.pending[0])
                    progressed = True

    def force(self, target: Operation | None) -> None:
        """Runs an operation and what it depends on, in one of the legal orders, and what the schedule lets run then."""
        self._finish(target)
        self._raise_sticky()

    def _finish(self, target: Operation | None) -> None:
        stack = [target] if target is not None else []
        while stack:
            waiting = [op for op in stack[-1].after if not op.is_done] if not stack[-1].is_done else []
            if waiting:
                self.random.shuffle(waiting)
                stack.extend(waiting)
            else:
                self._run(stack.pop())
                self.pump()  # others may overtake the rest as soon as what they waited for has happened

    def _run(self, op: Operation) -> None:
        if op.is_done:
            return
        stream = op.stream
        assert stream.pending.popleft() is op
        if not stream.pending:
            del self._busy[stream]
        op.is_done = True
        if op.run is not None and self.sticky is None:
            try:
                op.run()
            except Exception as error:  # a device reports later, to whoever asks next
                self.sticky, self.has_surfaced = error, False
        op.run, op.after = None, []

    def _drop(self) -> None:
        while self.dropped:
            with contextlib.suppress(CUDARuntimeError):  # a destructor has nobody to tell
                self.dropped.popleft()()

    def _raise_sticky(self) -> None:
        if self.sticky is not None:
            self.has_surfaced = True
            if isinstance(self.sticky, CUDARuntimeError):
                raise CUDARuntimeError(self.sticky.status) from self.sticky
            raise self.sticky

    # -------------------------------------------------------------------------------------------------- the captures

    def begin_capture(self, stream: Stream, mode: int) -> None:
        if stream is self.legacy[stream.device] or stream.capture is not None:
            raise CUDARuntimeError(900)
        stream.capture = Capture(stream, mode, threading.get_ident())
        self.captures.append(stream.capture)

    def end_capture(self, stream: Stream) -> int:
        capture = stream.capture
        if capture is None or capture.origin is not stream:
            raise CUDARuntimeError(901)
        self.captures.remove(capture)
        for other in (*self.legacy, *self.streams.values(), *self._per_thread.values()):
            if other.capture is capture:
                other.capture = None
        if capture.unjoined:
            raise CUDARuntimeError(904)
        self._check_capture(capture)
        handle = self.new_handle()
        self.graphs[handle] = capture.nodes
        return handle

    def exchange_capture_mode(self, mode: int) -> int:
        """cuThreadExchangeStreamCaptureMode: how this thread's unsafe calls and captures elsewhere get on."""
        previous = getattr(self.local, "capture_mode", GLOBAL)
        self.local.capture_mode = mode
        return previous

    def _join(self, stream: Stream, mark: Mark) -> None:
        capture = mark.capture
        if capture not in self.captures:
            raise CUDARuntimeError(907)
        if stream.capture is None:
            stream.capture = capture
            capture.unjoined[stream] = len(capture.nodes)
        elif stream.capture is not capture:
            self._invalidate(capture, 902)
        elif capture.unjoined.get(mark.stream, mark.position + 1) <= mark.position:
            del capture.unjoined[mark.stream]

    def _refuse_during_capture(self) -> None:
        own = getattr(self.local, "capture_mode", GLOBAL)
        for capture in self.captures:
            is_own = capture.thread == threading.get_ident()
            if own != RELAXED and (capture.mode == GLOBAL or (capture.mode == THREAD_LOCAL and is_own)):
                self._invalidate(capture, 900)

    def _check_capture(self, capture: Capture) -> None:
        if not capture.is_valid:
            raise CUDARuntimeError(901)

    def _invalidate(self, capture: Capture, status: int) -> NoReturn:
        capture.is_valid = False
        raise CUDARuntimeError(status)
