"""Which checkpoints a CheckpointManager keeps, and which it deletes: the rule alone, without clock or files.

::

    all it has saved, oldest first     p1  p2  p3  p4  p5  p6  p7
                                                       the newest max_to_keep            listed in the state file
                                           pinned, or among the best best_to_keep        kept, not listed
                                       t - period >= last_preserved                      kept for ever and forgotten
                                                                                         (then last_preserved = t)
                                       any other                                         deleted

The first rule that fits counts.  ``last_preserved`` is the time of the last checkpoint kept for ever, at first the time
at which the directory was first managed, as in TensorFlow.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``name``: of the prefix, without a directory.  ``time``: of its save, seconds since the epoch."""

    name: str
    time: float
    metric: float | None = None
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class Managed:
    """What a manager knows.  Both tuples are oldest first; ``doomed`` are names that are still to be deleted."""

    checkpoints: tuple[Checkpoint, ...] = ()
    last_preserved: float = 0.0
    doomed: tuple[str, ...] = ()

    def find(self, name: str) -> Checkpoint | None:
        return next((checkpoint for checkpoint in self.checkpoints if checkpoint.name == name), None)

    def saved(self, new: Checkpoint) -> Managed:
        """``new`` is the newest now; one of that name that was there before is no more."""
        checkpoints = (*(c for c in self.checkpoints if c.name != new.name), new)
        doomed = tuple(name for name in self.doomed if name != new.name)
        return replace(self, checkpoints=checkpoints, doomed=doomed)

    def pinned(self, name: str, is_pinned: bool) -> Managed:
        checkpoints = (replace(c, is_pinned=is_pinned) if c.name == name else c for c in self.checkpoints)
        return replace(self, checkpoints=tuple(checkpoints))

    def given_up(self, name: str) -> Managed:
        """To be deleted, whatever the policy says."""
        checkpoints = tuple(c for c in self.checkpoints if c.name != name)
        return replace(self, checkpoints=checkpoints, doomed=(*self.doomed, name))


@dataclass(frozen=True, slots=True)
class Policy:
    """Raises TypeError for what is no number, ValueError for numbers out of range."""

    max_to_keep: int | None
    keep_checkpoint_every_n_hours: float | None = None
    best_to_keep: int = 0
    best_mode: Mode = "min"

    def __post_init__(self) -> None:
        if self.max_to_keep is not None and (
            isinstance(self.max_to_keep, bool) or operator.index(self.max_to_keep) < 1
        ):
            raise ValueError(f"max_to_keep: expected at least 1, or None to keep all, found {self.max_to_keep!r}")
        hours = self.keep_checkpoint_every_n_hours
        if hours is not None and not hours > 0:
            raise ValueError(f"keep_checkpoint_every_n_hours: expected more than 0 or None, found {hours!r}")
        if isinstance(self.best_to_keep, bool) or operator.index(self.best_to_keep) < 0:
            raise ValueError(f"best_to_keep: expected 0 or more, found {self.best_to_keep!r}")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode: expected 'min' or 'max', found {self.best_mode!r}")

    def newest(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Those that the state file lists, oldest first."""
        return list(checkpoints if self.max_to_keep is None else checkpoints[-self.max_to_keep :])

    def best(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """At most ``best_to_keep``, the best first; of equal ones the newer.  Without a finite metric none is good."""
        sign = 1.0 if self.best_mode == "min" else -1.0
        ranked = [c for c in reversed(checkpoints) if c.metric is not None and math.isfinite(c.metric)]
        return sorted(ranked, key=lambda c: sign * (c.metric or 0.0))[: self.best_to_keep]

    def sweep(self, managed: Managed) -> Managed:
        """Moves what is to be deleted from ``checkpoints`` to ``doomed``, and forgets what is kept for ever."""
        checkpoints = managed.checkpoints
        kept = {c.name for c in (*self.newest(checkpoints), *self.best(checkpoints))}
        kept |= {c.name for c in checkpoints if c.is_pinned}
        last_preserved, doomed = managed.last_preserved, list(managed.doomed)
        for checkpoint in checkpoints:
            if checkpoint.name in kept:
                continue
            hours = self.keep_checkpoint_every_n_hours
            if hours is not None and checkpoint.time - hours * 3600 >= last_preserved:
                last_preserved = checkpoint.time
            else:
                doomed.append(checkpoint.name)
        return Managed(tuple(c for c in checkpoints if c.name in kept), last_preserved, tuple(doomed))

    def next_to_go(self, managed: Managed) -> Checkpoint | None:
        """What may be deleted ahead of its time to make room: the oldest, but never the newest, a pinned or a best."""
        best = self.best(managed.checkpoints)
        return next((c for c in managed.checkpoints[:-1] if not c.is_pinned and c not in best), None)

    def copies_to_come(self, managed: Managed) -> int:
        """How many further checkpoints will be on disk together with these, before one is deleted."""
        if self.max_to_keep is None:
            return 1
        return max(1, self.max_to_keep + self.best_to_keep + 1 - len(managed.checkpoints))
