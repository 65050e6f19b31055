"""Whether a file may be written over is for the kernel to say."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gpusaver.storage.local import RECYCLED_FILE_SYSTEMS, LocalStorage, file_system
from gpusaver.storage.unshared import nbytes_if_unshared

pytestmark = pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="this system has no leases")


@pytest.fixture(params=["disk", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path, memory_path: Path) -> Path:
    path = {"disk": tmp_path, "memory": memory_path}[request.param] / "f"
    path.write_bytes(b"0123456789")
    if file_system(path.stat().st_dev) not in RECYCLED_FILE_SYSTEMS:
        pytest.skip("nothing is written over on this file system")
    return path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[None]:
    with path.open("rb"):
        yield


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[None]:
    """And closed: the mapping alone holds it."""
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with view:
        yield


@contextlib.contextmanager
def opened_elsewhere(path: Path) -> Iterator[None]:
    command = [sys.executable, "-c", f"file = open({str(path)!r}); print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.communicate("\n")


@contextlib.contextmanager
def linked(path: Path) -> Iterator[None]:
    other = path.with_name("other name")
    os.link(path, other)
    yield
    other.unlink()


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """As far as another user may."""
    with mock.patch.object(os, "open", side_effect=PermissionError):
        yield


@pytest.mark.parametrize("use", [opened, mapped, opened_elsewhere, linked, read_only])
def test_a_file_that_is_used_is_not_written_over(path: Path, use: Any) -> None:
    assert nbytes_if_unshared(str(path)) == 10
    with use(path):
        assert nbytes_if_unshared(str(path)) is None
    assert nbytes_if_unshared(str(path)) == 10


def test_what_is_no_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"0123456789")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "missing", "."):
        assert nbytes_if_unshared(str(tmp_path / name)) is None


def test_whoever_opens_the_file_meanwhile_ends_no_process(path: Path) -> None:
    real, refused = fcntl.fcntl, []

    def call(fd: int, command: int, argument: Any = 0) -> Any:
        result = real(fd, command, argument)
        if command == fcntl.F_SETLEASE and argument == fcntl.F_WRLCK:
            with pytest.raises(BlockingIOError):  # it would wait for the lease, but for the flag
                os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            refused.append(True)
        return result

    with mock.patch.object(fcntl, "fcntl", call):
        assert nbytes_if_unshared(str(path)) == 10
    assert refused == [True]
    assert path.read_bytes() == b"0123456789"


def test_a_file_that_is_read_is_removed_instead(path: Path) -> None:
    with path.open("rb") as file:
        assert LocalStorage().recycle(str(path), str(path.with_name("spare"))) is None
        assert os.listdir(path.parent) == []
        assert file.read() == b"0123456789"


def test_elsewhere_nothing_is_kept(path: Path) -> None:
    """Of a network file system this host does not know who reads it."""
    with mock.patch("gpusaver.storage.local.file_system", return_value="nfs4"):
        assert LocalStorage().recycle(str(path), str(path.with_name("spare"))) is None
    assert os.listdir(path.parent) == []


def test_a_close_that_fails_harms_nobody(path: Path) -> None:
    close = os.close

    def failing(fd: int) -> None:
        close(fd)
        raise OSError(5, "injected")

    with mock.patch.object(os, "close", failing):
        assert nbytes_if_unshared(str(path)) == 10
