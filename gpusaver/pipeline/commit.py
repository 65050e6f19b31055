"""Making a bundle appear whole, or not at all.

::

    lock of the prefix taken                                or FailedPreconditionError: somebody else is writing it
    data files under temporary names, space reserved       nothing visible
    ... written by the pipeline ...
    data files synced; index, and `.meta` if there is one, written under temporary names, synced
    strict: data and index read again and compared          DataLossError: the old checkpoint stays
    data files renamed; directory synced                    still no checkpoint: there is no index
    index renamed                                           <- the commit point
    `.meta` renamed; directory synced                       durable
    data files of the checkpoint that was there before: removed
    lock released

A prefix that exists already keeps its old files until the commit: a bundle of N shards is replaced by one of N + 1 (or
back), the surplus shards empty, so that old and new data files never share a name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple

from gpusaver.bundle.filenames import data_path, index_path, is_data_of, lock_path, split_data_path, temporary_path
from gpusaver.bundle.index import BundleIndex
from gpusaver.errors import DataLossError, Error, InternalError
from gpusaver.pipeline.check import bundle_problems
from gpusaver.storage.base import ReadableFile, Storage, WritableFile, new_token
from gpusaver.tensor import Buffer


class FileVersion(NamedTuple):
    """A file, and what :meth:`Storage.version` said of it."""

    path: str
    version: Hashable


class MetaFile(NamedTuple):
    """A `.meta` file to be.  ``twin``: one that got the same content; if that is still so, one file serves both."""

    path: str
    content: Callable[[], bytes]
    twin: FileVersion | None


#: Below this size O_DIRECT saves nothing: the page cache takes it in milliseconds.
DIRECT_MIN_NBYTES = 64 * 1024 * 1024


class _NoFileYet:
    """Stands for a data file until it is known whether it must be written."""

    alignment = 1
    ordered = False

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        raise InternalError("this data file was not created")

    def sync(self) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


class BundleCommit:
    """The files of one save under way.  Methods are called from one thread at a time.

    ``later``: data files for which :meth:`link` or :meth:`create` is called before anything is written to them.
    ``direct``: None asks the storage what suits the directory; True or False decides.  Raises FailedPreconditionError,
    naming the owner of the lock, if the prefix is being saved by another.
    """

    def __init__(
        self,
        storage: Storage,
        prefix: str,
        shard_nbytes: Sequence[int],
        *,
        direct: bool | None,
        later: Collection[int] = (),
    ) -> None:
        self._storage = storage
        self._prefix = prefix
        self._direct = direct
        self._directory, base = os.path.split(prefix)
        self._token = new_token()
        # Like the index's, so that whoever looks for leftovers knows whose it is: a suffix may be anything.
        self._meta_temporary = temporary_path(index_path(prefix), new_token())
        self.files: list[WritableFile] = []
        self._renamed: list[str] = []
        self._lock = storage.lock(lock_path(index_path(prefix)))
        try:
            self._create_all(base, shard_nbytes, later)
        except BaseException:
            self.abort()
            raise

    def _create_all(self, base: str, shard_nbytes: Sequence[int], later: Collection[int]) -> None:
        storage, prefix = self._storage, self._prefix
        self._old = [name for name in storage.list(self._directory) if is_data_of(name, base)]
        taken = {found[2] for found in map(split_data_path, self._old) if found is not None}
        self.num_shards = next(
            n for n in range(len(shard_nbytes), len(shard_nbytes) + len(taken) + 1) if n not in taken
        )
        #: Of the data files.
        self.paths = [data_path(prefix, shard, self.num_shards) for shard in range(self.num_shards)]
        self._nbytes = [*shard_nbytes, *[0] * (self.num_shards - len(shard_nbytes))]
        for shard in range(self.num_shards):
            self.files.append(_NoFileYet())
            if shard not in later:
                self.create(shard)

    def create(self, shard: int) -> None:
        """Makes a data file."""
        path, nbytes, direct = self.paths[shard], self._nbytes[shard], self._direct
        is_direct = nbytes >= DIRECT_MIN_NBYTES if direct is None else direct and nbytes > 0
        if is_direct and direct is None:
            is_direct = self._storage.prefers_direct(self._directory)
        self.files[shard] = self._storage.create(self._temporary(path), nbytes, direct=is_direct, target=path)

    def link(self, shard: int, source: FileVersion) -> bool:
        """Makes a data file of one that holds the same, complete; False if it must be written."""
        path = self.paths[shard]
        file = self._storage.link(source.path, self._temporary(path), target=path)
        if file is None:
            return False
        self.files[shard] = file
        if self._storage.version(source.path) == source.version:
            return True
        file.abort()  # somebody has changed the source
        self.files[shard] = _NoFileYet()
        return False

    def _temporary(self, path: str) -> str:
        return temporary_path(path, self._token)

    def sync(self) -> None:
        """The data files are complete.  Call it before :meth:`publish`."""
        for file in self.files:
            file.sync()
            file.close()

    def publish(self, index: bytes, meta: MetaFile | None = None, *, strict: bool = False) -> None:
        """Makes the bundle durable and visible, and with it the `.meta` file.

        ``strict``: if it can be read again as it was written.

        If it raises, call :meth:`abort`: then the prefix is as it was, unless only a step after the commit point
        failed; then the new checkpoint is there, perhaps not durable, perhaps without its `.meta`.
        """
        storage, final_index = self._storage, index_path(self._prefix)
        meta_file = None if meta is None else self._meta_file(meta)
        self._write(self._temporary(final_index), index)
        if strict:
            self._read_again(index)
        for path in self.paths:
            self._renamed.append(path)
            storage.replace(self._temporary(path), path)
        storage.sync_directory(self._directory)
        try:
            storage.replace(self._temporary(final_index), final_index)
        except Error:
            if self._may_be_committed():
                self._renamed.clear()
            raise
        self._keep()
        if meta is not None and meta_file is not None:
            self.files.append(meta_file)
            storage.replace(self._meta_temporary, meta.path)
            self.files.pop().abort()  # of two names of one file a rename leaves both
        storage.sync_directory(self._directory)
        for name in self._old:
            with contextlib.suppress(Error):  # garbage at worst, and the next save tries again
                storage.remove(os.path.join(self._directory, name))
        self._lock.release()

    def _read_again(self, written: bytes) -> None:
        def open_again(path: str) -> ReadableFile:
            return self._storage.open(self._temporary(path), uncached=True)

        path = self._temporary(index_path(self._prefix))
        problem: str | None = f"{path} is not what was written"
        with contextlib.closing(open_again(index_path(self._prefix))) as file:
            found = bytearray(len(written))
            file.read_into(0, [memoryview(found)])
        if found == written and file.size == len(written):
            problems = bundle_problems(
                BundleIndex(written, path),
                lambda shard: open_again(self.paths[shard]),
                lambda shard: self._temporary(self.paths[shard]),
                checksums=True,
            )
            problem = next(problems, None)
        if problem is not None:
            raise DataLossError(
                f"cannot save {self._prefix}: what was written differs when it is read again. {problem}. The disk, its "
                "cable or the memory is failing; save elsewhere"
            )

    def _meta_file(self, meta: MetaFile) -> WritableFile | None:
        """The `.meta` file, complete and durable under its temporary name; None if it is there under its own."""
        twin = meta.twin
        if twin is not None and twin.version is not None:
            if self._storage.version(meta.path) == twin.version:
                return None
            file = self._storage.link(twin.path, self._meta_temporary)
            if file is not None:
                self.files.append(file)
                if self._storage.version(self._meta_temporary) == twin.version:
                    return file
                self.files.pop().abort()  # somebody has changed the twin
        return self._write(self._meta_temporary, meta.content())

    def _write(self, temporary: str, content: bytes) -> WritableFile:
        """A small file, complete and durable under its temporary name."""
        file = self._storage.create(temporary, len(content))
        self.files.append(file)
        file.write_at(0, [memoryview(content)])
        file.sync()
        file.close()
        return file

    def _may_be_committed(self) -> bool:
        """After a rename of the index that failed: a network file system may have done it, and lost the answer."""
        try:
            return not self._storage.exists(self._temporary(index_path(self._prefix)))
        except Error:
            return True

    def _keep(self) -> None:
        """The new checkpoint is the one that readers see: it must not be taken away again."""
        self._renamed.clear()
        self.files.clear()

    def abort(self) -> None:
        """Removes what was written and releases the lock.  Never raises; what is committed stays."""
        for file in self.files:
            file.abort()
        for path in self._renamed:
            with contextlib.suppress(Error):
                self._storage.remove(path)
        self._keep()
        self._lock.release()
