"""From a plan to files: the capture of the variables, their way to storage, and the memory kept for both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from gpusaver.device import HOST
from gpusaver.errors import ResourceExhaustedError
from gpusaver.pending import PendingSave
from gpusaver.pipeline.chunk import CHUNK_NBYTES
from gpusaver.pipeline.commit import BundleCommit
from gpusaver.pipeline.plan import Save
from gpusaver.pipeline.save import Source, write_chunks
from gpusaver.pipeline.staging import Ring
from gpusaver.pipeline.workers import Slots
from gpusaver.storage.base import Storage, WritableFile

_log = logging.getLogger("gpusaver")

Capture = Literal["auto", "snapshot", "deferred", "blocking"]

#: Through the page cache both threads copy; where chunks are staged another thread does, and these wait for the disk.
_THREADS = 2
_STAGED_THREADS = 3
#: Of the ring: pinned, and of ordinary pages for host arrays alone, whose copier must stay ahead of the writers.
_PINNED_SLOTS, _HOST_SLOTS = 4, 6


class Saving:
    """Captures and writes, one save after the other; keeps slots, rings and snapshot memory between them.

    ``direct_io`` and ``staging_bytes`` are the Saver's.
    """

    def __init__(self, storage: Storage, direct_io: bool | None, staging_bytes: int) -> None:
        self.slots = Slots(CHUNK_NBYTES)
        self._storage = storage
        self._direct_io = direct_io
        self._staging_bytes = staging_bytes
        self._rings: dict[bool, Ring] = {}
        self._snapshots: dict[str, Any] = {}
        self._has_blocked = False

    def capture(self, save: Save, capture: Capture) -> tuple[Save, str, str]:
        """What is to be written instead of ``save``, the mode used, and why.  Call it in the caller's thread."""
        if capture in ("blocking", "deferred"):
            reason = "asked for"
            for runtime in save.runtimes():
                runtime.order_after_caller([s.array for s in save.sources if s.runtime is runtime])
            return save, capture, reason
        try:
            sources: list[Source] = list(save.sources)
            places = save.plan.layout.places().tolist()
            for runtime in save.runtimes():
                numbers = [number for number, source in enumerate(save.sources) if source.runtime is runtime]
                arrays = [save.sources[number].array for number in numbers]
                own_places = [places[number] for number in numbers]
                copies, memory = runtime.snapshot(arrays, own_places, self._snapshots.get(runtime.name))
                self._snapshots[runtime.name] = memory
                runtime.order_after_caller(copies)
                for number, copy in zip(numbers, copies, strict=True):
                    sources[number] = Source(runtime, copy)
            return Save(save.plan, sources, save.string_checksums), "snapshot", "memory sufficed"
        except ResourceExhaustedError as error:
            self._snapshots.clear()
            if capture == "snapshot":
                raise
            if not self._has_blocked:
                _log.warning("save_async copies nothing and blocks instead: %s", error)
            self._has_blocked = True
            return self.capture(save, "blocking")[0], "blocking", str(error)

    def write(self, save: Save, pending: PendingSave) -> None:
        """Returns when the checkpoint is durable; after an error nothing of it is left."""
        layout = save.plan.layout
        commit = BundleCommit(self._storage, pending.prefix, layout.shard_nbytes, direct=self._direct_io)
        try:
            ring = self._ring_for(save, commit.files)
            threads = _THREADS if ring is None else _STAGED_THREADS
            checksums = write_chunks(
                layout,
                save.sources,
                commit.files,
                self.slots,
                ring,
                1 if self._storage.ordered else threads,
                on_recorded=pending.mark_recorded,
                on_staged=pending.mark_captured,
                cancelled=pending.cancel_requested,
            )
            checksums.update(save.string_checksums)
            index = save.plan.index(commit.num_shards, checksums)
            pending.begin_commit()
            commit.publish(index)
        except BaseException:
            commit.abort()
            raise

    def close(self) -> None:
        """Frees the memory.  Requires: no save is under way."""
        self.slots.close()
        for ring in self._rings.values():
            ring.close()
        self._rings.clear()
        self._snapshots.clear()

    def _ring_for(self, save: Save, files: Sequence[WritableFile]) -> Ring | None:
        """The memory through which chunks are staged, made at the first save that needs it and kept."""
        devices = [runtime for runtime in save.runtimes() if runtime is not HOST]
        if not devices and all(file.alignment == 1 for file in files):
            return None
        is_pinned = bool(devices)
        if is_pinned not in self._rings:
            pinned_count = max(_PINNED_SLOTS, -(-self._staging_bytes // CHUNK_NBYTES))
            runtime, count = (devices[0], pinned_count) if is_pinned else (HOST, _HOST_SLOTS)
            self._rings[is_pinned] = Ring(CHUNK_NBYTES, count, runtime.allocate)
        return self._rings[is_pinned]
