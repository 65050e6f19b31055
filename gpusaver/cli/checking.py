"""``verify`` and ``diff``: are these what they should be?"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any, cast

import click
import numpy as np

from gpusaver import finding
from gpusaver.cli import screen
from gpusaver.cli.listing import WatchedStorage, data_nbytes, open_reader, regex, storage_of
from gpusaver.cli.screen import Column, count, json_option, print_json, print_table, say
from gpusaver.cli.statistics import Difference, side_by_side
from gpusaver.reader import CheckpointReader
from gpusaver.storage.base import Storage
from gpusaver.streaming import TensorStream
from gpusaver.tensor import DataType

_DIFF = [
    Column("name", "name", folds=True),
    Column("change", "change"),
    Column("first", "A"),
    Column("second", "B"),
    Column("differing", "differing", screen.number, right=True),
    Column("max_abs", "max |a-b|", screen.number, right=True),
    Column("max_rel", "relative", screen.number, right=True),
]


@click.command()
@click.argument("prefixes", metavar="PREFIX...", nargs=-1, required=True)
@click.option("--structure", is_flag=True, help="Only the index and the sizes of the data files.")
@json_option
def verify(prefixes: tuple[str, ...], structure: bool, as_json: bool) -> int:
    """Read checkpoints and compare every checksum; exit code 1, and what is wrong, if one is not whole."""
    found = []
    for path in prefixes:
        prefix = finding.prefix_of(path)
        total = 0 if structure else data_nbytes(prefix)
        with screen.bar("verifying", total) as on_read:
            storage = cast(Storage, WatchedStorage(storage_of(prefix), on_read))
            problems = list(finding.verify(prefix, checksums=not structure, storage=storage))
        found.append({"prefix": prefix, "problems": problems})
        if as_json:
            continue
        for problem in problems:
            say(problem)
        if screen.console().is_terminal:
            verdict = count(len(problems), "problem") if problems else "whole"
            say(f"{prefix}: {verdict}", style="bold red" if problems else "bold green")
    if as_json:
        print_json({"checkpoints": found})
    return 1 if any(checked["problems"] for checked in found) else 0


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--exact", is_flag=True, help="Compare bits: NaNs of other bits differ, and 0 from -0.")
@click.option("--filter", "wanted", callback=regex, help="Only names in which this regular expression is found.")
@json_option
def diff(first: str, second: str, exact: bool, wanted: re.Pattern[str] | None, as_json: bool) -> int:
    """Compare the tensors of two checkpoints; exit code 1 if they differ.

    NaN equals NaN, and 0 equals -0, unless --exact.  "relative" is |a-b| / max(|a|, |b|) where that is largest.
    """
    one, other = open_reader(first), open_reader(second)
    names = sorted(name for name in {*one, *other} if wanted is None or wanted.search(name))
    rows = []
    with contextlib.ExitStack() as stack:
        streams = stack.enter_context(TensorStream(one)), stack.enter_context(TensorStream(other))
        on_read = stack.enter_context(screen.bar("comparing", sum(map(functools.partial(_nbytes, one), names))))
        done = 0
        for name in names:
            row = _compare(name, (one, other), streams, exact)
            rows += [row] if row is not None else []
            on_read(done := done + _nbytes(one, name))
    counts = {kind: sum(row["change"] == kind for row in rows) for kind in ("added", "removed", "changed")}
    counts["equal"] = len(names) - len(rows)
    if as_json:
        print_json({"first": one.prefix, "second": other.prefix, "tensors": rows, "counts": counts})
        return 1 if rows else 0
    if rows:
        print_table(_DIFF, rows)
    if screen.console().is_terminal:
        say(", ".join(f"{number:,} {kind}" for kind, number in counts.items()), style="bold")
    return 1 if rows else 0


def _nbytes(reader: CheckpointReader, name: str) -> int:
    found = reader.find(name)
    return found.spec.nbytes if found is not None else 0


def _compare(
    name: str,
    readers: tuple[CheckpointReader, CheckpointReader],
    streams: tuple[TensorStream, TensorStream],
    exact: bool,
) -> dict[str, Any] | None:
    """The row of a tensor; None if it is equal in both."""
    found = [reader.find(name) for reader in readers]
    specs = [None if located is None else located.spec for located in found]
    row = dict(zip(("first", "second"), (None if spec is None else str(spec) for spec in specs), strict=True))
    row = {"name": name, "change": "changed", **row, "differing": None, "max_abs": None, "max_rel": None}
    if specs[0] is None or specs[1] is None:
        return row | {"change": "added" if specs[0] is None else "removed"}
    if specs[0] != specs[1]:
        return row
    if specs[0].dtype is DataType.string:
        values = [np.asarray(reader.get_tensor(name), object).reshape(-1) for reader in readers]
        count = int((values[0] != values[1]).sum())
        return row | {"differing": count} if count else None
    if not specs[0].dtype.is_fixed_size:  # variants, of which nothing but the checksum is known
        assert found[0] is not None
        assert found[1] is not None
        return None if readers[0].same_bytes(found[0], found[1]) else row
    difference = Difference(exact)
    for blocks in side_by_side(streams[0].blocks(name), streams[1].blocks(name)):
        difference.add(*blocks)
    if not difference.count:
        return None
    return row | {"differing": difference.count, "max_abs": difference.max_abs, "max_rel": difference.max_rel}


COMMANDS = [verify, diff]
