"""The files of an object store: on their way there, and being read.  See :mod:`gpusaver.storage.object_store`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from gpusaver.errors import Error, InternalError, OutOfRangeError
from gpusaver.storage.upload import Upload
from gpusaver.tensor import Buffer

if TYPE_CHECKING:
    from gpusaver.storage.object_store import ObjectStorage

#: What is larger goes up in parts, which are at least so large.
PART_NBYTES = 8 << 20


class KeptFile:
    """A small file in memory, until :meth:`ObjectStorage.replace` puts it."""

    alignment = 1
    ordered = False

    def __init__(self, nbytes: int, forget: Callable[[], None]) -> None:
        self.content = bytearray(nbytes)
        self.target: str | None = None
        self._forget = forget

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            self.content[offset : offset + buffer.nbytes] = _octets(buffer)
            offset += buffer.nbytes

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        self._forget()


class UploadedFile:
    """An object under way to its key, which is claimed.  See :class:`gpusaver.storage.base.WritableFile`."""

    alignment = 1
    ordered = True

    def __init__(self, storage: ObjectStorage, path: str, target: str, nbytes: int) -> None:
        self.target = target
        self._storage = storage
        self._path = path
        self._nbytes = nbytes
        self._position = 0
        self._parts: list[bytes] = []
        self._upload: Upload | None = None
        self._state: Literal["open", "complete", "gone"] = "open"
        storage.claim(target)
        if nbytes > PART_NBYTES:
            self._upload = Upload(lambda parts: storage.put_parts(target, parts, nbytes))

    @classmethod
    def copied(cls, storage: ObjectStorage, source: str, path: str, target: str) -> UploadedFile:
        """One that is complete: the server has copied ``source``."""
        file = cls(storage, path, target, 0)
        try:
            storage.copy(source, target)
        except BaseException:
            file.abort()
            raise
        file._state = "complete"
        return file

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self._state != "open" or offset < self._position:
            raise InternalError(f"{self.target}: offset {offset} after byte {self._position}, or after sync()")
        self._fill_up_to(offset)
        self._add(b"".join(map(_octets, buffers)))

    def _fill_up_to(self, offset: int) -> None:
        while self._position < offset:
            self._add(bytes(min(offset - self._position, PART_NBYTES)))

    def _add(self, part: bytes) -> None:
        self._position += len(part)
        if self._upload is None:
            self._parts.append(part)
        elif part:
            self._upload.add(part)

    def sync(self) -> None:
        if self._state != "open":
            return
        self._fill_up_to(self._nbytes)
        if self._upload is not None:
            self._upload.finish()
        else:
            self._storage.put(self.target, b"".join(self._parts), "overwrite")
            self._parts.clear()
        self._state = "complete"

    def close(self) -> None:
        self.sync()

    def abort(self) -> None:
        if self._state == "gone":
            return
        self.keep()
        if self._upload is not None:
            self._upload.abandon()
        with contextlib.suppress(Error):
            self._storage.remove(self.target)

    def keep(self) -> None:
        """It has its name: from now on the object is nobody's to take back."""
        self._state = "gone"
        self._storage.forget(self._path)


class ReadableObject:
    """See :class:`gpusaver.storage.base.ReadableFile`.  UnknownError if the object was replaced meanwhile."""

    parallel_reads = 8

    def __init__(self, storage: ObjectStorage, path: str, size: int, e_tag: str | None) -> None:
        self.size = size
        self._storage = storage
        self._path = path
        self._e_tag = e_tag

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        wanted = sum(buffer.nbytes for buffer in buffers)
        if not wanted:
            return
        if offset + wanted > self.size:
            raise OutOfRangeError(
                f"{self._path} ends at byte {self.size}: expected {wanted} at offset {offset}. The file was cut short"
            )
        data = self._storage.get_range(self._path, offset, wanted, self._e_tag)
        position = 0
        for buffer in buffers:
            _octets(buffer)[:] = data[position : position + buffer.nbytes]
            position += buffer.nbytes

    def read_each(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        for offset, buffer in zip(offsets, buffers, strict=True):
            self.read_into(offset, [buffer])

    def close(self) -> None:
        pass


class ReadableMemory:
    parallel_reads = 1

    def __init__(self, path: str, content: bytes) -> None:
        self.size = len(content)
        self._path = path
        self._content = memoryview(content)

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            if offset + buffer.nbytes > self.size:
                raise OutOfRangeError(f"{self._path} ends at byte {self.size}")
            _octets(buffer)[:] = self._content[offset : offset + buffer.nbytes]
            offset += buffer.nbytes

    def read_each(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        for offset, buffer in zip(offsets, buffers, strict=True):
            self.read_into(offset, [buffer])

    def close(self) -> None:
        pass


def _octets(buffer: Buffer) -> memoryview:
    return np.frombuffer(buffer, np.uint8).data if buffer.nbytes else memoryview(bytearray())
