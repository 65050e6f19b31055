"""What must hold of a directory of checkpoints, whatever happened to the process that wrote it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from scenarios import Scenario, state_of, version_of

import gpusaver
from gpusaver.errors import Error, NotFoundError
from gpusaver.metagraph.reading import read_meta_graph, saved_variables


def recover(directory: Path | str, *, state_file: str | None = None) -> int | None:
    """The version that ``restore_latest`` restores, bit for bit; None if there is no checkpoint."""
    state = state_of(0)
    with gpusaver.Saver(state) as saver:
        try:
            report = saver.restore_latest(directory, latest_filename=state_file)
        except Error as error:
            raise AssertionError(f"nothing could be restored: {error}") from error
    return None if report is None else version_of(state)


def check_state_file(directory: Path | str) -> None:
    """If there is one, it can be read, and all that it names is complete."""
    if not os.path.exists(os.path.join(directory, "checkpoint")):
        return
    try:
        state = gpusaver.get_checkpoint_state(directory)
    except Error as error:
        raise AssertionError(f"the state file is broken: {error}") from error
    assert state is not None, "the state file is broken"
    assert state.all_model_checkpoint_paths[-1] == state.model_checkpoint_path
    for prefix in state.all_model_checkpoint_paths:
        try:
            version_of(gpusaver.load(prefix))
        except Error as error:
            raise AssertionError(f"the state file names {prefix}, which cannot be restored: {error}") from error


def check_meta_files(directory: Path | str) -> None:
    """They are whole, or not there."""
    for path in Path(directory).glob("*.meta"):
        try:
            assert len(saved_variables(read_meta_graph(path))) in (len(state_of(0)), len(state_of(0)) + 1)  # frozen
        except Error as error:
            raise AssertionError(f"{path} is broken: {error}") from error


def check_recovery(directory: Path | str, acknowledged: int | None) -> int | None:
    """The newest acknowledged version is restored, or a newer one, with the state file and without; returns it."""
    found = recover(directory)
    assert (found or 0) >= (acknowledged or 0), f"{found} was restored, but {acknowledged} was acknowledged"
    without = recover(directory, state_file="no such file")
    assert (without or 0) >= (found or 0), f"{without} was restored without the state file, {found} with it"
    check_state_file(directory)
    check_meta_files(directory)
    return found


def check_older(scenario: Scenario, directory: Path | str, acknowledged: int | None) -> None:
    """What retention keeps, also beside the next one, is there too."""
    for version in range(1, (acknowledged or 0) + 1):
        if scenario.is_kept(version, acknowledged or 0) and scenario.is_kept(version, (acknowledged or 0) + 1):
            assert version_of(gpusaver.load(scenario.prefix(directory, version))) == version
    for index in Path(directory).rglob("*.index"):
        try:
            version_of(gpusaver.load(index.with_suffix("")))
        except NotFoundError:  # one that was given up may be back without its data
            continue
        except Error as error:
            raise AssertionError(f"{index} has the data of another checkpoint: {error}") from error
    for memory in Path(directory).rglob("*.json"):
        try:
            json.loads(memory.read_text())
        except ValueError as error:
            raise AssertionError("what the manager remembers is broken") from error
