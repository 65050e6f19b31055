"""What SaveReport and RestoreReport say, and the trace of a save's timeline."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim.fixture import every_schedule, simulated_cupy  # noqa: F401
from sim.tools import late, on_device

import gpusaver
from gpusaver.pipeline.chunk import CHUNK_NBYTES
from gpusaver.pipeline.timeline import Span, Timeline, busy_seconds, chrome_trace

#: Rounding of a trace's microseconds.
ROUNDING = 0.002


def overlapping(spans: Sequence[tuple[float, float]]) -> list[Any]:
    """Pairs of (start, end) of one track that neither nest nor follow each other."""
    found = []
    for first, second in itertools.combinations(sorted(spans), 2):
        if first[0] < second[0] < first[1] - ROUNDING and second[1] > first[1] + ROUNDING:
            found.append((first, second))
    return found


def check_trace(path: Path, report: Any) -> dict[str, dict[str, Any]]:
    """A trace is well formed, whole, and within the save; returns its events by track and stage."""
    trace = json.loads(path.read_text("utf-8"))
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    events = trace["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(report.spans)
    tracks: dict[str, dict[str, Any]] = {}
    for event in spans:
        assert 0 <= event["ts"] <= event["ts"] + event["dur"] <= report.durable_seconds * 1e6 + ROUNDING
        tracks.setdefault(names[event["tid"]], {}).setdefault(event["name"], []).append(event)
    for name, stages in tracks.items():
        ranges = [(e["ts"], e["ts"] + e["dur"]) for stage in stages.values() for e in stage]
        assert not overlapping(ranges), name
    return tracks


def written(tracks: dict[str, dict[str, Any]], stage: str) -> int:
    return sum(e.get("args", {}).get("nbytes", 0) for track in tracks.values() for e in track.get(stage, []))


@pytest.mark.parametrize("direct_io", [False, True], ids=["page-cache", "O_DIRECT"])
def test_a_save_of_host_arrays_is_reported(tmp_path, direct_io):
    state = {"large": np.arange(3 * CHUNK_NBYTES // 8 + 5.0), "small": np.arange(3), "text": "a string"}
    with gpusaver.Saver(state, direct_io=direct_io) as saver:
        pending = saver.save_async(tmp_path / "model", capture="snapshot")
        assert pending.report is None or pending.done()
        pending.result()
    report = pending.report
    nbytes = state["large"].nbytes + state["small"].nbytes + 13  # the string: its length, a checksum, 8 letters
    assert (report.tensors, report.nbytes, report.capture, report.devices) == (3, nbytes, "snapshot", ())
    assert report.call_seconds > 0
    assert 0 < report.captured_seconds <= report.durable_seconds
    assert 0 < report.background_seconds < 60
    assert report.rate == nbytes / report.durable_seconds
    assert report.link_rate == 0.0
    assert report.write_rate > 0
    assert (report.copy_rate > 0) == direct_io
    for stage in ("plan", "capture", "checksum", "write", "sync", "commit"):
        assert 0 < report.seconds(stage) <= report.durable_seconds, stage
    assert report.seconds("plan") + report.seconds("capture") <= report.call_seconds
    with pytest.raises(ValueError, match="stage: expected one of plan, capture"):
        report.seconds("prune")

    report.write_trace(tmp_path / "trace.json")
    tracks = check_trace(tmp_path / "trace.json", report)
    assert set(tracks[threading.current_thread().name]) == {"plan", "capture"}
    assert {"sync", "commit"} <= set(tracks["gpusaver-save"])
    assert nbytes <= written(tracks, "write") <= nbytes + 4096
    assert written(tracks, "checksum") == (nbytes if direct_io else written(tracks, "write"))
    # Of what lies in huge pages only the ends are copied.
    assert (0 < written(tracks, "copy") <= nbytes) if direct_io else (written(tracks, "copy") == 0)


def test_a_blocking_call_lasts_until_its_end(tmp_path):
    with gpusaver.Saver({"w": np.zeros(1000)}) as saver:
        seen: list[Any] = []
        pending = saver.save_async(tmp_path / "model", capture="blocking")
        pending.add_done_callback(lambda p: seen.append(p.report))
        pending.result()
        assert pending.report.call_seconds >= pending.report.captured_seconds
        saver.save(tmp_path / "model")
        report = saver._pending.report
        assert report.call_seconds == report.durable_seconds
    assert seen[0].spans == pending.report.spans


def test_a_restore_is_reported(tmp_path):
    state = {"w": np.arange(1000.0), "text": "a string", "step": 3}
    with gpusaver.Saver(state) as saver:
        report = saver.restore(saver.save(tmp_path / "model"))
    assert report.nbytes == 8000 + 13 + 8
    assert report.seconds > 0
    assert report.rate == report.nbytes / report.seconds


@every_schedule
@pytest.mark.parametrize("capture", ["snapshot", "deferred"])
def test_a_save_of_device_arrays_is_reported(sim, tmp_path, capture):
    arrays = {f"v{number}": on_device(sim, np.arange(5 << 20, dtype=np.uint8)) for number in range(4)}
    with sim.cupy.cuda.Device(1):
        arrays["other"] = on_device(sim, np.arange(3 << 20, dtype=np.uint8))
    nbytes = sum(array.nbytes for array in arrays.values())
    with gpusaver.Saver(arrays) as saver:
        pending = saver.save_async(tmp_path / "model", capture=capture)
        pending.fence()
        pending.result()
    report = pending.report
    assert report.devices == ("cuda:0", "cuda:1")
    assert report.copy_rate > 0
    report.write_trace(tmp_path / "trace.json")
    tracks = check_trace(tmp_path / "trace.json", report)
    assert {"cuda:0", "cuda:1"} <= set(tracks)
    assert written(tracks, "copy") == written(tracks, "write") >= nbytes
    assert sum(len(track.get("copy", [])) for track in tracks.values()) == 4
    # A chunk is copied before it is written.
    first_copied = min(e["ts"] + e["dur"] for name in ("cuda:0", "cuda:1") for e in tracks[name]["copy"])
    first_written = min(e["ts"] for track in tracks.values() for e in track.get("write", []))
    assert first_copied <= first_written


@late
def test_profilers_see_the_stages(sim, tmp_path, monkeypatch):
    arrays = {"v": on_device(sim, np.arange(1000))}
    seen: list[str] = []
    push = sim.cupy.cuda.nvtx.RangePush
    monkeypatch.setattr(sim.cupy.cuda.nvtx, "RangePush", lambda name, *rest: (seen.append(name), push(name, *rest)))
    with gpusaver.Saver(arrays) as saver:
        saver.save(tmp_path / "model")
    assert {f"gpusaver {stage}" for stage in ("plan", "capture", "copy", "write", "commit")} <= set(seen)
    sim.assert_quiescent()
    monkeypatch.setattr(sim.cupy.cuda.nvtx, "available", False)
    seen.clear()
    with gpusaver.Saver(arrays) as saver:
        saver.save(tmp_path / "model")
    assert not seen


def test_seconds_count_what_overlaps_once():
    spans = [Span("write", "a", 1.0, 3.0, 8), Span("write", "b", 2.0, 2.5, 8), Span("write", "a", 3.0, 4.0, 8)]
    spans += [Span("write", "b", 6.0, 7.0, 8), Span("copy", "a", 0.0, 9.0, 8)]
    assert busy_seconds(spans, "write") == 4.0
    assert busy_seconds([], "write") == 0.0


def test_a_timeline_counts_the_time_of_its_threads():
    timeline = Timeline(0.0)
    with timeline.in_background():
        sum(range(100_000))
    once = timeline.background_seconds
    assert once > 0
    with timeline.in_background():
        sum(range(100_000))
    assert timeline.background_seconds > once
    with timeline.range("copy"):  # for profilers alone
        pass
    assert timeline.spans == []
    assert json.loads(chrome_trace([], "nothing"))["traceEvents"][0]["args"] == {"name": "nothing"}
