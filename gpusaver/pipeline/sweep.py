"""Removing what a Saver that was killed has left: temporary files, locks, and data files without their index.

What may go is decided by locks alone.  Whoever writes a checkpoint or a state file holds its lock from before the first
temporary file until after the last.  So a temporary file that was there before the lock could be taken has no owner.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

from gpusaver.bundle import filenames
from gpusaver.errors import Error
from gpusaver.storage.base import Storage, is_token_of_this_host

_log = logging.getLogger("gpusaver")


@dataclass(slots=True)
class _Left:
    """What is left of one save or of one update of a state file; all are base names."""

    temporary: list[str] = field(default_factory=list)
    was_locked: bool = False
    is_of_this_host: bool = True


def sweep(storage: Storage, directory: str, stem: str) -> None:
    """Removes leftovers in ``directory``: all of ``stem`` (``k`` for ``k-5``), others only if they are of this host.

    For on some file systems locks do not reach other hosts.  Never raises: a save must not fail for a file that is in
    nobody's way.
    """
    try:
        found = _leftovers(storage.list(directory))
        for target, left in found.items():
            prefix = target.removesuffix(filenames.INDEX_SUFFIX)
            is_ours = filenames.split_step(prefix)[0] == stem
            if is_ours or (left.temporary and left.is_of_this_host):
                _clear(storage, directory, target, left)
    except Error as error:
        _log.warning("cannot remove what killed saves have left in %s: %s", directory or ".", error)


def _leftovers(names: list[str]) -> dict[str, _Left]:
    """By the index or state file that was being written."""
    found: dict[str, _Left] = {}
    for name in names:
        split = filenames.split_temporary(name)
        if split is not None:
            target = filenames.lock_path(split[0]).removesuffix(filenames.LOCK_SUFFIX)
            left = found.setdefault(target, _Left())
            left.temporary.append(name)
            left.is_of_this_host &= is_token_of_this_host(split[1])
        elif name.endswith(filenames.LOCK_SUFFIX):
            found.setdefault(name.removesuffix(filenames.LOCK_SUFFIX), _Left()).was_locked = True
    return found


def _clear(storage: Storage, directory: str, target: str, left: _Left) -> None:
    path = os.path.join(directory, target)
    try:
        lock = storage.lock(path + filenames.LOCK_SUFFIX, wait_seconds=0)
    except Error:  # its owner lives
        return
    try:
        if not lock.is_exclusive:
            return
        names = left.temporary
        if left.was_locked and target.endswith(filenames.INDEX_SUFFIX) and not storage.exists(path):
            # Killed after the data files had been renamed, before the index was.
            base = target.removesuffix(filenames.INDEX_SUFFIX)
            names = [*names, *(name for name in storage.list(directory) if filenames.is_data_of(name, base))]
        for name in names:
            storage.remove(os.path.join(directory, name))
        if names:
            _log.info("removed %d files of a save that did not end: %s", len(names), ", ".join(names[:5]))
    finally:
        lock.release()
