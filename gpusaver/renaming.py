"""A checkpoint under other tensor names: a new index, beside data files that are hard links to the old ones.

::

    A.index  {a/w: shard 0, offset 0}          A.data-00000-of-00001  <---+
    B.index  {b/w: shard 0, offset 0}          B.data-00000-of-00001  ----+  one file, two names (or a copy)

Nothing writes into a data file once it is there, so both checkpoints may be used, and deleted, apart.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

from gpusaver.arguments import checkpoint_prefix, make_directory
from gpusaver.bundle import filenames
from gpusaver.bundle.coding import decode_slice_key, printable
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.index import BundleIndex, encode_index
from gpusaver.bundle.object_graph import OBJECT_GRAPH_KEY
from gpusaver.bundle.slices import slice_key
from gpusaver.checkpoint_files import PathLike, checkpoint_exists
from gpusaver.errors import InvalidArgumentError, UnimplementedError
from gpusaver.pipeline.chunk import CHUNK_NBYTES
from gpusaver.pipeline.commit import BundleCommit, FileVersion
from gpusaver.reader import read_table
from gpusaver.storage.base import Storage
from gpusaver.storage.routing import RoutedStorage


class Renaming(NamedTuple):
    """``names``: (old, new) of every tensor that got another name, sorted.  The rest counts data files."""

    names: list[tuple[str, str]]
    linked: int
    copied: int


def rename_tensors(
    source: PathLike,
    destination: PathLike,
    new_name: Callable[[str], str],
    *,
    dry_run: bool = False,
    storage: Storage | None = None,
) -> Renaming:
    """Makes the checkpoint ``destination``: that of the prefix ``source``, its tensors called ``new_name(old name)``.

    Only the index is written; data files are linked, or copied where links do not work.  A `.meta` file, which has the
    old names, does not come along, nor does the graph of objects of a TF2 checkpoint.  Nothing is verified.

    Raises InvalidArgumentError if two tensors would get one name, or a tensor none, or if ``destination`` exists;
    UnimplementedError for V1 and big-endian checkpoints, which :func:`gpusaver.conversion.convert` makes anew.
    """
    storage = storage or RoutedStorage()
    old, new = os.fsdecode(source), checkpoint_prefix(destination, None, padded=False)
    path = filenames.index_path(old)
    if not storage.exists(path) and checkpoint_exists(old, storage=storage):
        raise UnimplementedError(f"{old} is a V1 checkpoint, whose names and values are in one file; convert it first")
    index = BundleIndex(read_table(storage, path), path)
    if index.big_endian:
        raise UnimplementedError(f"{old} is big-endian: such checkpoints are read but not written; convert it first")
    entries, names = _rename(index, new_name)
    if dry_run:
        return Renaming(names, 0, 0)
    try:
        make_directory(storage, os.path.dirname(new), new)
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from error
    shards = range(index.num_shards)
    files = [filenames.data_path(old, shard, index.num_shards) for shard in shards]
    commit = BundleCommit(storage, new, [_size(storage, path) for path in files], direct=False, later=shards)
    try:
        _check_new(storage, new)
        linked = sum(_link_or_copy(storage, path, commit, shard) for shard, path in enumerate(files))
        commit.sync()
        commit.publish(encode_index(commit.num_shards, sorted(entries.items())))
    except BaseException:
        commit.abort()
        raise
    return Renaming(names, linked, len(files) - linked)


def _rename(index: BundleIndex, new_name: Callable[[str], str]) -> tuple[dict[bytes, Entry], list[tuple[str, str]]]:
    slice_keys = index.slice_keys()
    entries: dict[bytes, Entry] = {}
    names: list[tuple[str, str]] = []
    came_from: dict[bytes, bytes] = {}
    for key, entry in index.items():
        if key == OBJECT_GRAPH_KEY:
            continue
        name, part = decode_slice_key(key) if key in slice_keys else (key, None)
        old = name.decode("utf-8", "surrogateescape")
        renamed = new_name(old)
        new = renamed.encode("utf-8", "surrogateescape")
        if not new:
            raise InvalidArgumentError(f"{index.name}: {printable(name)} would get the empty name")
        if came_from.setdefault(new, name) != name:
            both = f"{printable(came_from[new])} and {printable(name)}"
            raise InvalidArgumentError(f"{index.name}: {both} would both be called {printable(new)}")
        if part is None and renamed != old:
            names.append((old, renamed))
        target = new if part is None else slice_key(new, part)
        if target in entries:
            raise InvalidArgumentError(f"{index.name}: {printable(new)} is the key of a slice; choose another name")
        entries[target] = entry
    return entries, names


def _check_new(storage: Storage, prefix: str) -> None:
    """Requires: the prefix is locked."""
    directory, base = os.path.split(prefix)
    left = [name for name in storage.list(directory) if filenames.is_data_of(name, base)]
    if left or checkpoint_exists(prefix, storage=storage):
        raise InvalidArgumentError(f"{prefix} exists ({', '.join(left[:3]) or 'a checkpoint'}); use another name")


def _size(storage: Storage, path: str) -> int:
    with contextlib.closing(storage.open(path)) as file:
        return file.size


def _link_or_copy(storage: Storage, path: str, commit: BundleCommit, shard: int) -> bool:
    """Whether the data file is linked."""
    if commit.shards.link(shard, FileVersion(path, storage.version(path))):
        return True
    commit.shards.create(shard)
    copy = commit.files[shard]
    with contextlib.closing(storage.open(path)) as file:
        buffer = memoryview(bytearray(min(CHUNK_NBYTES, file.size)))
        for start in range(0, file.size, CHUNK_NBYTES):
            part = buffer[: file.size - start]
            file.read_into(start, [part])
            copy.write_at(start, [part])
    return False
