"""How far a save is: for a callback, and for a bar on a terminal."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger("gpusaver")


@dataclass(frozen=True, slots=True)
class SaveProgress:
    """``written_nbytes`` of ``total_nbytes`` of the checkpoint ``prefix`` have been handed to the system.

    ``is_durable``: the last one of a save that succeeded.
    """

    prefix: str
    written_nbytes: int
    total_nbytes: int
    is_durable: bool = False


class Progress:
    """Hands every progress to the listeners, one at a time, from whichever thread it comes.

    An error of a listener is logged, and that listener hears no more: a save must not fail for it.
    """

    def __init__(self, listeners: list[Callable[[SaveProgress], object]]) -> None:
        self._listeners = listeners
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def __call__(self, progress: SaveProgress) -> None:
        with self._lock:
            for listener in list(self._listeners):
                try:
                    listener(progress)
                except Exception:
                    self._listeners.remove(listener)
                    _log.exception("a progress callback failed and is not called any more")

    def close(self) -> None:
        """Of listeners that have an end, the bar."""
        with self._lock:
            for listener in self._listeners:
                if isinstance(listener, Bar):
                    listener.close()


class Bar:
    """Draws with tqdm on standard error.  :func:`bar` makes one only where that makes sense."""

    def __init__(self, tqdm: Any) -> None:
        self._tqdm = tqdm
        self._bar: Any = None
        self._prefix = ""

    def __call__(self, progress: SaveProgress) -> None:
        if self._bar is None or progress.prefix != self._prefix:
            self.close()
            self._prefix = progress.prefix
            self._bar = self._tqdm(
                total=progress.total_nbytes, desc=progress.prefix, unit="B", unit_scale=True, leave=False
            )
        self._bar.update(progress.written_nbytes - self._bar.n)
        if progress.is_durable:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def bar() -> Bar | None:
    """None where standard error is no terminal, or where tqdm is not installed."""
    if not (sys.stderr is not None and sys.stderr.isatty()):
        return None
    try:
        return Bar(importlib.import_module("tqdm").tqdm)
    except ImportError:
        _log.info("no progress bar: pip install 'gpusaver[progress]'")
        return None
