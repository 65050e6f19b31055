"""From a plan to files: the capture of the variables, their way to storage, and the memory kept for both."""

from __future__ import annotations

import logging
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
from gpusaver.storage.base import Storage

_log = logging.getLogger("gpusaver")

Capture = Literal["auto", "snapshot", "deferred", "blocking"]

#: Around the page cache more writes must be under way at once than through it, where two cores copy.
_DIRECT_THREADS = 4
_BUFFERED_THREADS = 2
_RING_SLOTS = 4


class Saving:
    """Captures and writes, one save after the other; keeps slots, pinned ring and snapshot memory between them.

    ``direct_io`` and ``staging_bytes`` are the Saver's.
    """

    def __init__(self, storage: Storage, direct_io: bool | None, staging_bytes: int) -> None:
        self.slots = Slots(CHUNK_NBYTES)
        self._storage = storage
        self._direct_io = direct_io
        self._staging_bytes = staging_bytes
        self._ring: Ring | None = None
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
            threads = _DIRECT_THREADS if any(file.alignment > 1 for file in commit.files) else _BUFFERED_THREADS
            checksums = write_chunks(
                layout,
                save.sources,
                commit.files,
                self.slots,
                self._ring_for(save),
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
        if self._ring is not None:
            self._ring.close()
        self._snapshots.clear()

    def _ring_for(self, save: Save) -> Ring | None:
        """Pinned memory for the copies of device arrays, made at the first save that has any and kept."""
        devices = [runtime for runtime in save.runtimes() if runtime is not HOST]
        if self._ring is None and devices:
            count = max(_RING_SLOTS, -(-self._staging_bytes // CHUNK_NBYTES))
            self._ring = Ring(CHUNK_NBYTES, count, devices[0].allocate)
        return self._ring if devices else None
