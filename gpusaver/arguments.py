"""What callers hand to a Saver, checked before anything happens and brought into one form."""

from __future__ import annotations

import functools
import inspect
import operator
import os
import re
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

from gpusaver.bundle import filenames
from gpusaver.checkpoint_files import PathLike
from gpusaver.checkpoint_state import DEFAULT_STATE_FILENAME, generate_checkpoint_state_proto
from gpusaver.errors import NotFoundError
from gpusaver.storage.base import Storage
from gpusaver.storage.routing import check_url

P = ParamSpec("P")
R = TypeVar("R")


def without_session(method: Callable[P, R]) -> Callable[P, R]:
    """``save(sess, path, step)`` gets our TypeError, not Python's about the number of arguments.

    Requires: the method's first argument after ``self`` is a path.
    """

    kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
    most = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[1] if len(args) > 1 else None
        if "sess" in kwargs or not isinstance(first, str | bytes | os.PathLike | None) or (first is None and args[2:]):
            _refuse("save_path: expected str, bytes or PathLike", kwargs.get("sess", first))
        if len(args) > most:
            _refuse(f"{method.__name__}: expected all further arguments by keyword", args[most])
        return method(*args, **kwargs)

    return checked


def _refuse(expected: str, found: Any) -> NoReturn:
    raise TypeError(
        f"{expected}, found {found!r:.60} ({type(found).__name__}). The native Saver takes no session: "
        "saver.save(path, global_step), saver.restore(path). Scripts written for tf.train.Saver run on "
        "gpusaver.compat.v1"
    )


def fs_path(path: Any, what: str) -> str:
    if not isinstance(path, str | bytes | os.PathLike):
        _refuse(f"{what}: expected str, bytes or PathLike", path)
    decoded = os.fsdecode(path)
    check_url(decoded)
    if "\0" in decoded:
        raise ValueError(f"{what} {decoded!r} holds a NUL, which no file name can")
    return decoded


def checkpoint_prefix(save_path: Any, global_step: Any, *, padded: bool) -> str:
    """``save_path``, or ``save_path-<step>``."""
    prefix = fs_path(save_path, "save_path")
    check_url(prefix, is_file=True)
    if not os.path.basename(prefix):
        raise ValueError(f"save_path {prefix!r} names a directory; expected a prefix such as 'dir/model.ckpt'")
    if global_step is None:
        return prefix
    step = _step(global_step)
    return f"{prefix}-{step:08d}" if padded else f"{prefix}-{step}"


def _step(global_step: Any) -> int:
    value = getattr(global_step, "value", global_step)
    try:
        if not isinstance(value, str | bytes):
            return operator.index(value.item() if getattr(value, "shape", None) == () else value)
    except TypeError:
        pass
    _refuse("global_step: expected an int or an integer variable of rank 0", value)


def state_filename(
    latest_filename: PathLike | None, prefix: str, *, is_plain: bool, is_relative: bool, is_written: bool
) -> str:
    """The name of the state file.  ValueError if it cannot be one, or if the file cannot hold ``prefix``.

    ``is_plain``: a save without step and shards, for which TensorFlow refuses more.  ``is_relative``: the file holds
    paths relative to its directory.  ``is_written``: there will be a state file.
    """
    name = DEFAULT_STATE_FILENAME if latest_filename is None else fs_path(latest_filename, "latest_filename")
    if os.path.basename(name) != name or not name:
        raise ValueError(f"'latest_filename' must not contain path components: {name!r}")
    directory, base = os.path.split(prefix)
    is_listed_as_itself = not directory or (os.path.isabs(directory) and not is_relative)
    if base == name and (is_plain or (is_written and is_listed_as_itself)):
        raise ValueError(f"'latest_filename' collides with 'save_path': {name!r} and {prefix!r}")
    if is_written:
        generate_checkpoint_state_proto(directory, prefix)  # finds names that are not UTF-8
    return name


def meta_graph_file(prefix: str, suffix: str) -> str:
    """ValueError for a suffix by which the file would be another one of the checkpoint, or elsewhere."""
    if not isinstance(suffix, str) or not re.fullmatch(r"[^/\0]+", suffix) or re.match(r"index$|data-", suffix):
        raise ValueError(f"meta_graph_suffix {suffix!r}: expected the end of a file name, as 'meta'")
    return filenames.meta_graph_path(prefix, suffix)


def make_directory(storage: Storage, directory: str, prefix: str) -> None:
    """Makes one missing level, as TensorFlow does: more would turn a mistyped path into a tree."""
    if storage.is_directory(directory):
        return
    try:
        if not storage.exists(directory):
            storage.make_directory(directory)
            return
    except NotFoundError:
        pass
    raise ValueError(f"Parent directory of {prefix} doesn't exist, can't save.")


def from_saver_def(saver_def: Any) -> tuple[int, float | None, bool]:
    """``max_to_keep, keep_checkpoint_every_n_hours, sharded`` of a SaverDef, ours or TensorFlow's."""
    from gpusaver.protos import SaverDef
    from gpusaver.protos.convert import adopt

    adopted = adopt(saver_def, SaverDef)
    return adopted.max_to_keep, adopted.keep_checkpoint_every_n_hours or None, adopted.sharded
