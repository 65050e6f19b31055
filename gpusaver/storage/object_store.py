"""Objects of S3, Google Cloud Storage, Azure and what speaks like them, and of this process's memory, by obstore.

Here a file appears whole or not at all, nothing can be renamed, and nobody can be kept out.  What the rest of gpusaver
does on a file system becomes::

    data file, temporary, with a target    the target is claimed (created, if it is not there); chunks go up in one
                                           streamed multipart put, which ends, and takes the claim's place, with sync()
    other temporary file, then replace()   kept in memory; put by replace()
    lock(X), then replace(..., X)          the version of X is noted; X is replaced on condition that it still has that
                                           version, else ChangedError: of two writers one learns of the other
    release(), sync_directory()            nothing

A put on condition whose answer got lost is told from one that was refused by its content.  Errors name the path, and of
obstore's text only what cannot hold a secret.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Literal, cast

import obstore
from obstore import exceptions
from obstore.store import MemoryStore, from_url

from gpusaver.errors import (
    Error,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    UnimplementedError,
    UnknownError,
)
from gpusaver.storage.base import LOCK_SECONDS, LOCK_SUFFIX, TEMPORARY_SUFFIX, ChangedError, new_token
from gpusaver.storage.object_files import PART_NBYTES, KeptFile, ReadableMemory, ReadableObject, UploadedFile

#: Parts of a multipart put: S3 takes so many, of at least 5 MiB and at most 5 GiB.
MAX_PARTS = 10_000
#: Of parts under way, for each file that is being written.
_IN_FLIGHT_NBYTES = 64 << 20
#: Larger objects cannot be copied by one request (S3).
COPY_LIMIT_NBYTES = 5 << 30

#: obstore repeats what fails, by default ten times and for three minutes, and waits 30 s for an answer; but not puts on
#: condition whose answer is lost.
_ATTEMPTS = 6
_FIRST_DELAY_SECONDS = 0.1
_RETRY_SECONDS = 180.0

_log = logging.getLogger("gpusaver")

#: A put replaces whatever is there, is refused if anything is, or if it is not this version.
Condition = Literal["overwrite", "create"] | dict[str, str]

_KINDS: list[tuple[type[Exception], type[Error]]] = [
    (FileNotFoundError, NotFoundError),
    (exceptions.AlreadyExistsError, ChangedError),
    (exceptions.PreconditionError, ChangedError),
    (exceptions.PermissionDeniedError, PermissionDeniedError),
    (exceptions.UnauthenticatedError, PermissionDeniedError),
    (exceptions.NotSupportedError, UnimplementedError),
    (NotImplementedError, UnimplementedError),
    (exceptions.InvalidPathError, InvalidArgumentError),
    (exceptions.UnknownConfigurationKeyError, InvalidArgumentError),
    (exceptions.BaseError, UnknownError),
    (ValueError, InvalidArgumentError),  # the path is none
    (OSError, UnknownError),
]
_FOREIGN = tuple({foreign for foreign, _ in _KINDS})

#: obstore's threads are not in a forked child: there, every call would hang.
_process = os.getpid()


def _text(error: Exception) -> str:
    """What obstore says, without what follows: the request with its headers, the server's answer, signatures."""
    full = str(error)
    code = re.search(r"<Code>(\w{1,80})</Code>", full)
    line = full.partition("\n")[0].partition("<?xml")[0]
    line = re.sub(r"//[^/@\s]*@", "//", line)
    line = re.sub(r"\?\S*", "", line).strip().rstrip(":")
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(r"SECRET|TOKEN|KEY|PASSWORD|CREDENTIAL|SAS", name.upper()):
            line = line.replace(value, "***")
    return f"{line[:400]} ({code[1]})" if code else line[:400]


@contextlib.contextmanager
def _translated(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except Error:
        raise
    except _FOREIGN as error:
        kind = next(kind for foreign, kind in _KINDS if isinstance(error, foreign))
        # Not "from error": tracebacks would print all of it.
        raise kind(f"cannot {action} {path}: {_text(error)}") from None


class VersionLock:
    """See :class:`gpusaver.storage.base.Lock`.  Keeps nobody out: knows what was there when it was taken."""

    is_exclusive = False

    def __init__(self, condition: Condition, forget: Callable[[VersionLock], None]) -> None:
        self.condition = condition
        self._forget = forget

    def release(self) -> None:
        self._forget(self)


class ObjectStorage:
    """See :class:`gpusaver.storage.base.Storage`.  Paths are URLs below ``root``: ``s3://bucket``, ``gs://bucket``,
    ``az://container``, ``memory://name``.

    ``store``: an object of :mod:`obstore.store` that holds the keys, for options that environment variables do not
    give; without it one is made for ``root``, with credentials and endpoint as obstore finds them.
    """

    def __init__(self, root: str, store: Any = None) -> None:
        self._root = root
        self._store = store if store is not None else _open_store(root, hash(frozenset(os.environ.items())))
        self._locks: dict[str, VersionLock] = {}
        #: By temporary name: files that have not got their names yet.
        self._unnamed: dict[str, KeptFile | UploadedFile] = {}
        self._has_warned = False

    # -- requests

    def _key(self, path: str) -> str:
        if os.getpid() != _process:
            raise FailedPreconditionError(
                f"{path}: object stores cannot be used in a forked child; start processes by 'spawn' or 'forkserver'"
            )
        if not (path + "/").startswith(self._root + "/"):
            raise InvalidArgumentError(f"{path} is not below {self._root}")
        return re.sub("/+", "/", path[len(self._root) :]).strip("/")

    def _head(self, path: str) -> Any:
        with _translated("look at", path):
            return obstore.head(self._store, self._key(path))

    def get_range(self, path: str, start: int, nbytes: int, e_tag: str | None) -> memoryview:
        options: Any = {"range": (start, start + nbytes)}
        if e_tag is not None:
            options["if_match"] = e_tag
        try:
            with _translated("read", path):
                data = obstore.get(self._store, self._key(path), options=options).bytes()
        except ChangedError as error:
            raise UnknownError(f"{error}. It was replaced while it was being read: open it again") from None
        found = memoryview(data)
        if found.nbytes != nbytes:
            raise OutOfRangeError(f"{path}: expected {nbytes} bytes at offset {start}, found {found.nbytes}")
        return found

    def put_parts(self, path: str, parts: Iterator[bytes], nbytes: int) -> None:
        """One streamed put; an error that ``parts`` raises ends it, and comes out."""
        part_nbytes = part_size(nbytes)
        with _translated("write", path):
            obstore.put(
                self._store,
                self._key(path),
                parts,
                use_multipart=True,
                chunk_size=part_nbytes,
                max_concurrency=max(2, _IN_FLIGHT_NBYTES // part_nbytes),
            )

    def put(self, path: str, data: bytes, condition: Condition) -> Condition:
        """Returns the condition that is true from now on.

        ChangedError if something else is there; UnknownError leaves open whether it was put.
        """
        if condition == "overwrite":
            with _translated("write", path):
                return _version(obstore.put(self._store, self._key(path), data, use_multipart=False))
        delay, deadline = _FIRST_DELAY_SECONDS, time.monotonic() + _RETRY_SECONDS
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with _translated("write", path):
                    mode = cast(Any, condition)
                    return _version(obstore.put(self._store, self._key(path), data, mode=mode, use_multipart=False))
            except ChangedError:
                # The put that was refused may be the second of one whose answer was lost.
                if (found := self._version_of(path, data)) is not None:
                    return found
                raise
            except UnimplementedError:
                self._warn_once()
                return self.put(path, data, "overwrite")
            except UnknownError:
                with contextlib.suppress(Error):
                    if (found := self._version_of(path, data)) is not None:
                        return found
                if attempt == _ATTEMPTS or time.monotonic() + delay > deadline:
                    raise
            time.sleep(delay)
            delay *= 2
        raise AssertionError

    def _version_of(self, path: str, data: bytes) -> Condition | None:
        """The version of what is there, if that is this."""
        try:
            with _translated("read", path):
                found = obstore.get(self._store, self._key(path))
                return _version(found.meta) if found.meta["size"] == len(data) and found.bytes() == data else None
        except NotFoundError:
            return None

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s has no conditional writes; two Savers with one prefix would disturb each other", self._root
            )

    def claim(self, path: str) -> None:
        """Makes sure that no other writer, of any process, will write this object."""
        try:
            self.put(path, f"claimed by a gpusaver that is writing it: {new_token()}\n".encode(), "create")
        except ChangedError:
            raise FailedPreconditionError(
                f"cannot create {path}: it is there already, perhaps of another Saver that is writing the same prefix"
            ) from None

    # -- Storage

    def create(
        self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None
    ) -> KeptFile | UploadedFile:
        file: KeptFile | UploadedFile
        if target is None and path.endswith(TEMPORARY_SUFFIX):
            file = KeptFile(nbytes, lambda: self.forget(path))
        else:
            file = UploadedFile(self, path, target or path, nbytes)
        if path.endswith(TEMPORARY_SUFFIX):
            self._unnamed[path] = file
        return file

    def forget(self, path: str) -> None:
        self._unnamed.pop(path, None)

    def prefers_direct(self, directory: str) -> bool:
        return False

    def open(self, path: str, *, uncached: bool = False) -> ReadableObject | ReadableMemory:
        unnamed = self._unnamed.get(path)
        if isinstance(unnamed, KeptFile):
            return ReadableMemory(path, bytes(unnamed.content))
        where = path if unnamed is None else unnamed.target
        found = self._head(where)
        return ReadableObject(self, where, found["size"], found["e_tag"])

    def exists(self, path: str) -> bool:
        if path in self._unnamed:
            return True
        try:
            return bool(self._key(path)) and self._head(path) is not None
        except NotFoundError:
            return False

    def is_directory(self, path: str) -> bool:
        """Whether there is an object below; the root is one always."""
        key = self._key(path)
        if not key:
            return True
        with _translated("list", path):
            return any(obstore.list(self._store, prefix=key, chunk_size=1))

    def version(self, path: str) -> Hashable | None:
        try:
            found = self._head(path)
        except Error:
            return None
        if found["e_tag"] is None and found["version"] is None:
            return None
        return found["e_tag"], found["version"], found["size"]

    def link(self, source: str, path: str, *, target: str | None = None) -> UploadedFile | None:
        """A copy that the server makes; None where one request cannot."""
        if target is None:
            return None
        try:
            file = UploadedFile.copied(self, source, path, target)
        except Error:  # then it is written
            return None
        self._unnamed[path] = file
        return file

    def modified_time(self, path: str) -> float:
        return float(self._head(path)["last_modified"].timestamp())

    def list(self, directory: str) -> list[str]:
        key = self._key(directory)
        with _translated("list", directory):
            found = obstore.list_with_delimiter(self._store, prefix=key or None)
        paths = [*(entry["path"] for entry in found["objects"]), *found["common_prefixes"]]
        # Some servers have an object for the directory itself.
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths if path.strip("/") != key)

    def make_directory(self, path: str) -> None:
        """There are none, and none is missing."""

    def replace(self, source: str, target: str) -> None:
        file = self._unnamed.get(source)
        if isinstance(file, KeptFile):
            self._put_kept(source, file, target)
        elif file is not None or source.endswith(TEMPORARY_SUFFIX):
            # It is under its target since it was synced, by this process or another.
            if not self.exists(target):
                raise NotFoundError(f"cannot rename {source}: neither it nor {target} is there")
            if file is not None:
                file.keep()
        else:
            self.copy(source, target)
            self.remove(source)

    def _put_kept(self, source: str, file: KeptFile, target: str) -> None:
        lock = self._locks.get(target)
        try:
            condition = self.put(target, bytes(file.content), lock.condition if lock is not None else "overwrite")
        except UnknownError:
            self.forget(source)  # for it may be there
            raise
        if lock is not None:
            lock.condition = condition
        self.forget(source)

    def copy(self, source: str, target: str) -> None:
        """By the server, whole or not at all.  UnimplementedError beyond what it copies at once."""
        if (nbytes := self._head(source)["size"]) > COPY_LIMIT_NBYTES:
            raise UnimplementedError(f"cannot copy {source}: {nbytes} bytes, one request copies {COPY_LIMIT_NBYTES}")
        with _translated(f"copy {source} to", target):
            obstore.copy(self._store, self._key(source), self._key(target))

    def remove(self, path: str) -> None:
        unnamed = self._unnamed.pop(path, None)
        if isinstance(unnamed, KeptFile):
            return
        with contextlib.suppress(NotFoundError), _translated("remove", path):
            obstore.delete(self._store, self._key(path if unnamed is None else unnamed.target))

    def recycle(self, path: str, spare: str) -> None:
        """Objects are never written over."""
        self.remove(path)

    def reuse(self, spare: str, path: str, nbytes: int, *, direct: bool = False) -> None:
        """See :meth:`recycle`: there is no spare."""

    def sync_directory(self, path: str) -> None:
        pass

    def lock(self, path: str, *, wait_seconds: float = LOCK_SECONDS) -> VersionLock:
        """Never waits: see the head of the module."""
        target = path.removesuffix(LOCK_SUFFIX)
        condition: Condition = "create"
        with contextlib.suppress(NotFoundError):
            condition = _version(self._head(target))

        def forget(lock: VersionLock) -> None:
            if self._locks.get(target) is lock:
                del self._locks[target]

        self._locks[target] = VersionLock(condition, forget)
        return self._locks[target]

    def free_nbytes(self, directory: str) -> int | None:
        return None


def part_size(nbytes: int) -> int:
    """Of the parts of an upload of ``nbytes`` bytes: whole MiB, 8 where that gives no more than 10,000."""
    needed = -(-nbytes // MAX_PARTS)
    return max(PART_NBYTES, -(-needed // (1 << 20)) << 20)


def _version(found: Any) -> Condition:
    """Of the answer to a put or to a head."""
    version = {name: str(found[name]) for name in ("e_tag", "version") if found[name] is not None}
    return version or "overwrite"


@functools.lru_cache(maxsize=16)
def _open_store(root: str, environment: int) -> Any:
    """Kept: a store has its connections.  ``environment``: it depends on that too."""
    if root.startswith("memory://"):
        return _memory_store(root)
    with _translated("open", root):
        return from_url(root)


@functools.cache
def _memory_store(root: str) -> Any:
    return MemoryStore()
