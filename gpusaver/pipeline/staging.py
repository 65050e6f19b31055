"""From arrays to filled slots: the half of a save that runs ahead of the writers.

Device arrays take this road, and host arrays that are written around the page cache.

::

    copier thread, one a runtime  wait for a free slot -> queue gather and copy -> a few chunks later: wait for the copy
                                                                                         |
    writer threads                                     checksum, write <- filled slots <-+
                                                             |
                                        the ring of slots <--+

At most four chunks are queued in a device's copy engine, which serves in order of arrival: the trainer's own small
copies wait behind no more, half a millisecond.  With two the engine now and then waited for Python.
The ring bounds the host memory; copiers stall when the writers are slower than the link.

A host copier copies at once, and only what the disk cannot take from where it lies; it computes the checksums as
well.  It keeps a core to itself while the writers sleep in the kernel: threads that did both were woken on each
other's cores, and the same save took 1.2 to 2 times as long.
"""

from __future__ import annotations

import collections
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from gpusaver.bundle.layout import Chunk
from gpusaver.device import Event, HostBuffer, Runtime, Transfers
from gpusaver.device.inventory import nearby_cpus
from gpusaver.device.nvml import bind_thread
from gpusaver.pipeline.timeline import Timeline
from gpusaver.pipeline.workers import Ring, Stopped
from gpusaver.tensor import Buffer

#: Chunks queued in one device's copy engine.
MAX_QUEUED = 4


class Ready(NamedTuple):
    """What is to be written of a chunk of the host: parts of its slot, and, if ``is_in_place``, of the arrays."""

    buffers: list[Buffer]
    is_in_place: bool


class Filled(NamedTuple):
    """A chunk whose bytes are in a slot; whoever writes it releases the slot.

    ``event``: of the copy from a device, which has happened; the slot has still to be sealed.  ``ready``: of the host,
    whose copier has done that.
    """

    chunk: Chunk
    slot: HostBuffer
    event: Event | None
    ready: Ready | None


#: A chunk, and what fills a slot with it: None of a device's, which the copier queues.
Job = tuple[Chunk, Callable[[memoryview], Ready] | None]


class Copier:
    """Fills slots with the chunks of one runtime, in a thread of its own."""

    def __init__(
        self,
        runtime: Runtime,
        jobs: Iterable[Job],
        transfers: Callable[[Chunk], Transfers],
        ring: Ring,
        filled: queue.SimpleQueue[Filled | BaseException | None],
        stop: threading.Event,
        timeline: Timeline,
    ) -> None:
        self._runtime = runtime
        self._jobs = jobs
        self._transfers = transfers
        self._ring = ring
        self._filled = filled
        self._stop = stop
        self._timeline = timeline
        #: With the times at which they were queued.
        self._queued: collections.deque[tuple[Filled, float]] = collections.deque()
        self._settled_at = 0.0

    def run(self, on_recorded: Callable[[Event], None], on_copied: Callable[[], None]) -> None:
        """``on_recorded(event)``: all copies of a device are queued, the last one ends with the event.
        ``on_copied()``: all copies have ended.

        Every chunk goes to ``filled``, then None; or, first, the error.
        """
        with self._timeline.in_background():
            self._run(on_recorded, on_copied)

    def _run(self, on_recorded: Callable[[Event], None], on_copied: Callable[[], None]) -> None:
        bind_thread(nearby_cpus(self._runtime.name))
        try:
            event: Event | None = None
            for chunk, fill in self._jobs:
                if len(self._queued) == MAX_QUEUED:
                    self._settle()
                slot = self._free_slot()
                queued_at = time.perf_counter()
                try:
                    if fill is not None:
                        filled = Filled(chunk, slot, None, fill(slot.view))
                    else:
                        with self._timeline.range("copy"):
                            event = self._runtime.to_slot(self._transfers(chunk), slot.view)
                        filled = Filled(chunk, slot, event, None)
                except BaseException:
                    self._ring.release(slot)
                    raise
                if event is None:
                    self._filled.put(filled)
                else:
                    self._queued.append((filled, queued_at))
            if event is not None:
                on_recorded(event)
            while self._queued:
                self._settle()
            on_copied()
        except BaseException as error:
            self._abandon()
            if not isinstance(error, Stopped):
                self._filled.put(error)
        finally:
            self._filled.put(None)

    def run_inline(self, on_recorded: Callable[[Event], None], on_copied: Callable[[], None]) -> Iterator[Filled]:
        """The same without a thread of its own, for when none can be started: each chunk when it is asked for."""
        event: Event | None = None
        for chunk, fill in self._jobs:
            slot = self._ring.acquire(self._stop)
            try:
                ready = None
                if fill is not None:
                    ready = fill(slot.view)
                else:
                    with self._timeline.span("copy", chunk.nbytes):
                        event = self._runtime.to_slot(self._transfers(chunk), slot.view)
                        if event is not None:
                            event.synchronize()
            except BaseException:
                self._ring.release(slot)
                raise
            yield Filled(chunk, slot, event, ready)
        if event is not None:
            on_recorded(event)
        on_copied()

    def _free_slot(self) -> HostBuffer:
        """While none is free, chunks in flight are handed over, not kept: the writers may wait for them, and several
        copiers that each kept one could have all of the ring."""
        while self._queued:
            if self._stop.is_set():
                raise Stopped
            slot = self._ring.acquire_now()
            if slot is not None:
                return slot
            self._settle()
        return self._ring.acquire(self._stop)

    def _settle(self) -> None:
        """Waits for the oldest copy and hands its chunk to the writers."""
        filled, queued_at = self._queued[0]
        assert filled.event is not None
        filled.event.synchronize()
        self._queued.popleft()
        # It began when the one before it had ended.
        now, began = time.perf_counter(), max(queued_at, self._settled_at)
        self._timeline.add_span("copy", self._runtime.name, began, now, filled.chunk.nbytes)
        self._settled_at = now
        self._filled.put(filled)

    def _abandon(self) -> None:
        """Copies in flight still write into their slots: they must end before anybody else gets these."""
        if self._queued:
            self._runtime.synchronize()
        for filled, _ in self._queued:
            self._ring.release(filled.slot)
        self._queued.clear()


class Staging:
    """All copiers of one save."""

    def __init__(
        self,
        jobs: Sequence[tuple[Runtime, Iterable[Job]]],
        transfers: Callable[[Chunk], Transfers],
        ring: Ring,
        timeline: Timeline,
    ) -> None:
        """``jobs``: those of each runtime, made as they are asked for, in its copier's thread.

        ``transfers(chunk)``: what is copied from a device.
        """
        self._filled: queue.SimpleQueue[Filled | BaseException | None] = queue.SimpleQueue()
        self._ring = ring
        self._stop = threading.Event()
        self._copiers = [
            Copier(runtime, own, transfers, ring, self._filled, self._stop, timeline) for runtime, own in jobs
        ]
        self._threads: list[threading.Thread] = []
        self._inline: list[Iterator[Filled]] = []

    @property
    def copier_count(self) -> int:
        return len(self._copiers)

    def start(self, on_recorded: Callable[[Event], None], on_copied: Callable[[], None]) -> None:
        """``on_recorded`` is called once a device, ``on_copied`` once a runtime."""
        for number, copier in enumerate(self._copiers):
            thread = threading.Thread(
                target=copier.run, args=(on_recorded, on_copied), name=f"gpusaver-copier-{number}"
            )
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down
                self._inline.append(copier.run_inline(on_recorded, on_copied))
            else:
                self._threads.append(thread)

    def filled(self) -> Iterator[Filled]:
        """Chunks as they become ready; raises a copier's error."""
        yield from itertools.chain(*self._inline)
        running = len(self._threads)
        while running:
            found = self._filled.get()
            if found is None:
                running -= 1
            elif isinstance(found, BaseException):
                raise found
            else:
                yield found

    def release(self, filled: Filled) -> None:
        """The chunk is written, or never will be."""
        self._ring.release(filled.slot)

    def stop(self) -> None:
        """After an error elsewhere: copiers end at their next chunk."""
        self._stop.set()
        self._ring.wake()

    def join(self) -> None:
        """Returns when all copiers have ended and every slot is back in the ring.

        Requires: nobody takes or writes a chunk any more.
        """
        for thread in self._threads:
            thread.join()
        while not self._filled.empty():
            item = self._filled.get()
            if isinstance(item, Filled):
                self._ring.release(item.slot)
