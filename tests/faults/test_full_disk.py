"""Disks that are really full, really out of names, and really read-only: small file systems, mounted for the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from oracle import check_recovery
from scenarios import Job, Scenario
from size import deadline

import gpusaver
from gpusaver.errors import PermissionDeniedError, ResourceExhaustedError

DISK_NBYTES = 8 << 20
CountCases = Callable[[int], None]

SCENARIOS = [
    Scenario("new", (1, 2)),
    Scenario("overwrite", (1, 2), is_one_prefix=True),
    Scenario("retention", (1, 2), max_to_keep=1),
]


def run(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def mounted(parent: Path, kind: str, *options: str) -> Iterator[Path]:
    """An empty file system of 8 MiB; skips the test where this process may not mount one."""
    target = parent / "disk"
    target.mkdir()
    try:
        if kind == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", ",".join([f"size={DISK_NBYTES}", *options]), "tmpfs", target)
        else:
            with open(parent / "image", "wb") as image:
                image.truncate(DISK_NBYTES)
            run("mkfs.ext4", "-q", "-m", "0", parent / "image")
            run("mount", "-o", ",".join(["loop", *options]), parent / "image", target)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NO DISK WAS FILLED: {kind} cannot be mounted here: {getattr(error, 'stderr', '') or error}")
    try:
        shutil.rmtree(target / "lost+found", ignore_errors=True)
        yield target
    finally:
        run("umount", "-l", target)
        target.rmdir()


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, memory_path: Path) -> Iterator[Path]:
    with mounted(memory_path, request.param) as target:
        yield target


def leave(disk: Path, nbytes: int) -> None:
    """Fills the disk but for so many bytes, as nearly as its bookkeeping lets us."""
    status = os.statvfs(disk)
    size = status.f_bavail * status.f_frsize - nbytes
    with open(disk / "filler", "wb") as filler:
        while size > 0:
            try:
                os.posix_fallocate(filler.fileno(), 0, size)
                break
            except OSError:  # the filler needs blocks of its own
                size -= status.f_frsize


def has_room(job: Job, directory: Path) -> bool:
    """Whether version 2 can be saved after version 1; nothing is lost if it cannot."""
    try:
        job.save(2)
    except ResourceExhaustedError as error:
        told = str(error)
    else:
        assert check_recovery(directory, 2) == 2
        return True
    assert str(directory) in told
    assert check_recovery(directory, 1) in (1, 2)
    return False


def test_saves_until_the_disk_is_full(disk: Path, count_cases: CountCases) -> None:
    state = {"w": np.arange(200_000.0)}
    with deadline(), gpusaver.Saver(state, max_to_keep=None) as saver:
        saved: list[str] = []

        def save_on() -> None:
            for step in range(20):
                state["w"] += 1
                saved.append(saver.save(disk / "k", step))

        with pytest.raises(ResourceExhaustedError, match=rf"cannot save {disk}/k-\d+: No space .*\(ENOSPC\)"):
            save_on()
        assert len(saved) in (4, 5)
        assert not list(disk.glob("*gpusaver-tmp"))
        for number, prefix in enumerate(saved, 1):
            np.testing.assert_array_equal(gpusaver.load(prefix)["w"], np.arange(200_000.0) + number)
        assert gpusaver.latest_checkpoint(disk) == saved[-1]
        gpusaver.remove_checkpoint(saved[0])
        assert saver.save(disk / "k", 20) == gpusaver.latest_checkpoint(disk) == f"{disk}/k-20"
    count_cases(len(saved) + 1)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_any_amount_of_free_space(disk: Path, scenario: Scenario, count_cases: CountCases) -> None:
    """From none to enough, in steps of less than a file."""
    outcomes = []
    for free in range(0, 48 << 10, 2 << 10):
        place = disk / "run"
        place.mkdir()
        with deadline(), scenario.job(place) as job:
            job.save(1)
            leave(disk, free)
            outcomes.append(has_room(job, place))
            assert not list(place.glob("*gpusaver-tmp"))
            (disk / "filler").unlink()
            job.save(3)
            assert check_recovery(place, 3) == 3
        shutil.rmtree(place)
    assert outcomes == sorted(outcomes), "what worked with less space must work with more"
    assert not outcomes[0]
    assert outcomes[-1]
    count_cases(len(outcomes))


def test_any_number_of_free_names(memory_path: Path, count_cases: CountCases) -> None:
    outcomes = []
    for names in range(6, 16):
        with mounted(memory_path, "tmpfs", f"nr_inodes={names}") as disk, SCENARIOS[0].job(disk) as job, deadline():
            job.save(1)
            outcomes.append(has_room(job, disk))
            assert not list(disk.glob("*gpusaver-tmp"))
    assert not outcomes[0]
    assert outcomes[-1]
    count_cases(len(outcomes))


def test_a_disk_that_was_made_read_only(disk: Path) -> None:
    with deadline(), SCENARIOS[0].job(disk) as job:
        prefix = job.save(1)
        run("mount", "-o", "remount,ro", disk)
        with pytest.raises(PermissionDeniedError, match=rf"cannot lock {disk}/k-2.*\(EROFS\)"):
            job.save(2)
        assert job.restore(prefix) == 1
        run("mount", "-o", "remount,rw", disk)
        job.save(3)
        assert check_recovery(disk, 3) == 3
