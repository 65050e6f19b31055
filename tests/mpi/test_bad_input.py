"""What does not fit together: one error on every rank, naming tensor and ranks, before a byte is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_ranks import SimulatedTransport, run

import gpusaver
from gpusaver import PartitionedVariable
from gpusaver.errors import FailedPreconditionError, InvalidArgumentError

State = dict[str, Any]


def part(index: tuple[slice, ...], shape: tuple[int, ...] = (12, 2), dtype: Any = np.float32) -> PartitionedVariable:
    array = np.zeros([len(range(*piece.indices(size))) for piece, size in zip(index, shape, strict=True)], dtype)
    return PartitionedVariable(shape, index, array)


def quarters(rank: int) -> PartitionedVariable:
    return part(np.s_[3 * rank : 3 * rank + 3, :])


CASES: dict[str, tuple[Callable[[int], State], str]] = {
    "overlap": (
        lambda rank: {"emb": part(np.s_[2:6, :]) if rank == 1 else quarters(rank)},
        r"Overlapping slices of tensor emb: .* \(held by ranks 0-1\)",
    ),
    "hole": (
        lambda rank: {} if rank == 2 else {"emb": quarters(rank)},
        r"partitioned tensor emb .*the 3 stored slices hold 18 of its 24 elements \(held by ranks 0-1, 3\)",
    ),
    "dtype of a part": (
        lambda rank: {"emb": part(np.s_[9:12, :], dtype=np.float64) if rank == 3 else quarters(rank)},
        r"tensor emb is partitioned float32\[12, 2\] on ranks? .*0.*, but partitioned float64\[12, 2\] on rank 3",
    ),
    "full shape": (
        lambda rank: {"emb": part(np.s_[9:12, :], (13, 2)) if rank == 3 else quarters(rank)},
        r"tensor emb is partitioned float32\[12, 2\] on ranks? .*0.*, but partitioned float32\[13, 2\] on rank 3",
    ),
    "dtype of a replica": (
        lambda rank: {"w": np.zeros(3, np.float64 if rank == 2 else np.float32)},
        r"tensor w is whole float32\[3\] on ranks 0-1, 3, but whole float64\[3\] on rank 2",
    ),
    "shape of a replica": (
        lambda rank: {"w": np.zeros(3 + rank // 2)},
        r"tensor w is whole float64\[3\] on ranks 0-1, but whole float64\[4\] on ranks 2-3",
    ),
    "whole and in parts": (
        lambda rank: {"emb": np.zeros((12, 2), np.float32) if rank == 3 else quarters(rank)},
        r"tensor emb is partitioned float32\[12, 2\] on rank 0, but whole float32\[12, 2\] on rank 3",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("background", [False, True])
def test_variables_that_do_not_fit(tmp_path: Path, name: str, background: bool) -> None:
    state_of, message = CASES[name]

    def work(transport: SimulatedTransport) -> str:
        with gpusaver.Saver(state_of(transport.rank), comm=transport) as saver:
            with pytest.raises(InvalidArgumentError, match=message) as caught:
                (saver.save_async if background else saver.save)(tmp_path / "run" / "k", 1)
            return str(caught.value)

    outcomes = run(4, work)
    assert isinstance(outcomes[0], str), outcomes
    assert outcomes == [outcomes[0]] * 4
    assert os.listdir(tmp_path) == []


def test_what_one_rank_alone_can_see(tmp_path: Path) -> None:
    """It is told when the Saver is made, on all ranks."""

    def work(transport: SimulatedTransport) -> None:
        state: State = {"w": np.zeros(3)}
        if transport.rank == 1:
            state["w"] = [part(np.s_[0:4, :]), part(np.s_[3:12, :])]
        with pytest.raises(InvalidArgumentError, match="rank 1: Overlapping slices of tensor w"):
            gpusaver.Saver(state, comm=transport)
        same = [gpusaver.Variable(np.zeros(2), "a")] * (2 if transport.rank == 2 else 1)
        with pytest.raises(ValueError, match="rank 2: At least two variables have the same name: a"):
            gpusaver.Saver(same, comm=transport)

    def in_own_collection(transport: SimulatedTransport) -> None:
        with gpusaver.variables():
            work(transport)

    assert run(3, in_own_collection) == [None] * 3


def test_calls_that_do_not_fit(tmp_path: Path) -> None:
    def work(transport: SimulatedTransport) -> None:
        is_last = transport.rank == 2
        saver = gpusaver.Saver({"w": np.zeros(3)}, comm=transport)
        with pytest.raises(InvalidArgumentError, match=r"disagree on the prefix: ranks 0-1: .*/k-1; rank 2: .*/k-2"):
            saver.save(tmp_path / "k", 2 if is_last else 1)
        with pytest.raises(
            InvalidArgumentError, match=r"disagree on the options of the save: ranks 0-1: meta graph meta"
        ):
            saver.save(tmp_path / "k", write_meta_graph=not is_last)
        with pytest.raises(InvalidArgumentError, match=r"disagree on the options of the save: .*state file"):
            saver.save(tmp_path / "k", write_state=not is_last)
        with pytest.raises(ValueError, match=r"rank 2: save_path .* names a directory"):
            saver.save(f"{tmp_path}/" if is_last else tmp_path / "k")
        with pytest.raises(ValueError, match=r"^Parent directory of .*no/such/k"):
            saver.save(tmp_path / "no" / "such" / "k")
        saver.save(tmp_path / "k", 1)
        with pytest.raises(
            InvalidArgumentError, match=r"disagree on restore: ranks 0-1: .*k-1.*; rank 2: .*partial=True"
        ):
            saver.restore(tmp_path / "k-1", partial=is_last)
        with pytest.raises(InvalidArgumentError, match=r"ranks 0-2: The passed save_path is not a valid checkpoint"):
            saver.restore(tmp_path / "k-9")
        saver.close()
        with pytest.raises(FailedPreconditionError, match="ranks 0-2: this Saver is closed"):
            saver.save(tmp_path / "k", 2)

    outcomes = run(3, work)
    assert outcomes == [None] * 3, outcomes
