"""What the commands print: tables, JSON, bars.

On a terminal a table is drawn; elsewhere it is lines of fields between tabs, sizes and times as plain numbers, and
nothing else is drawn.  Names come from files that anybody may have written: whatever could steer a terminal, or look
like something it is not, is shown as an escape (:func:`gpusaver.display.shown`).
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpusaver.display import shown

Row = Mapping[str, Any]

_SHOWN_LENGTH = 240


class Column(NamedTuple):
    """``key``: in the rows and in JSON; ``show``: what a terminal gets for a value that is not None."""

    key: str
    title: str
    show: Callable[[Any], str] = str
    right: bool = False
    #: Broken over several lines; else the column is as wide as it needs.
    folds: bool = False
    #: Lists of numbers between tabs: ``[2,3]``, so that the shape of a scalar is seen.
    brackets: bool = False
    #: What rich calls a style, on a terminal, for a value.
    style: Callable[[Any], str | None] = lambda value: None


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")(function)


def console(*, stderr: bool = False) -> Console:
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=False, stderr=stderr)


def say(text: str = "", *, style: str | None = None) -> None:
    """A line on the standard output."""
    out = console()
    if out.is_terminal:
        out.print(Text(shown(text), style or ""), soft_wrap=True)
    else:
        click.echo(shown(text))


def complain(text: str) -> None:
    """Lines on the standard error."""
    for line in text.splitlines() or [""]:
        click.echo(shown(line), err=True)


def print_json(document: Mapping[str, Any]) -> None:
    """ASCII alone; numbers that JSON lacks are strings: "nan", "inf", "-inf"."""
    click.echo(json.dumps(_plain(document), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def print_table(columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Requires: cells of text need not be safe; this makes them so."""
    out = console()
    if not out.is_terminal:
        click.echo("\t".join(column.key for column in columns))
        for row in rows:
            fields = [_field(row.get(column.key)) for column in columns]
            click.echo("\t".join(f"[{f}]" if c.brackets else f for c, f in zip(columns, fields, strict=True)))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        overflow: Any = "fold" if column.folds else "ellipsis"
        justify: Any = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, overflow=overflow, no_wrap=not column.folds)
    for row in rows:
        table.add_row(*(_cell(column, row.get(column.key)) for column in columns))
    out.print(table)


def _cell(column: Column, value: Any) -> Text:
    if value is None:
        return Text("-")
    return Text(_shortened(shown(column.show(value))), column.style(value) or "")


def _shortened(text: str) -> str:
    """For a terminal: a name of thousands of characters would fill it."""
    return text if len(text) <= _SHOWN_LENGTH else f"{text[: _SHOWN_LENGTH - 40]}... ({len(text):,} characters)"


def _field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ",".join(_field(item) for item in value)
    return shown(str(value))


def count(number: int, noun: str) -> str:
    """``1 tensor``, ``2,000 tensors``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rate(nbytes_per_second: float) -> str:
    return f"{nbytes_per_second / 1e9:.2f} GB/s"


def age(modified: float) -> str:
    """How long ago, of seconds since the epoch."""
    seconds = max(0.0, time.time() - modified)
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name} ago"
    return f"{seconds:.0f} s ago"


def number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) or abs(value) >= 10**9 else f"{value:,}"


@contextlib.contextmanager
def bar(title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """On a terminal a bar of bytes, gone when it ends; ``on_bytes(done, total)``, where ``total`` may come late."""
    err = console(stderr=True)
    if not err.is_terminal:
        yield lambda done, total=None: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done, total=None: progress.update(task, completed=done, total=total)


def flush() -> None:
    sys.stdout.flush()
