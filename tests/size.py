"""How much of a test runs: the bounded size in `make test`, the long one in `make test-faults`."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

LONG = os.environ.get("GPUSAVER_FAULTS") == "long"

#: After so long something hangs.  Each case takes milliseconds; the machine may be busy with others.
DEADLINE_SECONDS = 300.0


def sized(bounded: T, long: T) -> T:
    return long if LONG else bounded


@contextlib.contextmanager
def deadline(seconds: float = DEADLINE_SECONDS) -> Iterator[None]:
    """Raises TimeoutError in the middle of whatever still runs, or waits, after that time.  Main thread only."""

    def expired(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def join_savers() -> None:
    """The thread of a save outlives its result by a moment."""
    for thread in threading.enumerate():
        if thread.name.startswith("gpusaver"):
            thread.join()
