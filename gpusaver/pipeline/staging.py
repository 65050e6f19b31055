"""From device arrays to filled slots: the half of a save that runs ahead of the writers.

::

    copier thread, one a device   wait for a free slot -> queue gather and copy -> two chunks later: wait for the copy
                                                                                         |
    writer threads                                     checksum, write <- filled slots <-+
                                                             |
                                        the ring of slots <--+

At most two chunks are queued in a device's copy engine, which serves in order of arrival: the trainer's own small
copies wait behind no more.  The ring bounds the host memory; copiers stall when the writers are slower than the link.
"""

from __future__ import annotations

import collections
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gpusaver.bundle.layout import Chunk
from gpusaver.device import Event, HostBuffer, Runtime, Transfer
from gpusaver.pipeline.workers import Ring, Stopped

#: Chunks queued in one device's copy engine.
MAX_QUEUED = 2


class Filled(NamedTuple):
    """A chunk whose bytes are in a slot; whoever writes it releases the slot.

    ``checksums``: of its pieces, if the device computed them.
    """

    chunk: Chunk
    slot: HostBuffer
    checksums: Sequence[int] | None


class Copier:
    """Fills slots with the chunks of one device, in a thread of its own."""

    def __init__(
        self,
        runtime: Runtime,
        chunks: Sequence[Chunk],
        transfers: Callable[[Chunk], list[Transfer]],
        ring: Ring,
        filled: queue.SimpleQueue[Filled | BaseException | None],
        stop: threading.Event,
    ) -> None:
        self._runtime = runtime
        self._chunks = chunks
        self._transfers = transfers
        self._ring = ring
        self._filled = filled
        self._stop = stop
        self._queued: collections.deque[tuple[Chunk, HostBuffer, Event]] = collections.deque()

    def run(self, on_recorded: Callable[[Event], None], on_copied: Callable[[], None]) -> None:
        """``on_recorded(event)``: all copies are queued, the last one ends with the event; ``on_copied()``: it has.

        Every chunk goes to ``filled``, then None; or, first, the error.
        """
        try:
            event: Event | None = None
            for chunk in self._chunks:
                if len(self._queued) == MAX_QUEUED:
                    self._settle()
                slot = self._ring.acquire(self._stop)
                try:
                    event = self._runtime.to_slot(self._transfers(chunk), slot.view)
                    assert event is not None  # as of every device
                except BaseException:
                    self._ring.release(slot)
                    raise
                self._queued.append((chunk, slot, event))
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
        for chunk in self._chunks:
            slot = self._ring.acquire(self._stop)
            try:
                event = self._runtime.to_slot(self._transfers(chunk), slot.view)
                assert event is not None
                event.synchronize()
            except BaseException:
                self._ring.release(slot)
                raise
            yield Filled(chunk, slot, event.checksums)
        if event is not None:
            on_recorded(event)
        on_copied()

    def _settle(self) -> None:
        """Waits for the oldest copy and hands its chunk to the writers."""
        chunk, slot, event = self._queued[0]
        event.synchronize()
        self._queued.popleft()
        self._filled.put(Filled(chunk, slot, event.checksums))

    def _abandon(self) -> None:
        """Copies in flight still write into their slots: they must end before anybody else gets these."""
        if self._queued:
            self._runtime.synchronize()
        for _, slot, _ in self._queued:
            self._ring.release(slot)
        self._queued.clear()


class Staging:
    """All copiers of one save."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        runtime_of: Callable[[Chunk], Runtime],
        transfers: Callable[[Chunk], list[Transfer]],
        ring: Ring,
    ) -> None:
        self._filled: queue.SimpleQueue[Filled | BaseException | None] = queue.SimpleQueue()
        self._ring = ring
        self._stop = threading.Event()
        by_runtime: dict[str, tuple[Runtime, list[Chunk]]] = {}
        for chunk in chunks:
            runtime = runtime_of(chunk)
            by_runtime.setdefault(runtime.name, (runtime, []))[1].append(chunk)
        self._copiers = [
            Copier(runtime, own, transfers, ring, self._filled, self._stop) for runtime, own in by_runtime.values()
        ]
        self._threads: list[threading.Thread] = []
        self._inline: list[Iterator[Filled]] = []

    @property
    def copier_count(self) -> int:
        return len(self._copiers)

    def start(self, on_recorded: Callable[[Event], None], on_copied: Callable[[], None]) -> None:
        """Each callback is called once a device."""
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
            item = self._filled.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item

    def release(self, filled: Filled) -> None:
        self._ring.release(filled.slot)

    def stop(self) -> None:
        """After an error elsewhere: copiers end at their next chunk."""
        self._stop.set()
        self._ring.wake()

    def join(self) -> None:
        """Returns when all copiers have ended and every slot is back in the ring."""
        for thread in self._threads:
            thread.join()
        while not self._filled.empty():
            item = self._filled.get()
            if isinstance(item, Filled):
                self._ring.release(item.slot)
