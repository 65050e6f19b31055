"""SIGKILL of one real rank at each step of a save: the others fail within the deadline, and nothing is half committed.

Open MPI's ``--enable-recovery`` leaves the other ranks alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mpiexec import mpiexec, needs_mpiexec
from rank_states import GROUP, tensors
from size import sized

import gpusaver

SCRIPT = Path(__file__).with_name("rank_script.py")

#: So many groups of ranks die in one job.
_GROUPS = 10
#: "RANK:NUMBER"; no rank has an operation of this number.
_NOBODY = "0:-1"


def run_points(directory: Path, points: list[str]) -> None:
    """The outcomes are in ``directory / point / RANK.json``."""
    for point in points:
        (directory / point).mkdir()
    mpiexec(GROUP * len(points), SCRIPT, "kill", directory, *points, options=("--enable-recovery",))


def outcomes_in(directory: Path) -> dict[int, dict[str, Any]]:
    files = {rank: directory / f"{rank}.json" for rank in range(GROUP)}
    return {rank: json.loads(file.read_text()) for rank, file in files.items() if file.exists()}


@needs_mpiexec
def test_a_rank_is_killed_before_each_of_its_operations(memory_path: Path, count_cases: Callable[[int], None]) -> None:
    run_points(memory_path, [_NOBODY])
    whole = outcomes_in(memory_path / _NOBODY)
    assert [whole[rank]["saved"] for rank in range(GROUP)] == [f"{memory_path}/{_NOBODY}/k-2"] * GROUP
    operations = {rank: whole[rank]["operations"] for rank in range(2)}
    assert operations[1].count("receive") >= 3
    assert operations[0].count("replace") >= GROUP + 2
    every = [f"{rank}:{number}" for rank in (1, 0) for number in range(len(operations[rank]))]
    chosen = sized([*every[1 : len(operations[1]) : 3], *every[len(operations[1]) + 3 :: 8]], every)
    for first in range(0, len(chosen), _GROUPS):
        points = chosen[first : first + _GROUPS]
        run_points(memory_path, points)
        for point in points:
            rank, number = map(int, point.split(":"))
            check(memory_path / point, rank, operations[rank][:number])
    count_cases(len(chosen))


def check(directory: Path, killed: int, before: list[str]) -> None:
    """``before``: what the rank had done."""
    outcomes = outcomes_in(directory)
    assert sorted(outcomes) == [rank for rank in range(GROUP) if rank != killed], "not every other rank has ended"
    np.testing.assert_equal(gpusaver.load(directory / "k-1"), tensors(1))
    is_committed = (directory / "k-2.index").exists()
    if is_committed:
        np.testing.assert_equal(gpusaver.load(directory / "k-2"), tensors(2))
    for outcome in outcomes.values():
        if "saved" in outcome:
            assert is_committed
            continue
        kind, text, notes = outcome["error"]
        assert (kind, f"rank {killed} of {GROUP} did not" in text) == ("DeadlineExceededError", True), outcome
        assert not is_committed or "committed is not known here" in notes[-1]
    state = gpusaver.get_checkpoint_state(directory)
    assert state is not None
    assert all(gpusaver.checkpoint_exists(path) for path in state.all_model_checkpoint_paths)
    # One process goes on in their place, and clears up.
    with gpusaver.Saver({"step": 3}) as saver:
        saver.save(directory / "k", 3)
    assert not [path.name for path in directory.iterdir() if "gpusaver-" in path.name], before
