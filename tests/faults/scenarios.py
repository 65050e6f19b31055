"""What a training job does that crashes, fails or is killed: saves of versions 1, 2, 3 ... of one small state."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import gpusaver
from gpusaver.pipeline import recycling
from gpusaver.storage.base import Storage

State = dict[str, Any]


def state_of(version: int) -> State:
    """Four sectors of data; every sector of every version is different, and ``step`` tells which it is."""
    random = np.random.default_rng(version)
    return {
        "big": random.integers(0, 255, 1500, np.uint8),
        "small": random.random(5, np.float32),
        "strided": random.random((4, 6))[:, ::2],
        "step": version,
        "text": f"version {version}",
    }


#: What an incremental scenario saves besides, and never changes.
FROZEN = np.random.default_rng(0).integers(0, 255, 1200, np.uint8)


def fill(state: State, version: int) -> None:
    """Makes the arrays of ``state`` those of the version, in place."""
    for name, value in state_of(version).items():
        if isinstance(value, np.ndarray):
            state[name][...] = value
        else:
            state[name] = value


def version_of(state: State) -> int:
    """Which version it is, bit for bit; AssertionError if it is none."""
    version = int(state["step"])
    for name, value in state_of(version).items():
        found = state[name]
        if isinstance(value, np.ndarray):
            assert (found.dtype, found.shape) == (value.dtype, value.shape), f"{name} of version {version}"
            assert found.tobytes() == value.tobytes(), f"{name} is not that of version {version}"
        else:
            assert (found.decode() if isinstance(found, bytes) else found) == value
    if "frozen" in state:
        assert state["frozen"].tobytes() == FROZEN.tobytes(), f"the frozen variable of version {version}"
    return version


@dataclass(frozen=True)
class Scenario:
    """``versions`` are saved one after the other; all but the last are there before something happens.

    ``is_incremental``: with a variable that does not change.  ``recycles``: data files are written over.

    ``folder``: below the directory, made by the Saver.  ``is_one_prefix``: every save replaces the one before.
    ``has_manager``: a CheckpointManager saves, for which version 1 is the best.
    """

    name: str
    versions: tuple[int, ...] = (1, 2)
    folder: str = ""
    is_one_prefix: bool = False
    max_to_keep: int = 5
    is_sharded: bool = False
    writes_state: bool = True
    direct_io: bool | None = None
    strict: bool = False
    has_manager: bool = False
    is_incremental: bool = False
    recycles: bool = False

    def prefix(self, directory: Path | str, version: int) -> str:
        path = os.path.join(directory, self.folder, "k")
        return path if self.is_one_prefix else f"{path}-{version}"

    def is_kept(self, version: int, last: int) -> bool:
        """Whether the version's checkpoint is still there when ``last`` has been saved."""
        if self.is_one_prefix:
            return version == last
        return last - self.max_to_keep < version <= last or (self.has_manager and version == 1)

    def job(self, directory: Path | str, *, storage: Storage | None = None) -> Job:
        return Job(self, directory, storage)

    def run(self, directory: Path | str, acknowledged: Callable[[int], object] = lambda version: None) -> None:
        """All of it; ``acknowledged(version)`` is called as soon as a save has returned."""
        with self.job(directory) as job:
            for version in self.versions:
                job.save(version)
                acknowledged(version)


class Job:
    """One Saver with a state, or a CheckpointManager.  A context manager, which closes it."""

    def __init__(self, scenario: Scenario, directory: Path | str, storage: Storage | None) -> None:
        self._scenario = scenario
        self._smaller = mock.patch.object(recycling, "RECYCLED_MIN_NBYTES", 1)
        if scenario.recycles:
            self._smaller.start()
        self._path = os.path.join(directory, scenario.folder, "k")
        self.state = state_of(0)
        with gpusaver.variables():
            variables: State = dict(self.state)
            if scenario.is_sharded:
                for name, device in (("big", "cpu:1"), ("strided", "cpu:2")):
                    variables[name] = gpusaver.Variable(variables[name], name, device=device)
            if scenario.is_incremental:
                variables["frozen"] = gpusaver.Variable(FROZEN.copy(), "frozen", trainable=False)
        self._variables = variables
        self.saver = gpusaver.Saver(
            variables,
            sharded=scenario.is_sharded,
            max_to_keep=scenario.max_to_keep,
            direct_io=scenario.direct_io,
            strict=scenario.strict,
            incremental=scenario.is_incremental,
            recycle=scenario.recycles,
            storage=storage,
        )
        self._manager = None
        if scenario.has_manager:
            self._manager = gpusaver.CheckpointManager(
                self.saver, os.path.dirname(self._path), scenario.max_to_keep, checkpoint_name="k", best_to_keep=1
            )

    def fill(self, version: int) -> None:
        fill(self.state, version)
        self._variables.update({name: self.state[name] for name in ("step", "text")})

    def save(self, version: int) -> str:
        self.fill(version)
        if self._manager is not None:
            return self._manager.save(version, metric=float(version))
        step = None if self._scenario.is_one_prefix else version
        return self.saver.save(self._path, step, write_state=self._scenario.writes_state)

    def restore(self, prefix: str, **options: Any) -> int:
        self.saver.restore(prefix, **options)
        self.state.update({name: self._variables[name] for name in ("step", "text")})
        return version_of(self.state)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            (self._manager or self.saver).close()
        finally:
            if self._scenario.recycles:
                self._smaller.stop()


SCENARIOS = [
    Scenario("new", (1, 2)),
    Scenario("overwrite", (1, 2, 3), is_one_prefix=True),
    Scenario("overwrite_without_state", (1, 2), is_one_prefix=True, writes_state=False),
    Scenario("retention", (1, 2, 3), max_to_keep=1),
    Scenario("retention_of_two", (1, 2, 3), max_to_keep=2),
    Scenario("sharded_overwrite", (1, 2), is_one_prefix=True, is_sharded=True),
    Scenario("direct_io", (1, 2), direct_io=True, max_to_keep=1),
    Scenario("strict_overwrite", (1, 2), strict=True, is_one_prefix=True),
    Scenario("manager", (1, 2, 3), max_to_keep=1, has_manager=True),
    Scenario("new_folder", (1, 2), folder="run"),
    Scenario("incremental", (1, 2, 3), max_to_keep=1, is_incremental=True),
    Scenario("incremental_overwrite", (1, 2), is_one_prefix=True, is_incremental=True),
    Scenario("recycle", (1, 2, 3), max_to_keep=1, recycles=True),
    Scenario("recycle_overwrite", (1, 2, 3), is_one_prefix=True, recycles=True),
    Scenario("recycle_incremental", (1, 2, 3, 4), max_to_keep=1, is_incremental=True, recycles=True),
]
