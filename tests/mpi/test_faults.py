"""Something fails on one rank at a time, for every operation there is: one verdict, and nothing half committed.

On simulated messages; ranks that are really killed are in test_kills.py.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing_storage import FailingStorage
from simulated_ranks import Killed, SimulatedTransport, run
from size import sized

import gpusaver
from gpusaver import PartitionedVariable
from gpusaver.errors import Error, UnknownError

CountCases = Callable[[int], None]

SIZE = 3
FULL = np.arange(12, dtype=np.float32).reshape(6, 2)


def state_of(rank: int, version: int) -> dict[str, Any]:
    index = np.s_[2 * rank : 2 * rank + 2, :]
    return {
        "emb": PartitionedVariable(FULL.shape, index, FULL[index] + version),
        "a": np.full(3, version),
        "b": np.full(5, version),
        "step": version,
        f"own{rank}": np.full(2, version),
    }


def check_holds(prefix: str, version: int) -> None:
    found = gpusaver.load(prefix)
    np.testing.assert_array_equal(found["emb"], FULL + version)
    assert all((found[name] == version).all() for name in ("a", "b", "step", "own0", "own1", "own2"))


def is_committed(prefix: str, version: int) -> bool:
    """If it is, then whole."""
    if not os.path.exists(f"{prefix}.index"):
        return False
    check_holds(prefix, version)
    return True


def temporary(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if "gpusaver-" in name]


class Fault:
    """Operation ``number`` of one rank's messages, counted while ``is_armed``."""

    def __init__(self, rank: int, number: int, error: type[BaseException]) -> None:
        self.rank = rank
        self.is_armed = False
        self.is_reached = False
        self._number = number
        self._error = error
        self._count = itertools.count()

    def __call__(self, rank: int, operation: str) -> None:
        if self.is_armed and rank == self.rank and next(self._count) == self._number:
            self.is_reached = True
            raise self._error("injected")


@pytest.mark.parametrize("error", [UnknownError, Killed])
@pytest.mark.parametrize("rank", range(SIZE))
@pytest.mark.parametrize("background", sized([False], [False, True]))
def test_every_message_of_a_save(
    memory_path: Path, rank: int, error: type[BaseException], background: bool, count_cases: CountCases
) -> None:
    def attempt(number: int) -> bool:
        directory = memory_path / str(number)
        directory.mkdir()
        fault = Fault(rank, number, error)

        def work(transport: SimulatedTransport) -> str:
            state = state_of(transport.rank, 1)
            saver = gpusaver.Saver(state, comm=transport)
            saver.save(directory / "k", 1)
            state.update(state_of(transport.rank, 2))
            if transport.rank == rank:
                fault.is_armed = True
            if background:
                pending = saver.save_async(directory / "k", 2)
                assert pending is not None
                return pending.result()
            return saver.save(directory / "k", 2)

        outcomes = run(SIZE, work, fault)
        check_holds(f"{directory}/k-1", 1)
        committed = is_committed(f"{directory}/k-2", 2)
        if not fault.is_reached:
            assert committed
            assert outcomes == [f"{directory}/k-2"] * SIZE
            return False
        others = [outcome for number, outcome in enumerate(outcomes) if number != rank]
        if not committed:
            assert all(isinstance(outcome, gpusaver.DeadlineExceededError) for outcome in others), outcomes
            assert isinstance(outcomes[rank], error | Error)
            assert gpusaver.latest_checkpoint(directory) == f"{directory}/k-1"
        else:  # only the verdict did not reach everybody
            for outcome in others:
                assert outcome == f"{directory}/k-2" or "committed is not known here" in outcome.__notes__[-1]
        assert not temporary(directory)
        check_next(directory)
        return True

    number = 0
    while attempt(number):
        number += 1
        assert number < 100
    assert number >= 6
    count_cases(number)


def check_next(directory: Path) -> None:
    """The ranks that come after them go on."""

    def work(transport: SimulatedTransport) -> str:
        with gpusaver.Saver(state_of(transport.rank, 3), comm=transport) as saver:
            return saver.save(directory / "k", 2)

    assert run(SIZE, work) == [f"{directory}/k-2"] * SIZE
    check_holds(f"{directory}/k-2", 3)
    assert gpusaver.latest_checkpoint(directory) == f"{directory}/k-2"
    assert not temporary(directory)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("same_prefix", [False, True])
def test_every_operation_on_files(
    memory_path: Path, rank: int, for_ever: bool, same_prefix: bool, count_cases: CountCases
) -> None:
    """The others hear of it, all raise the same, and the next save of the same Savers works."""

    def attempt(number: int) -> bool:
        directory = memory_path / str(number)
        directory.mkdir()
        storages = [FailingStorage() for _ in range(SIZE)]
        last = f"{directory}/k" if same_prefix else f"{directory}/k-2"

        def work(transport: SimulatedTransport) -> Any:
            state, storage = state_of(transport.rank, 1), storages[transport.rank]
            with gpusaver.Saver(state, comm=transport, storage=storage) as saver:

                def save(version: int) -> str:
                    state.update(state_of(transport.rank, version))
                    return saver.save(directory / "k", None if same_prefix else version)

                save(1)
                if transport.rank == rank:
                    storage.arm(number, for_ever=for_ever)
                outcome: Any
                try:
                    outcome = save(2)
                except Error as error:
                    outcome = error
                found = is_committed(last, 2 if isinstance(outcome, str) else version_of(last))
                if transport.rank == rank:
                    is_reached = len(storage.log) > number
                    storage.arm(None)
                else:
                    is_reached = False
                save(3)
                return outcome, found, is_reached

        results = run(SIZE, work)
        assert all(isinstance(result, tuple) for result in results), results
        outcomes = [outcome for outcome, _, _ in results]
        if isinstance(outcomes[0], str):
            assert outcomes == [last] * SIZE
        else:
            assert len({(type(outcome), str(outcome)) for outcome in outcomes}) == 1, outcomes
            assert "injected" in str(outcomes[0])
        if not same_prefix:
            check_holds(f"{directory}/k-1", 1)
        check_holds(f"{directory}/k" if same_prefix else f"{directory}/k-3", 3)
        assert not temporary(directory)
        return bool(results[rank][2])

    number = 0
    while attempt(number):
        number += 1
        assert number < 100
    assert number >= (15 if rank == 0 else 3)
    count_cases(number)


def version_of(prefix: str) -> int:
    return int(gpusaver.load(prefix)["step"]) if os.path.exists(f"{prefix}.index") else 0


@pytest.mark.parametrize("rank", range(SIZE))
@pytest.mark.parametrize("verify", ["during", "before"])
def test_every_operation_of_a_restore(memory_path: Path, rank: int, verify: Any, count_cases: CountCases) -> None:
    def save(transport: SimulatedTransport) -> str:
        with gpusaver.Saver(state_of(transport.rank, 1), comm=transport) as saver:
            return saver.save(memory_path / "k")

    assert run(SIZE, save) == [f"{memory_path}/k"] * SIZE

    def attempt(number: int) -> bool:
        def work(transport: SimulatedTransport) -> tuple[Any, bool]:
            storage, state = FailingStorage(), state_of(transport.rank, 0)
            with gpusaver.Saver(state, comm=transport, storage=storage) as saver:
                if transport.rank == rank:
                    storage.arm(number)
                outcome: Any = None
                try:
                    saver.restore(memory_path / "k", verify=verify)
                except Error as error:
                    outcome = error
                is_reached = transport.rank == rank and len(storage.log) > number
                storage.arm(None)
                saver.restore(memory_path / "k")
                assert (state["a"] == 1).all()
                return outcome, is_reached

        results = run(SIZE, work)
        assert all(isinstance(result, tuple) for result in results), results
        if results[rank][1]:
            assert {f"{type(error).__name__}: {error}" for error, _ in results} == {str_of(results[rank][0])}
            assert f"rank {rank}: " in str(results[0][0])
        return bool(results[rank][1])

    number = 0
    while attempt(number):
        number += 1
    assert number >= 5
    count_cases(number)


def str_of(error: Error) -> str:
    return f"{type(error).__name__}: {error}"
