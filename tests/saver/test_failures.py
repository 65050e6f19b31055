"""The n-th operation of the storage fails, for every n: what was there before is there afterwards."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing_storage import KINDS, FailingStorage
from size import sized

import gpusaver
from gpusaver.errors import Error
from gpusaver.pipeline import restore

State = dict[str, Any]
CountCases = Callable[[int], None]

MODES = sized([("EIO", False), ("ENOSPC", True)], list(itertools.product(KINDS, (False, True))))


def state_of(number: int) -> State:
    """Large and small arrays, one that is not plain memory, and values that are replaced."""
    random = np.random.default_rng(number)
    return {
        "big": random.integers(0, 255, 300_000, np.uint8),
        "small": random.random(5, np.float32),
        "strided": random.random((20, 30))[:, ::2],
        "step": number,
        "text": f"number {number}",
    }


def fill(state: State, number: int) -> None:
    for name, value in state_of(number).items():
        if isinstance(value, np.ndarray):
            state[name][...] = value
        else:
            state[name] = value


def assert_holds(prefix: str | Path, number: int) -> None:
    """The checkpoint restores bit by bit, from disk and with an untouched storage."""
    state = state_of(999)
    with gpusaver.Saver(state) as saver:
        saver.restore(prefix)
    np.testing.assert_equal(state, state_of(number))


def files(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def temporary(directory: Path) -> list[str]:
    return [name for name in files(directory) if name.endswith("gpusaver-tmp")]


def is_committed(storage: FailingStorage, prefix: str) -> bool:
    """Whether the index was renamed: all operations before the failing one succeeded."""
    return ("replace", f"{prefix}.index") in storage.log[: storage.fail_at]


def every_n(run: Callable[[int], bool]) -> int:
    """Runs with n = 0, 1, ... as long as that operation is reached; returns how many there are."""
    n = 0
    while run(n):
        n += 1
        assert n < 200
    return n


def check_error(error: BaseException, directory: Path) -> None:
    assert isinstance(error, Error)
    assert re.search(rf"cannot \w+ {re.escape(os.fspath(directory))}.*injected", str(error))


@pytest.fixture(params=MODES, ids=lambda mode: f"{mode[0]}{'-from-then-on' if mode[1] else ''}")
def mode(request: pytest.FixtureRequest) -> tuple[str, bool]:
    return request.param


@pytest.mark.parametrize("direct", [False, True])
def test_a_new_checkpoint(tmp_path: Path, mode: tuple[str, bool], direct: bool, count_cases: CountCases) -> None:
    kind, for_ever = mode

    def run(n: int) -> bool:
        directory = tmp_path / str(n)
        directory.mkdir()
        storage = FailingStorage()
        state = state_of(1)
        with gpusaver.Saver(state, storage=storage, direct_io=direct) as saver:
            first = saver.save(directory / "k", 1)
            fill(state, 2)
            before = files(directory)
            storage.arm(n, kind, for_ever=for_ever)
            try:
                second = saver.save(directory / "k", 2)
            except Error as error:
                check_error(error, directory)
                has_failed = True
            else:
                has_failed = False
                assert second == f"{directory}/k-2"
            is_reached = n < len(storage.log)
            committed = is_committed(storage, f"{directory}/k-2") or not has_failed
            assert not temporary(directory)
            assert_holds(first, 1)
            assert gpusaver.checkpoint_exists(f"{directory}/k-2") == committed
            if committed:
                assert_holds(f"{directory}/k-2", 2)
            elif not for_ever:
                assert files(directory) == before
            latest = gpusaver.latest_checkpoint(directory)
            assert latest in ((first, f"{directory}/k-2") if committed else (first,))
            assert latest is not None
            storage.arm(None)
            fill(state, 3)
            assert_holds(saver.save(directory / "k", 3), 3)
            assert gpusaver.latest_checkpoint(directory) == f"{directory}/k-3"
        return is_reached

    count = every_n(run)
    assert count > 15
    count_cases(count)


@pytest.mark.parametrize("lost_answer", [False, True])
def test_the_same_prefix_again(
    tmp_path: Path, mode: tuple[str, bool], lost_answer: bool, count_cases: CountCases
) -> None:
    """Readers see the old checkpoint or the new one, never a mixture, whatever fails.

    With ``lost_answer`` the operation that fails has been done: a network file system may end so.
    """
    kind, for_ever = mode

    def run(n: int) -> bool:
        directory = tmp_path / str(n)
        directory.mkdir()
        storage = FailingStorage()
        state = state_of(1)
        prefix = f"{directory}/k"
        with gpusaver.Saver(state, storage=storage) as saver:
            for round_ in range(2):  # one shard replaced by two, two by one
                fill(state, 1)
                storage.arm(None)
                saver.save(prefix)
                fill(state, 2)
                storage.arm(n, kind, for_ever=for_ever, lost_answer=lost_answer)
                has_failed = False
                try:
                    saver.save(prefix)
                except Error as error:
                    check_error(error, directory)
                    has_failed = True
                is_reached = n < len(storage.log)
                is_new = is_committed(storage, prefix) or not has_failed
                if lost_answer and storage.log[n : n + 1] == [("replace", f"{prefix}.index")]:
                    is_new = True
                assert_holds(prefix, 2 if is_new else 1)
                assert gpusaver.latest_checkpoint(directory) == prefix
                if not (lost_answer and has_failed):
                    assert not temporary(directory)
                if round_ == 1:
                    storage.arm(None)
                    fill(state, 3)
                    saver.save(prefix)
                    assert_holds(prefix, 3)
        data = [name for name in files(directory) if ".data-" in name and os.path.getsize(directory / name)]
        assert len(data) == 1  # garbage of failed saves goes with the next that succeeds
        return is_reached

    count = every_n(run)
    assert count > 15
    count_cases(2 * count)


def test_a_save_that_gives_up_an_old_checkpoint(
    tmp_path: Path, mode: tuple[str, bool], count_cases: CountCases
) -> None:
    kind, for_ever = mode

    def run(n: int) -> bool:
        directory = tmp_path / str(n)
        directory.mkdir()
        storage = FailingStorage()
        state = state_of(1)
        with gpusaver.Saver(state, storage=storage, max_to_keep=2) as saver:
            for number in (1, 2):
                fill(state, number)
                saver.save(directory / "k", number)
            fill(state, 3)
            storage.arm(n, kind, for_ever=for_ever)
            has_failed = False
            try:
                saver.save(directory / "k", 3)
            except Error as error:
                check_error(error, directory)
                has_failed = True
            is_reached = n < len(storage.log)
            assert not temporary(directory)
            found = gpusaver.get_checkpoint_state(directory)
            assert found is not None
            listed = list(found.all_model_checkpoint_paths)
            assert listed[-1] == found.model_checkpoint_path
            for path in listed:  # the state file names nothing that is not there
                assert_holds(path, int(path[-1]))
            assert_holds(directory / "k-2", 2)
            assert has_failed == (listed[-1] == f"{directory}/k-2") or is_committed(storage, f"{directory}/k-3")
            storage.arm(None)
            fill(state, 4)
            saver.save(directory / "k", 4)
            assert len(saver.last_checkpoints) == 2
            for path in saver.last_checkpoints:
                assert_holds(path, int(path[-1]))
        return is_reached

    count = every_n(run)
    assert count > 20
    count_cases(count)


def overwritten(state: State, before: State) -> set[str]:
    return {name for name in state if not np.array_equal(state[name], before[name])}


@pytest.mark.parametrize("verify", ["during", "before"])
def test_a_restore(
    tmp_path: Path, mode: tuple[str, bool], verify: Any, monkeypatch: pytest.MonkeyPatch, count_cases: CountCases
) -> None:
    """Whoever asks is told which variables are no longer what they were."""
    kind, for_ever = mode
    monkeypatch.setattr(restore, "CHUNK_NBYTES", 128 * 1024)  # several reads
    prefix = gpusaver.save(tmp_path / "k", state_of(1))
    overwritten_some = []

    def run(n: int) -> bool:
        storage = FailingStorage()
        state, before = state_of(2), state_of(2)
        with gpusaver.Saver(state, storage=storage) as saver:
            storage.arm(n, kind, for_ever=for_ever)
            try:
                saver.restore(prefix, verify=verify)
            except Error as error:
                check_error(error, tmp_path)
                changed = overwritten(state, before)
                told = " ".join(getattr(error, "__notes__", []))
                assert all(name in told for name in changed)
                overwritten_some.append(bool(changed))
            else:
                np.testing.assert_equal(state, state_of(1))
            is_reached = n < len(storage.log)
            storage.arm(None)
            saver.restore(prefix)
        np.testing.assert_equal(state, state_of(1))
        return is_reached

    count = every_n(run)
    assert count >= 4
    count_cases(count)
    assert any(overwritten_some)


def test_reading_without_a_saver(tmp_path: Path, mode: tuple[str, bool]) -> None:
    kind, for_ever = mode
    prefix = gpusaver.save(tmp_path / "k", state_of(1))

    def run(n: int) -> bool:
        storage = FailingStorage()
        storage.arm(n, kind, for_ever=for_ever)
        try:
            reader = gpusaver.CheckpointReader(prefix, storage=storage)
            np.testing.assert_array_equal(reader.get_tensor("big"), state_of(1)["big"])
        except Error as error:
            check_error(error, tmp_path)
        return n < len(storage.log)

    assert every_n(run) >= 4
