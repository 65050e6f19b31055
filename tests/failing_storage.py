"""A storage whose n-th operation fails, as SQLite tests its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from gpusaver.errors import Error, PermissionDeniedError, ResourceExhaustedError, UnknownError
from gpusaver.storage.base import Buffer
from gpusaver.storage.local import LocalStorage

OPERATIONS = [
    *("create", "open", "exists", "is_directory", "modified_time", "list", "make_directory"),
    *("replace", "remove", "recycle", "reuse", "sync_directory", "prefers_direct", "lock", "free_nbytes"),
]

KINDS: dict[str, type[Error]] = {
    "EIO": UnknownError,
    "ENOSPC": ResourceExhaustedError,
    "EINTR": UnknownError,
    "EDQUOT": ResourceExhaustedError,
    "EROFS": PermissionDeniedError,
}


class FailingStorage(LocalStorage):
    """Counts every operation on it and on its files; ``fail_at`` is the number of the first that raises.

    ``abort`` and ``close`` of files never fail: the first must not, the second is what stands after an error.
    With ``lost_answer`` a rename that fails is carried out all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, str]] = []
        self.fail_at: int | None = None
        self.for_ever = False
        self.lost_answer = False
        self.kind = "EIO"

    def arm(self, fail_at: int | None, kind: str = "EIO", *, for_ever: bool = False, lost_answer: bool = False) -> None:
        self.log.clear()
        self.fail_at, self.kind, self.for_ever, self.lost_answer = fail_at, kind, for_ever, lost_answer

    def count(self, operation: str, path: str) -> bool:
        """Takes note; raises if it is this one's turn.  True: it is, but only the answer gets lost."""
        self.log.append((operation, path))
        number = len(self.log) - 1
        if self.fail_at is None or number < self.fail_at or (number > self.fail_at and not self.for_ever):
            return False
        if not (self.lost_answer and operation == "replace"):
            self.refuse(operation, path)
        return True

    def refuse(self, operation: str, path: str) -> None:
        raise KINDS[self.kind](f"cannot {operation} {path}: injected ({self.kind})")

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        return functools.partial(self._counted, name, attribute) if name in OPERATIONS else attribute

    def _counted(self, name: str, method: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        path_at_stake = args[0] if name in ("replace", "reuse") else path
        lost = self.count(name, path_at_stake)
        result = method(path, *args, **kwargs)
        if lost:
            self.refuse(name, path_at_stake)
        is_file = name in ("create", "open", "reuse") and result is not None
        return _File(self, path_at_stake, result) if is_file else result


class _File:
    def __init__(self, storage: FailingStorage, path: str, file: Any) -> None:
        self._storage = storage
        self._path = path
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._storage.count("write", self._path)
        self._file.write_at(offset, buffers)

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._storage.count("read", self._path)
        self._file.read_into(offset, buffers)

    def read_each(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        for offset, buffer in zip(offsets, buffers, strict=True):
            self.read_into(offset, [buffer])

    def sync(self) -> None:
        self._storage.count("sync", self._path)
        self._file.sync()
