"""Finding a checkpoint that is whole: verification, and the search from the newest one back.

::

    candidates    the one that the state file calls the newest
                  older ones, listed or only lying there, newest first
                  those newer than it, which somebody may have discarded: the last resort

Which of two is newer: within one name the step says it (``k-90`` < ``k-100``), because times are lost in copying;
between names, the time of the newest file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

from gpusaver import checkpoint_state
from gpusaver.bundle import filenames
from gpusaver.bundle.index import BundleIndex
from gpusaver.bundle.v1 import V1Bundle
from gpusaver.checkpoint_files import PathLike, checkpoint_exists, checkpoint_times, v1_files
from gpusaver.checkpoint_state import get_checkpoint_state
from gpusaver.errors import (
    DataLossError,
    Error,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    UnknownError,
)
from gpusaver.pipeline.check import bundle_problems
from gpusaver.reader import not_a_prefix, read_table
from gpusaver.storage.base import Storage
from gpusaver.storage.routing import RoutedStorage

Result = TypeVar("Result")

Verify = Literal["none", "structure", "checksums"]

_log = logging.getLogger("gpusaver")


def verify(prefix: PathLike, *, checksums: bool = True, storage: Storage | None = None) -> Iterator[str]:
    """Yields what is wrong with a checkpoint, a line per problem, naming file and tensor; nothing if it is whole.

    Everything is read, unless ``checksums=False``: then only the index and the sizes of the data files.  Problems are
    yielded as they are found, so ``next(verify(prefix), None)`` stops at the first.  A path that is no checkpoint is a
    problem as well.  Memory: a chunk of 8 MiB, the index, and the largest tensor of strings; a V1 checkpoint whole.
    """
    storage = storage or RoutedStorage()
    path = os.fsdecode(prefix)
    try:
        if storage.exists(filenames.index_path(path)):
            yield from _v2_problems(storage, path, checksums)
        elif files := v1_files(storage, path):
            bundle = V1Bundle([(file, read_table(storage, file)) for file in files])
            yield from _v1_problems(bundle)
        else:
            yield str(not_a_prefix(path, storage))
    except Error as error:
        yield str(error)


def _v2_problems(storage: Storage, prefix: str, checksums: bool) -> Iterator[str]:
    path = filenames.index_path(prefix)
    index = BundleIndex(read_table(storage, path), path)

    def describe(shard: int) -> str:
        return filenames.data_path(prefix, shard, index.num_shards)

    yield from bundle_problems(index, lambda shard: storage.open(describe(shard)), describe, checksums=checksums)


def _v1_problems(bundle: V1Bundle) -> Iterator[str]:
    for name in bundle.tensors():
        try:
            bundle.get_array(name)
        except Error as error:
            yield str(error)


def latest_checkpoint(
    checkpoint_dir: PathLike,
    latest_filename: PathLike | None = None,
    *,
    verify: Verify = "none",
    allow_outside: bool = False,
    storage: Storage | None = None,
) -> str | None:
    """The newest checkpoint of a directory, or None if it has none.

    ``verify="none"``: what the state file says, as in TensorFlow; None if there is no such file, or if the files of
    that checkpoint are gone.  Entries are followed as in :func:`get_checkpoint_state`.

    "structure" looks whether the index can be read and the data files are there and long enough, "checksums" reads
    everything.  A checkpoint that is damaged is skipped with a warning that says why, and the next older one is looked
    at, whether or not the state file lists it; without a state file the directory is searched.  DataLossError if there
    are checkpoints but none is whole: a caller who got None would begin anew.
    """
    if verify not in ("none", "structure", "checksums"):
        raise ValueError(f"verify: expected none, structure or checksums, found {verify!r}")
    if verify == "none":
        return checkpoint_state.latest_checkpoint(
            checkpoint_dir, latest_filename, allow_outside=allow_outside, storage=storage
        )

    def attempt(prefix: str) -> str:
        check(prefix, checksums=verify == "checksums", storage=storage)
        return prefix

    storage = storage or RoutedStorage()
    prefixes = candidates(os.fsdecode(checkpoint_dir), latest_filename, allow_outside=allow_outside, storage=storage)
    return first_sound(checkpoint_dir, attempt, prefixes, storage=storage)


def prefix_of(path: PathLike, *, storage: Storage | None = None) -> str:
    """The checkpoint that a path stands for: a prefix itself, of a directory the newest, of a SavedModel its variables.

    The newest is what the state file calls so if it is there, else what the directory has.  Nothing is verified.
    Raises NotFoundError for a directory without checkpoints.
    """
    storage = storage or RoutedStorage()
    text = os.fsdecode(path)
    if not storage.is_directory(text):
        return text
    variables = os.path.join(text, "variables", "variables")
    if checkpoint_exists(variables, storage=storage):
        return variables
    prefixes = candidates(text, None, allow_outside=False, storage=storage)
    found = next((prefix for prefix in prefixes if checkpoint_exists(prefix, storage=storage)), None)
    if found is None:
        raise NotFoundError(f"no checkpoint in the directory {text}: no state file, no .index, no variables/")
    return found


def check(prefix: str, *, checksums: bool, storage: Storage | None) -> None:
    """Raises DataLossError with the first of the problems that :func:`verify` finds."""
    problem = next(verify(prefix, checksums=checksums, storage=storage), None)
    if problem is not None:
        raise DataLossError(problem)


def first_sound(
    directory: PathLike,
    attempt: Callable[[str], Result],
    prefixes: Sequence[str],
    *,
    storage: Storage,
) -> Result | None:
    """What ``attempt(prefix)`` returns for the first of the candidates that is not damaged; None without any.

    Damage is DataLossError, OutOfRangeError, InternalError (slices that overlap) and UnknownError (a disk that cannot
    be read); other errors too, if the files are not whole any more when looked at again.
    """
    damaged: list[str] = []
    for prefix in prefixes:
        try:
            return attempt(prefix)
        except (DataLossError, OutOfRangeError, InternalError, UnknownError) as error:
            reason = str(error)
        except (NotFoundError, InvalidArgumentError) as error:  # another process may have deleted it meanwhile
            found = next(verify(prefix, checksums=False, storage=storage), None)
            if found is None:
                raise
            reason = f"{error} ({found})"
        damaged.append(f"{prefix}: {reason}")
        _log.warning("the checkpoint %s is damaged, the next older one is tried: %s", prefix, reason)
    if damaged:
        raise DataLossError(f"no checkpoint in {os.fsdecode(directory)} is whole:\n  " + "\n  ".join(damaged))
    return None


def candidates(directory: str, latest_filename: PathLike | None, *, allow_outside: bool, storage: Storage) -> list[str]:
    """All checkpoints of a directory, in the order in which they are to be tried."""
    try:
        state = get_checkpoint_state(directory, latest_filename, allow_outside=allow_outside, storage=storage)
    except InvalidArgumentError as error:
        _log.warning("%s; the directory is searched instead", error)
        state = None
    latest = state.model_checkpoint_path if state is not None else ""
    found = [
        os.path.join(directory, name.removesuffix(filenames.INDEX_SUFFIX))
        for name in storage.list(directory)
        if name.endswith(filenames.INDEX_SUFFIX) and name != filenames.INDEX_SUFFIX
    ]
    listed = [] if state is None else list(state.all_model_checkpoint_paths)
    prefixes = list({os.path.abspath(path): path for path in [*found, *listed, latest] if path}.values())
    newest_first = _newest_first(prefixes, storage)
    if not latest:
        return newest_first
    at = newest_first.index(latest)
    return [*newest_first[at:], *reversed(newest_first[:at])]


def _newest_first(prefixes: list[str], storage: Storage) -> list[str]:
    times = dict(checkpoint_times(prefixes, storage=storage))
    groups: dict[tuple[str, bool], float] = {}
    keys: dict[str, tuple[tuple[str, bool], int]] = {}
    for prefix in prefixes:
        stem, step = filenames.split_step(prefix)
        group = (stem, step is None)
        keys[prefix] = (group, step or 0)
        groups[group] = max(groups.get(group, 0.0), times.get(prefix, 0.0))
    return sorted(prefixes, key=lambda prefix: (groups[keys[prefix][0]], *keys[prefix]), reverse=True)
