"""What may be on the disk after a crash, given what was asked of the operating system before.

POSIX promises little, and this model takes no more::

    write, fallocate, truncate   of each 512-byte sector, and each new size, it is open whether it got to the disk,
                                 until fsync(file) has returned
    create, rename, unlink,      of each it is open whether it got to the disk, in any order, until fsync(directory)
    mkdir                        has returned; syncing a file does not make its name durable
    rename                       happens or does not, never half

A record is a list of operations; after ``record[:n]`` the operations that are open are free choices, and every
combination of choices is a crash state: the content of a directory.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from system_calls import CHANGES, Call, intercepted, octets

SECTOR_NBYTES = 512

#: Path of a file, relative to the directory that is looked at -> its bytes; None for a folder.
Content = dict[str, bytes | None]


class Operation(NamedTuple):
    """``name``: create, mkdir, rename, unlink, sync_directory; write, grow, cut, sync; acknowledged."""

    name: str
    path: str = ""
    #: Number of the file that it concerns: names come and go.
    file: int = -1
    target: str = ""
    offset: int = 0
    data: bytes = b""
    #: Bytes for grow and cut; the version for acknowledged.
    number: int = 0


class Recorder:
    """Runs ``job(acknowledged)`` and keeps, in ``record``, what it changes in the directory."""

    def __init__(self, directory: Path, job: Callable[[Callable[[int], object]], object]) -> None:
        self.record: list[Operation] = []
        self._directory = str(directory)
        self._numbers = itertools.count()
        self._files: dict[str, int] = {}
        self._by_descriptor: dict[int, int] = {}
        self._lock = threading.Lock()
        with intercepted(directory, self._hook):
            job(lambda version: self.record.append(Operation("acknowledged", number=version)))
        left = replayed(self.record)
        assert left == content_of(directory), "something went past the recorder"

    def _hook(self, call: Call, perform: Callable[[], Any]) -> Any:
        with self._lock:
            result = perform()
            self._note(call, result)
        return result

    def _note(self, call: Call, result: Any) -> None:
        path = os.path.relpath(call.path, self._directory)
        match call.name:
            case "open" if call.is_directory:
                pass
            case "open":
                flags = call.args[1]
                assert not flags & (os.O_TRUNC | os.O_APPEND), "not modelled"
                if flags & os.O_CREAT and path not in self._files:
                    self._files[path] = next(self._numbers)
                    self.record.append(Operation("create", path, self._files[path]))
                self._by_descriptor[result] = self._files[path]
            case "mkdir":
                self.record.append(Operation("mkdir", path))
            case "unlink" | "remove":
                del self._files[path]
                self.record.append(Operation("unlink", path))
            case "replace" | "rename":
                source = os.path.relpath(call.args[0], self._directory)
                if self._files.get(path) == self._files[source]:
                    return  # two names of one file: nothing happens
                self._files[path] = self._files.pop(source)
                self.record.append(Operation("rename", source, self._files[path], target=path))
            case "link":
                source = os.path.relpath(call.args[0], self._directory)
                self._files[path] = self._files[source]
                self.record.append(Operation("create", path, self._files[path]))
            case "fsync" if call.is_directory:
                self.record.append(Operation("sync_directory", path))
            case "fsync" | "posix_fallocate" | "ftruncate" | "pwritev" | "pwrite":
                self._note_file(call, self._by_descriptor[call.args[0]], path, result)
            case name:
                assert name not in CHANGES | {"write"}, f"{name} is not modelled"

    def _note_file(self, call: Call, file: int, path: str, result: Any) -> None:
        if call.name == "fsync":
            self.record.append(Operation("sync", path, file))
        elif call.name == "posix_fallocate":
            self.record.append(Operation("grow", path, file, number=call.args[1] + call.args[2]))
        elif call.name == "ftruncate":
            self.record.append(Operation("cut", path, file, number=call.args[1]))
        else:
            buffers = call.args[1] if call.name == "pwritev" else [call.args[1]]
            data = octets(buffers)[:result]
            self.record.append(Operation("write", path, file, offset=call.args[2], data=data))


def content_of(directory: Path) -> Content:
    paths = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes() for path in paths}


def materialise(content: Content, directory: Path) -> None:
    """Requires: an empty directory."""
    for path, data in content.items():
        if data is None:
            (directory / path).mkdir()
        else:
            (directory / path).write_bytes(data)


class Disk:
    """Names and bytes; operations are applied in the order in which they were recorded."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.folders: set[str] = set()
        self.bytes: dict[int, bytes] = {}

    def copy(self) -> Disk:
        other = Disk()
        other.names, other.folders, other.bytes = dict(self.names), set(self.folders), dict(self.bytes)
        return other

    def apply(self, operation: Operation) -> None:
        match operation.name:
            case "create":
                self.names[operation.path] = operation.file
            case "mkdir":
                self.folders.add(operation.path)
            case "unlink":
                self.names.pop(operation.path, None)
            case "rename":
                self.names.pop(operation.path, None)
                self.names[operation.target] = operation.file
            case "grow":
                self._resize(operation.file, max(operation.number, len(self.bytes.get(operation.file, b""))))
            case "cut":
                self._resize(operation.file, operation.number)
            case "write":
                before = self.bytes.get(operation.file, b"").ljust(operation.offset, b"\0")
                end = operation.offset + len(operation.data)
                self.bytes[operation.file] = before[: operation.offset] + operation.data + before[end:]

    def _resize(self, file: int, nbytes: int) -> None:
        self.bytes[file] = self.bytes.get(file, b"")[:nbytes].ljust(nbytes, b"\0")

    def content(self) -> Content:
        """What can be reached: a file in a folder that was lost is lost."""
        content: Content = dict.fromkeys(sorted(self.folders))
        for path, file in self.names.items():
            folder = os.path.dirname(path)
            if not folder or folder in self.folders:
                content[path] = self.bytes.get(file, b"")
        return dict(sorted(content.items()))


def replayed(record: list[Operation]) -> Content:
    disk = Disk()
    for operation in record:
        disk.apply(operation)
    return disk.content()


class CrashPoint:
    """The moment after ``record[:n]``: ``durable`` is surely on the disk, of each operation in ``open`` it is open."""

    def __init__(self, record: list[Operation], n: int) -> None:
        past = record[:n]
        synced = {(op.name, op.file if op.name == "sync" else op.path): at for at, op in enumerate(past)}
        self.acknowledged = max((op.number for op in past if op.name == "acknowledged"), default=None)
        self.durable = Disk()
        #: Each is there or is not.  What concerns lock files, whose content nobody relies on, goes together.
        self.open: list[list[Operation]] = []
        locks: list[Operation] = []
        for at, operation in enumerate(past):
            if operation.name in ("sync", "sync_directory", "acknowledged"):
                continue
            if operation.name in ("write", "grow", "cut"):
                is_durable = synced.get(("sync", operation.file), -1) > at
            else:
                is_durable = synced.get(("sync_directory", os.path.dirname(operation.path) or "."), -1) > at
            # Applying later what is open keeps the order: a sync makes durable all that came before it.
            if is_durable:
                self.durable.apply(operation)
            elif operation.path.endswith(".gpusaver-lock"):
                locks.append(operation)
            else:
                self.open += [[part] for part in sectors(operation)]
        if locks:
            self.open.append(locks)

    def states(self, limit: int, random: random.Random) -> Iterator[Content]:
        """The crash states: all of them if there are at most ``limit``, else so many, drawn."""
        count = len(self.open)
        if 1 << count <= limit:
            choices: Iterator[Any] = itertools.product((False, True), repeat=count)
        else:
            choices = (self._drawn(random) for _ in range(limit))
        for choice in choices:
            yield self.state(choice)

    def drawn(self, random: random.Random) -> Content:
        return self.state(self._drawn(random))

    def state(self, choice: list[bool]) -> Content:
        disk = self.durable.copy()
        for operations, is_there in zip(self.open, choice, strict=True):
            for operation in operations if is_there else ():
                disk.apply(operation)
        return disk.content()

    def _drawn(self, random: random.Random) -> list[bool]:
        """Half of the draws lose or keep nearly everything: bugs live where a single operation is out of line."""
        odds = random.choice((0.1, 0.5, 0.9))
        return [random.random() < odds for _ in self.open]


def sectors(operation: Operation) -> list[Operation]:
    """A write may be torn at every 512 bytes of the file; nothing else can be."""
    if operation.name != "write":
        return [operation]
    pieces, at, end = [], operation.offset, operation.offset + len(operation.data)
    while at < end:
        stop = min(end, (at // SECTOR_NBYTES + 1) * SECTOR_NBYTES)
        data = operation.data[at - operation.offset : stop - operation.offset]
        pieces.append(operation._replace(offset=at, data=data))
        at = stop
    return pieces


def _syncs_file(part: str) -> Callable[[list[Operation], int], bool]:
    """Whether an operation syncs a file that will be called so."""

    def matches(record: list[Operation], at: int) -> bool:
        later = (op.target for op in record[at:] if op.name == "rename" and op.file == record[at].file)
        return record[at].name == "sync" and re.search(part, next(later, "")) is not None

    return matches


def _syncs_after(name: str, part: str) -> Callable[[list[Operation], int], bool]:
    """Whether an operation syncs the directory right after such another."""

    def matches(record: list[Operation], at: int) -> bool:
        before = record[at - 1]
        is_it = before.name == name and re.search(part, before.target or before.path) is not None
        return record[at].name == "sync_directory" and is_it

    return matches


def _syncs_before_reuse(record: list[Operation], at: int) -> bool:
    """Whether an operation syncs the directory right before a spare is written over."""
    after = record[at + 1] if at + 1 < len(record) else Operation("")
    is_it = after.name == "rename" and all(name.endswith(".gpusaver-tmp") for name in (after.path, after.target))
    return record[at].name == "sync_directory" and is_it


#: The syncs of the protocol: what each makes durable, and how it is told from the others.
SYNCS: dict[str, Callable[[list[Operation], int], bool]] = {
    "data": _syncs_file(r"\.data-"),
    "index": _syncs_file(r"\.index$"),
    "meta graph": _syncs_file(r"\.meta$"),
    "manager's memory": _syncs_file(r"\.json$"),
    "state file": _syncs_file(r"checkpoint$"),
    "names of the data files": _syncs_after("rename", r"\.data-"),
    "commit": _syncs_after("rename", r"\.(index|meta)$"),
    "name of the state file": _syncs_after("rename", r"checkpoint$"),
    "folder": _syncs_after("mkdir", ""),
    "removal of what is written over": _syncs_before_reuse,
}


def without_sync(record: list[Operation], sync: str) -> list[Operation]:
    """The record of a program that forgot this sync."""
    return [operation for at, operation in enumerate(record) if not SYNCS[sync](record, at)]
