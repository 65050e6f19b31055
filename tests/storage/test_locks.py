"""Advisory locks: one owner at a time, none after a death, and an error that names who has it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import gpusaver
from gpusaver.errors import Error, FailedPreconditionError, InvalidArgumentError
from gpusaver.storage import locks
from gpusaver.storage.local import LocalStorage

ROOT = Path(gpusaver.__file__).parents[1]
SECONDS = 30.0

OWNER = """
import os, sys, time
from gpusaver.storage.local import LocalStorage
lock = LocalStorage().lock(sys.argv[1])
if "fork" in sys.argv and os.fork() == 0:
    time.sleep(60)
print("locked", flush=True)
time.sleep(60)
"""


def other_owner(path: Path, *more: str) -> subprocess.Popen[str]:
    """Another process that has the lock, until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, path, *more],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.fspath(ROOT)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return f"{tmp_path}/k.index.gpusaver-lock"


def test_one_owner_at_a_time(path: str) -> None:
    storage = LocalStorage()
    lock = storage.lock(path)
    assert lock.is_exclusive
    with pytest.raises(FailedPreconditionError, match=rf"cannot lock {path}: held by process {os.getpid()}, this one,"):
        storage.lock(path, wait_seconds=0)
    lock.release()
    assert not os.path.exists(path)
    lock.release()
    storage.lock(path, wait_seconds=0).release()
    assert not os.path.exists(path)


def test_the_record_says_who_has_it(path: str) -> None:
    lock = LocalStorage().lock(path)
    record = json.loads(Path(path).read_text())
    assert (record["pid"], record["host"]) == (os.getpid(), socket.gethostname())
    assert record["since"].endswith("+00:00")
    lock.release()


def test_a_lock_that_is_let_go_is_waited_for(path: str) -> None:
    storage = LocalStorage()
    lock = storage.lock(path)
    timer = threading.Timer(0.05, lock.release)
    timer.start()
    storage.lock(path, wait_seconds=SECONDS).release()
    timer.join()


def test_a_lock_that_is_forgotten_is_free(path: str) -> None:
    storage = LocalStorage()
    storage.lock(path)
    storage.lock(path, wait_seconds=0).release()


@pytest.mark.parametrize("with_child", [False, True])
def test_a_dead_owner(path: str, with_child: bool) -> None:
    """Its lock is taken over, also while a child that it forked lives on."""
    process = other_owner(Path(path), *["fork"] * with_child)
    with pytest.raises(FailedPreconditionError, match=rf"held by process {process.pid} on host {socket.gethostname()}"):
        LocalStorage().lock(path, wait_seconds=0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads(Path(path).read_text())["pid"] == process.pid
    LocalStorage().lock(path, wait_seconds=SECONDS).release()
    assert not os.path.exists(path)
    end(process)


def test_a_stopped_owner_is_not_dead(path: str) -> None:
    process = other_owner(Path(path))
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(FailedPreconditionError, match=f"held by process {process.pid}"):
        LocalStorage().lock(path, wait_seconds=0.05)
    end(process)


def test_a_forked_child_neither_has_nor_releases_it(path: str) -> None:
    lock = LocalStorage().lock(path)
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(FailedPreconditionError):
        LocalStorage().lock(path, wait_seconds=0)
    lock.release()


def count(path: str, counter: str, rounds: int) -> None:
    """Reads and writes a number, which two at once would spoil."""
    for _ in range(rounds):
        lock = LocalStorage().lock(path, wait_seconds=SECONDS)
        number = int(Path(counter).read_text())
        time.sleep(0)
        Path(counter).write_text(str(number + 1))
        lock.release()


def test_processes_and_threads_take_turns(path: str, tmp_path: Path) -> None:
    """The file of the lock comes and goes meanwhile."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=count, args=(path, str(counter), 50)) for _ in range(2)]
    for other in others:
        other.start()
    threads = [threading.Thread(target=count, args=(path, str(counter), 50)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for worker in [*others, *threads]:
        worker.join(SECONDS)
    assert counter.read_text() == "200"
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"pid": "x"}', b"[" * 1000, b'{"pid": 1, "host": 2}', b"x" * 10_000]
)
def test_a_record_that_makes_no_sense(path: str, content: bytes) -> None:
    lock = LocalStorage().lock(path)
    Path(path).write_bytes(content)
    with pytest.raises(FailedPreconditionError, match="held by another process, which left no record"):
        LocalStorage().lock(path, wait_seconds=0)
    lock.release()


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_something_else_of_that_name(path: str, tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    if kind == "link":
        os.symlink(victim, path)
    elif kind == "directory":
        os.mkdir(path)
    else:
        os.mkfifo(path)
    with pytest.raises(InvalidArgumentError, match=f"cannot lock {path}"):
        LocalStorage().lock(path)
    assert os.path.lexists(path)
    assert victim.read_text() == "untouched"


def test_a_file_system_without_locks(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Saving goes on without them, and says so once."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "_warned", set())
    for _ in range(2):
        lock = LocalStorage().lock(path)
        assert not lock.is_exclusive
        assert not os.path.exists(path)
        lock.release()
    assert [record.message.count("no locks") for record in caplog.records] == [1]


def test_other_errors_are_told(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(Error, match=f"cannot lock {path}: injected"):
        LocalStorage().lock(path)


def test_a_full_disk_does_not_keep_the_lock_from_being_taken(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", refuse)
    lock = LocalStorage().lock(path)
    assert lock.is_exclusive
    lock.release()


def test_a_release_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk that fails: what was saved under the lock is saved."""
    close = os.close

    def failing(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EIO, "injected")

    lock = LocalStorage().lock(f"{tmp_path}/lock")
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", failing)
        lock.release()
    LocalStorage().lock(f"{tmp_path}/lock", wait_seconds=0).release()
