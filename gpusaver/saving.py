"""From a plan to files: the capture of the variables, their way to storage, and the memory kept for both."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gpusaver.bundle.bulk import collector_paused
from gpusaver.device import HOST, Event, Runtime
from gpusaver.errors import DataLossError, FailedPreconditionError, ResourceExhaustedError
from gpusaver.exporting import MetaContent
from gpusaver.pending import PendingSave
from gpusaver.pipeline.chunk import CHUNK_NBYTES
from gpusaver.pipeline.commit import BundleCommit, FileVersion, ShardFiles
from gpusaver.pipeline.incremental import Contents, Hashing, Incremental, WrittenFile, tensors_of
from gpusaver.pipeline.plan import Item, Plan, Save
from gpusaver.pipeline.preflight import Preflight
from gpusaver.pipeline.recycling import Recycler
from gpusaver.pipeline.save import Sources, checksums_now, write_chunks
from gpusaver.pipeline.timeline import Timeline
from gpusaver.pipeline.watched import Meter
from gpusaver.pipeline.workers import Slots
from gpusaver.storage.base import Storage, WritableFile
from gpusaver.variables import Leaf

_log = logging.getLogger("gpusaver")

Capture = Literal["auto", "snapshot", "deferred", "blocking"]
WhenBusy = Literal["wait", "skip", "raise"]

#: Through the page cache both threads copy; where chunks are staged another thread does, and these wait for the disk.
_THREADS = 2
_STAGED_THREADS = 4
_PINNED_SLOTS = 4


class SaveRequest(NamedTuple):
    """How to save.

    ``meta_graph_suffix``: None writes no meta graph.  ``is_awaited``: the caller waits for the end and gets the error.
    ``copies``: see :meth:`gpusaver.pipeline.preflight.Preflight.check`.  ``finish(prefix)`` is called in the saving
    thread when the checkpoint is durable, ``on_written(nbytes written, in total)`` from any thread while it is being
    written.
    """

    meta_graph_suffix: str | None
    capture: Capture
    when_busy: WhenBusy
    is_awaited: bool
    copies: int = 1
    finish: Callable[[str], None] | None = None
    on_written: Callable[[int, int], None] | None = None


class Saving:
    """Captures and writes, one save after the other; keeps slots, rings and snapshot memory between them.

    ``direct_io``, ``staging_bytes``, ``strict``, ``check_captures``, ``incremental`` and ``recycle`` are the Saver's.
    """

    def __init__(
        self,
        storage: Storage,
        direct_io: bool | None,
        staging_bytes: int,
        *,
        strict: bool,
        check_captures: bool,
        incremental: bool | Literal["declared"],
        recycle: bool,
    ) -> None:
        self.slots = Slots(CHUNK_NBYTES, max(_PINNED_SLOTS, staging_bytes // CHUNK_NBYTES))
        self.storage = storage
        if direct_io not in (None, False, True):
            raise ValueError(f"direct_io: expected None, False or True, found {direct_io!r}")
        self.direct_io = direct_io
        self.strict = strict
        self.check_captures = check_captures
        self.preflight = Preflight(storage)
        self.recycler = Recycler(storage)
        self._recycles = recycle
        self._snapshots: dict[str, Any] = {}
        self._has_blocked = False
        if incremental not in (False, True, "declared"):
            raise ValueError(f"incremental: expected False, True or 'declared', found {incremental!r}")
        self._incremental = Incremental(incremental) if incremental else None

    def frozen(self, leaves: Iterable[Leaf]) -> frozenset[str]:
        """Names of the variables that the next save puts into data files of their own."""
        return frozenset() if self._incremental is None else self._incremental.frozen(leaves)

    @collector_paused()
    def capture(self, save: Save, capture: Capture) -> tuple[Save, str, str]:
        """What is to be written instead of ``save``, the mode used, and why.  Call it in the caller's thread."""
        runtimes = save.runtimes
        for runtime in runtimes:
            if runtime is not HOST:
                self.slots.ring(runtime)  # so that close() knows of it
        mode, reason = capture, "asked for"
        if capture in ("auto", "snapshot"):
            parts = [_Part(save, runtime) for runtime in runtimes]
            reason = self._reason_to_block(parts) if capture == "auto" else ""
            try:
                if not reason:
                    return self._snapshot(save, parts), "snapshot", "memory sufficed"
            except ResourceExhaustedError as error:
                for runtime in runtimes:
                    runtime.synchronize()  # what one has copied before another had no room
                self._snapshots.clear()
                if capture == "snapshot":
                    raise
                reason = str(error)
            if not self._has_blocked:
                _log.warning("save_async copies nothing and blocks instead: %s", reason)
            self._has_blocked = True
            mode = "blocking"
        for runtime in runtimes:
            runtime.order_after_caller()
        return save, mode, reason

    def _snapshot(self, save: Save, parts: Sequence[_Part]) -> Save:
        arrays = list(save.sources.arrays)
        copied: list[Event] = []
        for part in parts:
            runtime = part.runtime
            copies, self._snapshots[runtime.name], event = runtime.snapshot(
                part.arrays, part.places, self._snapshots.get(runtime.name)
            )
            if len(parts) == 1:
                arrays = copies
            else:
                for number, copy in zip(part.numbers, copies, strict=True):
                    arrays[number] = copy
            if event is not None:
                copied.append(event)
        return Save(
            save.plan, Sources(save.sources.runtimes, arrays), save.string_checksums, is_snapshot=True, copied=copied
        )

    def begin(
        self, save: Save, prefix: str, mode: str, reason: str, timeline: Timeline, *, is_awaited: bool
    ) -> PendingSave:
        """For what :meth:`capture` returned.  Call it in the caller's thread."""
        devices = sorted(runtime.name for runtime in save.runtimes if runtime is not HOST)
        pending = PendingSave(
            prefix,
            mode,
            reason,
            timeline,
            is_awaited=is_awaited,
            devices=devices,
            has_host_arrays=len(devices) < len(save.runtimes),
        )
        if mode == "snapshot":
            pending.mark_snapshot(save.copied)
        if mode == "deferred" and self.check_captures:
            self.watch(save, pending)
        return pending

    def finish_capture(self, save: Save, pending: PendingSave) -> None:
        """In the background, before all else: a snapshot has been queued, and is now waited for."""
        for event in save.copied:
            event.synchronize()
        if save.is_snapshot:
            pending.mark_captured()

    def _reason_to_block(self, parts: Sequence[_Part]) -> str:
        """Why "auto" takes no snapshot: it must leave the training as much of the free memory as it takes itself."""
        for part in parts:
            kept = self._snapshots.get(part.runtime.name)
            reusable = 0 if kept is None else kept.nbytes
            free = part.runtime.free_memory() if part.nbytes > reusable else None
            if free is not None and part.nbytes > (free + reusable) // 2:
                return (
                    f"{part.runtime.name}: no room for a copy of the variables: {part.nbytes} bytes are more than "
                    f"half of the {free + reusable} free ones"
                )
        return ""

    def write(
        self,
        save: Save,
        pending: PendingSave,
        meta_graph: tuple[str, MetaContent] | None,
        copies: int,
        on_written: Callable[[int, int], None] | None,
    ) -> None:
        """Returns when the checkpoint is durable; after an error nothing of it is left.

        ``meta_graph``: the path of the `.meta` file, and what it says.  ``copies``: see :meth:`Preflight.check`.
        ``on_written(nbytes written, in total)`` is called from any thread.
        """
        plan = save.plan
        shard_nbytes = plan.layout.shard_nbytes
        needed = sum(shard_nbytes)
        if self._incremental is not None and self._incremental.has_files:
            needed -= sum(shard_nbytes[shard] for shard in plan.frozen_shards)
        spare = self.recycler.expect(os.path.dirname(pending.prefix), shard_nbytes) if self._recycles else 0
        self.preflight.check(pending.prefix, needed, len(plan.rows), copies, spare)
        commit = BundleCommit(
            self.storage,
            pending.prefix,
            shard_nbytes,
            direct=self.direct_io,
            later=plan.frozen_shards,
            recycler=self.recycler,
        )
        try:
            contents: dict[int, Contents] = {}
            if self._incremental is None or not plan.frozen_shards:
                checksums = self.write_data(save, pending, commit, on_written)
            else:
                checksums, contents = self._write_changed(self._incremental, save, pending, commit, on_written)
            index = plan.index(commit.num_shards, checksums)
            pending.begin_commit()
            with pending.timeline.span("commit"):
                self.publish(commit, index, meta_graph)
                if self._incremental is not None:
                    self._remember(self._incremental, plan, commit, checksums, contents)
        except BaseException as error:
            if self._incremental is not None and isinstance(error, DataLossError):
                self._incremental.forget_files()  # one of them may be what was read otherwise
            commit.abort()
            raise

    def write_data(
        self,
        save: Save,
        pending: PendingSave,
        into: BundleCommit | ShardFiles,
        on_written: Callable[[int, int], None] | None,
    ) -> dict[int, int]:
        """Fills the data files, syncs them, and returns the checksums by tensor number."""
        meter = Meter(sum(save.plan.layout.shard_nbytes), on_written)
        return self._synced(save, pending, into, self._write_files(save, pending, into.files, meter))

    def _synced(
        self, save: Save, pending: PendingSave, into: BundleCommit | ShardFiles, checksums: dict[int, int]
    ) -> dict[int, int]:
        """All is written; the checksums, now also those of strings."""
        with pending.timeline.span("sync"):
            into.sync()
        checksums.update(save.string_checksums)
        return checksums

    def _write_files(
        self,
        save: Save,
        pending: PendingSave,
        files: Sequence[WritableFile],
        meter: Meter,
        shards: Collection[int] | None = None,
        *,
        is_last: bool = True,
    ) -> dict[int, int]:
        """Fills all data files, or ``shards``; the checksums.  ``is_last``: then nothing is read any more."""
        is_staged = any(file.alignment > 1 for file in files) or save.runtimes != [HOST]
        threads = _STAGED_THREADS if is_staged else _THREADS
        is_read = is_last and not save.is_snapshot  # the variables themselves, until this has ended
        return write_chunks(
            save.plan.layout,
            save.sources,
            meter.watched(files),
            self.slots,
            1 if any(file.ordered for file in files) else threads,
            shards=shards,
            on_recorded=pending.mark_recorded if is_read else lambda _: None,
            on_staged=pending.mark_captured if is_read else lambda: None,
            cancelled=pending.cancel_requested,
            timeline=pending.timeline,
            is_snapshot=save.is_snapshot,
        )

    def _write_changed(
        self,
        incremental: Incremental,
        save: Save,
        pending: PendingSave,
        commit: BundleCommit,
        on_written: Callable[[int, int], None] | None,
    ) -> tuple[dict[int, int], dict[int, Contents]]:
        """As :meth:`write_data`, but frozen data files are linked where the last save has written their contents."""
        meter = Meter(sum(save.plan.layout.shard_nbytes), on_written)
        layout, timeline, frozen = save.plan.layout, pending.timeline, save.plan.frozen_shards
        hashing = Hashing(save, frozen, incremental.trusted(save.plan), self.slots, pending.cancel_requested, timeline)
        try:
            others = set(range(len(layout.shard_nbytes))) - frozen
            checksums = self._write_files(save, pending, commit.files, meter, others, is_last=False)
            contents = hashing.result()
        finally:
            hashing.stop()
        linked: set[int] = set()
        for shard in sorted(frozen):
            found = incremental.find(contents[shard], self.storage)
            begun_at = time.perf_counter()
            if found is None or not commit.shards.link(shard, found.file):
                commit.shards.create(shard)
                continue
            linked.add(shard)
            nbytes = layout.shard_nbytes[shard]
            timeline.add_span("link", threading.current_thread().name, begun_at, time.perf_counter(), nbytes)
            meter.add(nbytes)
            checksums.update(zip(tensors_of(layout, [shard]), found.checksums, strict=True))
        checksums.update(self._write_files(save, pending, commit.files, meter, frozen - linked))
        return self._synced(save, pending, commit, checksums), contents

    def _remember(
        self,
        incremental: Incremental,
        plan: Plan,
        commit: BundleCommit,
        checksums: dict[int, int],
        contents: dict[int, Contents],
    ) -> None:
        files = []
        for shard, held in contents.items():
            path = commit.paths[shard]
            stored = tuple(checksums[tensor] for tensor in tensors_of(plan.layout, [shard]))
            files.append(WrittenFile(FileVersion(path, self.storage.version(path)), held, stored))
        incremental.saved(plan, checksums, files)

    def publish(self, commit: BundleCommit, index: bytes, meta_graph: tuple[str, MetaContent] | None) -> None:
        """See :meth:`BundleCommit.publish`."""
        if meta_graph is None:
            commit.publish(index, strict=self.strict)
            return
        path, content = meta_graph
        commit.publish(index, content.file(path), strict=self.strict)
        content.mark_written(path, self.storage)

    def warm_up(self, save: Save, directory: str | None) -> None:
        """Pins the ring, compiles the kernels, and looks at the directory, where there is one."""
        for runtime in save.runtimes:
            runtime.warm_up()
            if runtime is not HOST:
                self.slots.ring(runtime).fill()
        if directory is not None and self.direct_io is None and self.storage.is_directory(directory):
            self.storage.prefers_direct(directory)

    def watch(self, save: Save, pending: PendingSave) -> None:
        """Has ``pending.fence()`` raise FailedPreconditionError if a variable is not as it is now."""
        before = checksums_now(save.plan.layout, save.sources, self.slots)

        def check() -> None:
            now = checksums_now(save.plan.layout, save.sources, self.slots)
            changed = [item.key.decode("utf-8", "replace") for item in save.plan.items() if _differ(item, before, now)]
            if changed:
                outcome = "is cancelled" if pending.cancel() else "may hold them half changed: remove it"
                raise FailedPreconditionError(
                    f"{len(changed)} variables changed between save_async(capture='deferred') and fence(): "
                    f"{', '.join(changed[:20])}; the save of {pending.prefix} {outcome}. Place the fence before the "
                    "work that changes them"
                )

        pending.check = check

    def close(self) -> None:
        """Frees the memory, and removes spare files.  Requires: no save is under way."""
        self.slots.close()
        self._snapshots.clear()
        self.recycler.close()


def _differ(item: Item, before: dict[int, int], now: dict[int, int]) -> bool:
    return before.get(item.tensor) != now.get(item.tensor)


class _Part:
    """What one runtime has of a save; ``nbytes`` of memory hold a copy, each tensor at its place."""

    def __init__(self, save: Save, runtime: Runtime) -> None:
        layout = save.plan.layout
        own = np.flatnonzero(layout.owner == save.runtimes.index(runtime))
        self.runtime = runtime
        self.numbers: list[int] = own.tolist()
        self.arrays = [save.sources.arrays[number] for number in self.numbers]
        self.places = save.plan.places[own]
        self.nbytes = int((self.places + layout.nbytes[own]).max())
