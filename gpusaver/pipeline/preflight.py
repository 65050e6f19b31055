"""Before a save: is there room for it, and what has a Saver that was killed left?

Left are temporary files, locks, and data files without their index.  What may go is decided by locks alone.  Whoever
writes a checkpoint or a state file holds its lock from before the first temporary file until after the last.  So a
temporary file that was there before the lock could be taken has no owner.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass, field

from gpusaver.bundle import filenames
from gpusaver.errors import Error, from_os_error
from gpusaver.storage.base import Storage, is_token_of_this_host

#: For the state file and the directory, and for each entry of the index.
_COMMIT_NBYTES = 16 << 10
_ENTRY_NBYTES = 128

_log = logging.getLogger("gpusaver")


class Preflight:
    """Remembers which directories it has swept, and that it has warned.  One save at a time."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._swept: set[str] = set()
        self._has_warned = False

    def check(self, prefix: str, nbytes: int, entries: int, copies: int, spare_nbytes: int = 0) -> None:
        """Before a byte is copied; sweeps the directory before the first save into it.

        ``nbytes``: of the data files; ``copies``: how many checkpoints of this size will come beside what is there
        before the first is deleted; ``spare_nbytes``: of files that will be written over.  Raises
        ResourceExhaustedError if there is no room for this one, and warns once if there is none for all of them.
        """
        directory, base = os.path.split(prefix)
        if directory not in self._swept:
            self._swept.add(directory)
            sweep(self._storage, directory, filenames.split_step(base)[0])
        try:
            free = self._storage.free_nbytes(directory)
        except Error:
            return  # whatever is wrong there, creating the first file tells it
        nbytes += _COMMIT_NBYTES + _ENTRY_NBYTES * entries
        if free is None or free + spare_nbytes >= nbytes * copies:
            return
        what = f"{directory or '.'} has {free:,} bytes free, a checkpoint takes {nbytes:,}"
        if free + spare_nbytes < nbytes:
            reason = f"{os.strerror(errno.ENOSPC)}; {what}, and old checkpoints are deleted after a save, not before"
            raise from_os_error(OSError(errno.ENOSPC, reason), "save", prefix)
        if not self._has_warned:
            self._has_warned = True
            advice = "Free space, or lower max_to_keep: later saves will fail"
            _log.warning("%s, and %d more come before the first is deleted. %s", what, copies, advice)


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
