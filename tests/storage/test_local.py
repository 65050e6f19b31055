"""LocalStorage on a system that does not behave: short transfers, full disks, links, missing abilities."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver.device.host import allocate_pages
from gpusaver.errors import (
    Error,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnknownError,
)
from gpusaver.storage import local
from gpusaver.storage.base import Buffer, read_bytes
from gpusaver.storage.local import LocalStorage, file_system

Transfer = Callable[[int, Sequence[Buffer], int], int]


def in_small_steps(call: Transfer, steps: Iterator[int]) -> Transfer:
    """Moves only as many bytes as the next step says."""

    def move(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        left = next(steps)
        batch = []
        for buffer in buffers:
            batch.append(buffer[:left])
            left -= batch[-1].nbytes
        return call(fd, batch, offset)

    return move


def endless(*steps: int) -> Iterator[int]:
    while True:
        yield from steps


def test_short_writes_and_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", in_small_steps(os.pwritev, endless(1, 7, 3, 100)))
    monkeypatch.setattr(os, "preadv", in_small_steps(os.preadv, endless(5, 1, 2)))
    data = bytes(range(256)) * 4
    storage = LocalStorage()
    file = storage.create(f"{tmp_path}/f", len(data))
    file.write_at(512, [memoryview(data)[512:515], memoryview(data)[515:]])
    file.write_at(0, [memoryview(data)[n : n + 2] for n in range(0, 512, 2)])
    file.close()
    assert read_bytes(storage, f"{tmp_path}/f") == data


def test_more_bytes_than_one_call_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_MAX_BYTES", 1000)
    monkeypatch.setattr(local, "_MAX_BUFFERS", 3)
    sizes: list[int] = []
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, b, o: sizes.append(len(b)) or pwritev(fd, b, o))
    data = os.urandom(5000)
    storage = LocalStorage()
    file = storage.create(f"{tmp_path}/f", len(data))
    view = memoryview(data)
    file.write_at(0, [view[:2500], *(view[n : n + 10] for n in range(2500, 2600, 10)), view[2600:]])
    file.close()
    assert max(sizes) == 3
    assert read_bytes(storage, f"{tmp_path}/f") == data


def test_a_device_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LocalStorage().create(f"{tmp_path}/f", 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", lambda fd, buffers, offset: 0)
        with pytest.raises(UnknownError, match=f"write {tmp_path}/f"):
            file.write_at(0, [memoryview(b"abc")])
    file.abort()


@pytest.mark.parametrize("look", ["exists", "is_directory"])
def test_a_disk_that_fails_is_not_an_absent_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str) -> None:
    def failing(path: str) -> os.stat_result:
        raise OSError(errno.EIO, "injected", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        with pytest.raises(UnknownError, match=f"cannot look at {tmp_path}/f"):
            getattr(LocalStorage(), look)(f"{tmp_path}/f")


@pytest.mark.parametrize("name", ["none", "file/below", "x" * 300, "null\0byte", "loop"])
def test_names_that_cannot_be_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not LocalStorage().exists(f"{tmp_path}/{name}")
    assert not LocalStorage().is_directory(f"{tmp_path}/{name}")


def test_a_file_that_cannot_be_looked_at_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"")
    before = os.listdir("/dev/fd")

    def failing(descriptor: int) -> os.stat_result:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", failing)
        with pytest.raises(UnknownError, match=f"cannot open {tmp_path}/f"):
            LocalStorage().open(f"{tmp_path}/f")
    assert os.listdir("/dev/fd") == before


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    file = LocalStorage().open(f"{tmp_path}/f")
    os.truncate(tmp_path / "f", 4)
    with pytest.raises(OutOfRangeError, match="byte 4: expected 10 at offset 0, found 4"):
        file.read_into(0, [memoryview(bytearray(10))])
    file.close()


def test_signals_do_not_disturb(tmp_path: Path) -> None:
    """EINTR is Python's business; the handlers must run all the same."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with gpusaver.Saver({"w": np.arange(300_000)}) as saver:
            deadline = time.monotonic() + 10
            prefix = saver.save(tmp_path / "k")
            while len(seen) < 5 and time.monotonic() < deadline:
                saver.restore(saver.save(tmp_path / "k"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen
    np.testing.assert_array_equal(gpusaver.load(prefix)["w"], np.arange(300_000))


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, ResourceExhaustedError),
        (errno.EDQUOT, ResourceExhaustedError),
        (errno.EFBIG, ResourceExhaustedError),
        (errno.EIO, UnknownError),
    ],
)
def test_a_disk_without_the_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Error]
) -> None:
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(error, match=f"reserve 1000 bytes for {tmp_path}/f: {os.strerror(number)}") as caught:
        LocalStorage().create(f"{tmp_path}/f", 1000)
    assert isinstance(caught.value, OSError)
    assert (caught.value.errno, caught.value.filename) == (number, f"{tmp_path}/f")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    file = LocalStorage().create(f"{tmp_path}/f", 1000)
    file.close()
    assert os.path.getsize(tmp_path / "f") == 1000


def test_space_is_reserved(tmp_path: Path) -> None:
    file = LocalStorage().create(f"{tmp_path}/f", 1_000_000)
    file.close()
    status = os.stat(tmp_path / "f")
    assert status.st_size == 1_000_000
    if hasattr(os, "posix_fallocate"):
        assert status.st_blocks * 512 >= 1_000_000


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a file system in memory")
def test_in_memory_no_page_is_cleared_before_it_is_written() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if file_system(os.stat(folder).st_dev) != "tmpfs":
            pytest.skip("/dev/shm is not in memory here")
        file = LocalStorage().create(f"{folder}/f", 8 << 20)
        file.close()
        status = os.stat(f"{folder}/f")
        assert (status.st_size, status.st_blocks) == (8 << 20, 0)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not say what is in its cache")
@pytest.mark.parametrize("nbytes", [4096, 2 << 20])
@pytest.mark.parametrize("answer", [None, errno.EAGAIN, errno.EOPNOTSUPP])
def test_long_reads_that_wait_for_the_disk_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | None, nbytes: int
) -> None:
    """Short ones do not ask, and the others read at a time; in each case all threads get the bytes."""
    (tmp_path / "f").write_bytes(bytes(range(256)) * (4 * nbytes // 256))
    under_way, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)
    preadv = os.preadv

    def watched(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        nonlocal under_way, most
        if flags:
            assert nbytes > 4096
            if answer is not None:
                raise OSError(answer, os.strerror(answer))
            return preadv(fd, buffers, offset, flags)
        with lock:
            under_way += 1
            most = max(most, under_way)
        if answer != errno.EAGAIN or nbytes == 4096:
            both.wait(10)
        try:
            return preadv(fd, buffers, offset)
        finally:
            with lock:
                under_way -= 1

    monkeypatch.setattr(os, "preadv", watched)
    file = LocalStorage().open(f"{tmp_path}/f")
    targets = [bytearray(nbytes) for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for found in [threads.submit(file.read_into, n * nbytes, [memoryview(targets[n])]) for n in range(4)]:
            found.result()
    file.close()
    assert b"".join(targets) == (tmp_path / "f").read_bytes()
    assert most == (1 if answer == errno.EAGAIN and nbytes > 4096 else 2)


@pytest.mark.parametrize("direct", [False, True])
def test_a_link_is_not_followed(tmp_path: Path, direct: bool) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    os.symlink(tmp_path / "precious", tmp_path / "f")
    os.symlink(tmp_path / "nothing", tmp_path / "g")
    for name in "fg":
        with pytest.raises(Error, match=f"{tmp_path}/{name}"):
            LocalStorage().create(f"{tmp_path}/{name}", 8, direct=direct)
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["f", "g", "precious"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_directory_that_must_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Root may write anywhere, so the refusal is injected; below is the real one, for everybody else."""
    opened = os.open

    def refuse(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return opened(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", refuse)
    with gpusaver.Saver({"w": np.zeros(3)}) as saver, pytest.raises(PermissionDeniedError, match=f"{tmp_path}/k"):
        saver.save(tmp_path / "k")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o555)
    try:
        with gpusaver.Saver({"w": np.zeros(3)}) as saver, pytest.raises(PermissionDeniedError, match=f"{tmp_path}/k"):
            saver.save(tmp_path / "k")
        assert os.listdir(tmp_path) == []
    finally:
        os.chmod(tmp_path, 0o755)


def test_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with gpusaver.Saver({"w": np.zeros(3)}) as saver:
            saver.save(tmp_path / "d" / "k")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "d").iterdir()} == {0o640}
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "k.index")
    with pytest.raises(InvalidArgumentError, match=r"k\.index: not a regular file"):
        LocalStorage().open(f"{tmp_path}/k.index")


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage()
    storage.create("f", 2).close()
    storage.make_directory("d")
    storage.replace("f", "d/f")
    storage.sync_directory("")
    assert storage.list("") == ["d"]
    assert storage.is_directory("")
    assert storage.prefers_direct("") == storage.prefers_direct(os.fspath(tmp_path))


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there is no O_DIRECT here")
def test_a_file_system_without_o_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        fd = opened(path, flags & ~os.O_DIRECT, mode, **options)
        if flags & os.O_DIRECT:
            os.close(fd)  # Linux has created the file by then
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return fd

    monkeypatch.setattr(os, "open", refuse)
    storage = LocalStorage()
    assert not storage.prefers_direct(os.fspath(tmp_path))
    file = storage.create(f"{tmp_path}/f", 3, direct=True)
    assert file.alignment == 1
    file.write_at(0, [memoryview(b"abc")])
    file.close()
    assert read_bytes(storage, f"{tmp_path}/f") == b"abc"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there is no O_DIRECT here")
def test_memory_whose_pages_a_disk_cannot_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's, mapped into the process: what the kernel answers then, and that the bytes go by way of a copy."""
    lent = allocate_pages(8192)
    lent[:] = np.arange(8192) % 251
    moved = os.pwritev

    def refuse(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        if any(np.shares_memory(np.frombuffer(buffer, np.uint8), lent) for buffer in buffers):
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return moved(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refuse)
    file = LocalStorage().create(f"{tmp_path}/f", 8192, direct=True)
    if file.alignment == 1:
        pytest.skip("this file system has no O_DIRECT")
    file.write_at(0, [lent[:4096].data, lent[4096:].data])
    file.close()
    assert Path(f"{tmp_path}/f").read_bytes() == lent.tobytes()
    cached = LocalStorage().create(f"{tmp_path}/g", 8192)
    with pytest.raises(Error, match="Bad address"):
        cached.write_at(0, [lent.data])
    cached.abort()


def test_the_probe_leaves_nothing_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage()
    answer = storage.prefers_direct(os.fspath(tmp_path))
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(local, "_direct_works", lambda directory: pytest.fail("probed again"))
    assert storage.prefers_direct(os.fspath(tmp_path)) == answer
    with pytest.raises(NotFoundError, match="missing"):
        storage.prefers_direct(f"{tmp_path}/missing")


@pytest.mark.parametrize("last_first", [False, True])
def test_padding_is_cut_off_in_whatever_order_it_comes(tmp_path: Path, last_first: bool) -> None:
    file = LocalStorage().create(f"{tmp_path}/f", 4096 + 5, direct=True)
    pages = allocate_pages(8192)
    pages[:] = 1
    parts = [(0, pages[:4096].data), (4096, pages[4096:].data)]
    for offset, block in reversed(parts) if last_first else parts:
        file.write_at(offset, [block])
    file.sync()
    file.close()
    assert (tmp_path / "f").read_bytes() == b"\1" * 4101


def test_everything_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that durability hangs on: data, meta graph and index; names of the data; then those of the others."""
    log: list[str] = []
    paths: dict[int, str] = {}
    opened, renamed = os.open, os.replace

    def name(path: Any) -> str:
        found = os.path.relpath(path, tmp_path)
        return found.split(".")[1].split("-")[0] if found.startswith("k") else found.split(".gpusaver")[0][:5]

    def note_open(path: Any, *rest: Any, **options: Any) -> int:
        fd = opened(path, *rest, **options)
        paths[fd] = name(path)
        return fd

    def note_rename(source: str, target: str) -> None:
        log.append(f"rename {name(target)}")
        renamed(source, target)

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "replace", note_rename)
    monkeypatch.setattr(local, "_full_sync", lambda fd: log.append(f"sync {paths[fd]}"))
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:
        saver.save(tmp_path / "k")
    assert log == [
        # A .meta file on the way is called like the index.
        *("sync data", "sync index", "sync index", "rename data", "sync .", "rename index", "rename meta", "sync ."),
        *("sync check", "rename check", "sync ."),
    ]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("mounting needs a privilege")
    try:
        state = {"w": np.arange(5_000)}
        with gpusaver.Saver(state, max_to_keep=1) as saver:
            first = saver.save(disk / "k", 1)
            before = sorted(os.listdir(disk))
            state["w"] = np.arange(50_000)
            with pytest.raises(ResourceExhaustedError, match=r"k-2.*No space left"):
                saver.save(disk / "k", 2)
            assert sorted(os.listdir(disk)) == before
            assert gpusaver.latest_checkpoint(disk) == first
            state["w"] = np.arange(5_000) + 1
            saver.save(disk / "k", 3)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_error_is_translated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some errors of the tree are OSErrors; translated again they would be their own cause."""

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(local, "_full_sync", refuse)
    with pytest.raises(UnknownError, match=f"sync directory {tmp_path}") as caught:
        LocalStorage().make_directory(f"{tmp_path}/d")
    assert caught.value.__cause__ is not caught.value


def test_the_disk_is_told_of_what_lies_near_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(content := os.urandom(400_000))
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, nbytes, __: told.append((offset, nbytes)))
    monkeypatch.setattr(local.LocalReadableFile, "_waits", lambda *_: True)
    file = LocalStorage().open(str(path))
    offsets = [0, 1000, 66_000, 131_737, 131_800, 399_000]
    buffers = [np.empty(nbytes, np.uint8) for nbytes in (900, 200, 200, 900, 100, 1000)]
    file.read_each(offsets, [buffer.data for buffer in buffers])
    file.close()
    assert told == [(0, 66_200), (131_737, 900), (399_000, 1000)]
    for offset, buffer in zip(offsets, buffers, strict=True):
        assert buffer.tobytes() == content[offset : offset + buffer.nbytes]
