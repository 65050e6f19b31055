"""The CheckpointManager: when a training loop saves, what it keeps, and how it begins again."""

from __future__ import annotations

import errno
import logging
import math
import operator
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

from gpusaver.arguments import fs_path, make_directory
from gpusaver.bundle import filenames
from gpusaver.checkpoint_files import PathLike, checkpoint_exists, discard_checkpoint
from gpusaver.checkpoint_state import latest_checkpoint, replace_state, state_lock, write_state
from gpusaver.errors import CancelledError, Error, NotFoundError, ResourceExhaustedError
from gpusaver.manager.memory import Memory
from gpusaver.manager.policy import Checkpoint, Managed, Mode, Policy
from gpusaver.manager.progress import Progress, SaveProgress, bar
from gpusaver.manager.signals import SignalFlag
from gpusaver.pending import PendingSave, close_on_exit, ended_if_interrupted
from gpusaver.saver import Saver
from gpusaver.saving import SaveRequest, WhenBusy
from gpusaver.storage.base import Lock, Storage

WhenDiskFull = Literal["raise", "continue", "make_room"]

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_log = logging.getLogger("gpusaver")


class CheckpointManager:
    """Saves a training loop's variables every so often, keeps the right checkpoints, and resumes from the newest.

    >>> with gpusaver.CheckpointManager(state, "run", save_every_n_steps=100, max_to_keep=3) as manager:
    ...     manager.restore_or_initialize()
    ...     while state["step"] < 1000 and not manager.preempted:
    ...         train(state)
    ...         manager.step(state["step"])

    ``var_list``: what a :class:`Saver` takes, or a Saver (whose own retention then plays no part; the manager closes
    it).  ``directory``: made if its parent exists.  Checkpoints are ``directory/checkpoint_name-<step>``.

    When to save, for :meth:`step`: ``save_every_n_steps``: when the step passes a multiple of it;
    ``save_every_secs``: so long after the last save began; both: whichever comes first; none: never by itself.
    ``when_busy``: "wait" for the save before, or "skip" until it has ended.

    What stays: the newest ``max_to_keep`` (None: all), which the state file lists; besides, the ``best_to_keep`` best
    by the metric given when saving (``best_mode`` "min" or "max"); the pinned; and for ever about one per
    ``keep_checkpoint_every_n_hours``.  Remembered across restarts in ``checkpoint.manager.json``.

    ``preemption_signals``: such as ``(signal.SIGTERM, signal.SIGUSR1)``: see :attr:`preempted`.  From the main thread
    only; the previous handlers are called too, and put back by :meth:`close`.

    ``when_disk_full``, for saves by :meth:`step`: "raise" at the next step; "continue" training with a warning, until
    the next save is due; "make_room": the same, and the oldest checkpoint that is neither pinned, best nor the newest
    is deleted ahead of its time, and the save tried again at the next step.

    ``on_progress``: called with :class:`SaveProgress` while a save is written, from its threads; it may not save.
    The last one comes before :meth:`save` or :meth:`close` returns.  ``progress_bar``: on standard error if that is a
    terminal (needs tqdm).  ``clock``: seconds since the epoch.

    One manager per directory and name at a time: from the first step or save on it holds a lock, and another process
    gets FailedPreconditionError naming this one.  Call from one thread.  A context manager: leaving it closes.
    """

    def __init__(
        self,
        var_list: Any,
        directory: PathLike,
        max_to_keep: int | None = 5,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_name: str = "ckpt",
        *,
        save_every_n_steps: int | None = None,
        save_every_secs: float | None = None,
        best_to_keep: int = 0,
        best_mode: Mode = "min",
        preemption_signals: Iterable[int] = (),
        when_busy: Literal["wait", "skip"] = "wait",
        when_disk_full: WhenDiskFull = "raise",
        on_progress: Callable[[SaveProgress], object] | None = None,
        progress_bar: bool = False,
        storage: Storage | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = fs_path(directory, "directory")
        _check_name(checkpoint_name)
        _check_choice("when_busy", when_busy, "wait", "skip")
        _check_choice("when_disk_full", when_disk_full, "raise", "continue", "make_room")
        _check_intervals(save_every_n_steps, save_every_secs)
        self._policy = Policy(max_to_keep, keep_checkpoint_every_n_hours, best_to_keep, best_mode)
        self._name = checkpoint_name
        self._every_steps = save_every_n_steps
        self._every_secs = save_every_secs
        self._when_busy: WhenBusy = when_busy
        self._when_disk_full = when_disk_full
        self._clock = clock
        self._saver = var_list if isinstance(var_list, Saver) else Saver(var_list, storage=storage, clock=clock)
        if self._saver.is_collective:
            raise ValueError(
                "a CheckpointManager decides by its own clock and disk, which ranks do not share: it takes no "
                "Saver with comm; call its save on every rank"
            )
        self._storage = self._saver.storage
        self._memory = Memory(self.directory, checkpoint_name, self._storage)
        #: Changed by the saving thread under this lock; replaced, never changed, so it may be read without.
        self._managed = self._memory.load(clock(), last_preserved=clock() - 1.0)
        self._managed_lock = threading.Lock()
        self._ownership: Lock | None = None
        self._pending: PendingSave | None = None
        self._reported = threading.Event()  # the pending save has ended, and listeners and log have its report
        self._must_retry = False
        #: Of the last save, or of what was restored: from here the intervals count.
        self._base_step = 0
        self._base_time = clock()
        self._answered = False
        drawn = bar() if progress_bar else None
        self._progress = Progress([listener for listener in (on_progress, drawn) if listener is not None])
        self._process = os.getpid()
        self._signals = SignalFlag(preemption_signals)

    # -- what there is

    @property
    def latest_checkpoint(self) -> str | None:
        """The newest prefix according to the state file; as :func:`gpusaver.latest_checkpoint`."""
        return latest_checkpoint(self.directory, storage=self._storage)

    @property
    def checkpoints(self) -> list[str]:
        """The newest ``max_to_keep``, oldest first: those that the state file lists."""
        return self._paths(self._policy.newest(self._managed.checkpoints))

    @property
    def best_checkpoints(self) -> list[str]:
        """At most ``best_to_keep``, the best first."""
        return self._paths(self._policy.best(self._managed.checkpoints))

    @property
    def pinned_checkpoints(self) -> list[str]:
        return self._paths(c for c in self._managed.checkpoints if c.is_pinned)

    @property
    def preempted(self) -> bool:
        """A signal came and the checkpoint of this step is durable: it is time to leave the loop.

        The signal alone only sets a flag; :meth:`step` then saves, waits for the end, and makes this true.
        """
        return self._answered

    # -- beginning

    def restore_or_initialize(self, init_fn: Callable[[], object] | None = None) -> str | None:
        """Restores the newest checkpoint that is whole and returns its prefix; if there is none calls ``init_fn()``.

        As :meth:`Saver.restore_latest`: damaged ones are passed over with a warning; DataLossError if all are damaged.
        """
        report = self._saver.restore_latest(self.directory)
        self._base_time = self._clock()
        if report is None:
            if init_fn is not None:
                init_fn()
            _log.info("%s has no checkpoint: training begins", self.directory)
            return None
        self._base_step = filenames.split_step(report.prefix)[1] or 0
        _log.info("resumed from %s", report.prefix)
        return report.prefix

    # -- saving

    def step(self, step: int, *, metric: float | None = None) -> PendingSave | None:
        """Call it after every training step, with its number; saves in the background if it is time to.

        Returns the save that it started, None if there was nothing to do.  Raises the error of a background save that
        has failed since the last call.  If a preemption signal came, it saves, returns when that is durable, and
        :attr:`preempted` is true.  ``metric``: of the variables as they are now, for ``best_to_keep``.
        """
        step = operator.index(step)
        self._own()
        self._collect()
        received = self._signals.received
        if received is not None and not self._answered:
            self._answer(received.name, step, metric)
            return None
        if not self._is_due(step):
            return None
        return self._start(step, metric, is_pinned=False, is_awaited=False)

    def save(self, step: int | None = None, *, metric: float | None = None, pin: bool = False) -> str:
        """Saves now and returns the prefix when it is durable.  ``step`` None: one more than the last.

        ``pin``: retention never takes it, until :meth:`unpin`.  Raises its error, or that of an earlier save.
        """
        self._own()
        self._collect(wait=True)
        step = self._base_step + 1 if step is None else operator.index(step)
        pending = self._start(step, metric, is_pinned=pin, is_awaited=True)
        assert pending is not None
        try:
            with ended_if_interrupted(pending):
                return pending.result()
        finally:
            self._reported.wait()
            self._pending = None

    def pin(self, step: int) -> None:
        """Retention never takes the checkpoint of this step, until :meth:`unpin`.  NotFoundError if there is none."""
        self._set_pinned(step, True)

    def unpin(self, step: int) -> None:
        """It goes when its turn comes: at the next save, if it is among neither the newest nor the best."""
        self._set_pinned(step, False)

    def _set_pinned(self, step: int, is_pinned: bool) -> None:
        self._own()
        if self._pending is not None:
            self._pending.wait()
        with self._managed_lock:
            found = self._managed.find(f"{self._name}-{operator.index(step)}")
            if found is None:
                raise NotFoundError(f"{self.directory} has no checkpoint of step {step} that this manager knows of")
            managed = self._managed.pinned(found.name, is_pinned)
            self._memory.save(managed)
            self._managed = managed

    def _is_due(self, step: int) -> bool:
        now = self._clock()
        self._base_time = min(self._base_time, now)  # the clock may have been set back
        self._base_step = min(self._base_step, step)  # and the loop may have begun again
        every_steps, every_secs = self._every_steps, self._every_secs
        return (
            self._must_retry
            or (every_steps is not None and step // every_steps > self._base_step // every_steps)
            or (every_secs is not None and step > self._base_step and now - self._base_time >= every_secs)
        )

    def _start(self, step: int, metric: float | None, *, is_pinned: bool, is_awaited: bool) -> PendingSave | None:
        """Requires: the pending save was collected, unless it is still under way."""
        value = None if metric is None or not math.isfinite(metric) else float(metric)
        if self._pending is not None and self._when_busy == "skip":
            return None
        self._collect(wait=True)
        prefix = os.path.join(self.directory, f"{self._name}-{step}")
        progress, nbytes = self._progress, 0

        def finish(prefix: str) -> None:
            self._take_note(os.path.basename(prefix), value, is_pinned)

        def on_written(written: int, total: int) -> None:
            nonlocal nbytes
            nbytes = total  # with what pads tensors
            progress(SaveProgress(prefix, written, total))

        request = SaveRequest(
            "meta",
            "blocking" if is_awaited else "auto",
            "wait",
            is_awaited=is_awaited,
            copies=self._policy.copies_to_come(self._managed),
            finish=finish,
            on_written=on_written if progress else None,
        )
        pending = self._saver.start(prefix, request)
        assert pending is not None
        self._pending, self._must_retry = pending, False
        self._base_step, self._base_time = step, self._clock()
        reported = self._reported = threading.Event()

        def report(pending: PendingSave) -> None:
            try:
                self._report(pending, nbytes)
            finally:
                reported.set()

        pending.add_done_callback(report)
        if pending.capture == "blocking" and not is_awaited:
            with ended_if_interrupted(pending):
                pending.wait_captured()
        pending.mark_returned()
        return pending

    def _report(self, pending: PendingSave, nbytes: int) -> None:
        """In the saving thread, when it is over."""
        report = pending.report
        if report is None:
            self._progress.close()
            return
        _log.info("saved %s: %d bytes in %.2f s", pending.prefix, report.nbytes, report.durable_seconds)
        self._progress(SaveProgress(pending.prefix, nbytes, nbytes, is_durable=True))

    def _answer(self, signal_name: str, step: int, metric: float | None) -> None:
        """Saves at the step boundary after a signal, unless this step is saved already."""
        _log.warning("%s came: saving at step %d", signal_name, step)
        self._collect(wait=True)
        prefix = os.path.join(self.directory, f"{self._name}-{step}")
        if self._managed.find(os.path.basename(prefix)) is None or step != self._base_step:
            prefix = self.save(step, metric=metric)
        self._answered = True
        _log.warning("%s: saved %s; the process may end", signal_name, prefix)

    # -- what came of it

    def _collect(self, *, wait: bool = False) -> None:
        """Raises the error of a background save that has ended, or deals with it as ``when_disk_full`` says."""
        pending = self._pending
        if pending is None or not (wait or pending.done()):
            return
        error = pending.exception()
        self._reported.wait()
        self._pending = None
        if error is None or isinstance(error, CancelledError):
            return
        is_full = isinstance(error, ResourceExhaustedError) and error.errno in _DISK_FULL
        if not is_full or self._when_disk_full == "raise":
            raise error
        _log.warning("training goes on without this checkpoint: %s", error)
        if self._when_disk_full == "make_room":
            self._must_retry = self._make_room()

    def _make_room(self) -> bool:
        """Deletes one checkpoint ahead of its time; False if none may go, or if even that fails."""
        with self._managed_lock:
            victim = self._policy.next_to_go(self._managed)
            if victim is None:
                _log.warning("there is no checkpoint left to delete; the next save is tried when it is due")
                return False
            try:
                self._apply(self._managed.given_up(victim.name))
            except Error as error:
                _log.warning("cannot delete %s to make room: %s", victim.name, error)
                return False
        _log.warning("deleted %s to make room; the save is tried again at the next step", victim.name)
        return True

    def _take_note(self, name: str, metric: float | None, is_pinned: bool) -> None:
        """In the saving thread, when the checkpoint is durable: state file, then retention."""
        with self._managed_lock:
            was = self._managed.find(name)
            is_pinned = is_pinned or (was is not None and was.is_pinned)
            managed = self._managed.saved(Checkpoint(name, self._clock(), metric, is_pinned))
            try:
                self._apply(self._policy.sweep(managed))
            except Error as error:
                error.add_note(f"The checkpoint {name} itself is complete; no state file lists it.")
                raise

    def _apply(self, managed: Managed) -> None:
        """Remembers, replaces the state file, deletes what is doomed: in this order.

        Requires: the lock is held, and the newest checkpoint is there.
        """
        replace_state(self.directory, None, lambda _: self._apply_locked(managed), storage=self._storage)

    def _apply_locked(self, managed: Managed) -> None:
        with state_lock(self.directory, storage=self._storage):
            there = tuple(c for c in managed.checkpoints if self._exists(c.name))
            managed = replace(managed, checkpoints=there)
            self._memory.save(managed)
            listed = self._policy.newest(there)
            write_state(
                self.directory,
                self._path(listed[-1].name),
                self._paths(listed),
                None,
                [c.time for c in listed],
                managed.last_preserved,
                save_relative_paths=True,
                storage=self._storage,
            )
            left = tuple(name for name in managed.doomed if not self._remove(name))
            self._managed = replace(managed, doomed=left)

    def _remove(self, name: str) -> bool:
        try:
            discard_checkpoint(self._storage, self._path(name), "meta", self._saver.discard_data)
        except Error as error:
            _log.warning("cannot remove the old checkpoint %s, the next save tries again: %s", name, error)
            return False
        return True

    def _own(self) -> None:
        """Takes the directory, and looks anew at what is there: another may have had it until now."""
        if self._ownership is not None:
            return
        make_directory(self._storage, self.directory, self._path(self._name))
        self._ownership = self._storage.lock(filenames.lock_path(self._memory.path))
        self._memory.sweep()
        self._managed = self._memory.load(self._clock(), last_preserved=self._managed.last_preserved)

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _paths(self, checkpoints: Iterable[Checkpoint]) -> list[str]:
        return [self._path(checkpoint.name) for checkpoint in checkpoints]

    def _exists(self, name: str) -> bool:
        return checkpoint_exists(self._path(name), storage=self._storage)

    # -- the end

    def close(self) -> None:
        """Waits for the pending save, puts signal handlers back, lets the directory go.  Idempotent.

        Raises the error of that save, also of a full disk: there is no later one that would make up for it.
        """
        if os.getpid() != self._process:
            return  # a forked child: all of this is the parent's
        self._signals.close()
        self._when_disk_full = "raise"
        try:
            self._collect(wait=True)
        finally:
            try:
                self._saver.close()
            finally:
                self._progress.close()
                if self._ownership is not None:
                    self._ownership.release()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        close_on_exit(self.close, error)


def _check_name(name: str) -> None:
    if not name or os.path.basename(name) != name or "\0" in name or filenames.split_step(name)[1] is not None:
        raise ValueError(f"checkpoint_name: expected a plain name that does not end like a step, found {name!r}")


def _check_choice(what: str, found: object, *expected: str) -> None:
    if found not in expected:
        raise ValueError(f"{what}: expected {' or '.join(expected)}, found {found!r}")


def _check_intervals(steps: int | None, seconds: float | None) -> None:
    if steps is not None and (isinstance(steps, bool) or operator.index(steps) < 1):
        raise ValueError(f"save_every_n_steps: expected at least 1 or None, found {steps!r}")
    if seconds is not None and not (seconds >= 0 and math.isfinite(seconds)):
        raise ValueError(f"save_every_secs: expected a number of seconds or None, found {seconds!r}")
