"""A storage that holds a save up, so that a test can look at it half-way."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

import gpusaver
from gpusaver.storage.local import LocalStorage

SECONDS = 30.0


class GatedStorage(LocalStorage):
    """``hold()`` stops the next save at its first file (nothing read yet), or at its first rename (all written).

    ``arrived`` is set when it is there; ``let_go()``, with an error to raise instead of going on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Event()
        self._open = threading.Event()
        self._open.set()
        self._at = ""
        self._error: BaseException | None = None

    def hold(self, at: str = "create") -> None:
        assert at in ("create", "replace")
        self._at = at
        self.arrived.clear()
        self._open.clear()

    def let_go(self, error: BaseException | None = None) -> None:
        self._error = error
        self._open.set()

    def _pass(self, at: str) -> None:
        if at != self._at:
            return
        self.arrived.set()
        assert self._open.wait(SECONDS), "nobody let the save go"
        self._at = ""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
        self._pass("create")
        return super().create(path, nbytes, direct=direct, target=target)

    def replace(self, source: str, target: str) -> None:
        self._pass("replace")
        super().replace(source, target)


def held(saver: gpusaver.Saver, storage: GatedStorage, path: Any, at: str = "create", **options: Any) -> Any:
    """A save that is under way and waits."""
    storage.hold(at)
    pending = saver.save_async(path, **options)
    assert storage.arrived.wait(SECONDS)
    assert pending is not None
    assert not pending.done()
    return pending


def in_thread(call: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def is_blocked(future: concurrent.futures.Future[Any]) -> bool:
    """Not proof, but a call that does not block is done by then."""
    time.sleep(0.05)
    return not future.done()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
