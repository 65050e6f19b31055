"""Files that tell how much has been written to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from gpusaver.storage.base import WritableFile
from gpusaver.tensor import Buffer


class Meter:
    """Calls ``on_written(nbytes written so far, total_nbytes)``: one call at a time, in ascending order."""

    def __init__(self, total_nbytes: int, on_written: Callable[[int, int], None] | None) -> None:
        self._written = 0
        self._total = total_nbytes
        self._on_written = on_written
        self._lock = threading.Lock()

    def watched(self, files: Sequence[WritableFile]) -> Sequence[WritableFile]:
        """The same files; each write to one counts, from whichever thread."""
        return files if self._on_written is None else [_WatchedFile(file, self) for file in files]

    def add(self, nbytes: int) -> None:
        if self._on_written is None:
            return
        with self._lock:
            self._written = min(self._written + nbytes, self._total)  # the last block may be padded
            self._on_written(self._written, self._total)


class _WatchedFile:
    def __init__(self, file: WritableFile, meter: Meter) -> None:
        self.alignment = file.alignment
        self.ordered = file.ordered
        self._file = file
        self._meter = meter

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._file.write_at(offset, buffers)
        self._meter.add(sum(buffer.nbytes for buffer in buffers))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def abort(self) -> None:
        self._file.abort()
