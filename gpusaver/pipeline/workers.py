"""Threads that work off a list of jobs, and the memory they do it in.

Threads are not daemons and live only while :func:`work_off` runs: an idle one would hang the interpreter's exit, and
none can be started during it (then the calling thread does all the work).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from gpusaver.device import HOST, HostBuffer, Runtime
from gpusaver.device.host import allocate_pages
from gpusaver.errors import CancelledError
from gpusaver.pipeline.timeline import Timeline

Job = TypeVar("Job")

#: Of host arrays that are written around the page cache: enough for four writers, and for their copier to stay ahead.
_HOST_RING_COUNT = 6


class Stopped(Exception):
    """Somebody else failed: whoever gets this ends, and its error is not the one to report."""


class Ring:
    """At most ``count`` host buffers of ``nbytes`` bytes, made when first needed, kept until :meth:`close`."""

    def __init__(self, nbytes: int, count: int, allocate: Callable[[int], HostBuffer]) -> None:
        self.nbytes = nbytes
        self.count = count
        self._allocate = allocate
        self._buffers: list[HostBuffer] = []
        self._free: list[HostBuffer] = []
        self._changed = threading.Condition()

    def acquire(self, stop: threading.Event) -> HostBuffer:
        """Waits for a free buffer; raises Stopped when ``stop`` is set (and :meth:`wake` called) meanwhile."""
        with self._changed:
            while True:
                if stop.is_set():
                    raise Stopped
                buffer = self.acquire_now()
                if buffer is not None:
                    return buffer
                self._changed.wait()

    def acquire_now(self) -> HostBuffer | None:
        """A free buffer, None if there is none."""
        with self._changed:
            if not self._free and len(self._buffers) < self.count:
                self._buffers.append(self._allocate(self.nbytes))
                return self._buffers[-1]
            return self._free.pop() if self._free else None

    def release(self, buffer: HostBuffer) -> None:
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def fill(self) -> None:
        """Makes all buffers now."""
        with self._changed:
            while len(self._buffers) < self.count:
                self._buffers.append(self._allocate(self.nbytes))
                self._free.append(self._buffers[-1])

    def wake(self) -> None:
        """Has all waiters look at their ``stop`` again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Frees the memory.  Requires: no buffer is in use."""
        with self._changed:
            while self._buffers:
                self._buffers.pop().free()
            self._free.clear()


class Slots:
    """Page-aligned buffers of ``nbytes`` bytes, made when first needed and kept for reuse; and the rings.

    May be used from any thread.  A worker borrows one at a time, so there are at most as many as there were workers at
    any moment, and nobody ever waits for one.  A ring has a fixed number, ``pinned_count`` where devices copy.
    """

    def __init__(self, nbytes: int, pinned_count: int = 4) -> None:
        self.nbytes = nbytes
        self._pinned_count = pinned_count
        self._free: list[memoryview] = []
        self._rings: dict[bool, Ring] = {}
        self._devices: dict[str, Runtime] = {}
        self._lock = threading.Lock()

    def borrow(self) -> memoryview:
        try:
            return self._free.pop()
        except IndexError:
            return allocate_pages(self.nbytes).data

    def give_back(self, slot: memoryview) -> None:
        self._free.append(slot)

    def ring(self, runtime: Runtime) -> Ring:
        """One of pinned buffers for all devices, one of ordinary ones for the host, made when first asked for."""
        is_pinned = runtime is not HOST
        with self._lock:
            if is_pinned:
                self._devices[runtime.name] = runtime
            if is_pinned not in self._rings:
                count = self._pinned_count if is_pinned else _HOST_RING_COUNT
                self._rings[is_pinned] = Ring(self.nbytes, count, runtime.allocate)
            return self._rings[is_pinned]

    def close(self) -> None:
        """Frees the memory of every slot that is not lent, and what the devices keep for their copies.

        Requires: none of the ring is lent.
        """
        self._free.clear()
        for ring in self._rings.values():
            ring.close()
        for runtime in self._devices.values():
            runtime.trim()


class LazySlot:
    """The slot of one worker, borrowed when the first job needs one."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._slot: memoryview | None = None

    def get(self) -> memoryview:
        if self._slot is None:
            self._slot = self._slots.borrow()
        return self._slot

    def close(self) -> None:
        if self._slot is not None:
            self._slots.give_back(self._slot)
            self._slot = None


def work_off(
    jobs: Iterable[Job],
    work: Callable[[Job, LazySlot], None],
    slots: Slots,
    threads: int,
    cancelled: threading.Event | None = None,
    on_error: Callable[[], object] | None = None,
    timeline: Timeline | None = None,
) -> None:
    """Calls ``work(job, slot)`` for every job, from ``threads`` threads, the calling one among them.

    No more threads take part than there are jobs, if ``jobs`` has a length.  Returns when all jobs are done.  The first
    error, an interruption of the calling thread (Ctrl-C) included, stops the others at their next job and is raised
    when all threads have ended; CancelledError if ``cancelled`` was set before the last job was taken.  ``on_error`` is
    called at once, to wake whoever makes the jobs.  ``timeline`` gets the CPU time of the other threads; the calling
    one counts its own.
    """
    if isinstance(jobs, Sized):
        threads = min(threads, len(jobs))
    pending = iter(jobs)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def run(ended: threading.Event) -> None:
        slot = LazySlot(slots)
        try:
            for job in _share(pending, lock, errors, cancelled):
                work(job, slot)
        except BaseException as error:  # raised below, in the caller's thread
            errors.append(error)
            if on_error is not None:
                on_error()
        finally:
            slot.close()
            ended.set()

    def help_out(ended: threading.Event) -> None:
        with timeline.in_background() if timeline is not None else contextlib.nullcontext():
            run(ended)

    helpers: list[tuple[threading.Thread, threading.Event]] = []
    try:
        # RuntimeError: the interpreter is shutting down, or the system is out of threads.
        with contextlib.suppress(RuntimeError):
            for number in range(1, threads):
                ended = threading.Event()
                helper = threading.Thread(target=help_out, args=(ended,), name=f"gpusaver-worker-{number}")
                helper.start()
                helpers.append((helper, ended))
        run(threading.Event())
    except BaseException as error:
        errors.append(error)
    while not all(ended.is_set() for _, ended in helpers):
        try:
            # Not join: interrupted, it takes the thread for ended (Python 3.11 and 3.12).
            for _, ended in helpers:
                ended.wait()
        except BaseException as error:  # Ctrl-C must not leave the caller's arrays to threads that still fill them
            errors.append(error)
    for helper, _ in helpers:
        helper.join()
    if errors:
        raise errors[0]


def cpu_count() -> int:
    """Of the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_background(run: Callable[[], None]) -> None:
    """Runs it in a thread; at once, in this one, where none can be started."""
    thread = threading.Thread(target=run, name="gpusaver-save")
    try:
        thread.start()
    except RuntimeError:  # the interpreter is shutting down: no thread can be started any more
        run()


def _share(
    jobs: Iterator[Job], lock: threading.Lock, errors: list[BaseException], cancelled: threading.Event | None
) -> Iterator[Job]:
    while True:
        with lock:
            if errors:
                return
            try:
                job = next(jobs)
            except StopIteration:
                return
        if cancelled is not None and cancelled.is_set():
            raise CancelledError("the save was cancelled before it was committed")
        yield job
