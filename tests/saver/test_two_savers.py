"""Several Savers in one directory, what killed ones have left there, and disks that are too small."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gated_storage import GatedStorage, held

import gpusaver
from gpusaver.errors import FailedPreconditionError, ResourceExhaustedError
from gpusaver.storage import base
from gpusaver.storage.local import LocalStorage

SECONDS = 60.0


class Impatient(GatedStorage):
    """Does not wait for locks."""

    def lock(self, path: str, *, wait_seconds: float = 0.0) -> Any:
        return super().lock(path, wait_seconds=0)


@pytest.fixture
def storage() -> Any:
    storage = Impatient()
    yield storage
    storage.let_go()


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_the_same_prefix_at_the_same_time(tmp_path: Path, storage: GatedStorage, saver: gpusaver.Saver) -> None:
    saver.save(tmp_path / "k", 1)
    pending = held(saver, storage, tmp_path / "k", global_step=2)
    with gpusaver.Saver({"w": np.zeros(3)}, storage=Impatient()) as other:
        with pytest.raises(FailedPreconditionError, match=rf"{tmp_path}/k-2.index.*held by process {os.getpid()}"):
            other.save(tmp_path / "k", 2)
        with pytest.raises(FailedPreconditionError, match="held by"):
            gpusaver.remove_checkpoint(tmp_path / "k-2", storage=Impatient())
        storage.let_go()
        pending.result(SECONDS)
        np.testing.assert_array_equal(gpusaver.load(tmp_path / "k-2")["w"], np.arange(200_000.0))
        other.save(tmp_path / "k", 2)
    assert gpusaver.load(tmp_path / "k-2")["w"].shape == (3,)
    assert not [name for name in names(tmp_path) if name.endswith(("-lock", "-tmp"))]


def test_different_prefixes_at_the_same_time(tmp_path: Path, storage: GatedStorage, saver: gpusaver.Saver) -> None:
    """The first save of the other Saver sweeps; what lives is left alone."""
    pending = held(saver, storage, tmp_path / "a", at="replace")
    with gpusaver.Saver({"w": np.zeros(3)}) as other:
        other.save(tmp_path / "b", latest_filename="others")
    storage.let_go()
    assert pending.result(SECONDS) == f"{tmp_path}/a"
    np.testing.assert_array_equal(gpusaver.load(tmp_path / "a")["w"], np.arange(200_000.0))
    assert gpusaver.latest_checkpoint(tmp_path) == f"{tmp_path}/a"
    assert gpusaver.latest_checkpoint(tmp_path, "others") == f"{tmp_path}/b"


def save_often(directory: str, number: int, rounds: int) -> None:
    with gpusaver.Saver({"w": np.full(1000, number)}, max_to_keep=2) as saver:
        for step in range(rounds):
            saver.save(f"{directory}/k", step)


def test_processes_that_save_the_same_steps(tmp_path: Path) -> None:
    """A job that was started twice: whatever the order, each checkpoint is one of theirs and the state file is true."""
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=save_often, args=(str(tmp_path), number, 15)) for number in range(3)]
    for other in others:
        other.start()
    while any(other.is_alive() for other in others):
        state = gpusaver.get_checkpoint_state(tmp_path)
        assert state is None or state.model_checkpoint_path
    for other in others:
        other.join(SECONDS)
        assert other.exitcode == 0
    state = gpusaver.get_checkpoint_state(tmp_path)
    assert state is not None
    for prefix in state.all_model_checkpoint_paths:
        values = gpusaver.load(prefix)["w"]
        assert values.shape == (1000,)
        assert len(set(values.tolist())) == 1
    assert not [name for name in names(tmp_path) if name.endswith(("-lock", "-tmp"))]


def test_what_another_has_deleted_is_not_listed(tmp_path: Path) -> None:
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:
        for step in (1, 2, 3):
            saver.save(tmp_path / "k", step)
        gpusaver.remove_checkpoint(tmp_path / "k-2")
        saver.save(tmp_path / "k", 4)
    state = gpusaver.get_checkpoint_state(tmp_path)
    assert state is not None
    assert list(state.all_model_checkpoint_paths) == [f"{tmp_path}/k-{step}" for step in (1, 3, 4)]


def test_the_state_file_is_being_written(tmp_path: Path) -> None:
    lock = LocalStorage().lock(f"{tmp_path}/checkpoint.gpusaver-lock")
    with gpusaver.Saver({"w": np.zeros(3)}, storage=Impatient()) as saver:
        with pytest.raises(FailedPreconditionError, match=r"checkpoint\.gpusaver-lock: held by process") as caught:
            saver.save(tmp_path / "k", 1)
        assert "itself is complete" in caught.value.__notes__[0]
        assert gpusaver.checkpoint_exists(tmp_path / "k-1")
        lock.release()
        saver.save(tmp_path / "k", 2)
    assert gpusaver.latest_checkpoint(tmp_path) == f"{tmp_path}/k-2"


# What killed Savers have left

TOKEN = base.new_token()
ELSEWHERE = f"{int(TOKEN[:4], 16) ^ 1:04x}{TOKEN[4:]}"


def litter(directory: Path, *found: str) -> None:
    for name in found:
        (directory / name).write_bytes(b"half")


def test_leftovers_go_at_the_first_save(tmp_path: Path) -> None:
    ours = [
        f"k-7.index.{TOKEN}.gpusaver-tmp",
        f"k-7.data-00000-of-00001.{TOKEN}.gpusaver-tmp",
        f"k-6.index.{ELSEWHERE}.gpusaver-tmp",  # our prefix, though of another host: a container that was replaced
        f"other-3.data-00001-of-00002.{TOKEN}.gpusaver-tmp",  # of this host, and nobody has its lock
        f"checkpoint.{TOKEN}.gpusaver-tmp",
        f"probe.{TOKEN}.gpusaver-tmp",
        "k-7.index.gpusaver-lock",
        "k-7.data-00000-of-00001",  # renamed, when the Saver was killed before it renamed the index
    ]
    others = [
        f"alien-3.index.{ELSEWHERE}.gpusaver-tmp",
        "model.index.gpusaver-lock",
        "k-8.data-00000-of-00001",  # no lock tells that this is of a save: somebody may be copying a checkpoint
        "k-9.index.gpusaver-tmp",
        f"k-9.index.{TOKEN[1:]}.gpusaver-tmp",
        f"k-9.index.{TOKEN}.gpusaver-tmp.bak",
        "notes.txt",
    ]
    litter(tmp_path, *ours, *others)
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:
        saver.save(tmp_path / "k", 10)
        checkpoint = ["checkpoint", "k-10.data-00000-of-00001", "k-10.index", "k-10.meta"]
        assert names(tmp_path) == sorted([*others, *checkpoint])
        litter(tmp_path, ours[0])
        saver.save(tmp_path / "k", 10)  # only the first save of a Saver looks
        assert ours[0] in names(tmp_path)


def test_a_complete_checkpoint_survives_its_old_lock(tmp_path: Path) -> None:
    with gpusaver.Saver({"w": np.arange(3)}) as saver:
        saver.save(tmp_path / "k", 7)
    litter(tmp_path, "k-7.index.gpusaver-lock")
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:
        saver.save(tmp_path / "k", 8)
    np.testing.assert_array_equal(gpusaver.load(tmp_path / "k-7")["w"], np.arange(3))
    assert "k-7.index.gpusaver-lock" not in names(tmp_path)


def test_leftovers_that_cannot_be_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = f"k-7.index.{TOKEN}.gpusaver-tmp"
    (tmp_path / name).mkdir()
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:
        saver.save(tmp_path / "k", 8)
    assert name in caplog.text
    assert gpusaver.checkpoint_exists(tmp_path / "k-8")


def test_the_token_names_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    token = base.new_token()
    assert len(token) == 16
    assert int(token, 16) >= 0
    assert base.is_token_of_this_host(token)
    monkeypatch.setattr(base, "host_name", lambda: "quite another")
    assert not base.is_token_of_this_host(token)


# Space


class SmallDisk(LocalStorage):
    free = 0

    def free_nbytes(self, directory: str) -> int | None:
        return self.free


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(tmp_path: Path) -> None:
    storage = SmallDisk()
    storage.free = 700_000
    with gpusaver.Saver({"w": np.zeros(100_000)}, storage=storage) as saver:
        with pytest.raises(ResourceExhaustedError, match=r"k-1.*700,000 bytes free, a checkpoint takes 8\d\d,\d{3}"):
            saver.save(tmp_path / "k", 1)
        assert names(tmp_path) == []
        storage.free = 900_000
        saver.save(tmp_path / "k", 1)


@pytest.mark.parametrize(
    ("keep", "free", "warns"),
    [(3, 3_200_000, True), (3, 3_300_000, False), (1, 1_600_000, True), (None, 900_000, False)],
)
def test_what_retention_will_need_is_counted(
    tmp_path: Path, keep: int | None, free: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """``max_to_keep`` and the one that is being written; each takes 817 kB here."""
    storage = SmallDisk()
    storage.free = free
    with gpusaver.Saver({"w": np.zeros(100_000)}, storage=storage, max_to_keep=keep) as saver:
        saver.save(tmp_path / "k", 1)
        saver.save(tmp_path / "k", 2)
    assert caplog.text.count("lower max_to_keep") == warns


def test_without_a_step_there_are_two_at_most(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = SmallDisk()
    storage.free = 900_000
    with gpusaver.Saver({"w": np.zeros(100_000)}, storage=storage) as saver:
        saver.save(tmp_path / "k")
    assert not caplog.text


def test_nobody_knows_how_much_is_free(tmp_path: Path) -> None:
    storage = SmallDisk()
    storage.free = None  # type: ignore[assignment]
    with gpusaver.Saver({"w": np.zeros(3)}, storage=storage) as saver:
        saver.save(tmp_path / "k", 1)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with gpusaver.Saver({"w": np.zeros(3)}) as saver:
            saver.save(tmp_path / "d" / "k", 1)
    finally:
        os.umask(before)
    assert os.stat(tmp_path / "d").st_mode & 0o777 == 0o750
    assert {os.stat(path).st_mode & 0o777 for path in (tmp_path / "d").iterdir()} == {0o640}
