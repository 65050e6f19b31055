"""A save under way, as its caller sees it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import enum
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gpusaver.device import Event
from gpusaver.errors import CancelledError, FailedPreconditionError


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a finished save did.  Times are seconds since the call.

    ``capture`` is the mode used and ``reason`` why; ``captured_seconds``: when the arrays could be changed;
    ``durable_seconds``: when the checkpoint was on stable storage.
    """

    prefix: str
    tensors: int
    nbytes: int
    capture: str
    reason: str
    captured_seconds: float
    durable_seconds: float


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
        started_at: float,
        *,
        is_awaited: bool,
        devices: int,
        has_host_arrays: bool,
    ) -> None:
        self.prefix = prefix
        self.capture = capture
        self.reason = reason
        self.report: SaveReport | None = None
        self.cancel_requested = threading.Event()
        #: What a fence calls first; for debugging.
        self.check: Callable[[], None] | None = None
        self._captured = threading.Event()
        self._recorded = threading.Event()
        self._events: list[Event] = []
        self._devices = devices
        self._has_host_arrays = has_host_arrays
        if not devices:
            self._recorded.set()
        self._captured_at = 0.0
        self._started_at = started_at
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
        error = self._future.exception(timeout)
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
        host arrays it blocks until they have been read.  When it raises, nothing reads the arrays any more.

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

    # Called by the Saver.

    def mark_recorded(self, event: Event) -> None:
        """The last copy of one device ends with ``event``."""
        with self._lock:
            self._events.append(event)
            if len(self._events) == self._devices:
                self._recorded.set()

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

    def finish(self, tensors: int, nbytes: int) -> None:
        captured = self._captured_at - self._started_at
        durable = time.perf_counter() - self._started_at
        self.report = SaveReport(self.prefix, tensors, nbytes, self.capture, self.reason, captured, durable)
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
        self._future.exception()

    def undelivered_error(self) -> BaseException | None:
        """Waits for the end of the save; its error if nobody has seen it yet (seen from now on)."""
        error = self._future.exception()
        was_delivered, self._delivered = self._delivered, True
        return None if was_delivered or isinstance(error, CancelledError) else error

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
