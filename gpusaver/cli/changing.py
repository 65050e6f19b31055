"""``convert``, ``rename``, ``prune``: what makes and removes files."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import click

from gpusaver.bundle import filenames
from gpusaver.checkpoint_files import remove_checkpoint
from gpusaver.checkpoint_state import get_checkpoint_state, state_lock, write_state
from gpusaver.cli import screen
from gpusaver.cli.listing import Listed, checkpoints, regex, storage_of
from gpusaver.cli.screen import Column, count, json_option, print_json, print_table, say
from gpusaver.conversion import convert as convert_checkpoint
from gpusaver.display import size
from gpusaver.errors import InvalidArgumentError, NotFoundError
from gpusaver.finding import prefix_of
from gpusaver.manager.memory import Memory
from gpusaver.manager.policy import Checkpoint, Managed, Policy
from gpusaver.renaming import rename_tensors
from gpusaver.storage.base import Storage

_RENAMES = [Column("old", "old name", folds=True), Column("new", "new name", folds=True)]
_PRUNED = [
    Column("name", "checkpoint", folds=True),
    Column("modified", "saved", screen.age, right=True),
    Column("nbytes", "size", size, right=True),
    Column("action", "action"),
    Column("reason", "because"),
]


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--include", callback=regex, help="Only names in which this regular expression is found.")
@click.option("--exclude", callback=regex, help="No names in which this one is found.")
@click.option("--overwrite", is_flag=True, help="Replace DESTINATION if it exists.")
@json_option
def convert(
    source: str,
    destination: str,
    include: re.Pattern[str] | None,
    exclude: re.Pattern[str] | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the tensors of SOURCE to DESTINATION in another format.

    The ending says which: .safetensors, .npz, .pt and .pth (to read alone, by PyTorch's safe loader); anything else is
    a TensorFlow checkpoint: V2 to write; V2, V1, TF2's or a SavedModel to read.
    """
    with screen.bar("converting", None) as on_written:
        done = convert_checkpoint(
            source,
            destination,
            include=include,
            exclude=exclude,
            overwrite=overwrite,
            on_written=on_written,
        )
    if as_json:
        print_json({"destination": destination, **done._asdict()})
        return
    say(f"{destination}: {count(done.tensors, 'tensor')}, {size(done.nbytes)}")
    for what in done.left_out:
        screen.complain(f"left out: {what}")


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option(
    "-e",
    "--replace",
    "rules",
    nargs=2,
    multiple=True,
    required=True,
    metavar="PATTERN REPLACEMENT",
    help="As re.sub takes them, \\1 is the first group; several are applied one after the other.",
)
@click.option("--dry-run", is_flag=True, help="Only say what the names would be.")
@json_option
def rename(source: str, destination: str, rules: Sequence[tuple[str, str]], dry_run: bool, as_json: bool) -> None:
    """Make the checkpoint DESTINATION: SOURCE with other tensor names.

    Only the index is written; the data files are hard links to those of SOURCE, or copies where links do not work.
    """

    def new_name(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    try:
        for pattern, replacement in rules:
            re.compile(pattern).sub(replacement, "")
        done = rename_tensors(prefix_of(source), destination, new_name, dry_run=dry_run)
    except (re.error, IndexError) as error:
        raise click.BadParameter(f"--replace: {error}") from error
    rows = [{"old": old, "new": new} for old, new in done.names]
    if as_json:
        print_json({"destination": destination, "names": rows, "linked": done.linked, "copied": done.copied})
        return
    print_table(_RENAMES, rows)
    if screen.console().is_terminal:
        files = "nothing was written" if dry_run else f"{count(done.linked, 'data file')} linked, {done.copied} copied"
        say(f"{count(len(rows), 'tensor')} renamed, {files}", style="bold")


@click.command()
@click.argument("directory")
@click.option("--keep", type=click.IntRange(1), required=True, help="How many of the newest stay, of each name.")
@click.option("--keep-every-hours", type=float, help="Besides, one for every so many hours.")
@click.option("--best", type=click.IntRange(0), help="How many of the best stay, by the metrics that a manager noted.")
@click.option("--best-mode", type=click.Choice(["min", "max"]), default="min", help="Which metrics are good.")
@click.option("--latest-filename", default="checkpoint", help="The state file.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def prune(
    directory: str,
    keep: int,
    keep_every_hours: float | None,
    best: int | None,
    best_mode: Literal["min", "max"],
    latest_filename: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete old checkpoints of DIRECTORY: retention by hand.

    What the state file calls the newest, what is pinned, and what is damaged stays.  Fails while a CheckpointManager
    works in the directory.
    """
    storage = storage_of(directory)
    if keep_every_hours is not None and not keep_every_hours > 0:
        raise click.BadParameter("--keep-every-hours: expected more than 0")
    with contextlib.nullcontext() if dry_run else _alone(storage, directory, latest_filename):
        found = checkpoints(directory, latest_filename)
        remembered = _remembered(storage, directory, found)
        if best is None and any(c.metric is not None for c in remembered.values()):
            raise InvalidArgumentError(
                f"the CheckpointManager of {directory} noted metrics: say how many of the best stay, --best N or 0"
            )
        policy = Policy(keep, keep_every_hours, best or 0, best_mode)
        doomed = _doomed(found, remembered, policy)
        rows = [_row(c, c.prefix in doomed, remembered, policy) for c in found]
        if not dry_run and doomed:
            _update_state(storage, directory, latest_filename, doomed)
            for prefix in doomed:
                remove_checkpoint(prefix, storage=storage)
    freed = sum(c.nbytes for c in found if c.prefix in doomed)
    if as_json:
        print_json({"directory": directory, "checkpoints": rows, "freed": freed, "dry_run": dry_run})
        return
    print_table(_PRUNED, rows)
    if screen.console().is_terminal:
        verb = "would be deleted" if dry_run else "deleted"
        say(f"{count(len(doomed), 'checkpoint')} {verb}, {size(freed)}", style="bold")


@contextlib.contextmanager
def _alone(storage: Storage, directory: str, latest_filename: str) -> Iterator[None]:
    """Without a CheckpointManager, which holds the lock of its file for life, and without Savers at the state file."""
    if not storage.is_directory(directory):
        raise NotFoundError(f"there is no directory {directory}")
    path = Memory(directory, "", storage).path
    with contextlib.ExitStack() as stack:
        if storage.exists(path):
            stack.callback(storage.lock(filenames.lock_path(path), wait_seconds=1.0).release)
        stack.enter_context(state_lock(directory, latest_filename, storage=storage))
        yield


def _remembered(storage: Storage, directory: str, found: Sequence[Listed]) -> dict[str, Checkpoint]:
    """By prefix, what a CheckpointManager of any name knows."""
    known: dict[str, Checkpoint] = {}
    for stem in {c.stem for c in found}:
        for checkpoint in Memory(directory, stem, storage).noted():
            known[os.path.join(directory, checkpoint.name)] = checkpoint
    return known


def _doomed(found: Sequence[Listed], remembered: dict[str, Checkpoint], policy: Policy) -> set[str]:
    doomed = set()
    for stem in {c.stem for c in found}:
        # Damaged ones neither count nor go: somebody may want to look at them.
        ours = [c for c in found if c.stem == stem and c.step is not None and c.state in ([], ["latest"], ["listed"])]
        known = [
            Checkpoint(
                c.prefix,
                c.modified,
                remembered[c.prefix].metric if c.prefix in remembered else None,
                "latest" in c.state or (c.prefix in remembered and remembered[c.prefix].is_pinned),
            )
            for c in ours
        ]
        first = min((c.time for c in known), default=0.0)
        doomed |= set(policy.sweep(Managed(tuple(known), first)).doomed)
    return doomed


def _row(c: Listed, is_doomed: bool, remembered: dict[str, Checkpoint], policy: Policy) -> dict[str, Any]:
    noted = remembered.get(c.prefix)
    if is_doomed:
        reason = "old"
    elif c.step is None:
        reason = "no step"
    else:
        reason = ", ".join([*c.state, *["pinned"] * bool(noted and noted.is_pinned)]) or (
            "new or among the best" if policy.best_to_keep else "new"
        )
    action = "delete" if is_doomed else "keep"
    names = {"name": os.path.basename(c.prefix), "prefix": c.prefix, "step": c.step}
    return {**names, "modified": c.modified, "nbytes": c.nbytes, "action": action, "reason": reason}


def _update_state(storage: Storage, directory: str, latest_filename: str, doomed: set[str]) -> None:
    """Before the files go: the state file never names what is deleted."""
    state = get_checkpoint_state(directory, latest_filename, storage=storage)
    if state is None or not state.model_checkpoint_path:
        return
    latest, gone = state.model_checkpoint_path, {os.path.abspath(prefix) for prefix in doomed}
    paths, times = list(state.all_model_checkpoint_paths), list(state.all_model_checkpoint_timestamps)
    known = times if len(times) == len(paths) and paths[-1:] == [latest] else []
    stays = [os.path.abspath(path) not in gone for path in paths]
    write_state(
        directory,
        latest,
        list(itertools.compress(paths, stays)),
        latest_filename,
        list(itertools.compress(known, stays)),
        state.last_preserved_timestamp or None,
        save_relative_paths=True,
        storage=storage,
    )


COMMANDS = [convert, rename, prune]
