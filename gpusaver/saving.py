"""From a plan to files: the capture of the variables, their way to storage, and the memory kept for both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gpusaver.device import HOST, Runtime
from gpusaver.errors import FailedPreconditionError, ResourceExhaustedError
from gpusaver.exporting import MetaContent
from gpusaver.pending import PendingSave
from gpusaver.pipeline.chunk import CHUNK_NBYTES
from gpusaver.pipeline.commit import DIRECT_MIN_NBYTES, BundleCommit, ShardFiles
from gpusaver.pipeline.plan import Item, Save
from gpusaver.pipeline.preflight import Preflight
from gpusaver.pipeline.save import Source, checksums_now, write_chunks
from gpusaver.pipeline.watched import watched
from gpusaver.pipeline.workers import Slots
from gpusaver.storage.base import Storage

_log = logging.getLogger("gpusaver")

Capture = Literal["auto", "snapshot", "deferred", "blocking"]
WhenBusy = Literal["wait", "skip", "raise"]

#: Through the page cache both threads copy; where chunks are staged another thread does, and these wait for the disk.
_THREADS = 2
_STAGED_THREADS = 3
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

    ``direct_io``, ``staging_bytes``, ``strict`` and ``check_captures`` are the Saver's.
    """

    def __init__(
        self, storage: Storage, direct_io: bool | None, staging_bytes: int, *, strict: bool, check_captures: bool
    ) -> None:
        self.slots = Slots(CHUNK_NBYTES, max(_PINNED_SLOTS, staging_bytes // CHUNK_NBYTES))
        self.storage = storage
        self.direct_io = direct_io
        self.strict = strict
        self.check_captures = check_captures
        self.preflight = Preflight(storage)
        self._snapshots: dict[str, Any] = {}
        self._has_blocked = False

    def arrange(self, save: Save, directory: str) -> Save:
        """The same, laid out as the files in this directory are best written."""
        is_direct = self.direct_io
        if is_direct is None:
            is_large = max(save.plan.layout.shard_nbytes) >= DIRECT_MIN_NBYTES
            is_direct = is_large and self.storage.prefers_direct(directory)
        return save.moved(around_cache=is_direct)

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
        sources: list[Source] = list(save.sources)
        for part in parts:
            runtime = part.runtime
            copies, self._snapshots[runtime.name] = runtime.snapshot(
                part.arrays, part.places, self._snapshots.get(runtime.name)
            )
            for number, copy in zip(part.numbers, copies, strict=True):
                sources[number] = Source(runtime, copy)
        return Save(save.plan, sources, save.string_checksums)

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
        layout = save.plan.layout
        self.preflight.check(pending.prefix, sum(layout.shard_nbytes), len(save.plan.items), copies)
        commit = BundleCommit(self.storage, pending.prefix, layout.shard_nbytes, direct=self.direct_io)
        try:
            checksums = self.write_data(save, pending, commit, on_written)
            index = save.plan.index(commit.num_shards, checksums)
            pending.begin_commit()
            with pending.timeline.span("commit"):
                self.publish(commit, index, meta_graph)
        except BaseException:
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
        layout, files = save.plan.layout, into.files
        is_staged = any(file.alignment > 1 for file in files) or save.runtimes != [HOST]
        threads = _STAGED_THREADS if is_staged else _THREADS
        checksums = write_chunks(
            layout,
            save.sources,
            files if on_written is None else watched(files, sum(layout.shard_nbytes), on_written),
            self.slots,
            1 if self.storage.ordered else threads,
            on_recorded=pending.mark_recorded,
            on_staged=pending.mark_captured,
            cancelled=pending.cancel_requested,
            timeline=pending.timeline,
        )
        with pending.timeline.span("sync"):
            into.sync()
        checksums.update(save.string_checksums)
        return checksums

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
            changed = [item.key.decode("utf-8", "replace") for item in save.plan.items if _differ(item, before, now)]
            if changed:
                outcome = "is cancelled" if pending.cancel() else "may hold them half changed: remove it"
                raise FailedPreconditionError(
                    f"{len(changed)} variables changed between save_async(capture='deferred') and fence(): "
                    f"{', '.join(changed[:20])}; the save of {pending.prefix} {outcome}. Place the fence before the "
                    "work that changes them"
                )

        pending.check = check

    def close(self) -> None:
        """Frees the memory.  Requires: no save is under way."""
        self.slots.close()
        self._snapshots.clear()


def _differ(item: Item, before: dict[int, int], now: dict[int, int]) -> bool:
    return before.get(item.tensor) != now.get(item.tensor)


class _Part:
    """What one runtime has of a save; ``nbytes`` of memory hold a copy, each tensor at its place."""

    def __init__(self, save: Save, runtime: Runtime) -> None:
        places, sizes = save.plan.places, save.plan.layout.nbytes
        self.runtime = runtime
        self.numbers = [number for number, source in enumerate(save.sources) if source.runtime is runtime]
        self.arrays = [save.sources[number].array for number in self.numbers]
        self.places = [places[number] for number in self.numbers]
        self.nbytes = int((np.asarray(self.places) + sizes[self.numbers]).max())
