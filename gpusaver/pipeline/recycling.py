"""Data files that are given up, kept for the next save to write over.

::

    save 6 is durable; retention gives up 1:   k-1.index removed, k-1.data-... renamed: a spare, under a temporary name
    save 7:                                    directory synced, spare renamed to k-7's temporary file, written over

Blocks that a file system has already need not be found again, nor, on a disk that is told of free ones, given back and
asked for anew.  A spare is no checkpoint's, and goes like any other temporary file: a Saver that finds one whose owner
was killed removes it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Sequence

from gpusaver.bundle.filenames import temporary_path
from gpusaver.errors import Error
from gpusaver.storage.base import Storage, WritableFile, new_token

#: A smaller file is created anew: that takes a millisecond or two, as does the sync before one is written over.
RECYCLED_MIN_NBYTES = 64 * 1024 * 1024


class Recycler:
    """Of one Saver, whose saves come one after the other; what is given up may be so from any thread.

    At most as many spares are kept as the last save had files of their kind, in its directory: none before
    :meth:`expect`.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._directory: str | None = None
        self._limit = 0
        #: Path -> size in bytes.
        self._spares: dict[str, int] = {}
        self._lock = threading.Lock()
        #: Also at the end of the process, for who does not close the Saver.
        self._remove_all = weakref.finalize(self, _remove, storage, self._spares, os.getpid())

    def expect(self, directory: str, sizes: Sequence[int]) -> int:
        """A save of files of these sizes begins; the bytes of the spares that it will find."""
        with self._lock:
            if directory != self._directory:
                _remove(self._storage, self._spares, os.getpid())
            self._directory = directory
            self._limit = sum(nbytes >= RECYCLED_MIN_NBYTES for nbytes in sizes)
            return sum(self._spares.values())

    def give_up(self, path: str) -> None:
        """Instead of ``storage.remove(path)``, of which it raises the errors: a data file of no checkpoint any more."""
        with self._lock:
            is_wanted = os.path.dirname(path) == self._directory and len(self._spares) < self._limit
            if not is_wanted:
                self._storage.remove(path)
                return
            spare = temporary_path(path, new_token())
            nbytes = self._storage.recycle(path, spare)
            if nbytes is not None and nbytes >= RECYCLED_MIN_NBYTES:
                self._spares[spare] = nbytes
            elif nbytes is not None:
                self._storage.remove(spare)

    def reuse(self, path: str, nbytes: int, *, direct: bool) -> WritableFile | None:
        """A spare as the new file ``path``, as :meth:`Storage.reuse` makes it; None: create one."""
        if nbytes < RECYCLED_MIN_NBYTES:
            return None
        with self._lock:
            if not self._spares:
                return None
            spare = min(self._spares, key=lambda path: abs(self._spares[path] - nbytes))
            del self._spares[spare]
        return self._storage.reuse(spare, path, nbytes, direct=direct)

    def close(self) -> None:
        """Removes the spares, and keeps no more.  Idempotent.  Never raises."""
        with self._lock:
            self._limit = 0
            self._remove_all()


def _remove(storage: Storage, spares: dict[str, int], process: int) -> None:
    """Those of this process: a forked child has the list, but not the files."""
    while spares and os.getpid() == process:
        with contextlib.suppress(Error):
            storage.remove(spares.popitem()[0])
