"""``ls``, ``latest``, ``show``, ``get``: what there is."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import click
from rich.text import Text
from rich.tree import Tree

from gpusaver.bundle.slices import slice_key
from gpusaver.cli import screen
from gpusaver.cli.listing import checkpoints, open_reader, regex
from gpusaver.cli.screen import Column, count, json_option, print_json, print_table, say
from gpusaver.cli.statistics import Statistics
from gpusaver.conversion import npz, tensorflow
from gpusaver.conversion.tensors import refuse, replacing
from gpusaver.display import shown, size
from gpusaver.errors import NotFoundError
from gpusaver.finding import latest_checkpoint
from gpusaver.reader import CheckpointReader
from gpusaver.streaming import TensorStream
from gpusaver.tensor import DataType

#: A name made to hurt may have thousands of scopes.
_MAX_DEPTH = 40

_LS = [
    Column("name", "checkpoint", folds=True),
    Column("step", "step", right=True),
    Column("modified", "saved", screen.age, right=True),
    Column("nbytes", "size", size, right=True),
    Column("state", "state", ", ".join),
]
_SHOW = [
    Column("name", "name", folds=True),
    Column("dtype", "dtype"),
    Column("shape", "shape", str, brackets=True),
    Column("nbytes", "size", size, right=True),
    Column("shards", "shard", lambda shards: ",".join(map(str, shards)), right=True),
]
_STATS = [
    Column("min", "min", screen.number, right=True),
    Column("max", "max", screen.number, right=True),
    Column("mean", "mean", screen.number, right=True),
    Column("nan", "NaN", screen.number, right=True),
]


@click.command()
@click.argument("directory", default=".")
@json_option
def ls(directory: str, as_json: bool) -> None:
    """List the checkpoints of DIRECTORY: step, age, size, state.

    "latest" is what the state file calls the newest, "listed" what else is in it.
    """
    found = checkpoints(directory)
    rows = [{"name": os.path.basename(c.prefix), **c._asdict()} for c in found]
    for row in rows:
        del row["stem"]
    if as_json:
        print_json({"directory": directory, "checkpoints": rows})
        return
    print_table(_LS, rows)
    if screen.console().is_terminal:
        say(f"{count(len(rows), 'checkpoint')}, {size(sum(c.nbytes for c in found))}", style="bold")


@click.command()
@click.argument("directory", default=".")
@click.option(
    "--verify",
    type=click.Choice(["none", "structure", "checksums"]),
    default="none",
    help="Pass over damaged ones: look at sizes alone, or read everything.",
)
@json_option
def latest(directory: str, verify: Literal["none", "structure", "checksums"], as_json: bool) -> int:
    """Print the prefix of the newest checkpoint of DIRECTORY; exit code 1 if there is none."""
    prefix = latest_checkpoint(directory, verify=verify)
    if as_json:
        print_json({"prefix": prefix})
    elif prefix is not None:
        say(prefix)
    else:
        screen.complain(f"gpusaver: {directory} has no checkpoint that a state file calls the newest")
    return 0 if prefix is not None else 1


@click.command()
@click.argument("prefix")
@click.option("--filter", "wanted", callback=regex, help="Only names in which this regular expression is found.")
@click.option(
    "--sort", type=click.Choice(["name", "dtype", "shape", "size", "shard"]), default="name", help="By which column."
)
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option("--tree", is_flag=True, help="By scope, with the sum of each.")
@click.option("--stats", is_flag=True, help="Also minimum, maximum, mean and number of NaNs; reads everything.")
@json_option
def show(
    prefix: str, wanted: re.Pattern[str] | None, sort: str, reverse: bool, tree: bool, stats: bool, as_json: bool
) -> None:
    """List the tensors of a checkpoint: name, dtype, shape, size, shard."""
    reader = open_reader(prefix)
    rows = [_describe(reader, name) for name in reader if wanted is None or wanted.search(name)]
    rows.sort(key=functools.partial(_sort_key, by=sort), reverse=reverse)
    if stats:
        total = sum(row["nbytes"] for row in rows)
        with TensorStream(reader) as stream, screen.bar("reading", total) as on_read:
            done = 0
            for row in rows:
                row |= _statistics(stream, row)
                on_read(done := done + row["nbytes"])
    totals = {
        "tensors": len(rows),
        "elements": sum(row["elements"] for row in rows),
        "nbytes": sum(row["nbytes"] for row in rows),
        "shards": len({shard for row in rows for shard in row["shards"] or ()}),
    }
    if as_json:
        print_json({"prefix": reader.prefix, "tensors": rows, "totals": totals})
        return
    if tree:
        _print_tree(rows)
    else:
        # On a terminal the room is for the names.
        columns = _SHOW[:-1] if stats and screen.console().is_terminal else _SHOW
        print_table(columns + _STATS * stats, rows)
    if screen.console().is_terminal:
        say(
            f"{count(len(rows), 'tensor')}, {count(totals['elements'], 'element')}, {size(totals['nbytes'])}",
            style="bold",
        )


def _describe(reader: CheckpointReader, name: str) -> dict[str, Any]:
    found = reader.find(name)
    assert found is not None
    spec, entry = found.spec, found.entry
    row: dict[str, Any] = {"name": name, "dtype": spec.dtype.name, "shape": list(spec.shape)}
    row["elements"] = spec.num_elements
    if entry is None:  # V1
        return row | {"nbytes": spec.nbytes, "shards": None, "slices": None}
    assert reader._index is not None
    parts = [reader._index.get(slice_key(found.key, part)) for part in entry.slices] or [entry]
    there = [part for part in parts if part is not None]
    nbytes, shards = sum(part.nbytes for part in there), sorted({part.shard for part in there})
    return row | {"nbytes": nbytes, "shards": shards, "slices": len(entry.slices) or None}


def _sort_key(row: dict[str, Any], by: str) -> Any:
    value = row[{"size": "nbytes", "shard": "shards"}.get(by, by)]
    return (value is not None, value, row["name"]) if value is not None else (False, row["name"])


def _statistics(stream: TensorStream, row: dict[str, Any]) -> dict[str, Any]:
    statistics = Statistics(DataType[row["dtype"]])
    if statistics.has_any:
        for block in stream.blocks(row["name"]):
            statistics.add(block)
    return statistics.row()


def _print_tree(rows: Sequence[dict[str, Any]]) -> None:
    root: dict[str, Any] = {}
    for row in rows:
        scope = root
        *scopes, name = row["name"].split("/", _MAX_DEPTH)
        for part in scopes:
            scope = scope.setdefault(f"{part}/", {})
        scope[f"{name}\0"] = row  # a tensor may be called as a scope is
    out = screen.console()
    if out.is_terminal:
        drawn = Tree("", hide_root=True)
        for child in _branches(root):
            _draw(drawn, child)
        out.print(drawn)
    else:
        for depth, title, text in _flat(_branches(root), 0):
            click.echo(f"{'  ' * depth}{title}\t{text}")


_Branch = tuple[str, str, list[Any]]


def _branches(scope: dict[str, Any]) -> list[_Branch]:
    """``(title, what is said of it, branches below)`` of everything in a scope."""
    found: list[_Branch] = []
    for key, inner in scope.items():
        if key.endswith("\0"):
            found.append((shown(key[:-1]), f"{inner['dtype']}{inner['shape']} {size(inner['nbytes'])}", []))
        else:
            leaves = list(_leaves(inner))
            text = f"{count(len(leaves), 'tensor')}, {size(sum(row['nbytes'] for row in leaves))}"
            found.append((shown(key), text, _branches(inner)))
    return found


def _leaves(scope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, inner in scope.items():
        if key.endswith("\0"):
            yield inner
        else:
            yield from _leaves(inner)


def _draw(tree: Tree, branch: _Branch) -> None:
    title, text, below = branch
    node = tree.add(Text.assemble((title, "bold" if below else ""), "  ", (text, "dim")))
    for child in below:
        _draw(node, child)


def _flat(branches: Sequence[_Branch], depth: int) -> Iterator[tuple[int, str, str]]:
    for title, text, below in branches:
        yield depth, title, text
        yield from _flat(below, depth + 1)


@click.command()
@click.argument("prefix")
@click.argument("name")
@click.option("-o", "--output", help="Write it there instead, as .npy.")
@json_option
def get(prefix: str, name: str, output: str | None, as_json: bool) -> None:
    """Print a tensor, or save it as .npy."""
    reader = open_reader(prefix)
    found = reader.find(name)
    if found is None:
        raise NotFoundError(f"{reader.prefix} has no tensor {name}; `gpusaver show` lists them")
    if output is not None:
        with TensorStream(reader) as stream:
            tensor = tensorflow.source_tensor(stream, reader, name)
            refuse(output, [] if npz.has_dtype(tensor.spec.dtype) else [tensor], ".npy has no such dtype")
            with replacing(output) as file:
                npz.write_npy(file, tensor, lambda nbytes: None)
        return
    value = reader.get_tensor(name)
    if as_json:
        row = {"name": name, "dtype": found.spec.dtype.name, "shape": list(found.spec.shape)}
        print_json({**row, "value": _values(value if isinstance(value, bytes) else value.tolist())})
        return
    if screen.console().is_terminal:
        say(f"{name}: {found.spec}", style="bold")
    for line in (repr(value) if isinstance(value, bytes) else str(value)).splitlines():
        say(line)


def _values(value: Any) -> Any:
    """What JSON has: complex numbers are pairs, strings text."""
    if isinstance(value, list):
        return [_values(inner) for inner in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, complex):
        return [value.real, value.imag]
    return value if isinstance(value, bool | int | float) else float(value)


COMMANDS = [ls, latest, show, get]
