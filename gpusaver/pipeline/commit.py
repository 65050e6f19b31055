"""Making a bundle appear whole, or not at all.

::

    lock of the prefix taken                                or FailedPreconditionError: somebody else is writing it
    data files under temporary names, space reserved       nothing visible (new files, or spares: see recycling.py)
    ... written by the pipeline ...
    data files synced; index, and `.meta` if there is one, written under temporary names, synced
    strict: data and index read again and compared          DataLossError: the old checkpoint stays
    data files renamed; directory synced                    still no checkpoint: there is no index
    index renamed                                           <- the commit point
    `.meta` renamed; directory synced                       durable
    data files of the checkpoint that was there before: removed, or kept as spares
    lock released

Several processes may write one bundle: each has its own data files (:class:`ShardFiles`), one has the commit as well.

A prefix that exists already keeps its old files until the commit: a bundle of N shards is replaced by one of N + 1 (or
back), the surplus shards empty, so that old and new data files never share a name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

from gpusaver.bundle.filenames import data_path, index_path, is_data_of, lock_path, split_data_path, temporary_path
from gpusaver.bundle.index import BundleIndex
from gpusaver.errors import DataLossError, Error, InternalError
from gpusaver.pipeline.check import bundle_problems
from gpusaver.pipeline.recycling import Recycler
from gpusaver.storage.base import Storage, WritableFile, new_token
from gpusaver.tensor import Buffer


class FileVersion(NamedTuple):
    """A file, and what :meth:`Storage.version` said of it."""

    path: str
    version: Hashable


#: Takes the bytes of a file, one piece after the other.
Emit = Callable[[bytes | bytearray], object]


class MetaFile(NamedTuple):
    """A `.meta` file to be.

    ``write`` hands its content over.  ``twin``: one that got the same content; if that is still so, one file serves
    both.
    """

    path: str
    write: Callable[[Emit], None]
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


class ShardFiles:
    """Data files of a save under way, under temporary names, space reserved.  One thread at a time.

    ``nbytes``: shard -> size of its file; those ``later`` are made by :meth:`create` or :meth:`link`.  ``token`` is
    that of the whole save.  ``direct``: None asks the storage what suits the directory; True or False decides.
    ``recycler``: may have files to write over.
    """

    def __init__(
        self,
        storage: Storage,
        prefix: str,
        num_shards: int,
        token: str,
        nbytes: Mapping[int, int],
        *,
        direct: bool | None,
        later: Collection[int] = (),
        recycler: Recycler | None = None,
    ) -> None:
        self.files: list[WritableFile] = []
        self._storage = storage
        self._recycler = recycler or Recycler(storage)
        self._direct = direct
        self._nbytes = dict(nbytes)
        self._places = {shard: place for place, shard in enumerate(nbytes)}
        self._finals = [data_path(prefix, shard, num_shards) for shard in nbytes]
        self._paths = [temporary_path(path, token) for path in self._finals]
        try:
            for shard in nbytes:
                self.files.append(_NoFileYet())
                if shard not in later:
                    self.create(shard)
        except BaseException:
            self.abort()
            raise

    def create(self, shard: int) -> None:
        place, nbytes, direct = self._places[shard], self._nbytes[shard], self._direct
        path, final = self._paths[place], self._finals[place]
        is_direct = nbytes >= DIRECT_MIN_NBYTES if direct is None else direct and nbytes > 0
        if is_direct and direct is None:
            is_direct = self._storage.prefers_direct(os.path.dirname(final))
        file = self._recycler.reuse(path, nbytes, direct=is_direct)
        if file is None:
            file = self._storage.create(path, nbytes, direct=is_direct, target=final)
        self.files[place] = file

    def link(self, shard: int, source: FileVersion) -> bool:
        """Makes the file of one that holds the same, complete; False if it must be created and written."""
        place = self._places[shard]
        file = self._storage.link(source.path, self._paths[place], target=self._finals[place])
        if file is None:
            return False
        self.files[place] = file
        if self._storage.version(source.path) == source.version:
            return True
        file.abort()  # somebody has changed the source
        self.files[place] = _NoFileYet()
        return False

    def sync(self) -> None:
        """The data files are complete."""
        for file in self.files:
            file.sync()
            file.close()

    def damage(self, index: bytes) -> str | None:
        """The first thing that differs from ``index``, whose shards these are, when they are read from the medium."""
        problems = bundle_problems(
            BundleIndex(index, "the index to be written"),
            lambda shard: self._storage.open(self._paths[shard], uncached=True),
            lambda shard: self._paths[shard],
            checksums=True,
            some_slices=True,
        )
        return next(problems, None)

    def keep(self) -> None:
        """They have got other names, or belong to somebody else now."""
        self.files.clear()

    def abort(self) -> None:
        """Removes what was written.  Never raises."""
        for file in self.files:
            file.abort()
        self.keep()


class BundleCommit:
    """The files of one save under way.  Methods are called from one thread at a time.

    ``elsewhere``: shards whose files other processes write, as :class:`ShardFiles` with this commit's ``num_shards``
    and ``token``.  ``direct``, ``later``, ``recycler``: as there.  Raises FailedPreconditionError, naming the owner of
    the lock, if the prefix is being saved by another.
    """

    def __init__(
        self,
        storage: Storage,
        prefix: str,
        shard_nbytes: Sequence[int],
        *,
        direct: bool | None,
        elsewhere: Collection[int] = (),
        later: Collection[int] = (),
        recycler: Recycler | None = None,
    ) -> None:
        self._storage = storage
        self._recycler = recycler or Recycler(storage)
        self._prefix = prefix
        self._directory, base = os.path.split(prefix)
        self.token = new_token()
        # Like the index's, so that whoever looks for leftovers knows whose it is: a suffix may be anything.
        self._meta_temporary = temporary_path(index_path(prefix), new_token())
        self._shards: ShardFiles | None = None
        self._elsewhere = elsewhere
        self._written: list[WritableFile] = []
        self._renamed: list[str] = []
        #: Whether readers see the new checkpoint, or may: from then on its files must stay.
        self.is_committed = False
        self._lock = storage.lock(lock_path(index_path(prefix)))
        try:
            self._create(base, shard_nbytes, direct, later)
        except BaseException:
            self.abort()
            raise

    def _create(self, base: str, shard_nbytes: Sequence[int], direct: bool | None, later: Collection[int]) -> None:
        storage, prefix = self._storage, self._prefix
        self._old = [name for name in storage.list(self._directory) if is_data_of(name, base)]
        taken = {found[2] for found in map(split_data_path, self._old) if found is not None}
        self.num_shards = next(
            n for n in range(len(shard_nbytes), len(shard_nbytes) + len(taken) + 1) if n not in taken
        )
        #: The names that the data files get.
        self.paths = [data_path(prefix, shard, self.num_shards) for shard in range(self.num_shards)]
        sizes = dict(enumerate([*shard_nbytes, *[0] * (self.num_shards - len(shard_nbytes))]))
        mine = {shard: nbytes for shard, nbytes in sizes.items() if shard not in self._elsewhere}
        self._shards = ShardFiles(
            storage, prefix, self.num_shards, self.token, mine, direct=direct, later=later, recycler=self._recycler
        )

    @property
    def shards(self) -> ShardFiles:
        """The data files that are not ``elsewhere``."""
        assert self._shards is not None
        return self._shards

    @property
    def files(self) -> list[WritableFile]:
        """The data files that are not ``elsewhere``, in the order of their shards."""
        return self._shards.files if self._shards is not None else []

    def _temporary(self, path: str) -> str:
        return temporary_path(path, self.token)

    def sync(self) -> None:
        """The data files are complete.  Call it before :meth:`publish`."""
        if self._shards is not None:
            self._shards.sync()

    def damage(self, index: bytes) -> str | None:
        """See :meth:`ShardFiles.damage`."""
        return self._shards.damage(index) if self._shards is not None else None

    def publish(self, index: bytes, meta: MetaFile | None = None, *, strict: bool = False) -> None:
        """Makes the bundle durable and visible, and with it the `.meta` file.

        ``strict``: if it can be read again as it was written (data files that are not ``elsewhere``).

        If it raises, call :meth:`abort`: then the prefix is as it was, unless only a step after the commit point
        failed; then the new checkpoint is there, perhaps not durable, perhaps without its `.meta`.
        """
        storage, final_index = self._storage, index_path(self._prefix)
        meta_file = None if meta is None else self._meta_file(meta)
        self._write(self._temporary(final_index), len(index), lambda emit: emit(index))
        if strict:
            self._read_again(index)
        for path in self.paths:
            self._renamed.append(path)
            storage.replace(self._temporary(path), path)
        storage.sync_directory(self._directory)
        try:
            storage.replace(self._temporary(final_index), final_index)
        except Error:
            self.is_committed = self._may_be_committed()
            if self.is_committed:
                self._renamed.clear()
            raise
        self.is_committed = True
        self._keep()
        if meta is not None and meta_file is not None:
            self._written.append(meta_file)
            storage.replace(self._meta_temporary, meta.path)
            self._written.pop().abort()  # of two names of one file a rename leaves both
        storage.sync_directory(self._directory)
        for name in self._old:
            with contextlib.suppress(Error):  # garbage at worst, and the next save tries again
                self._recycler.give_up(os.path.join(self._directory, name))
        self._lock.release()

    def _read_again(self, written: bytes) -> None:
        path = self._temporary(index_path(self._prefix))
        problem: str | None = f"{path} is not what was written"
        with contextlib.closing(self._storage.open(path, uncached=True)) as file:
            found = bytearray(len(written))
            file.read_into(0, [memoryview(found)])
        if found == written and file.size == len(written):
            # Of several processes each has looked at its own files.
            problem = None if self._elsewhere else self.damage(written)
        if problem is not None:
            raise differs_when_read_again(self._prefix, problem)

    def _meta_file(self, meta: MetaFile) -> WritableFile | None:
        """The `.meta` file, complete and durable under its temporary name; None if it is there under its own."""
        twin = meta.twin
        if twin is not None and twin.version is not None:
            if self._storage.version(meta.path) == twin.version:
                return None
            file = self._storage.link(twin.path, self._meta_temporary)
            if file is not None:
                self._written.append(file)
                if self._storage.version(self._meta_temporary) == twin.version:
                    return file
                self._written.pop().abort()  # somebody has changed the twin
        return self._write(self._meta_temporary, 0, meta.write)

    def _write(self, temporary: str, nbytes: int, write: Callable[[Emit], object]) -> WritableFile:
        """A small file, complete and durable under its temporary name.  ``nbytes``: 0 where that is not known yet."""
        file = self._storage.create(temporary, nbytes)
        self._written.append(file)
        position = 0

        def emit(content: bytes | bytearray) -> None:
            nonlocal position
            if content:
                file.write_at(position, [memoryview(content)])
            position += len(content)

        write(emit)
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
        self._written.clear()
        if self._shards is not None:
            self._shards.keep()

    def abort(self) -> None:
        """Removes what was written and releases the lock.  Never raises; what is committed stays."""
        paths = self._renamed
        if self._shards is not None:
            self._shards.abort()
            # Whoever writes them may be gone.
            paths = [*paths, *(self._temporary(self.paths[shard]) for shard in self._elsewhere)]
            if not self.is_committed:  # where nothing can be renamed they have their names already
                paths += [self.paths[shard] for shard in self._elsewhere]
        for file in self._written:
            file.abort()
        for path in paths:
            with contextlib.suppress(Error):
                self._storage.remove(path)
        self._keep()
        self._lock.release()


def differs_when_read_again(prefix: str, problem: str) -> DataLossError:
    return DataLossError(
        f"cannot save {prefix}: what was written differs when it is read again. {problem}. The disk, its "
        "cable or the memory is failing; save elsewhere"
    )
