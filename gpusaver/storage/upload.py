"""A put that asks for its parts, fed by a writer that has them.

::

    writer              add(part) ... add(part)  finish()      waits while two parts are waiting
    thread of the put   <- part ...  <- part     returns       asks for the next part when it has room for it

The thread lives from the start to the end of the upload.  Where none can be started (the interpreter is shutting down)
parts are collected and go up in :meth:`Upload.finish`.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator

_MAX_WAITING = 2


class _Abandoned(Exception):
    """Ends a put that nobody wants any more."""


class Upload:
    """``put(parts)`` runs in a thread; whatever ``parts`` raises it must let through, and leave nothing behind.

    Methods are called from one thread at a time.
    """

    def __init__(self, put: Callable[[Iterator[bytes]], None]) -> None:
        self._put = put
        self._parts: collections.deque[bytes] = collections.deque()
        self._changed = threading.Condition()
        self._is_complete = False
        self._is_abandoned = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="gpusaver-upload")
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None

    def add(self, part: bytes) -> None:
        """Raises what ended the put, if it has ended."""
        with self._changed:
            while self._thread is not None and len(self._parts) >= _MAX_WAITING and self._error is None:
                self._changed.wait()
            self._raise_error()
            self._parts.append(part)
            self._changed.notify_all()

    def finish(self) -> None:
        """Returns when the object is there."""
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()
        if self._thread is None:
            self._run()
        else:
            self._thread.join()
        self._raise_error()

    def abandon(self) -> None:
        """Ends the put, if it has not ended.  Never raises."""
        with self._changed:
            self._is_abandoned = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._put(self._next_parts())
        except BaseException as error:
            with self._changed:
                self._error = error
                self._parts.clear()
                self._changed.notify_all()

    def _next_parts(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                while not (self._parts or self._is_complete or self._is_abandoned):
                    self._changed.wait()
                if self._is_abandoned:
                    raise _Abandoned
                if not self._parts:
                    return
                part = self._parts.popleft()
                self._changed.notify_all()
            yield part
