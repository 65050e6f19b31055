"""What must hold of a directory of checkpoints, whatever happened to the process that wrote it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from scenarios import version_of

import gpusaver
from gpusaver.errors import Error


def prefixes(directory: Path | str) -> list[str]:
    """Of all that is called a checkpoint there, complete or not, the newest first."""
    found = [name.removesuffix(".index") for name in os.listdir(directory) if name.endswith(".index")]
    found.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)], reverse=True)
    return [os.path.join(directory, name) for name in found]


def recover(directory: Path | str) -> int | None:
    """The version that the newest restorable checkpoint holds, bit for bit; None if there is none."""
    for prefix in prefixes(directory) if os.path.isdir(directory) else ():
        try:
            return version_of(gpusaver.load(prefix))
        except Error:
            continue
    return None


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


def check_recovery(directory: Path | str, acknowledged: int | None) -> int | None:
    """The newest acknowledged version is restored, or a newer one; returns it."""
    found = recover(directory)
    assert (found or 0) >= (acknowledged or 0), f"{found} was restored, but {acknowledged} was acknowledged"
    check_state_file(directory)
    return found
