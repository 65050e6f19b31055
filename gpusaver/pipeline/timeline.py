"""What a save spends its time on: the spans of its stages, recorded by the threads that do the work.

::

    track                    time since the call ->
    (the caller's thread)    plan | capture
    gpusaver-save                            checksum | write | checksum | write |        sync | commit
    gpusaver-worker-1                        checksum | write | checksum | write |
    cuda:0                           copy |  copy |  copy |                               from queued to there

Always on: a span costs about a microsecond and 200 bytes, and there are at most four for each chunk of 8 MiB.  All
times are :func:`time.perf_counter`'s.  Methods may be called from any thread.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

#: In the order in which a save comes to them.
STAGES = ("plan", "capture", "copy", "compare", "checksum", "write", "link", "sync", "commit")


class Span(NamedTuple):
    """One stage of one chunk, or of the whole save; ``track`` is the thread or device that was busy with it.

    ``start`` and ``end``: seconds since the call; ``nbytes``: 0 if the stage is not about bytes.
    """

    stage: str
    track: str
    start: float
    end: float
    nbytes: int


class _Thread(threading.local):
    """Its name, which takes three calls otherwise."""

    def __init__(self) -> None:
        self.name = threading.current_thread().name


_thread = _Thread()
_span = functools.partial(tuple.__new__, Span)  # a third of the time of Span(...)


class Timeline:
    """The spans of one save.  ``nvtx``: an object with RangePush and RangePop that gets every span, too."""

    def __init__(self, started_at: float, nvtx: Any = None) -> None:
        self.started_at = started_at
        self.spans: list[Span] = []
        self.background_seconds = 0.0
        self._nvtx = nvtx
        self._lock = threading.Lock()

    def span(self, stage: str, nbytes: int = 0) -> contextlib.AbstractContextManager[None]:
        """Around the work of the calling thread."""
        return _Recording(self, self._nvtx, stage, nbytes)

    def range(self, stage: str) -> contextlib.AbstractContextManager[object]:
        """Around calls that queue a stage's work on a device: for profilers alone; see :meth:`add_span`."""
        return contextlib.nullcontext() if self._nvtx is None else _Recording(None, self._nvtx, stage, 0)

    def add_span(self, stage: str, track: str, start: float, end: float, nbytes: int) -> None:
        """What ``track`` did, also if that was no thread: a device.  Spans of a track must not overlap."""
        self.spans.append(_span((stage, track, start - self.started_at, end - self.started_at, nbytes)))

    @contextlib.contextmanager
    def in_background(self) -> Iterator[None]:
        """Around all that a thread of our own does: adds its CPU time."""
        before = time.thread_time()
        try:
            yield
        finally:
            used = time.thread_time() - before
            with self._lock:
                self.background_seconds += used


class _Recording:
    __slots__ = ("_nbytes", "_nvtx", "_stage", "_start", "_timeline")

    def __init__(self, timeline: Timeline | None, nvtx: Any, stage: str, nbytes: int) -> None:
        self._timeline, self._nvtx, self._stage, self._nbytes = timeline, nvtx, stage, nbytes

    def __enter__(self) -> None:
        if self._nvtx is not None:
            self._nvtx.RangePush(f"gpusaver {self._stage}")
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timeline is not None:
            self._timeline.add_span(self._stage, _thread.name, self._start, time.perf_counter(), self._nbytes)
        if self._nvtx is not None:
            self._nvtx.RangePop()


def busy_seconds(spans: Iterable[Span], stage: str) -> float:
    """How long at least one thread or device was in the stage."""
    total = until = 0.0
    for start, end in sorted((span.start, span.end) for span in spans if span.stage == stage):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def chrome_trace(spans: Sequence[Span], title: str) -> str:
    """JSON as chrome://tracing and https://ui.perfetto.dev show it; microseconds since the call."""
    tracks = list(dict.fromkeys(span.track for span in sorted(spans, key=lambda span: span.start)))
    numbers = {track: number for number, track in enumerate(tracks, 1)}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": title}}]
    for track, number in numbers.items():
        events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": track}})
        events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_sort_index", "args": {"sort_index": number}})
    for span in spans:
        event = {"ph": "X", "pid": 1, "tid": numbers[span.track], "name": span.stage, "cat": "gpusaver"}
        times = {"ts": round(span.start * 1e6, 3), "dur": round((span.end - span.start) * 1e6, 3)}
        events.append(event | times | ({"args": {"nbytes": span.nbytes}} if span.nbytes else {}))
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
