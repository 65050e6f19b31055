"""What a CheckpointManager remembers across restarts: a small file of JSON beside the state file.

::

    checkpoint.manager.json
    {"version": 1, "last_preserved": 1795369801.5,
     "checkpoints": [{"name": "ckpt-40", "time": 1795369802.5, "metric": 0.25, "pinned": true}, ...],   oldest first
     "doomed": ["ckpt-10"]}                                       to be deleted, in case a crash comes between

The state file itself stays as TensorFlow knows it, and lists the newest ``max_to_keep`` alone: whatever else reads or
rewrites it, nothing pinned or best is on a list of what may be deleted.  This one is written first, so that it knows of
everything that the state file names; what it names and what is gone is dropped when it is read.

The file decides what is deleted, so it is read with suspicion: only names of this manager (``ckpt-<number>``) in the
directory itself are taken from it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from dataclasses import replace
from typing import Any

from gpusaver.bundle import filenames
from gpusaver.checkpoint_files import checkpoint_exists, checkpoint_times
from gpusaver.checkpoint_state import DEFAULT_STATE_FILENAME, get_checkpoint_state
from gpusaver.errors import Error, NotFoundError
from gpusaver.manager.policy import Checkpoint, Managed
from gpusaver.storage.base import Storage, new_token, read_bytes, write_bytes

#: Room for 30,000 checkpoints.
_LIMIT_BYTES = 4 << 20

_log = logging.getLogger("gpusaver")


class Memory:
    """Reads and writes what is remembered of the checkpoints ``directory/name-<number>``."""

    def __init__(self, directory: str, name: str, storage: Storage) -> None:
        self.path = os.path.join(directory, f"{DEFAULT_STATE_FILENAME}.manager.json")
        self._directory = directory
        self._name = name
        self._storage = storage

    def load(self, now: float, *, last_preserved: float) -> Managed:
        """What is remembered and still there, and what the state file lists besides.

        Checkpoints that only the state file lists are taken over with its times, or those of their files: so one that
        TensorFlow or a Saver has written is deleted in its turn.  Times in the future become ``now``.
        ``last_preserved``: if neither file knows.
        """
        content = self._read()
        remembered = {c.name: c for c in self._noted(content)}
        found = {name: c for name, c in remembered.items() if self._exists(name)}
        listed, preserved = self._listed()
        checkpoints = [replace(c, time=min(c.time, now)) for c in found.values()]
        if new := [Checkpoint(name, min(time, now)) for name, time in listed.items() if name not in found]:
            checkpoints = sorted([*checkpoints, *new], key=lambda c: c.time)
        remembered_preserved = _number(content.get("last_preserved"))
        if remembered_preserved is None:
            remembered_preserved = preserved if preserved is not None else last_preserved
        kept = {c.name for c in checkpoints}
        doomed = [name for name in _rows(content, "doomed") if self._is_ours(name) and name not in kept]
        return Managed(tuple(checkpoints), min(remembered_preserved, now), tuple(filter(self._exists, doomed)))

    def noted(self) -> list[Checkpoint]:
        """What the file alone says of the checkpoints of this name, whether or not they are still there."""
        return self._noted(self._read())

    def _noted(self, content: dict[str, Any]) -> list[Checkpoint]:
        return [c for c in map(self._checkpoint, _rows(content, "checkpoints")) if c is not None]

    def save(self, managed: Managed) -> None:
        """Atomically and durably.  Requires: the lock of the file is held."""
        rows = [
            {"name": c.name, "time": c.time, "metric": c.metric, "pinned": c.is_pinned} for c in managed.checkpoints
        ]
        content = {
            "version": 1,
            "last_preserved": managed.last_preserved,
            "checkpoints": rows,
            "doomed": list(managed.doomed),
        }
        data = json.dumps(content, indent=1).encode()
        write_bytes(self._storage, self.path, filenames.temporary_path(self.path, new_token()), data)

    def sweep(self) -> None:
        """Removes what a manager that was killed has left of it.  Requires: the lock of the file is held."""
        with contextlib.suppress(Error):  # in nobody's way
            for name in self._storage.list(self._directory):
                temporary = filenames.split_temporary(name)
                if temporary is not None and temporary[0] == os.path.basename(self.path):
                    self._storage.remove(os.path.join(self._directory, name))

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(read_bytes(self._storage, self.path, limit=_LIMIT_BYTES))
            if isinstance(content, dict) and content.get("version") == 1:
                return content
            reason = "expected version 1"
        except NotFoundError:
            return {}
        except (Error, ValueError, RecursionError) as error:
            reason = str(error)
        _log.warning("ignoring %s, what is pinned or best is not known and stays: %s", self.path, reason)
        return {}

    def _checkpoint(self, row: Any) -> Checkpoint | None:
        if not isinstance(row, dict) or not self._is_ours(row.get("name")):
            return None
        time = _number(row.get("time"))
        return (
            None if time is None else Checkpoint(row["name"], time, _number(row.get("metric")), bool(row.get("pinned")))
        )

    def _listed(self) -> tuple[dict[str, float], float | None]:
        """Name -> time of the checkpoints in the state file, and its last_preserved_timestamp if it has one."""
        try:
            state = get_checkpoint_state(self._directory, storage=self._storage)
        except Error as error:
            _log.warning("ignoring the state file: %s", error)
            return {}, None
        if state is None:
            return {}, None
        paths, stamps = list(state.all_model_checkpoint_paths), list(state.all_model_checkpoint_timestamps)
        times = dict(zip(paths, stamps, strict=True)) if len(paths) == len(stamps) else {}
        found = {}
        for path, modified in checkpoint_times(paths, storage=self._storage):
            directory, name = os.path.split(path)
            if os.path.abspath(directory) == os.path.abspath(self._directory) and self._is_ours(name):
                time = times.get(path, modified)
                found[name] = time if math.isfinite(time) else modified
        preserved = state.last_preserved_timestamp
        return found, preserved if preserved > 0 and math.isfinite(preserved) else None

    def _is_ours(self, name: Any) -> bool:
        return isinstance(name, str) and filenames.split_step(name)[0] == self._name and name != self._name

    def _exists(self, name: str) -> bool:
        return checkpoint_exists(os.path.join(self._directory, name), storage=self._storage)


def _rows(content: dict[str, Any], key: str) -> list[Any]:
    rows = content.get(key)
    return rows if isinstance(rows, list) else []


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
