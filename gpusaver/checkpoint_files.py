"""The files of a checkpoint, found and removed by its prefix.

No function here keeps anything between calls, so all may be called from any thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable

from gpusaver.bundle import filenames
from gpusaver.bundle.table_writer import MAGIC
from gpusaver.errors import Error, NotFoundError, ResourceExhaustedError
from gpusaver.storage.base import Storage
from gpusaver.storage.routing import RoutedStorage

PathLike = str | bytes | os.PathLike[str] | os.PathLike[bytes]

#: Long enough for one that only looks whether the lock is free, too short to wait for a save.
_REMOVAL_WAIT_SECONDS = 1.0


def checkpoint_exists(checkpoint_prefix: PathLike, *, storage: Storage | None = None) -> bool:
    """Whether the prefix is a checkpoint: ``P.index`` is a file, or ``P`` is a V1 checkpoint.

    A V1 checkpoint is one file ``P``, or ``X-?????-of-NNNNN`` standing for the shards of ``X``.  A directory, the state
    file and the files of a V2 checkpoint are no prefixes.
    """
    return _first_file(storage or RoutedStorage(), os.fsdecode(checkpoint_prefix)) is not None


def get_checkpoint_mtimes(checkpoint_prefixes: Iterable[PathLike], *, storage: Storage | None = None) -> list[float]:
    """When each checkpoint was last written, in seconds since the epoch; those that do not exist are left out."""
    return [seconds for _, seconds in checkpoint_times(checkpoint_prefixes, storage=storage)]


def checkpoint_times(
    checkpoint_prefixes: Iterable[PathLike], *, storage: Storage | None = None
) -> list[tuple[str, float]]:
    """``(prefix, time)`` for those of the prefixes that exist, in the order given.

    Times are those of ``P.index`` or of the (first) V1 file.  A single path instead of several is a TypeError.
    """
    if isinstance(checkpoint_prefixes, str | bytes | os.PathLike):
        raise TypeError(f"expected a list of prefixes, found one path: {checkpoint_prefixes!r}")
    storage = storage or RoutedStorage()
    found = []
    for prefix in map(os.fsdecode, checkpoint_prefixes):
        path = _first_file(storage, prefix)
        if path is not None:
            try:
                found.append((prefix, storage.modified_time(path)))
            except NotFoundError:  # another process removed it meanwhile
                continue
    return found


def remove_checkpoint(
    checkpoint_prefix: PathLike, meta_graph_suffix: str = "meta", *, storage: Storage | None = None
) -> None:
    """Removes the files of a checkpoint: index, data of any number of shards, ``.meta``, or the V1 file or shards.

    Missing files are fine.  The index goes first, so that at no moment an index without its data is visible.  If a
    file cannot be removed the others are removed all the same, then the first error is raised.  FailedPreconditionError
    if the checkpoint is just being saved anew.
    """
    storage = storage or RoutedStorage()
    discard_checkpoint(storage, os.fsdecode(checkpoint_prefix), meta_graph_suffix, storage.remove)


def discard_checkpoint(
    storage: Storage, prefix: str, meta_graph_suffix: str, discard_data: Callable[[str], None]
) -> None:
    """:func:`remove_checkpoint`, with ``discard_data(path)`` for its data files."""
    try:
        lock = storage.lock(filenames.lock_path(filenames.index_path(prefix)), wait_seconds=_REMOVAL_WAIT_SECONDS)
    except NotFoundError:  # there is no such directory
        return
    except ResourceExhaustedError:  # nor any other file: removing some is just what helps
        _remove_files(storage, prefix, meta_graph_suffix, storage.remove)
        return
    try:
        _remove_files(storage, prefix, meta_graph_suffix, discard_data)
    finally:
        lock.release()


def _remove_files(storage: Storage, prefix: str, meta_graph_suffix: str, discard_data: Callable[[str], None]) -> None:
    directory, base = os.path.split(prefix)
    data = [os.path.join(directory, name) for name in storage.list(directory) if filenames.is_data_of(name, base)]
    meta = filenames.meta_graph_path(prefix, meta_graph_suffix)
    first_error: Error | None = None
    others = meta, *v1_files(storage, prefix)
    steps = (storage.remove, [filenames.index_path(prefix)]), (discard_data, data), (storage.remove, others)
    for remove, paths in steps:
        for path in paths:
            try:
                remove(path)
            except Error as error:
                first_error = first_error or error
    if first_error is not None:
        raise first_error


def _first_file(storage: Storage, prefix: str) -> str | None:
    """The file whose presence makes the prefix a checkpoint, or None if there is none."""
    index = filenames.index_path(prefix)
    if storage.exists(index):
        return index
    return next(iter(v1_files(storage, prefix)), None)


def v1_files(storage: Storage, prefix: str) -> list[str]:
    """The files of a V1 checkpoint, shards in order; empty if the prefix is none."""
    directory, base = os.path.split(prefix)
    stem, shards, total = base.rpartition("-?????-of-")
    if shards:
        pattern = re.compile(rf"{re.escape(stem)}-[0-9]{{5}}-of-{re.escape(total)}")
        names = [name for name in storage.list(directory) if pattern.fullmatch(name)]
    else:
        names = [base]
    return [path for name in names if _is_v1_file(storage, path := os.path.join(directory, name))]


def _is_v1_file(storage: Storage, path: str) -> bool:
    if path.endswith(filenames.INDEX_SUFFIX) or not storage.exists(path):
        return False
    try:
        file = storage.open(path)
    except NotFoundError:  # another process removed it meanwhile
        return False
    try:
        magic = bytearray(min(file.size, len(MAGIC)))
        file.read_into(file.size - len(magic), [memoryview(magic)])
        return magic == MAGIC  # a V1 checkpoint is one table, and tables end with this
    finally:
        file.close()
