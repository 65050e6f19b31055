"""Signals that announce the end of the process (preemption), remembered until the loop can answer them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

from gpusaver.errors import FailedPreconditionError


class SignalFlag:
    """From now on until :meth:`close` the signals set :attr:`received` instead of ending the process.

    A handler that was there before is called at once, after the flag is set (but for Python's own of Ctrl-C, which
    would interrupt the step).  FailedPreconditionError outside of the main thread: Python sets no handlers there.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        #: The first signal that came, or None.
        self.received: signal.Signals | None = None
        self._previous: dict[int, Any] = {}
        self._is_closed = False
        numbers = [signal.Signals(number) for number in numbers]
        if numbers and threading.current_thread() is not threading.main_thread():
            raise FailedPreconditionError("signals can only be handled by a CheckpointManager made in the main thread")
        for number in numbers:
            self._previous[number] = signal.signal(number, self._handle)

    def close(self) -> None:
        """Puts the previous handlers back, unless somebody has put others in the place of this one."""
        self._is_closed = True
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Nothing else than this: a handler runs between any two instructions, also of the logging module.
        if self.received is None:
            self.received = signal.Signals(number)
        previous = self._previous[number]
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)
        elif self._is_closed and previous is signal.SIG_DFL:
            # Another handler, put in afterwards, still leads here: the signal must not be lost.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
