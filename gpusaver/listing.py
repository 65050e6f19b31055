"""The checkpoints of one Saver: the state file that lists them, and the deletion of those that retention gives up."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable, Iterable

from gpusaver.checkpoint_files import checkpoint_exists, discard_checkpoint
from gpusaver.checkpoint_state import replace_state, state_lock, write_state
from gpusaver.errors import Error
from gpusaver.retention import Retention
from gpusaver.storage.base import Storage

_log = logging.getLogger("gpusaver")


class CheckpointList:
    """May be used from any thread: a save changes it from its own.

    ``discard_data(path)`` takes away the data files of what is deleted.
    """

    def __init__(
        self,
        retention: Retention,
        storage: Storage,
        clock: Callable[[], float],
        *,
        save_relative_paths: bool,
        discard_data: Callable[[str], None],
    ) -> None:
        self.retention = retention
        self.save_relative_paths = save_relative_paths
        self._storage = storage
        self._clock = clock
        self._discard_data = discard_data
        #: Always taken after the Saver's own lock.
        self._lock = threading.RLock()

    def add(self, prefix: str, meta_graph_suffix: str, state_name: str) -> None:
        """A checkpoint is complete: writes the state file, then deletes what the policy gives up."""
        with self._lock:
            retention = copy.copy(self.retention)  # taken over only if the state file could be written
            decision = retention.added(prefix, self._clock())
            directory = os.path.dirname(prefix)

            def replace(others: list[str]) -> None:
                others = [path for path in others if path not in (*decision.listed, *decision.delete)]
                with state_lock(directory, state_name, storage=self._storage):
                    # Another Saver, or somebody by hand, may have deleted what is on this one's list.
                    paths = [*others, *decision.listed]
                    listed = [path for path in paths if checkpoint_exists(path, storage=self._storage)]
                    write_state(
                        directory,
                        prefix,
                        listed,
                        state_name,
                        save_relative_paths=self.save_relative_paths,
                        storage=self._storage,
                    )
                    self.retention = retention
                    for old in decision.delete:
                        self._remove(old, meta_graph_suffix)

            try:
                replace_state(directory, state_name, replace, storage=self._storage)
            except Error as error:
                error.add_note(f"The checkpoint {prefix} itself is complete; no state file lists it.")
                raise

    def _remove(self, old: str, meta_graph_suffix: str) -> None:
        try:
            discard_checkpoint(self._storage, old, meta_graph_suffix, self._discard_data)
        except Error as error:
            _log.warning("cannot remove the old checkpoint %s: %s", old, error)

    def with_times(self) -> list[tuple[str, float]]:
        return self.retention.last_checkpoints_with_time

    def replace(self, prefixes: Iterable[str]) -> None:
        """By some whose times are not known."""
        with self._lock:
            self.retention.set_last_checkpoints(prefixes)

    def replace_with_times(self, prefixes: Iterable[tuple[str, float]]) -> None:
        with self._lock:
            self.retention.set_last_checkpoints_with_time(prefixes)
