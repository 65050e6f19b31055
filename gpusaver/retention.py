"""Which checkpoints a Saver lists, and which it deletes: the rule alone, without clock or files.

::

    added(path, now)
        p1 p2 p3 ... + path        the newest max_to_keep stay listed, in order of their last save
        p1, p2, ... surplus        saved later than next_time?   yes: files stay for ever, next_time += the period
                                                                 no:  files are to be deleted

``next_time`` starts one period after ``start_time`` and moves by whole periods only, never to "now" (as in TensorFlow:
with saves rarer than the period every checkpoint is kept).
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RetentionDecision:
    """What to do after a save: first write the state file with ``listed`` (oldest first), then remove ``delete``."""

    listed: list[str]
    delete: list[str]


class Retention:
    """Keeps the newest ``max_to_keep`` checkpoints, and for ever about one per ``keep_checkpoint_every_n_hours``.

    ``max_to_keep`` None or 0: nothing is deleted, and the state file names the newest alone.
    ``keep_checkpoint_every_n_hours`` None: none is kept beyond the newest.  Times are seconds since the epoch.

    Raises TypeError for arguments that are no numbers, ValueError for ``max_to_keep`` below 0 or beyond int32 and for
    hours that are not above 0.  With ``like_tensorflow=True`` hours of None mean 0, both may be zero or negative, and
    each save gives up at most one checkpoint.

    A checkpoint in ``RetentionDecision.delete`` is forgotten at once: if removing it fails, its files stay.
    The list may be read from any thread while another changes it; changes must come one after the other.
    """

    def __init__(
        self,
        max_to_keep: int | None,
        keep_checkpoint_every_n_hours: float | None,
        start_time: float,
        *,
        like_tensorflow: bool = False,
    ) -> None:
        self._max_to_keep = 0 if max_to_keep is None else operator.index(max_to_keep)
        self._surplus_per_save = 1 if like_tensorflow else _INT32_MAX
        hours = keep_checkpoint_every_n_hours
        if hours is None:
            hours = 0.0 if like_tensorflow else math.inf
        if isinstance(max_to_keep, bool):
            raise TypeError(f"max_to_keep: expected an integer or None, found {max_to_keep!r}")
        if isinstance(hours, str | bytes):
            raise TypeError(f"keep_checkpoint_every_n_hours: expected a number or None, found {hours!r}")
        if self._max_to_keep > _INT32_MAX or (self._max_to_keep < 0 and not like_tensorflow):
            raise ValueError(f"max_to_keep: expected None or 0 (keep all) up to {_INT32_MAX}, found {max_to_keep!r}")
        if not (hours > 0 or like_tensorflow):
            raise ValueError(
                "keep_checkpoint_every_n_hours: expected more than 0, or None to keep none beyond max_to_keep, "
                f"found {hours!r}"
            )
        self._period = float(hours) * 3600
        self._next_time = start_time + self._period
        #: Absolute path -> (path as given, time), oldest first.  One file has one entry, however its path is spelt:
        #: else ``d/k`` would be deleted as surplus of the same file saved as ``./d/k``.  Replaced, never changed: a
        #: background save must not disturb a thread that reads the list.
        self._last: dict[str, tuple[str, float]] = {}

    @property
    def max_to_keep(self) -> int:
        """0: all."""
        return self._max_to_keep

    @property
    def keep_checkpoint_every_n_hours(self) -> float | None:
        return None if self._period == math.inf else self._period / 3600

    @property
    def last_checkpoints(self) -> list[str]:
        """A new list of the paths, oldest first."""
        return [path for path, _ in self._last.values()]

    @property
    def last_checkpoints_with_time(self) -> list[tuple[str, float]]:
        """The same with their times; infinite where that is not known."""
        return list(self._last.values())

    def set_last_checkpoints(self, paths: Iterable[str]) -> None:
        """Replaces the list.  These are never deleted, because their time is not known (as in TensorFlow)."""
        self.set_last_checkpoints_with_time((path, math.inf) for path in paths)

    def set_last_checkpoints_with_time(self, paths_and_times: Iterable[tuple[str, float]]) -> None:
        """Replaces the list by pairs (path, seconds since the epoch), oldest first; the argument is copied."""
        last: dict[str, tuple[str, float]] = {}
        for path, time in paths_and_times:
            _append(last, path, time)
        self._last = last

    def copies_to_come(self) -> int:
        """How many further checkpoints will be on disk together with those listed, before one is deleted."""
        return max(1, self._max_to_keep + 1 - len(self._last))

    def added(self, path: str, now: float) -> RetentionDecision:
        """Takes note that ``path`` was saved at ``now``.

        A path that is listed already moves to the end; nothing is deleted for it.
        """
        last = dict(self._last)
        delete = []
        if self._max_to_keep != 0:
            _append(last, path, now)
            surplus = min(len(last) - self._max_to_keep, self._surplus_per_save)
            for identity in list(last)[: max(surplus, 0)]:
                old, time = last.pop(identity)
                if time > self._next_time or time == math.inf:
                    self._next_time += self._period
                else:
                    delete.append(old)
            self._last = last
        listed = [path for path, _ in last.values()]
        if not listed or listed[-1] != path:
            listed.append(path)
        return RetentionDecision(listed, delete)


def _append(last: dict[str, tuple[str, float]], path: str, time: float) -> None:
    identity = os.path.abspath(path)
    last.pop(identity, None)
    last[identity] = (path, time)
