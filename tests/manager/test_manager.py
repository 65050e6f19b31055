"""CheckpointManager in one process, with a clock that stands still until it is told to go on."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import gpusaver
from gpusaver import CheckpointManager
from gpusaver.bundle.layout import PHASE
from gpusaver.errors import (
    DataLossError,
    Error,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    UnknownError,
    from_os_error,
)
from gpusaver.manager import progress
from gpusaver.storage.local import LocalStorage

SECONDS = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Disk(LocalStorage):
    """Can be full, or broken, and can be held up."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Callable[[str], Error] | None = None
        self.gate = threading.Event()
        self.gate.set()

    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
        assert self.gate.wait(SECONDS)
        if self.error is not None and ".data-" in path:
            raise self.error(path)
        return super().create(path, nbytes, direct=direct, target=target)

    def lock(self, path: str, *, wait_seconds: float = 0.0) -> Any:
        return super().lock(path, wait_seconds=0.2)


def full(path: str) -> Error:
    return from_os_error(OSError(errno.ENOSPC, "full"), "create", path)


def broken(path: str) -> Error:
    return UnknownError(f"cannot create {path}: injected")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def disk() -> Disk:
    return Disk()


Make = Callable[..., CheckpointManager]


@pytest.fixture
def make(tmp_path: Path, clock: Clock, disk: Disk) -> Iterator[Make]:
    made = []

    def make(state: Any = None, **options: Any) -> CheckpointManager:
        state = {"w": np.zeros(3), "step": 0} if state is None else state
        manager = CheckpointManager(state, tmp_path / "run", storage=disk, clock=clock, **options)
        made.append(manager)
        return manager

    yield make
    disk.error = None
    disk.gate.set()
    for manager in made:
        manager.close()


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in directory.glob("ckpt-*.index"))


def steps_of(prefixes: list[str]) -> list[int]:
    return [int(prefix.rsplit("-", 1)[1]) for prefix in prefixes]


def run(manager: CheckpointManager, steps: range, clock: Clock | None = None, seconds: float = 0) -> list[int]:
    """Steps of a loop; those at which a save began."""
    saved = []
    for step in steps:
        if clock is not None:
            clock.now += seconds
        pending = manager.step(step)
        if pending is not None:
            saved.append(step)
            pending.result(SECONDS)
    return saved


# When

WHEN: dict[str, tuple[dict[str, Any], float, list[int]]] = {
    "every 4 steps": ({"save_every_n_steps": 4}, 1.0, [4, 8, 12]),
    "every step": ({"save_every_n_steps": 1}, 1.0, list(range(1, 13))),
    "every 25 s": ({"save_every_secs": 25}, 10.0, [3, 6, 9, 12]),
    "every 0 s": ({"save_every_secs": 0}, 0.0, list(range(1, 13))),
    "whichever comes first": ({"save_every_n_steps": 5, "save_every_secs": 30}, 10.0, [3, 5, 8, 10]),
    "never": ({}, 1e6, []),
}


@pytest.mark.parametrize(("options", "seconds", "expected"), WHEN.values(), ids=WHEN)
def test_when_it_saves(make: Make, clock: Clock, options: Any, seconds: float, expected: list[int]) -> None:
    assert run(make(max_to_keep=2, **options), range(1, 13), clock, seconds) == expected


def test_steps_of_any_size_pass_a_multiple(make: Make) -> None:
    assert run(make(save_every_n_steps=100), range(0, 1000, 64)) == [128, 256, 320, 448, 512, 640, 704, 832, 960][:9]


def test_resumed_at_any_step_the_multiples_stay(make: Make, tmp_path: Path) -> None:
    with make(save_every_n_steps=10) as manager:
        manager.save(137)
    manager = make(save_every_n_steps=10)
    assert manager.restore_or_initialize() == f"{tmp_path}/run/ckpt-137"
    assert run(manager, range(138, 160)) == [140, 150]


def test_a_clock_that_is_set_back(make: Make, clock: Clock) -> None:
    manager = make(save_every_secs=30)
    clock.now -= 10_000
    assert run(manager, range(1, 9), clock, 10) == [4, 7]


def test_a_loop_that_begins_again(make: Make) -> None:
    manager = make(save_every_n_steps=10)
    assert run(manager, range(1, 25)) == [10, 20]
    assert run(manager, range(1, 25)) == [10, 20]


def test_a_saved_step_is_not_saved_again_by_time(make: Make, clock: Clock) -> None:
    manager = make(save_every_secs=5)
    manager.save(3)
    clock.now += 10
    assert manager.step(3) is None
    assert manager.step(4) is not None


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
def test_while_a_save_is_under_way(make: Make, disk: Disk, tmp_path: Path, when_busy: Any) -> None:
    manager = make(save_every_n_steps=2, when_busy=when_busy)
    manager.save(1)
    disk.gate.clear()
    first = manager.step(2)
    assert first is not None
    if when_busy == "skip":
        assert [manager.step(step) for step in (3, 4, 5)] == [None] * 3
        disk.gate.set()
        first.result(SECONDS)
        assert manager.step(7) is not None  # as soon as it can
        expected = [1, 2, 7]
    else:
        timer = threading.Timer(0.05, disk.gate.set)
        timer.start()
        assert manager.step(4) is not None
        timer.join()
        expected = [1, 2, 4]
    manager.close()
    assert steps_in(tmp_path / "run") == expected


# What it saves and says


def test_the_values_are_those_of_the_step(make: Make, tmp_path: Path) -> None:
    state = {"w": np.zeros(1000), "step": 0}
    with make(state, save_every_n_steps=1, max_to_keep=None) as manager:
        for step in range(1, 6):
            state["w"] += 1
            state["step"] = step
            manager.step(step)
    for step in range(1, 6):
        found = gpusaver.load(tmp_path / "run" / f"ckpt-{step}")
        assert (found["w"] == step).all()
        assert found["step"] == step


def test_properties_and_files(make: Make, tmp_path: Path, clock: Clock) -> None:
    directory = tmp_path / "run"
    manager = make(max_to_keep=2, best_to_keep=1)
    assert manager.directory == str(directory)
    assert manager.latest_checkpoint is None
    assert manager.checkpoints == []
    for step, metric in ((1, 0.5), (2, 0.1), (3, np.float32(0.3)), (4, None), (5, 0.9)):
        clock.now += 10
        manager.save(step, metric=metric)
    assert manager.latest_checkpoint == f"{directory}/ckpt-5"
    assert manager.checkpoints == [f"{directory}/ckpt-4", f"{directory}/ckpt-5"]
    assert manager.best_checkpoints == [f"{directory}/ckpt-2"]
    assert manager.pinned_checkpoints == []
    manager.close()
    assert sorted(os.listdir(directory)) == sorted(
        ["checkpoint", "checkpoint.manager.json"]
        + [f"ckpt-{step}.{kind}" for step in (2, 4, 5) for kind in ("index", "meta", "data-00000-of-00001")]
    )
    state = gpusaver.get_checkpoint_state(directory)
    assert state is not None
    assert list(state.all_model_checkpoint_paths) == manager.checkpoints
    assert list(state.all_model_checkpoint_timestamps) == [1_000_040.0, 1_000_050.0]
    assert state.last_preserved_timestamp == 999_999.0
    assert 'model_checkpoint_path: "ckpt-5"' in (directory / "checkpoint").read_text()


def test_save_counts_on(make: Make) -> None:
    manager = make()
    assert steps_of([manager.save(), manager.save(), manager.save(7), manager.save()]) == [1, 2, 7, 8]


def test_the_directory_is_made_but_not_a_tree(tmp_path: Path) -> None:
    with (
        CheckpointManager({"w": np.zeros(2)}, tmp_path / "a" / "b") as manager,
        pytest.raises(ValueError, match="Parent"),
    ):
        manager.save(1)
    with CheckpointManager({"w": np.zeros(2)}, tmp_path / "a") as manager:
        manager.save(1)


def test_a_saver_may_be_given(tmp_path: Path) -> None:
    saver = gpusaver.Saver({"w": np.arange(3)}, max_to_keep=1, strict=True)
    with CheckpointManager(saver, tmp_path, max_to_keep=3, checkpoint_name="model") as manager:
        for step in range(5):
            manager.save(step)
    assert sorted(path.stem for path in tmp_path.glob("*.index")) == ["model-2", "model-3", "model-4"]
    with pytest.raises(FailedPreconditionError, match="closed"):
        saver.save(tmp_path / "x")


def test_progress_and_log(make: Make, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    seen: list[gpusaver.SaveProgress] = []
    caplog.set_level(logging.INFO)
    with make({"w": np.zeros(6_000_000)}, on_progress=seen.append) as manager:
        manager.save(1)
    written = [report.written_nbytes for report in seen]
    assert written == sorted(written)
    assert written[-1] == PHASE + 48_000_000
    assert len(written) > 3
    assert {(report.prefix, report.total_nbytes) for report in seen} == {(f"{tmp_path}/run/ckpt-1", PHASE + 48_000_000)}
    assert [report.is_durable for report in seen] == [False] * (len(seen) - 1) + [True]
    assert f"saved {tmp_path}/run/ckpt-1: 48000000 bytes" in caplog.text


def test_the_last_report_comes_before_the_save_returns(make: Make) -> None:
    told: list[str] = []

    def slow(report: gpusaver.SaveProgress) -> None:
        if report.is_durable:
            time.sleep(0.05)
            told.append(os.path.basename(report.prefix))

    manager = make(on_progress=slow, save_every_n_steps=1)
    manager.save(1)
    assert told == ["ckpt-1"]
    assert manager.step(2) is not None
    manager.save(3)
    assert told == ["ckpt-1", "ckpt-2", "ckpt-3"]
    pending = manager.step(4)
    assert pending is not None
    pending.wait()
    manager.step(5)
    assert "ckpt-4" in told
    manager.close()
    assert told[-1] == "ckpt-5"


def test_a_callback_that_fails_fails_no_save(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fail(report: gpusaver.SaveProgress) -> None:
        calls.append(report)
        raise RuntimeError("of the user")

    with make(on_progress=fail) as manager:
        manager.save(1)
        manager.save(2)
    assert len(calls) == 1
    assert "is not called any more" in caplog.text


def test_a_bar_on_a_terminal_only(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    class FakeBar:
        made: ClassVar[list[FakeBar]] = []

        def __init__(self, **options: Any) -> None:
            self.options, self.n, self.is_closed = options, 0, False
            self.made.append(self)

        def update(self, nbytes: int) -> None:
            self.n += nbytes

        def close(self) -> None:
            self.is_closed = True

    assert progress.bar() is None  # under pytest standard error is no terminal
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    monkeypatch.setattr(progress.importlib, "import_module", lambda name: type("tqdm", (), {"tqdm": FakeBar}))
    with make({"w": np.zeros(3_000_000)}, progress_bar=True) as manager:
        manager.save(1)
        manager.save(2)
    assert [(bar.n, bar.options["total"], bar.is_closed) for bar in FakeBar.made] == [
        (PHASE + 24_000_000, PHASE + 24_000_000, True)
    ] * 2

    def missing(name: str) -> None:
        raise ImportError

    monkeypatch.setattr(progress.importlib, "import_module", missing)
    assert progress.bar() is None


# Beginning again


def test_restore_or_initialize(make: Make, tmp_path: Path) -> None:
    called = []
    state = {"w": np.zeros(3), "step": 0}
    manager = make(state)
    assert manager.restore_or_initialize(lambda: called.append(1)) is None
    assert called == [1]
    state["w"][:], state["step"] = 7, 5
    manager.save(5)
    manager.close()
    state = {"w": np.zeros(3), "step": 0}
    assert make(state).restore_or_initialize(lambda: called.append(2)) == f"{tmp_path}/run/ckpt-5"
    assert called == [1]
    assert (state["w"] == 7).all()
    assert state["step"] == 5


def test_a_damaged_one_is_passed_over_and_saved_anew(make: Make, tmp_path: Path) -> None:
    with make(max_to_keep=3) as manager:
        for step in (10, 20, 30):
            manager.save(step)
    os.truncate(tmp_path / "run" / "ckpt-30.index", 10)
    manager = make(max_to_keep=3, save_every_n_steps=10)
    assert manager.restore_or_initialize() == f"{tmp_path}/run/ckpt-20"
    assert run(manager, range(21, 31)) == [30]
    assert list(gpusaver.verify(tmp_path / "run" / "ckpt-30")) == []
    os.truncate(tmp_path / "run" / "ckpt-20.index", 10)
    os.truncate(tmp_path / "run" / "ckpt-10.index", 10)
    os.truncate(tmp_path / "run" / "ckpt-30.index", 10)
    manager.close()
    with pytest.raises(DataLossError, match="is whole"):
        make().restore_or_initialize(lambda: pytest.fail("must not begin anew"))


def test_retention_is_remembered(make: Make, tmp_path: Path, clock: Clock) -> None:
    """What a manager that was closed has saved, pinned and measured counts for the next."""
    directory = tmp_path / "run"
    for step in range(1, 9):
        clock.now += 1200
        with make(max_to_keep=2, best_to_keep=1, keep_checkpoint_every_n_hours=1.0) as manager:
            manager.save(step, metric=abs(step - 4), pin=step == 2)
    assert steps_in(directory) == [2, 4, 5, 7, 8]  # pinned; best; an hour after the beginning; the newest
    manager = make(max_to_keep=2, best_to_keep=1, keep_checkpoint_every_n_hours=1.0)
    assert steps_of(manager.checkpoints) == [7, 8]
    assert steps_of(manager.best_checkpoints) == [4]
    assert steps_of(manager.pinned_checkpoints) == [2]


def test_pin_and_unpin(make: Make, tmp_path: Path) -> None:
    manager = make(max_to_keep=1)
    manager.save(1)
    manager.pin(1)
    manager.save(2)
    assert steps_of(manager.pinned_checkpoints) == [1]
    manager.save(1)  # again: it stays pinned
    manager.save(3)
    assert steps_in(tmp_path / "run") == [1, 3]
    with pytest.raises(NotFoundError, match="no checkpoint of step 9"):
        manager.pin(9)
    manager.unpin(1)
    assert manager.pinned_checkpoints == []
    manager.save(4)
    assert steps_in(tmp_path / "run") == [4]


def test_a_lower_limit_applies_at_once(make: Make, tmp_path: Path) -> None:
    with make(max_to_keep=None) as manager:
        for step in range(1, 7):
            manager.save(step)
    with make(max_to_keep=2) as manager:
        manager.save(7)
    assert steps_in(tmp_path / "run") == [6, 7]


def test_what_a_saver_has_left_is_managed(make: Make, tmp_path: Path) -> None:
    """Of the manager's own name; others stay for ever."""
    (tmp_path / "run").mkdir()
    with gpusaver.Saver({"w": np.zeros(3), "step": 0}) as saver:
        saver.save(tmp_path / "run" / "model", 1)
        for step in (1, 2, 3):
            saver.save(tmp_path / "run" / "ckpt", step)
    manager = make(max_to_keep=2)
    assert steps_of(manager.checkpoints) == [2, 3]
    manager.save(4)
    assert steps_in(tmp_path / "run") == [3, 4]
    assert gpusaver.checkpoint_exists(tmp_path / "run" / "model-1")


def test_without_its_file_nothing_pinned_or_best_is_lost(make: Make, tmp_path: Path) -> None:
    with make(max_to_keep=1, best_to_keep=1) as manager:
        manager.save(1, pin=True)
        manager.save(2, metric=0.1)
        manager.save(3, metric=0.2)
    (tmp_path / "run" / "checkpoint.manager.json").unlink()
    with make(max_to_keep=1, best_to_keep=1) as manager:
        manager.save(4, metric=0.3)
        manager.save(5, metric=0.4)
    assert steps_in(tmp_path / "run") == [1, 2, 4, 5]


HOSTILE = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "not UTF-8": b"\xff\xfe",
    "a list": "[]",
    "another version": '{"version": 2}',
    "nothing in it": '{"version": 1}',
    "wrong types": '{"version": 1, "last_preserved": "x", "checkpoints": {"a": 1}, "doomed": 7}',
    "wrong rows": '{"version": 1, "last_preserved": NaN, "checkpoints": [1, null, [], {}, {"name": 1}], "doomed": [1]}',
    "infinite": '{"version": 1, "checkpoints": [{"name": "ckpt-1", "time": Infinity}, {"name": "ckpt-1", "time": 9}]}',
    "huge": '{"version": 1, "checkpoints": [{"name": "ckpt-1", "time": 1' + "0" * 400 + "}]}",
    "long": '{"version": 1, "doomed": [' + '"ckpt-7", ' * 500_000 + '"ckpt-8"]}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_any_file_in_its_place(make: Make, tmp_path: Path, content: Any) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "checkpoint.manager.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with make(max_to_keep=1, best_to_keep=1) as manager:
        manager.save(1, metric=0.5)
        manager.save(2, metric=0.6)
    assert steps_in(tmp_path / "run") == [1, 2]
    assert json.loads(path.read_text())["version"] == 1


def test_it_deletes_nothing_outside_its_directory_and_name(make: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    victims = [tmp_path / "ckpt-1", tmp_path / "run" / "other-1", tmp_path / "run" / "ckpt"]
    for victim in victims:
        gpusaver.save(victim, {"w": np.zeros(3)})
    names = [
        "../ckpt-1",
        f"{tmp_path}/ckpt-1",
        "other-1",
        "ckpt",
        "./../ckpt-1",
        "",
        "..",
        "ckpt-1/../../ckpt-1",
        "\0-1",
    ]
    rows = [{"name": name, "time": 1.0} for name in names]
    content = {"version": 1, "last_preserved": 0.0, "checkpoints": rows, "doomed": names}
    (tmp_path / "run" / "checkpoint.manager.json").write_text(json.dumps(content))
    with make(max_to_keep=1) as manager:
        manager.save(5)
        manager.save(6)
    assert all(gpusaver.checkpoint_exists(victim) for victim in victims)
    assert steps_in(tmp_path / "run") == [6]


def test_a_crash_before_the_deletion(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to go goes after the restart."""
    with make(max_to_keep=1) as manager:
        manager.save(1)
        monkeypatch.setattr(manager, "_remove", lambda name: False)
        manager.save(2)
    assert steps_in(tmp_path / "run") == [1, 2]
    assert json.loads((tmp_path / "run" / "checkpoint.manager.json").read_text())["doomed"] == ["ckpt-1"]
    monkeypatch.undo()
    with make(max_to_keep=1) as manager:
        assert steps_of(manager.checkpoints) == [2]
        manager.save(3)
    assert steps_in(tmp_path / "run") == [3]


# Two of them


def test_what_a_killed_one_has_left_of_its_file_is_removed(make: Make, tmp_path: Path) -> None:
    """Nobody else may: the manager itself holds the lock of the file."""
    make().close()
    left = tmp_path / "run" / f"checkpoint.manager.json.{'0' * 16}.gpusaver-tmp"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"{")
    make().save(1)
    assert not left.exists()


def test_two_managers_of_one_directory(make: Make, tmp_path: Path) -> None:
    first, second = make(), make()
    first.save(1)
    for call in (lambda: second.save(2), lambda: second.step(2), lambda: second.pin(1)):
        with pytest.raises(FailedPreconditionError, match=rf"manager.json.*held by process {os.getpid()}, this one"):
            call()
    assert second.restore_or_initialize() == f"{tmp_path}/run/ckpt-1"  # reading is anybody's right
    first.close()
    second.save(2)
    assert steps_of(second.checkpoints) == [1, 2]


# Failures


def test_a_failure_comes_at_the_next_step(make: Make, disk: Disk) -> None:
    manager = make(save_every_n_steps=10)
    disk.error = broken
    pending = manager.step(10)
    assert pending is not None
    pending.wait()
    with pytest.raises(UnknownError, match=r"ckpt-10.*injected"):
        manager.step(11)
    assert manager.step(12) is None  # told once
    disk.error = None
    assert run(manager, range(13, 21)) == [20]


def test_a_failure_does_not_mask_the_loops_own(make: Make, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.error = broken
    manager = make(save_every_n_steps=1)
    with pytest.raises(ZeroDivisionError), manager:
        print(manager.step(1), 1 / 0)
    assert "while another exception was raised, a background save failed" in caplog.text


def test_a_failure_comes_at_the_end(make: Make, disk: Disk) -> None:
    disk.error = broken
    with pytest.raises(UnknownError, match="injected"), make(save_every_n_steps=1) as manager:
        manager.step(1)


def test_a_state_file_that_cannot_be_written(make: Make, disk: Disk, tmp_path: Path) -> None:
    manager = make(max_to_keep=1)
    manager.save(1)
    os.mkdir(tmp_path / "run" / "checkpoint.gpusaver-lock")
    with pytest.raises(Error) as caught:
        manager.save(2)
    assert "itself is complete" in caught.value.__notes__[0]
    os.rmdir(tmp_path / "run" / "checkpoint.gpusaver-lock")
    assert steps_in(tmp_path / "run") == [1, 2]
    manager.save(3)
    assert steps_of(manager.checkpoints) == [3]


def test_a_full_disk_by_default(make: Make, disk: Disk) -> None:
    manager = make(save_every_n_steps=1)
    disk.error = full
    pending = manager.step(1)
    assert pending is not None
    pending.wait()
    with pytest.raises(ResourceExhaustedError):
        manager.step(2)


def settle(manager: CheckpointManager, step: int) -> bool:
    """One step, and the end of its save; whether one began."""
    pending = manager.step(step)
    if pending is not None:
        pending.wait()
    return pending is not None


def test_a_full_disk_and_training_goes_on(
    make: Make, disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make(save_every_n_steps=10, when_disk_full="continue")
    assert settle(manager, 10)
    disk.error = full
    assert [step for step in range(11, 36) if settle(manager, step)] == [20, 30]  # the next time it is due
    assert caplog.text.count("training goes on without this checkpoint") == 2
    disk.error = None
    assert [step for step in range(36, 51) if settle(manager, step)] == [40, 50]
    manager.close()
    assert steps_in(tmp_path / "run") == [10, 40, 50]


def test_a_full_disk_and_room_is_made(make: Make, disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One checkpoint goes for every try, never the newest, a pinned or the best one."""
    manager = make(save_every_n_steps=10, when_disk_full="make_room", best_to_keep=1)
    for step, metric in ((1, 0.1), (2, 0.5), (3, 0.5), (4, 0.5), (5, 0.5)):
        manager.save(step, metric=metric, pin=step == 2)
    disk.error = full
    tries = [step for step in range(6, 16) if settle(manager, step)]
    assert tries == [10, 11, 12]
    assert steps_in(tmp_path / "run") == [1, 2, 5]
    assert steps_of(manager.checkpoints) == [1, 2, 5]
    assert gpusaver.latest_checkpoint(tmp_path / "run") == f"{tmp_path}/run/ckpt-5"
    assert "no checkpoint left to delete" in caplog.text
    disk.error = None
    assert [step for step in range(16, 21) if settle(manager, step)] == [20]
    assert manager.latest_checkpoint == f"{tmp_path}/run/ckpt-20"


def test_another_error_is_none_of_a_full_disk(make: Make, disk: Disk) -> None:
    manager = make(save_every_n_steps=1, when_disk_full="continue")
    disk.error = broken
    settle(manager, 1)
    with pytest.raises(UnknownError):
        manager.step(2)


def test_a_full_disk_at_the_end_is_told(make: Make, disk: Disk) -> None:
    disk.error = full
    with pytest.raises(ResourceExhaustedError), make(save_every_n_steps=1, when_disk_full="continue") as manager:
        manager.step(1)


def test_a_full_disk_when_asked_to_save(make: Make, disk: Disk) -> None:
    disk.error = full
    with pytest.raises(ResourceExhaustedError):
        make(when_disk_full="continue").save(1)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"checkpoint_name": "a/b"}, ValueError, "checkpoint_name"),
        ({"checkpoint_name": ""}, ValueError, "checkpoint_name"),
        ({"checkpoint_name": "ckpt-1"}, ValueError, "checkpoint_name"),
        ({"save_every_n_steps": 0}, ValueError, "save_every_n_steps"),
        ({"save_every_n_steps": 1.5}, TypeError, "float"),
        ({"save_every_secs": -1}, ValueError, "save_every_secs"),
        ({"when_busy": "raise"}, ValueError, "when_busy: expected wait or skip"),
        ({"when_disk_full": "ignore"}, ValueError, "when_disk_full"),
        ({"max_to_keep": 0}, ValueError, "max_to_keep"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        CheckpointManager({"w": np.zeros(2)}, tmp_path, **options)
