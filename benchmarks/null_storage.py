"""A storage that keeps nothing: what a save costs without its writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class _NullFile:
    alignment = 1
    ordered = False

    def write_at(self, offset: int, buffers: Sequence[memoryview]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


class _NullLock:
    is_exclusive = False

    def release(self) -> None: ...


class NullStorage:
    """See :class:`gpusaver.storage.base.Storage`; nothing that was written can be opened."""

    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
        return _NullFile()

    def prefers_direct(self, directory: str) -> bool:
        return False

    def open(self, path: str, *, uncached: bool = False) -> Any:
        raise NotImplementedError(f"{path}: nothing is kept here")

    def exists(self, path: str) -> bool:
        return False

    def is_directory(self, path: str) -> bool:
        return True

    def version(self, path: str) -> None:
        return None

    def link(self, source: str, path: str, *, target: str | None = None) -> None:
        return None

    def modified_time(self, path: str) -> float:
        return 0.0

    def list(self, directory: str) -> list[str]:
        return []

    def make_directory(self, path: str) -> None: ...

    def replace(self, source: str, target: str) -> None: ...

    def remove(self, path: str) -> None: ...

    def recycle(self, path: str, spare: str) -> None: ...

    def reuse(self, spare: str, path: str, nbytes: int, *, direct: bool = False) -> None: ...

    def sync_directory(self, path: str) -> None: ...

    def lock(self, path: str, *, wait_seconds: float = 0.0) -> Any:
        return _NullLock()

    def free_nbytes(self, directory: str) -> int | None:
        return None
