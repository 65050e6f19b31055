"""The state file: which checkpoints a directory has, and which is the newest.

It is a text-format ``CheckpointState`` message, by default named ``checkpoint``, beside the checkpoints it lists::

    model_checkpoint_path: "model.ckpt-50"              the newest prefix
    all_model_checkpoint_paths: "model.ckpt-40"         oldest first; the last one equals the newest
    all_model_checkpoint_paths: "model.ckpt-50"
    all_model_checkpoint_timestamps: 1795369802.585     seconds since the epoch, one per path (CheckpointManager only)
    all_model_checkpoint_timestamps: 1795369803.101
    last_preserved_timestamp: 1795369801.564            (CheckpointManager only)

The functions have the names and meanings they have in ``tf.train``.  What differs on purpose: paths may be str, bytes
or PathLike and are literal, never globs; lists given by the caller are never changed; and a state file cannot lead a
reader out of its own directory unless the caller allows it (see :func:`get_checkpoint_state`).

No function here keeps anything between calls, so all may be called from any thread.  Whoever replaces a state file
holds its lock (``checkpoint.gpusaver-lock``) meanwhile, and a Saver also while it deletes what it no longer lists:
among Savers of one directory the file never names what another one is deleting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from gpusaver.bundle import filenames
from gpusaver.checkpoint_files import PathLike, checkpoint_exists
from gpusaver.errors import Error, InvalidArgumentError, NotFoundError
from gpusaver.storage.base import ChangedError, Storage, new_token, read_bytes, write_bytes
from gpusaver.storage.routing import RoutedStorage

if TYPE_CHECKING:
    from gpusaver.protos import CheckpointState

DEFAULT_STATE_FILENAME = "checkpoint"

#: A larger file is refused, because parsing takes 0.15 to 0.75 s per megabyte.  Room for 40,000 checkpoints with
#: timestamps.
STATE_FILE_LIMIT_BYTES = 4 << 20

#: protobuf's parser takes quadratic time for a run of backslashes (12 s for 40 kB).  255 of them, the longest file name
#: there is, are written as 510.
_BACKSLASHES_LIMIT = 510

#: Of replacing a state file that others replace at the same time.
_ATTEMPTS = 20

_WINDOWS_PATH = re.compile(r"[A-Za-z]:\\|\\\\")

_ESCAPES = str.maketrans(
    {code: f"\\{code:03o}" for code in (*range(32), 127)}
    | {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", ord('"'): '\\"', ord("'"): "\\'", ord("\\"): "\\\\"}
)

_log = logging.getLogger(__name__)


# Reading


def get_checkpoint_state(
    checkpoint_dir: PathLike,
    latest_filename: PathLike | None = None,
    *,
    allow_outside: bool = False,
    storage: Storage | None = None,
) -> CheckpointState | None:
    """What the state file says, with paths joined to ``checkpoint_dir`` as it was given.

    Returns None if there is no state file, or if it cannot be read or parsed (then a warning is logged).

    An entry inside ``checkpoint_dir`` is followed (symbolic links too), whether or not its files exist.  Any other
    entry (an absolute path from another machine, ``../x``) is replaced by its base name in ``checkpoint_dir`` if that
    is a checkpoint: so a directory may be moved or copied.  Otherwise it is left out with a warning, and if it was the
    newest, ``model_checkpoint_path`` is empty.  With ``allow_outside=True`` entries outside are followed as TensorFlow
    does; the base name is then tried only if there is no checkpoint where the entry points.

    Raises InvalidArgumentError (a ValueError) if the file parses but names no newest checkpoint, or if a resulting
    path is not valid UTF-8, which the message cannot hold.
    """
    storage = storage or RoutedStorage()
    directory = os.fsdecode(checkpoint_dir)
    stored = _load(storage, directory, latest_filename)
    if stored is None:
        return None
    latest = _resolve(storage, directory, stored.model_checkpoint_path, allow_outside)
    paths = [_resolve(storage, directory, path, allow_outside) for path in stored.all_model_checkpoint_paths]
    times: Iterable[float] = stored.all_model_checkpoint_timestamps
    if len(stored.all_model_checkpoint_timestamps) == len(paths):
        times = [seconds for path, seconds in zip(paths, times, strict=True) if path is not None]
    return _message(latest or "", [path for path in paths if path is not None], times, stored.last_preserved_timestamp)


def latest_checkpoint(
    checkpoint_dir: PathLike,
    latest_filename: PathLike | None = None,
    *,
    allow_outside: bool = False,
    storage: Storage | None = None,
) -> str | None:
    """The newest prefix according to the state file, or None if there is none or its files are gone.

    Only the state file is asked: the directory is not searched, and older entries are no substitute.  Entries are
    followed, and errors raised, as in :func:`get_checkpoint_state`.
    """
    storage = storage or RoutedStorage()
    directory = os.fsdecode(checkpoint_dir)
    stored = _load(storage, directory, latest_filename)
    if stored is None:
        return None
    latest = _resolve(storage, directory, stored.model_checkpoint_path, allow_outside)
    if latest is None or checkpoint_exists(latest, storage=storage):
        return latest
    path = _state_path(directory, latest_filename)
    _log.error("%s names %s as the newest checkpoint, but there are no such files", path, latest)
    return None


def _state_path(directory: str, latest_filename: PathLike | None) -> str:
    name = DEFAULT_STATE_FILENAME if latest_filename is None else os.fsdecode(latest_filename)
    return os.path.join(directory, name)


def _load(storage: Storage, directory: str, latest_filename: PathLike | None) -> CheckpointState | None:
    """The message as it is in the file, or None where :func:`get_checkpoint_state` returns None."""
    path = _state_path(directory, latest_filename)
    try:
        text = read_bytes(storage, path, limit=STATE_FILE_LIMIT_BYTES).decode()
    except NotFoundError:
        return None
    except (Error, UnicodeDecodeError) as error:
        _log.warning("ignoring the state file %s: %s", path, error)
        return None
    state = _parse(text, path)
    if state is not None and not state.model_checkpoint_path:
        raise InvalidArgumentError(
            f"invalid checkpoint state in {path}: expected model_checkpoint_path to name the newest checkpoint, found "
            "none. Remove the file, or write it anew with update_checkpoint_state"
        )
    return state


def _parse(text: str, path: str) -> CheckpointState | None:
    from google.protobuf import text_format

    from gpusaver.protos import CheckpointState

    if "\\" * (_BACKSLASHES_LIMIT + 1) in text:
        _log.warning("ignoring the state file %s: more than %d backslashes in a row", path, _BACKSLASHES_LIMIT)
        return None
    state = CheckpointState()
    try:
        # Merge, unlike Parse, lets a later value of a field replace an earlier one, as in TensorFlow.
        text_format.Merge(text, state)
    except (text_format.ParseError, ValueError) as error:  # ValueError: an escape that gives no valid UTF-8
        _log.warning("ignoring the state file %s: %.300s", path, error)  # protobuf's text may quote the whole file
        return None
    return state


def _resolve(storage: Storage, directory: str, entry: str, allow_outside: bool) -> str | None:
    """The prefix that an entry of the state file stands for, or None if it must not be followed."""
    joined = os.path.join(directory, entry)
    windows = _WINDOWS_PATH.match(entry) is not None  # written on Windows, or (rarely) a file of such a name
    name = re.split(r"[\\/]" if windows else "/", entry)[-1]
    here = os.path.join(directory, name)
    usable = "\0" not in entry
    inside = usable and _is_inside(directory, entry)
    if inside and not windows:
        return joined
    may_follow = inside or (usable and allow_outside)
    if may_follow and checkpoint_exists(joined, storage=storage):
        return joined
    if usable and name not in ("", ".", "..") and checkpoint_exists(here, storage=storage):
        return here
    if may_follow:
        return joined
    _log.warning(
        "the state file in %s names %r, which is outside that directory, and inside it is no checkpoint %r: skipped. "
        "Pass allow_outside=True to follow it",
        directory or ".",
        entry,
        name,
    )
    return None


def _is_inside(directory: str, entry: str) -> bool:
    # "a/../k" is refused too: where "a" is a symbolic link, ".." leads elsewhere.
    if ".." in entry.split("/"):
        return False
    root = os.path.join(os.path.abspath(directory), "")
    return os.path.normpath(os.path.join(root, entry)).startswith(root)


# Writing


def generate_checkpoint_state_proto(
    save_dir: PathLike,
    model_checkpoint_path: PathLike,
    all_model_checkpoint_paths: Iterable[PathLike] | None = None,
    all_model_checkpoint_timestamps: Iterable[float] | None = None,
    last_preserved_timestamp: float | None = None,
    *,
    save_relative_paths: bool = False,
) -> CheckpointState:
    """The message for a state file in ``save_dir``.

    ``all_model_checkpoint_paths``: oldest first; the newest is appended if it is not the last one.  Relative paths
    (relative to the current directory, like ``save_dir``) become relative to ``save_dir`` if that is relative too;
    absolute paths stay.  With ``save_relative_paths=True`` every path becomes relative to ``save_dir``.

    Raises InvalidArgumentError (a ValueError) if the timestamps are not as many as the paths, or if a path is empty or
    is not valid UTF-8, which the message cannot hold.
    """
    directory = os.fsdecode(save_dir)
    latest = os.fsdecode(model_checkpoint_path)
    paths = [os.fsdecode(path) for path in all_model_checkpoint_paths or ()]
    if not paths or paths[-1] != latest:
        paths.append(latest)
    times = list(all_model_checkpoint_timestamps or ())
    if times and len(times) != len(paths):
        raise InvalidArgumentError(
            f"expected one timestamp per checkpoint path, found {len(times)} for {len(paths)} paths: {paths}"
        )
    if not all(paths):
        raise InvalidArgumentError(f"a checkpoint path is empty: {paths}")

    def written(path: str) -> str:
        if save_relative_paths or not (os.path.isabs(directory) or os.path.isabs(path)):
            return os.path.relpath(path, directory or ".")
        return path

    return _message(written(latest), [written(path) for path in paths], times, last_preserved_timestamp)


def update_checkpoint_state(
    save_dir: PathLike,
    model_checkpoint_path: PathLike,
    all_model_checkpoint_paths: Iterable[PathLike] | None = None,
    latest_filename: PathLike | None = None,
    all_model_checkpoint_timestamps: Iterable[float] | None = None,
    last_preserved_timestamp: float | None = None,
    *,
    save_relative_paths: bool = False,
    storage: Storage | None = None,
) -> None:
    """Replaces the state file in ``save_dir``, atomically and durably; on any error the old one stays.

    Arguments and errors as for :func:`generate_checkpoint_state_proto`; RuntimeError if the newest checkpoint would be
    listed under the path of the state file itself; NotFoundError if ``save_dir`` does not exist;
    FailedPreconditionError, naming the owner, if another process has kept the file's lock for ten seconds.
    """
    storage = storage or RoutedStorage()
    listed = None if all_model_checkpoint_paths is None else list(all_model_checkpoint_paths)
    times = None if all_model_checkpoint_timestamps is None else list(all_model_checkpoint_timestamps)

    def replace(others: list[str]) -> None:
        with state_lock(save_dir, latest_filename, storage=storage):
            write_state(
                save_dir,
                model_checkpoint_path,
                listed,
                latest_filename,
                times,
                last_preserved_timestamp,
                save_relative_paths=save_relative_paths,
                storage=storage,
            )

    replace_state(save_dir, latest_filename, replace, storage=storage)


@contextlib.contextmanager
def state_lock(save_dir: PathLike, latest_filename: PathLike | None = None, *, storage: Storage) -> Iterator[None]:
    """Nobody else replaces the state file, or deletes what it has listed, inside the ``with``."""
    lock = storage.lock(filenames.lock_path(_state_path(os.fsdecode(save_dir), latest_filename)))
    try:
        yield
    finally:
        lock.release()


def replace_state(
    save_dir: PathLike,
    latest_filename: PathLike | None,
    replace: Callable[[list[str]], None],
    *,
    storage: Storage,
) -> None:
    """Calls ``replace(others)``, which takes the :func:`state_lock` and calls :func:`write_state`.

    Where locks keep nobody out (object stores) the file may have been replaced by somebody else meanwhile.  Then it is
    called again, ``others`` being the checkpoints that the file lists now: so of two who replace it at the same time
    none loses what the other has just listed.
    """
    others: list[str] = []
    for _ in range(_ATTEMPTS - 1):
        try:
            return replace(others)
        except ChangedError:
            state = get_checkpoint_state(save_dir, latest_filename, storage=storage)
            others = [] if state is None else list(state.all_model_checkpoint_paths)
    replace(others)


def write_state(
    save_dir: PathLike,
    model_checkpoint_path: PathLike,
    all_model_checkpoint_paths: Iterable[PathLike] | None,
    latest_filename: PathLike | None,
    all_model_checkpoint_timestamps: Iterable[float] | None = None,
    last_preserved_timestamp: float | None = None,
    *,
    save_relative_paths: bool,
    storage: Storage,
) -> None:
    """:func:`update_checkpoint_state`.  Requires: the :func:`state_lock` is held."""
    directory = os.fsdecode(save_dir)
    path = _state_path(directory, latest_filename)
    state = generate_checkpoint_state_proto(
        directory,
        model_checkpoint_path,
        all_model_checkpoint_paths,
        all_model_checkpoint_timestamps,
        last_preserved_timestamp,
        save_relative_paths=save_relative_paths,
    )
    if state.model_checkpoint_path == path:
        raise RuntimeError(
            f"save path {os.fsdecode(model_checkpoint_path)} conflicts with the path of the checkpoint state, {path}. "
            "Use another save path or another latest_filename"
        )
    data = to_text(state).encode()
    if len(data) > STATE_FILE_LIMIT_BYTES:
        raise InvalidArgumentError(
            f"the state file {path} would have {len(data)} bytes, expected at most {STATE_FILE_LIMIT_BYTES}. "
            "List fewer checkpoints"
        )
    write_bytes(storage, path, filenames.temporary_path(path, new_token()), data)


def to_text(state: CheckpointState) -> str:
    """The text of a state file, character for character what TensorFlow 2.21 writes."""
    lines = []
    if state.model_checkpoint_path:
        lines.append(f'model_checkpoint_path: "{state.model_checkpoint_path.translate(_ESCAPES)}"\n')
    lines += [
        f'all_model_checkpoint_paths: "{path.translate(_ESCAPES)}"\n' for path in state.all_model_checkpoint_paths
    ]
    lines += [f"all_model_checkpoint_timestamps: {seconds!r}\n" for seconds in state.all_model_checkpoint_timestamps]
    if (preserved := repr(state.last_preserved_timestamp)) != "0.0":
        lines.append(f"last_preserved_timestamp: {preserved}\n")
    return "".join(lines)


def _message(
    latest: str, paths: Iterable[str], times: Iterable[float], last_preserved: float | None
) -> CheckpointState:
    from gpusaver.protos import CheckpointState

    try:
        return CheckpointState(
            model_checkpoint_path=latest,
            all_model_checkpoint_paths=paths,
            all_model_checkpoint_timestamps=times,
            last_preserved_timestamp=last_preserved,
        )
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"the checkpoint path {error.object!r} is not valid UTF-8: a checkpoint state cannot hold it. "
            "Save under another name"
        ) from error


# Waiting


def wait_for_new_checkpoint(
    checkpoint_dir: PathLike,
    last_checkpoint: PathLike | None = None,
    seconds_to_sleep: float = 1,
    timeout: float | None = None,
    *,
    storage: Storage | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> str | None:
    """Asks :func:`latest_checkpoint` every ``seconds_to_sleep`` seconds until it differs from ``last_checkpoint``.

    Returns the new prefix, or None as soon as another sleep would go beyond ``timeout`` seconds from the call: with
    ``timeout`` below ``seconds_to_sleep`` it looks once and never sleeps.  Without ``timeout`` it waits for ever.
    """
    known = None if last_checkpoint is None else os.fsdecode(last_checkpoint)
    deadline = None if timeout is None else clock() + timeout
    while True:
        latest = latest_checkpoint(checkpoint_dir, storage=storage)
        if latest is not None and latest != known:
            return latest
        if deadline is not None and clock() + seconds_to_sleep > deadline:
            return None
        sleep(seconds_to_sleep)


def checkpoints_iterator(
    checkpoint_dir: PathLike,
    min_interval_secs: float = 0,
    timeout: float | None = None,
    timeout_fn: Callable[[], bool] | None = None,
    *,
    storage: Storage | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """Yields the newest prefix each time there is a new one.

    At least ``min_interval_secs`` seconds lie between the moment of yielding and the next look; checkpoints that come
    and go in between are missed.  ``timeout`` seconds without a new one end the iteration unless ``timeout_fn`` is
    given: that is called after every timeout and after every checkpoint, and ends the iteration by returning true.
    """
    known: str | None = None
    while True:
        latest = wait_for_new_checkpoint(
            checkpoint_dir, known, timeout=timeout, storage=storage, clock=clock, sleep=sleep
        )
        if latest is not None:
            next_look = clock() + min_interval_secs
            known = latest
            yield latest
            if (remaining := next_look - clock()) > 0:
                sleep(remaining)
        elif timeout_fn is None:
            return
        if timeout_fn is not None and timeout_fn():
            return
