"""The Saver: which variables, under which prefix, how many checkpoints."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from gpusaver.arguments import (
    checkpoint_prefix,
    from_saver_def,
    fs_path,
    make_directory,
    meta_graph_file,
    state_filename,
    without_session,
)
from gpusaver.checkpoint_files import PathLike, checkpoint_times
from gpusaver.collective import CollectiveSaving
from gpusaver.device.inventory import nvtx
from gpusaver.distributed.group import Group
from gpusaver.distributed.transport import connect
from gpusaver.errors import CancelledError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from gpusaver.exporting import MetaContent, PlanDescription, SaverOptions
from gpusaver.finding import candidates, check, first_sound
from gpusaver.listing import CheckpointList
from gpusaver.metagraph.rewriting import without_scope, write_meta_graph
from gpusaver.pending import PendingSave, close_on_exit, ended_if_interrupted
from gpusaver.pipeline.plan import Plan, Save
from gpusaver.pipeline.timeline import Timeline
from gpusaver.pipeline.workers import run_in_background
from gpusaver.reader import READ_THREADS, CheckpointReader
from gpusaver.restoring import RestoreReport, restore_leaves
from gpusaver.retention import Retention
from gpusaver.saver_variables import SaverVariables
from gpusaver.saving import Capture, SaveRequest, Saving, WhenBusy
from gpusaver.storage.base import Storage
from gpusaver.storage.routing import RoutedStorage
from gpusaver.variables import Leaves, current_variables

if TYPE_CHECKING:
    from gpusaver.protos import MetaGraphDef, SaverDef

_log = logging.getLogger("gpusaver")


class Saver:
    """Saves and restores variables in TensorFlow's V2 checkpoint format.

    ``var_list``: a dict (also nested dicts and lists under it; names are joined with ``/``) of arrays, Variables,
    numbers and strings; or a list of Variables; None takes the current collection, as it is now.  Containers are kept
    and looked through anew at every save and restore, so ``state["w"] = new`` is saved rightly; the set of names is
    fixed.  ``reshape``: restore takes any shape of equal element count.  ``sharded``: one data file per device.
    ``max_to_keep``, ``keep_checkpoint_every_n_hours``: see :class:`gpusaver.retention.Retention`.
    ``pad_step_number``: steps of eight digits.  ``save_relative_paths``: what the state file holds, so that a
    directory can be moved.  ``restore_sequentially``: restore with one thread.  ``saver_def``: a SaverDef, ours or
    TensorFlow's, whose retention and sharding are taken.  ``defer_build``: :meth:`build` is called later.  ``name``:
    the scope of this Saver's nodes in ``.meta`` files, default "save"; ``filename``: the prefix they take without one.
    ``staging_bytes``: pinned host memory for copies from and to devices, never exceeded; the least, and the default, is
    32 MiB; as much as the state lets a "deferred" save run at the speed of the link, whatever the disk's.  (Tables of
    kernels come on top, 256 KiB each, a few per device.)  ``check_captures``: for debugging; "deferred" saves read
    everything three times, and their fences raise FailedPreconditionError for variables that were changed too early.
    ``direct_io``: None decides by directory and size, True or False for all.  ``strict``: every save is read again from
    the medium and verified before it replaces anything or counts as durable, DataLossError if it differs; it takes the
    time of a read.  (The system's cache is dropped for that; what a disk answers from memory of its own nobody can
    tell.)  ``incremental``: variables that do not change get data files of their own, and one that would hold what that
    of the last save holds is not written: it is another name of the same file, or on object stores a copy made there.
    Needs ``gpusaver[incremental]``.  ``"declared"``: the same, but variables with trainable=False are not hashed whole;
    see docs/incremental.md; not with ``comm``.  ``recycle``: the data files (of 64 MiB or more) of a checkpoint that
    retention gives up, or that a save replaces, are kept, and written over by the next save: disks that must find room
    for new files, and take back that of old ones, are spared both.  So one checkpoint more than ``max_to_keep`` takes
    up room between saves, as during them; its files have temporary names, and go when the Saver is closed or the
    process ends.  Only on a local file system of Linux that no other host reads, and no file that somebody has open or
    that has another name; not with ``comm``.  ``clock``: seconds since the epoch.  ``comm``: a communicator of mpi4py
    (``gpusaver[mpi]``), whose ranks save one checkpoint together and restore from it, each its own variables and parts
    (docs/distributed.md); then making a Saver, saving, waiting for a save, restoring and closing are collective, and
    raise the same error on every rank.  ``comm_deadline``: the seconds for which a rank that is ready waits for the
    others.

    Methods may be called from any thread; saves come one after the other.  A context manager: leaving it closes.

    Raises TypeError for values that cannot be stored, ValueError for names given twice, an empty ``var_list``
    (unless ``allow_empty``), and numbers out of range.
    """

    def __init__(
        self,
        var_list: Any = None,
        *,
        reshape: bool = False,
        sharded: bool = False,
        max_to_keep: int | None = 5,
        keep_checkpoint_every_n_hours: float | None = None,
        name: str | None = None,
        restore_sequentially: bool = False,
        saver_def: Any = None,
        allow_empty: bool = False,
        defer_build: bool = False,
        pad_step_number: bool = False,
        save_relative_paths: bool = True,
        filename: str | None = None,
        direct_io: bool | None = None,
        staging_bytes: int = 0,
        strict: bool = False,
        incremental: bool | Literal["declared"] = False,
        recycle: bool = False,
        check_captures: bool = False,
        storage: Storage | None = None,
        clock: Callable[[], float] = time.time,
        comm: Any = None,
        comm_deadline: float = 600.0,
    ) -> None:
        if saver_def is not None:
            max_to_keep, keep_checkpoint_every_n_hours, sharded = from_saver_def(saver_def)
        if defer_build and var_list is not None:
            raise ValueError(
                "If `var_list` is provided then build cannot be deferred: defer_build=False, or no var_list."
            )
        self.name = name
        self.filename = filename
        self._reshape = reshape
        self._sharded = sharded
        self._allow_empty = allow_empty
        self._pad_step_number = pad_step_number
        self._read_threads = 1 if restore_sequentially else READ_THREADS
        self.storage = storage or RoutedStorage()
        retention = Retention(max_to_keep, keep_checkpoint_every_n_hours, clock())
        for option, value in (("incremental", incremental), ("recycle", recycle)):
            if value and comm is not None:
                raise ValueError(f"{option}: only without comm, whose ranks write one file each: {option}=False")
        self._saving = Saving(
            self.storage,
            direct_io,
            staging_bytes,
            strict=strict,
            check_captures=check_captures,
            incremental=incremental,
            recycle=recycle,
        )
        #: Removes a data file that retention gives up, or keeps it for the next save: also for the CheckpointManager.
        self.discard_data = self._saving.recycler.give_up
        self._list = CheckpointList(
            retention,
            self.storage,
            clock,
            save_relative_paths=save_relative_paths,
            discard_data=self.discard_data,
        )
        kept = retention.max_to_keep, retention.keep_checkpoint_every_n_hours
        self._options = SaverOptions(name, filename, sharded, reshape, *kept)
        self._pending: PendingSave | None = None
        self._closed = False
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._variables: SaverVariables | None = None
        #: ``with self._agree(step, agreed)``: with other ranks, an error inside is everybody's.
        self._agree: Callable[[str, str], AbstractContextManager[None]] = lambda step, agreed: nullcontext()
        self._group: Group | None = None
        self._collective: CollectiveSaving | None = None
        if comm is not None:
            self._join(Group(connect(comm), comm_deadline))
        if not defer_build:
            with self._agree("Saver", ""):
                self.build(var_list)

    def _join(self, group: Group) -> None:
        """From now on this Saver's ends are those of all ranks."""
        self._group = group
        self._agree = group.step
        self._collective = CollectiveSaving(group, self._saving, self._options, self._list)

    def build(self, var_list: Any = None) -> None:
        """Fixes the set of names; only needed after ``defer_build=True``, once."""
        self._check_process()
        if self._variables is not None:
            return
        var_list = current_variables() if var_list is None else var_list
        variables = SaverVariables(var_list, self._options, self._saving.frozen)
        if not len(variables) and not self._allow_empty and self._collective is None:  # another rank may have some
            raise ValueError(
                "No variables to save: pass a dict of arrays, make a gpusaver.Variable, or allow_empty=True. "
                "gpusaver.import_meta_graph(prefix + '.meta') makes the variables of a checkpoint anew, and "
                "gpusaver.load(prefix) reads it without any"
            )
        if self._collective is not None:  # which plans for itself
            variables.forget()
        self._variables = variables

    def warmup(self, save_path: PathLike | None = None) -> None:
        """Does ahead of training what the first save would wait for.

        For variables on devices it pins the whole ring (``staging_bytes``) and compiles the kernels, which takes
        seconds where CuPy has not done so before.  For ``save_path``, a prefix as :meth:`save` takes it, it finds out
        how its directory is best written, if that exists.
        """
        self._check_process()
        directory = None if save_path is None else os.path.dirname(fs_path(save_path, "save_path"))
        with self._lock:
            variables = self._built("warmup")
            self._saving.warm_up(variables.plan(variables.leaves()), directory)

    # -- saving

    @without_session
    def save(
        self,
        save_path: PathLike,
        global_step: Any = None,
        *,
        latest_filename: PathLike | None = None,
        meta_graph_suffix: str = "meta",
        write_meta_graph: bool = True,
        write_state: bool = True,
    ) -> str:
        """Saves and returns the prefix when the checkpoint is durable: ``save_path``, or ``save_path-<step>``.

        ``global_step``: an int, or an integer Variable or array of rank 0.  ``latest_filename``: name of the state
        file, default "checkpoint".  ``write_meta_graph``: also write ``<prefix>.meta``, from which TensorFlow and
        :func:`gpusaver.import_meta_graph` make the variables anew; ``meta_graph_suffix``: another ending of that file,
        and of those that retention removes along.  ``write_state=False``: neither state file nor retention.

        No thread may change host arrays meanwhile: they are written from where they are, and bytes that change between
        their checksum and their way to the disk are damage to whoever restores them.  Where threads go on training,
        ``save_async(capture="snapshot").result()`` copies first.

        Raises TypeError for a wrong kind of argument, ValueError for a directory whose parent does not exist,
        ResourceExhaustedError for a full disk (found before anything is copied), and the error of an earlier
        background save that nobody has seen.  After an error older checkpoints and the state file are as they were.
        """
        suffix = meta_graph_suffix if write_meta_graph else None
        request = SaveRequest(suffix, "blocking", "wait", is_awaited=True)
        pending = self._start(save_path, global_step, latest_filename, meta_graph_suffix, write_state, request)
        assert pending is not None
        with ended_if_interrupted(pending):
            return pending.result()

    @without_session
    def save_async(
        self,
        save_path: PathLike,
        global_step: Any = None,
        *,
        capture: Capture = "auto",
        when_busy: WhenBusy = "wait",
        latest_filename: PathLike | None = None,
        meta_graph_suffix: str = "meta",
        write_meta_graph: bool = True,
        write_state: bool = True,
    ) -> PendingSave | None:
        """Starts a save and returns while it goes on in the background; see :meth:`save` for the other arguments.

        ``capture``: "snapshot" copies the variables first, so they may change as soon as the call returns; "deferred"
        copies nothing, and they may change after ``pending.fence()``; "blocking" returns when they have been read;
        "auto" is snapshot where memory allows, else blocking.  ``when_busy``: what to do while an earlier save of this
        Saver is under way: "wait" for it, "skip" this one (returns None), or "raise" FailedPreconditionError.
        """
        if capture not in ("auto", "snapshot", "deferred", "blocking"):
            raise ValueError(f"capture: expected auto, snapshot, deferred or blocking, found {capture!r}")
        if when_busy not in ("wait", "skip", "raise"):
            raise ValueError(f"when_busy: expected wait, skip or raise, found {when_busy!r}")
        if self._collective is not None and when_busy != "wait":
            raise ValueError(f"when_busy: expected wait, since ranks are not busy alike, found {when_busy!r}")
        suffix = meta_graph_suffix if write_meta_graph else None
        request = SaveRequest(suffix, capture, when_busy, is_awaited=False)
        pending = self._start(save_path, global_step, latest_filename, meta_graph_suffix, write_state, request)
        if pending is None:
            return None
        if pending.capture == "blocking":
            with ended_if_interrupted(pending):
                pending.wait_captured()
        pending.mark_returned()
        return pending

    def _start(
        self,
        save_path: PathLike,
        global_step: Any,
        latest_filename: PathLike | None,
        meta_graph_suffix: str,
        write_state: bool,
        request: SaveRequest,
    ) -> PendingSave | None:
        """With state file and retention, if wanted."""
        self._check_process()
        try:
            prefix = checkpoint_prefix(save_path, global_step, padded=self._pad_step_number)
            state_name = state_filename(
                latest_filename,
                prefix,
                is_plain=global_step is None and not self._sharded,
                is_relative=self._list.save_relative_paths,
                is_written=write_state,
            )
            meta_graph_file(prefix, meta_graph_suffix)  # refuses what cannot be one
        except (TypeError, ValueError) as error:
            self._refuse_collectively(error)
            raise
        if write_state:
            request = request._replace(
                copies=1 if global_step is None else self._list.retention.copies_to_come(),
                finish=lambda prefix: self._list.add(prefix, meta_graph_suffix, state_name),
            )
        return self.start(prefix, request)

    def _refuse_collectively(self, error: Exception) -> None:
        """The others wait in their save for this rank, which cannot begin it."""
        if self._collective is not None:
            if self._pending is not None:
                self._pending.wait()
            self._collective.refuse(error)

    def start(self, prefix: str, request: SaveRequest) -> PendingSave | None:
        """What :meth:`save`, :meth:`save_async` and the CheckpointManager come down to; None if it was skipped."""
        timeline = Timeline(time.perf_counter(), nvtx())
        self._check_process()  # before any lock: in a child it may be held by a thread that is not there
        while self._has_ended(self._pending, request.when_busy):
            with self._lock:
                if self._pending is None or self._pending.done():  # else another thread was faster
                    return self._launch(prefix, request, timeline)
        return None

    def _launch(self, prefix: str, request: SaveRequest, timeline: Timeline) -> PendingSave:
        """Refuses what can be refused, captures, and starts.  Requires: the lock is held, no save is under way."""
        if self._collective is not None:
            self._pending = self._collective.launch(prefix, request, timeline, self._leaves_to_save)
            return self._pending
        leaves = self._leaves_to_save()
        with timeline.span("plan"):
            save = self._built("save").plan(leaves)
        meta_graph = None
        if request.meta_graph_suffix is not None:
            meta_graph = meta_graph_file(prefix, request.meta_graph_suffix), self._describe(leaves, save.plan)
        make_directory(self.storage, os.path.dirname(prefix), prefix)
        with timeline.span("capture"):
            save, mode, reason = self._saving.capture(save, request.capture)
        pending = self._saving.begin(save, prefix, mode, reason, timeline, is_awaited=request.is_awaited)
        self._pending = pending
        with ended_if_interrupted(pending):
            run_in_background(lambda: self._run(save, pending, meta_graph, request))
        return pending

    def _leaves_to_save(self) -> Leaves:
        variables = self._built("save")
        self._raise_earlier_error()
        return variables.leaves()

    @staticmethod
    def _has_ended(earlier: PendingSave | None, when_busy: WhenBusy) -> bool:
        """Waits for an earlier save if asked to; outside the lock, so that another thread may skip meanwhile."""
        if earlier is None or earlier.done():
            return True
        if when_busy == "raise":
            raise FailedPreconditionError(f"the save of {earlier.prefix} is still under way")
        if when_busy == "wait":
            earlier.wait()
        return when_busy == "wait"

    def _raise_earlier_error(self) -> None:
        """Waits for the pending save, and raises its error if nobody has seen that."""
        error = self._pending.undelivered_error() if self._pending is not None else None
        self._pending = None  # not before it has ended: waiting may be interrupted
        if error is not None:
            raise error

    def _describe(self, leaves: Leaves, plan: Plan) -> MetaContent:
        """What the `.meta` file of a save is to say."""
        return self._built("save").description(leaves, plan)

    def _run(
        self, save: Save, pending: PendingSave, meta_graph: tuple[str, MetaContent] | None, request: SaveRequest
    ) -> None:
        """In the background: write, commit, state file, retention."""
        try:
            with pending.timeline.in_background():
                self._saving.finish_capture(save, pending)
                self._saving.write(save, pending, meta_graph, request.copies, request.on_written)
                if request.finish is not None:
                    with pending.timeline.span("commit"):
                        request.finish(pending.prefix)
        except BaseException as error:  # delivered by PendingSave, whatever it is
            try:
                if not (pending.is_awaited or isinstance(error, CancelledError)):
                    # Its text: a handler that keeps the record must not keep, by the traceback, the arrays.
                    _log.error("the save of %s in the background failed: %s", pending.prefix, str(error))
            finally:
                pending.fail(error)
            return
        pending.finish(len(save.plan.rows), sum(save.plan.layout.nbytes.tolist()))

    # -- restoring

    @without_session
    def restore(
        self,
        save_path: PathLike,
        *,
        partial: bool | Literal["shapes"] = False,
        verify: Literal["during", "before"] = "during",
    ) -> RestoreReport:
        """Restores every variable from the checkpoint ``save_path``, after the pending save has read them.

        Arrays are overwritten in place; what cannot be (numbers, strings, read-only arrays) is replaced in its
        container.  Names, dtypes and shapes are compared before a byte is written.  ``partial=True`` leaves variables
        that are not in the checkpoint as they are, ``"shapes"`` also those stored with another shape or dtype.
        ``verify="before"`` reads everything twice, so that a damaged checkpoint changes nothing; with "during"
        DataLossError.modified names the variables that were overwritten.

        Raises InvalidArgumentError (a ValueError) if there is no such checkpoint or shapes or dtypes differ,
        NotFoundError for missing names, DataLossError, OutOfRangeError for damage.
        """
        self._check_process()  # before the lock: in a child it may be held by a thread that is not there
        with self._lock:
            with self._agree("restore", f"{save_path!r}, partial={partial!r}, verify={verify!r}"):
                reader = self._reader(save_path, verify)
                leaves = self._built("restore").leaves()
            return restore_leaves(
                leaves,
                reader,
                self._saving.slots,
                self._read_threads,
                partial=partial,
                reshape=self._reshape,
                verify_first=verify == "before",
                group=self._group,
            )

    def _reader(self, save_path: PathLike, verify: str) -> CheckpointReader:
        """For a restore; refuses what can be refused before anything is compared."""
        if save_path is None:
            raise ValueError("Can't load save_path when it is None.")
        prefix = fs_path(save_path, "save_path")
        if verify not in ("during", "before"):
            raise ValueError(f"verify: expected 'during' or 'before', found {verify!r}")
        self._built("restore")
        if self._pending is not None:
            self._pending.wait_captured()
        try:
            return CheckpointReader(prefix, storage=self.storage)
        except NotFoundError as error:
            raise InvalidArgumentError(f"The passed save_path is not a valid checkpoint: {error}") from error

    def restore_latest(
        self,
        checkpoint_dir: PathLike,
        *,
        latest_filename: PathLike | None = None,
        partial: bool | Literal["shapes"] = False,
        allow_outside: bool = False,
    ) -> RestoreReport | None:
        """Restores the newest checkpoint of a directory that is whole; ``report.prefix`` says which.

        One that is damaged or incomplete is skipped with a warning that says why, and the next older one is taken,
        whether or not the state file lists it; the state file may be stale, of another machine, or missing.  Everything
        is read twice (``verify="before"``), so that a damaged checkpoint changes nothing.

        Returns None, and changes nothing, if the directory has no checkpoint.  Raises DataLossError if it has some but
        none is whole, and what :meth:`restore` raises if the variables do not fit.
        """

        def attempt(prefix: str) -> RestoreReport:
            with self._agree("check", prefix):
                check(prefix, checksums=False, storage=self.storage)
            return self.restore(prefix, partial=partial, verify="before")

        self._check_process()
        prefixes = candidates(
            os.fsdecode(checkpoint_dir), latest_filename, allow_outside=allow_outside, storage=self.storage
        )
        if self._group is not None:
            prefixes = self._group.share("restore_latest", prefixes)
        return first_sound(checkpoint_dir, attempt, prefixes, storage=self.storage)

    # -- meta graphs

    def export_meta_graph(
        self,
        filename: PathLike | None = None,
        collection_list: Collection[str] | None = None,
        as_text: bool = False,
        export_scope: str | None = None,
        clear_devices: bool = False,
    ) -> MetaGraphDef:
        """The variables, and how this Saver saves and restores them, as TensorFlow's ``import_meta_graph`` takes them.

        ``filename``: also write it there, atomically; ``as_text``: in protobuf's text format.  ``collection_list``: of
        "variables", "trainable_variables" and "global_step"; None: all.  ``export_scope``: only variables whose names
        start with it and a slash, which are cut off (checkpoints keep the whole names).  ``clear_devices``: without the
        devices that were given to Variables.  The message is :class:`gpusaver.protos.MetaGraphDef`.

        Raises RuntimeError before ``build()``, ValueError if ``filename`` has no directory and cannot have one.
        """
        meta_graph = self._describe_now().meta_graph(
            collection_list=collection_list, export_scope=export_scope, clear_devices=clear_devices
        )
        if filename is not None:
            path = fs_path(filename, "filename")
            make_directory(self.storage, os.path.dirname(path), path)
            write_meta_graph(meta_graph, path, as_text=as_text, storage=self.storage)
        return meta_graph

    def as_saver_def(self) -> SaverDef:
        """Retention, sharding, and the names of the nodes that save and restore in :meth:`export_meta_graph`."""
        return self._describe_now().saver_def()

    def to_proto(self, export_scope: str | None = None) -> SaverDef | None:
        """:meth:`as_saver_def` with ``export_scope`` cut off its three names; None if one does not start with it."""
        return without_scope(self.as_saver_def(), export_scope)

    @staticmethod
    def from_proto(saver_def: Any, import_scope: str | None = None) -> Saver:
        """A Saver of the current collection's variables, with the retention and sharding of ``saver_def``."""
        return Saver(saver_def=saver_def, name=import_scope)

    def _describe_now(self) -> PlanDescription:
        self._check_process()  # before the lock: in a child it may be held by a thread that is not there
        with self._lock:
            variables = self._built("the variables are described")
            leaves = variables.leaves()
            return variables.description(leaves, variables.plan(leaves).plan)

    # -- the list of checkpoints

    @property
    def last_checkpoints(self) -> list[str]:
        """A new list of the prefixes that retention counts, oldest first; without a save that is still under way."""
        self._check_process()
        return self._list.retention.last_checkpoints

    def set_last_checkpoints(self, last_checkpoints: Sequence[str]) -> None:
        """Replaces the list; these are never deleted, because their times are unknown."""
        self._check_process()
        self._list.replace(last_checkpoints)

    def set_last_checkpoints_with_time(self, last_checkpoints_with_time: Iterable[tuple[str, float]]) -> None:
        """Replaces the list by ``(prefix, seconds since the epoch)``, oldest first."""
        self._check_process()
        self._list.replace_with_times(last_checkpoints_with_time)

    def recover_last_checkpoints(self, checkpoint_paths: Iterable[PathLike]) -> None:
        """Replaces the list by those of the prefixes that exist, with the times of their files."""
        self.set_last_checkpoints_with_time(checkpoint_times(checkpoint_paths, storage=self.storage))

    # -- the end

    def close(self) -> None:
        """Waits for the pending save, raises its error if nobody has seen it, and frees memory.  Idempotent."""
        if os.getpid() != self._process:
            return  # a forked child: the save belongs to the parent
        with self._lock:
            self._closed = True
            try:
                self._raise_earlier_error()
            finally:
                self._saving.close()
                if self._variables is not None:
                    self._variables.forget()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        close_on_exit(self.close, error)

    @property
    def is_collective(self) -> bool:
        """Whether it saves together with other ranks."""
        return self._group is not None

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise FailedPreconditionError("this Saver was made before a fork; make a new one in the child process")

    def _built(self, before: str) -> SaverVariables:
        if self._closed:
            raise FailedPreconditionError("this Saver is closed")
        if self._variables is None:
            raise RuntimeError(f"`build()` should be called before {before} if defer_build==True")
        return self._variables


def save(prefix: PathLike, tensors: Any, *, write_meta_graph: bool = True) -> str:
    """Saves ``tensors`` (a dict, as a Saver takes it) once, without state file or retention; returns the prefix."""
    with Saver(tensors, max_to_keep=None) as saver:
        return saver.save(prefix, write_meta_graph=write_meta_graph, write_state=False)
