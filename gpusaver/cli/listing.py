"""The checkpoints of a directory, and the way from a path to a checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import click

from gpusaver.bundle import filenames
from gpusaver.bundle.index import BundleIndex
from gpusaver.checkpoint_files import checkpoint_exists, checkpoint_times, v1_files
from gpusaver.checkpoint_state import get_checkpoint_state
from gpusaver.errors import Error, InvalidArgumentError, NotFoundError
from gpusaver.finding import prefix_of
from gpusaver.reader import CheckpointReader, read_table
from gpusaver.storage.base import ReadableFile, Storage
from gpusaver.storage.routing import RoutedStorage
from gpusaver.tensor import Buffer

_NO_V1 = re.compile(r"\.(index|meta|json|npz|npy|safetensors|pt|gpusaver-lock|gpusaver-tmp)\Z")
_V1_SHARD = re.compile(r"-[0-9]{5}-of-([0-9]{5,})\Z")


class Listed(NamedTuple):
    """``modified``: seconds since the epoch.  ``state``: "latest", "listed", and what is wrong, in words."""

    prefix: str
    stem: str
    step: int | None
    modified: float
    nbytes: int
    state: list[str]


def regex(ctx: click.Context, option: click.Parameter, value: str | None) -> re.Pattern[str] | None:
    """Callback of an option that is a regular expression."""
    try:
        return None if value is None else re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"{value!r} is no regular expression: {error}") from error


def storage_of(path: str) -> Storage:
    """Where the files of a path are."""
    return RoutedStorage()


def open_reader(path: str) -> CheckpointReader:
    return CheckpointReader(prefix_of(path))


def checkpoints(directory: str, latest_filename: str | None = None) -> list[Listed]:
    """All of a directory, also V1's, by name and step.  NotFoundError if there is no such directory."""
    storage = storage_of(directory)
    if not storage.is_directory(directory):
        raise NotFoundError(f"there is no directory {directory}")
    try:
        state = get_checkpoint_state(directory, latest_filename)
    except InvalidArgumentError:
        state = None
    latest = _same(state.model_checkpoint_path) if state is not None else ""
    listed = {_same(path) for path in state.all_model_checkpoint_paths} if state is not None else set()
    names = storage.list(directory)
    found = []
    for prefix, modified in checkpoint_times([os.path.join(directory, name) for name in _prefixes(names)]):
        stem, step = filenames.split_step(os.path.basename(prefix))
        words = ["latest"] * (_same(prefix) == latest) + ["listed"] * (_same(prefix) in listed - {latest})
        nbytes, problem = _files(storage, prefix, names)
        found.append(Listed(prefix, stem, step, modified, nbytes, words + [problem] * bool(problem)))
    return sorted(found, key=lambda c: (c.stem, c.step is not None, c.step or 0))


def _same(path: str) -> str:
    return os.path.abspath(path) if path else ""


def _prefixes(names: Sequence[str]) -> list[str]:
    """Candidates: of every index, of every V1 file and set of shards; base names."""
    found: dict[str, None] = {}
    for name in names:
        if name.endswith(filenames.INDEX_SUFFIX):
            found[name.removesuffix(filenames.INDEX_SUFFIX)] = None
        elif not _NO_V1.search(name) and filenames.split_data_path(name) is None:
            found[_V1_SHARD.sub(r"-?????-of-\1", name)] = None
    return [name for name in found if name]


def _files(storage: Storage, prefix: str, names: Sequence[str]) -> tuple[int, str]:
    """The bytes of all its files, and what a look at them says is wrong."""
    directory, base = os.path.split(prefix)
    index = filenames.index_path(prefix)
    if not storage.exists(index):
        return sum(_size(storage, path) for path in v1_files(storage, prefix)), ""
    data = [os.path.join(directory, name) for name in names if filenames.is_data_of(name, base)]
    nbytes = sum(_size(storage, path) for path in (index, *data))
    try:
        shards = BundleIndex(read_table(storage, index), index).num_shards
    except Error:
        return nbytes, "index damaged"
    missing = {filenames.data_path(prefix, shard, shards) for shard in range(shards)}.difference(data)
    return nbytes, f"{len(missing)} of {shards} data files missing" if missing else ""


def _size(storage: Storage, path: str) -> int:
    try:
        file = storage.open(path)
    except NotFoundError:  # removed meanwhile
        return 0
    file.close()
    return file.size


def data_nbytes(prefix: str) -> int:
    """Of all files that hold tensors; 0 if there is no such checkpoint."""
    storage = storage_of(prefix)
    directory, base = os.path.split(prefix)
    if not checkpoint_exists(prefix):
        return 0
    return _files(storage, prefix, storage.list(directory))[0] if base else 0


class WatchedStorage:
    """A storage whose files tell ``on_read(bytes read so far)``."""

    def __init__(self, storage: Storage, on_read: Callable[[int], None]) -> None:
        self._storage = storage
        self._on_read = on_read
        self._read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def open(self, path: str, *, uncached: bool = False) -> ReadableFile:
        return _WatchedFile(self._storage.open(path, uncached=uncached), self._count)

    def _count(self, nbytes: int) -> None:
        self._read += nbytes
        self._on_read(self._read)


class _WatchedFile:
    def __init__(self, file: ReadableFile, count: Callable[[int], None]) -> None:
        self.size = file.size
        self.parallel_reads = file.parallel_reads
        self.close = file.close
        self._file = file
        self._count = count

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._file.read_into(offset, buffers)
        self._count(sum(buffer.nbytes for buffer in buffers))

    def read_each(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        self._file.read_each(offsets, buffers)
        self._count(sum(buffer.nbytes for buffer in buffers))
