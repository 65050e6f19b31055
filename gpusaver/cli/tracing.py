"""``trace``: where the time of a save goes, as a file for Perfetto, as a picture, and in numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from typing import Any

import click

from gpusaver.cli import screen
from gpusaver.cli.listing import storage_of
from gpusaver.cli.machine import size_in_bytes
from gpusaver.cli.measuring import save
from gpusaver.cli.screen import Column, json_option, print_json, print_table, rate, say
from gpusaver.display import shown, size
from gpusaver.errors import DataLossError, from_os_error
from gpusaver.pipeline.timeline import STAGES, Span, busy_seconds, chrome_trace

_STAGES = [
    Column("stage", "stage"),
    Column("seconds", "busy, seconds", lambda seconds: f"{seconds:.3f}", right=True),
    Column("share", "of the save", lambda share: f"{share:.0%}", right=True),
    Column("nbytes", "bytes", size, right=True),
    Column("rate", "rate", rate, right=True),
]
#: A trace of ours has 200 bytes a span; larger ones are somebody else's.
_LIMIT_NBYTES = 256 << 20


@click.command()
@click.argument("source")
@click.option("-o", "--output", default="trace", show_default=True, help="OUTPUT.json and OUTPUT.png are written.")
@click.option("--size", "nbytes", callback=size_in_bytes, default="512MB", show_default=True, help="Of what is saved.")
@json_option
def trace(source: str, output: str, nbytes: int, as_json: bool) -> None:
    """Show where the time of a save goes.

    SOURCE is a file that SaveReport.write_trace wrote, or a directory: then a save of made-up arrays is timed in it.
    OUTPUT.json opens in https://ui.perfetto.dev; OUTPUT.png is a Gantt chart.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the picture needs matplotlib: pip install 'gpusaver[trace]'")
    if storage_of(source).is_directory(source):
        folder = tempfile.mkdtemp(prefix="gpusaver-trace-", dir=source)
        try:
            spans = list(save(os.path.join(folder, "model"), nbytes).spans)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        title = f"a save of {size(nbytes)}"
        _write(f"{output}.json", chrome_trace(spans, f"gpusaver {source}"))
    else:
        spans = read_trace(source)
        title = os.path.basename(source)
    from gpusaver.cli.gantt import draw

    draw(spans, shown(title), f"{output}.png")
    rows = _rows(spans)
    if as_json:
        print_json({"seconds": max(span.end for span in spans), "stages": rows, "picture": f"{output}.png"})
        return
    print_table(_STAGES, rows)
    if screen.console().is_terminal:
        say(f"{output}.png", style="bold")


def read_trace(path: str) -> list[Span]:
    """The spans of a trace file of ours.  DataLossError for anything else."""
    try:
        if os.path.getsize(path) > _LIMIT_NBYTES:
            raise DataLossError(f"{path} is larger than any trace of gpusaver")
        with open(path, encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        tracks = {e["tid"]: str(e["args"]["name"]) for e in events if e.get("name") == "thread_name"}
        spans = [_span(event, tracks) for event in events if event.get("ph") == "X"]
    except DataLossError:
        raise
    except OSError as error:
        raise from_os_error(error, "open", path) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataLossError(f"{path} is no trace that SaveReport.write_trace wrote: {error!r:.200}") from error
    if not spans:
        raise DataLossError(f"{path} has no spans of a save")
    return spans


def _span(event: dict[str, Any], tracks: dict[Any, str]) -> Span:
    start, length = float(event["ts"]) / 1e6, float(event["dur"]) / 1e6
    if event["name"] not in STAGES or not (0 <= start < 1e9 and 0 <= length < 1e9):
        raise ValueError(f"stage {event['name']!r:.50} from {start} for {length}")
    nbytes = int(event.get("args", {}).get("nbytes", 0))
    return Span(event["name"], tracks[event["tid"]], start, start + length, nbytes)


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise from_os_error(error, "write", path) from error


def _rows(spans: list[Span]) -> list[dict[str, Any]]:
    total = max(span.end for span in spans)
    rows = []
    for stage in STAGES:
        seconds = busy_seconds(spans, stage)
        nbytes = sum(span.nbytes for span in spans if span.stage == stage)
        if seconds:
            share = seconds / total if total else None
            row = {"stage": stage, "seconds": seconds, "share": share, "nbytes": nbytes or None}
            rows.append(row | {"rate": nbytes / seconds if nbytes else None})
    return rows


COMMANDS = [trace]
