"""A save under way, as its caller sees it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import enum
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpusaver.device import Event
from gpusaver.device.inventory import link_rate
from gpusaver.errors import CancelledError, FailedPreconditionError
from gpusaver.pipeline.timeline import STAGES, Span, Timeline, busy_seconds, chrome_trace

_log = logging.getLogger("gpusaver")


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a finished save did.  Times are in seconds, rates in bytes per second.

    ``capture`` is the mode used and ``reason`` why; ``devices``: "cuda:0" and so on, of the arrays that were on any.
    Since the call: ``call_seconds``, until it returned (what the caller lost); ``captured_seconds``, until the arrays
    had been read; ``durable_seconds``, until the checkpoint was on stable storage.  ``background_seconds``: CPU time of
    the threads of the save, copies and checksums included.  ``spans``: the stages, chunk by chunk.
    """

    prefix: str
    tensors: int
    nbytes: int
    capture: str
    reason: str
    devices: tuple[str, ...]
    call_seconds: float
    captured_seconds: float
    durable_seconds: float
    background_seconds: float
    spans: tuple[Span, ...] = field(repr=False)

    def seconds(self, stage: str) -> float:
        """How long at least one thread or device was busy with it: "plan", "capture", "copy", "compare", "checksum",
        "write", "link", "sync" or "commit".  Stages overlap."""
        if stage not in STAGES:
            raise ValueError(f"stage: expected one of {', '.join(STAGES)}, found {stage!r}")
        return busy_seconds(self.spans, stage)

    @property
    def rate(self) -> float:
        """Of the whole save, until durable."""
        return self.nbytes / self.durable_seconds

    @property
    def linked_nbytes(self) -> int:
        """Of data files that were not written, because the last save had written the same (``incremental``)."""
        return sum(span.nbytes for span in self.spans if span.stage == "link")

    @property
    def copy_rate(self) -> float:
        """Of the copies from devices while any was under way, to be seen beside ``link_rate``; 0.0 without any."""
        return self._rate("copy")

    @property
    def write_rate(self) -> float:
        """Of the writes while any was under way, without the sync at the end; 0.0 without any."""
        return self._rate("write")

    @property
    def link_rate(self) -> float:
        """What to expect of the devices' links together, as :func:`gpusaver.devices` has it; 0.0 if unknown."""
        return sum(map(link_rate, self.devices))

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the stages, chunk by chunk, as JSON for https://ui.perfetto.dev and chrome://tracing."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(chrome_trace(self.spans, f"gpusaver {self.prefix}"))

    def _rate(self, stage: str) -> float:
        nbytes = sum(span.nbytes for span in self.spans if span.stage == stage)
        return nbytes / self.seconds(stage) if nbytes else 0.0


class _State(enum.Enum):
    """WORKING -> COMMITTING -> DONE, or WORKING -> CANCELLING -> DONE: a commit under way is not cancelled."""

    WORKING = enum.auto()
    CANCELLING = enum.auto()
    COMMITTING = enum.auto()
    DONE = enum.auto()


class PendingSave:
    """Like :class:`concurrent.futures.Future`; the result is the prefix.  Methods may be called from any thread.

    An error that :meth:`result`, :meth:`exception` and :meth:`fence` have given to nobody is raised by the Saver's next
    save, or by its ``close()``; a save that was cancelled is not an error there.  In a forked child, where nothing is
    being saved, every method raises FailedPreconditionError.
    """

    def __init__(
        self,
        prefix: str,
        capture: str,
        reason: str,
        timeline: Timeline,
        *,
        is_awaited: bool,
        devices: Sequence[str],
        has_host_arrays: bool,
    ) -> None:
        self.prefix = prefix
        self.capture = capture
        self.reason = reason
        self.timeline = timeline
        self.cancel_requested = threading.Event()
        #: What a fence calls first; for debugging.
        self.check: Callable[[], None] | None = None
        #: Of a save by several ranks: its end, which takes all of them, in the thread that waits for it.
        self.complete: Callable[[float | None], None] | None = None
        self._completing = threading.RLock()
        self._captured = threading.Event()
        self._recorded = threading.Event()
        self._events: list[Event] = []
        self._devices = tuple(devices)
        self._has_host_arrays = has_host_arrays
        if not devices:
            self._recorded.set()
        self._captured_at = 0.0
        self._returned_at = 0.0
        self._ended_at = 0.0
        self._size = (0, 0)
        self._error: BaseException | None = None
        self._future: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._state = _State.WORKING
        self._lock = threading.Lock()
        #: Whoever called waits for the end and gets the error; it is not for another thread's next save.
        self.is_awaited = is_awaited
        self._delivered = is_awaited
        self._process = os.getpid()

    def result(self, timeout: float | None = None) -> str:
        """The prefix, when the checkpoint is durable; raises the save's error, or TimeoutError after ``timeout`` s."""
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.prefix

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The save's error, or None; waits for the end of the save, TimeoutError after ``timeout`` seconds."""
        self._check_process()
        error = self._ended(timeout)
        self._delivered = True
        return error

    def done(self) -> bool:
        self._check_process()
        return self._future.done()

    def cancelled(self) -> bool:
        return self.done() and isinstance(self._future.exception(), CancelledError)

    def cancel(self) -> bool:
        """Asks the save to stop; True if it will not be committed (then :meth:`result` raises CancelledError)."""
        self._check_process()
        with self._lock:
            if self._state is _State.WORKING:
                self._state = _State.CANCELLING
                self.cancel_requested.set()
            return self._state is _State.CANCELLING or self.cancelled()

    def add_done_callback(self, function: Callable[[PendingSave], object]) -> None:
        """Calls ``function(self)`` when the save has ended, in the saving thread; at once, here, if it has."""
        self._check_process()
        self._future.add_done_callback(lambda _: function(self))

    def wait_captured(self, timeout: float | None = None) -> bool:
        """Blocks until the variables may be changed, or the save has ended; False after ``timeout`` seconds."""
        self._check_process()
        return self._captured.wait(timeout)

    def fence(self, stream: Any = None) -> None:
        """Place it before the work that changes the variables; raises the save's error if it has failed.

        For device arrays it blocks the host only until their last copy has been queued, then has ``stream`` (a CuPy
        stream, or anything with ``__cuda_stream__``; None: the current one of each device) wait for that copy.  For
        host arrays it blocks until they have been read.  After a snapshot it blocks nothing, and the streams that were
        current at the call need none.  When it raises, nothing reads the arrays any more.

        With the Saver's ``check_captures`` it waits for the copies and raises FailedPreconditionError if variables have
        been changed since the save was started.
        """
        self._check_process()
        self._recorded.wait()
        if self._has_host_arrays:
            self._captured.wait()
        if self._error is not None:
            self._delivered = True
            raise self._error
        try:
            if self.check is not None:
                self._captured.wait()
                self.check()
                self.check = None  # from now on they may change
            for event in list(self._events):
                event.hold_back(stream)
        except BaseException:
            self._captured.wait()
            raise

    @property
    def report(self) -> SaveReport | None:
        """None until the save has ended, and if it failed."""
        if not self._ended_at:
            return None
        started_at = self.timeline.started_at
        returned_at = self._ended_at if self.is_awaited else self._returned_at or time.perf_counter()
        return SaveReport(
            self.prefix,
            *self._size,
            self.capture,
            self.reason,
            self._devices,
            call_seconds=returned_at - started_at,
            captured_seconds=self._captured_at - started_at,
            durable_seconds=self._ended_at - started_at,
            background_seconds=self.timeline.background_seconds,
            spans=tuple(self.timeline.spans),
        )

    # Called by the Saver.

    def mark_recorded(self, event: Event) -> None:
        """The last copy of one device ends with ``event``."""
        with self._lock:
            self._events.append(event)
            if len(self._events) == len(self._devices):
                self._recorded.set()

    def mark_snapshot(self, copied: Sequence[Event]) -> None:
        """The variables have been copied when these events have happened; work that is queued later may change them."""
        self._events.extend(copied)
        self._has_host_arrays = False
        self._recorded.set()
        if not copied:
            self.mark_captured()

    def mark_captured(self) -> None:
        if not self._captured.is_set():
            self._captured_at = time.perf_counter()
            self._recorded.set()  # also of devices that have nothing but empty arrays
            self._captured.set()

    def begin_commit(self) -> None:
        """Raises CancelledError if a cancel came first; none can come later."""
        with self._lock:
            if self._state is _State.CANCELLING:
                raise CancelledError("the save was cancelled before it was committed")
            self._state = _State.COMMITTING

    def mark_returned(self) -> None:
        """The call that began the save is about to return; a call that waits for the end need not say so."""
        self._returned_at = time.perf_counter()

    def finish(self, tensors: int, nbytes: int) -> None:
        self._size = tensors, nbytes
        self._ended_at = time.perf_counter()
        self._state = _State.DONE
        self._future.set_result(self.prefix)

    def fail(self, error: BaseException) -> None:
        self._state = _State.DONE
        self._error = error
        self._recorded.set()
        self._captured.set()  # before the callbacks, which may wait for it
        self._future.set_exception(error)

    def wait(self) -> None:
        """Blocks until the save has ended; its error stays undelivered."""
        self._ended()

    def undelivered_error(self) -> BaseException | None:
        """Waits for the end of the save; its error if nobody has seen it yet (seen from now on)."""
        error = self._ended()
        was_delivered, self._delivered = self._delivered, True
        return None if was_delivered or isinstance(error, CancelledError) else error

    def _ended(self, timeout: float | None = None) -> BaseException | None:
        if self.complete is not None:
            with self._completing:
                if not self._future.done():
                    self.complete(timeout)
        return self._future.exception(timeout)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise FailedPreconditionError(
                f"the save of {self.prefix} was started before a fork; only the parent process can wait for it"
            )


@contextlib.contextmanager
def ended_if_interrupted(pending: PendingSave) -> Iterator[None]:
    """Ctrl-C and the like end the save as well: the caller may change or free the variables next."""
    try:
        yield
    except BaseException:
        if not pending.done():
            pending.cancel()
            pending.wait()
        raise


def close_on_exit(close: Callable[[], None], error: BaseException | None) -> None:
    """The end of a ``with``: the body's own ``error`` is the one to see, so one of ``close`` is logged beside it."""
    if error is None:
        close()
        return
    try:
        close()
    except Exception as masked:
        _log.error("while another exception was raised, a background save failed: %s", masked)
