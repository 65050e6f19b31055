"""The seam below the storage interface: what gpusaver asks of the operating system in one directory.

::

    with intercepted(directory, hook):
        saver.save(...)          hook(call, perform) runs in place of every call; perform() carries it out

Files are opened, written and removed through functions of :mod:`os` alone, which is what makes this possible; the
recorder of crash states checks that nothing went past it.  Long writes to tmpfs do (``storage/mapped.py``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

_BY_PATH = ("open", "stat", "lstat", "listdir", "scandir", "mkdir", "unlink", "remove", "replace", "rename", "link")
_BY_DESCRIPTOR = (
    "pwritev",
    "pwrite",
    "write",
    "preadv",
    "pread",
    "posix_fallocate",
    "ftruncate",
    "fsync",
    "fstat",
    "close",
)

#: What changes a directory or a file; the others only look.
CHANGES = frozenset({"mkdir", "unlink", "replace", "link", "pwritev", "posix_fallocate", "ftruncate", "fsync"})


class Call(NamedTuple):
    """``path``: of the file at stake, for a rename its new name; ``is_directory`` tells apart what is synced."""

    name: str
    path: str
    args: tuple[Any, ...]
    is_directory: bool = False

    def __str__(self) -> str:
        return f"{self.name}{' of the directory' if self.is_directory else ''} {os.path.basename(self.path)}"


Hook = Callable[[Call, Callable[[], Any]], Any]


class _Interception:
    def __init__(self, directory: str, hook: Hook) -> None:
        self._directory = directory
        self._hook = hook
        self._real = {name: getattr(os, name) for name in _BY_PATH + _BY_DESCRIPTOR}
        self._open: dict[int, tuple[str, bool]] = {}

    def by_path(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, int) or not self._is_ours(path):
                return real(path, *args, **kwargs)
            at_stake = args[0] if name in ("replace", "rename", "link") else path
            is_directory = name == "open" and bool(args[0] & os.O_DIRECTORY)
            seen = Call(name, os.fspath(at_stake), (path, *args), is_directory)
            result = self._hook(seen, lambda: real(path, *args, **kwargs))
            if name == "open":
                self._open[result] = (os.fspath(path), is_directory)
            return result

        return call

    def by_descriptor(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(descriptor: int, *args: Any) -> Any:
            if descriptor not in self._open:
                return real(descriptor, *args)
            path, is_directory = self._open[descriptor]
            if name == "close":
                del self._open[descriptor]  # before another thread gets the number again
            return self._hook(Call(name, path, (descriptor, *args), is_directory), lambda: real(descriptor, *args))

        return call

    def _is_ours(self, path: Any) -> bool:
        text = os.fsdecode(path)
        return text == self._directory or text.startswith(self._directory + os.sep)


@contextlib.contextmanager
def intercepted(directory: Path | str, hook: Hook) -> Iterator[None]:
    """``hook`` may be called from several threads at once.  Files that are open already are not seen."""
    interception = _Interception(os.fspath(directory), hook)
    with contextlib.ExitStack() as stack:
        for name in _BY_PATH:
            stack.enter_context(mock.patch.object(os, name, interception.by_path(name)))
        for name in _BY_DESCRIPTOR:
            stack.enter_context(mock.patch.object(os, name, interception.by_descriptor(name)))
        yield


def octets(buffers: Sequence[Any]) -> bytes:
    """What a write writes: arrays of any type as they lie in memory."""
    return b"".join(np.frombuffer(buffer, np.uint8).tobytes() for buffer in buffers)
