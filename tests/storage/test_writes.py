"""Which way writes take to files in memory and in the page cache, and which of them go on at once."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from gpusaver.errors import ResourceExhaustedError
from gpusaver.storage import local, mapped
from gpusaver.storage.base import Buffer
from gpusaver.storage.local import LocalStorage, file_system


@pytest.fixture
def memory_path() -> Iterator[str]:
    """A directory in memory."""
    if not os.path.isdir("/dev/shm") or file_system(os.stat("/dev/shm").st_dev) != "tmpfs":
        pytest.skip("/dev/shm is not in memory here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield folder


@pytest.mark.parametrize("is_refused", [False, True])
def test_long_writes_to_memory(memory_path: str, monkeypatch: pytest.MonkeyPatch, is_refused: bool) -> None:
    """By a mapping where the kernel does that, otherwise by pwritev, which short and odd ones take in any case."""
    if is_refused:
        monkeypatch.setattr(mapped, "_MADV_COLLAPSE", 9999)
    monkeypatch.setattr(mapped, "SPARE_SECONDS", 10.0)
    monkeypatch.setattr(local, "can_map", lambda: True)
    written: list[tuple[int, int]] = []
    pwritev = os.pwritev

    def watched(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        written.append((offset, sum(buffer.nbytes for buffer in buffers)))
        return pwritev(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", watched)
    huge = mapped.HUGE_NBYTES
    content = np.random.default_rng(0).integers(0, 256, 4 * huge + 77, np.uint8)
    file = LocalStorage().create(f"{memory_path}/f", content.nbytes)
    parts = [content[:5], np.empty((0, 3)), content[5 : huge - 3].reshape(4, -1), content[huge - 3 : huge + 99].data]
    file.write_at(0, parts)
    file.write_at(huge + 99, [content[huge + 99 : 2 * huge]])
    file.write_at(2 * huge, [content[2 * huge :].data])
    file.sync()
    file.close()
    assert np.array_equal(np.fromfile(f"{memory_path}/f", np.uint8), content)
    long = [(0, huge + 99), (2 * huge, 2 * huge + 77)]
    if is_refused or len(written) > 1:  # an older kernel
        assert written == [long[0], (huge + 99, huge - 99), long[1]]
    else:
        assert written == [(huge + 99, huge - 99)]


def test_a_long_write_to_memory_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, not the end of the process."""
    monkeypatch.setattr(local, "can_map", lambda: True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting needs a privilege")
    try:
        file = LocalStorage().create(f"{tmp_path}/f", 8 << 20)
        with pytest.raises(ResourceExhaustedError, match="No space left"):
            file.write_at(0, [np.ones(8 << 20, np.uint8)])
        file.abort()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(("alignment", "count"), [(1, 1), (4096, 1), (1, 4)])
def test_writes_to_the_page_cache_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alignment: int, count: int
) -> None:
    """Those around it do not, nor do those of short buffers, nor files among each other."""
    size = 64 * 1024
    under_way: dict[int, int] = {}
    most = 0
    lock = threading.Lock()
    all_files = threading.Barrier(2 if alignment == count == 1 else 4)
    pwritev = os.pwritev

    def watched(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        nonlocal most
        with lock:
            under_way[fd] = under_way.get(fd, 0) + 1
            most = max(most, under_way[fd])
        all_files.wait(10)
        try:
            return pwritev(fd, buffers, offset)
        finally:
            with lock:
                under_way[fd] -= 1

    monkeypatch.setattr(os, "pwritev", watched)
    files = []
    for name in "ab":
        fd = os.open(tmp_path / name, os.O_RDWR | os.O_CREAT)
        files.append(local.LocalWritableFile(f"{tmp_path}/{name}", fd, 4 * size, alignment))
    content = np.arange(4 * size, dtype=np.uint8)
    parts = content.reshape(4, count, -1)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        writes = [threads.submit(file.write_at, n * size, list(parts[n])) for n in range(4) for file in files]
        for write in writes:
            write.result()
    for file in files:
        file.close()
    assert most == 1 if alignment == count == 1 else most > 1
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == content.tobytes()


@pytest.mark.skipif(not mapped.can_map(), reason="nothing is mapped here")
@pytest.mark.parametrize(("slow", "written"), [((0, 1, 2, 3), 2), ((0, 3, 6), 9), ((6, 7, 8), 8)])
def test_huge_pages_that_are_slow_to_come_are_not_asked_for_again(
    memory_path: str, monkeypatch: pytest.MonkeyPatch, slow: tuple[int, ...], written: int
) -> None:
    """Some are no reason; what others have taken less is to the good, but not without end."""
    asked: list[bool] = []
    pages = iter(range(9))
    now = 0.0

    def advise(_address: int, _nbytes: int, advice: int) -> int:
        nonlocal now
        if advice == mapped._MADV_COLLAPSE:
            now += 5.0 if next(pages) in slow else 0.0
        return 0

    class Counted(mapped.HugePages):
        def write(self, offset: int, nbytes: int, buffers: Sequence[Buffer]) -> bool:
            asked.append(super().write(offset, nbytes, buffers))
            return asked[-1]

    map_, unmap, _ = mapped._calls()
    monkeypatch.setattr(mapped, "_calls", lambda: (map_, unmap, advise))
    monkeypatch.setattr(mapped.time, "perf_counter", lambda: now)
    monkeypatch.setattr(mapped, "PAGE_SECONDS", 2.0)
    monkeypatch.setattr(mapped, "SPARE_SECONDS", 8.0)
    monkeypatch.setattr(local, "HugePages", Counted)
    content = np.random.default_rng(0).integers(0, 256, 9 * mapped.HUGE_NBYTES, np.uint8)
    file = LocalStorage().create(f"{memory_path}/f", content.nbytes)
    for offset in range(0, content.nbytes, mapped.HUGE_NBYTES):
        file.write_at(offset, [content[offset : offset + mapped.HUGE_NBYTES]])
    file.close()
    assert asked == [True] * written + [False] * (written < 9)
    assert np.array_equal(np.fromfile(f"{memory_path}/f", np.uint8), content)
