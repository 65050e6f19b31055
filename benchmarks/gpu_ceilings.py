"""What bounds every library: the rates of links, memory, files and checksums, measured in the same run.

All in bytes per second of what is moved (a device-to-device copy reads and writes each byte, and it counts once), best
of a few tries.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpusaver.bundle.crc import crc32c

PIECE_NBYTES = 8 << 20
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_TRIES = 3


@dataclass(frozen=True)
class Sizes:
    """In bytes; a test makes them small."""

    link: int = 512 << 20
    device: int = 1 << 30
    host_crc: int = 256 << 20
    pin: int = 1 << 30


def best(run: Callable[[], None], tries: int = _TRIES) -> float:
    """Seconds; the first call is for warming up."""
    run()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def device_ceilings(cupy: Any, sizes: Sizes) -> dict[str, float]:
    """Links, device memory, checksums and pinning."""
    runtime, stream = cupy.cuda.runtime, cupy.cuda.Stream(non_blocking=True)
    rates: dict[str, float] = {}
    device = cupy.zeros(sizes.link, np.uint8)
    pinned = cupy.cuda.PinnedMemory(sizes.link)
    pageable = np.ones(sizes.link, np.uint8)
    cupy.cuda.Device().synchronize()

    def copy(target: int, source: int, kind: int, nbytes: int = sizes.link) -> Callable[[], None]:
        def run() -> None:
            runtime.memcpyAsync(target, source, nbytes, kind, stream.ptr)
            stream.synchronize()

        return run

    for name, host in (("pinned", pinned.ptr), ("pageable", pageable.ctypes.data)):
        rates[f"{name} D2H"] = sizes.link / best(copy(host, device.data.ptr, _DEVICE_TO_HOST))
        rates[f"{name} H2D"] = sizes.link / best(copy(device.data.ptr, host, _HOST_TO_DEVICE))
    del device, pinned, pageable
    source, target = cupy.zeros(sizes.device, np.uint8), cupy.zeros(sizes.device, np.uint8)
    cupy.cuda.Device().synchronize()
    rates["D2D"] = sizes.device / best(copy(target.data.ptr, source.data.ptr, _DEVICE_TO_DEVICE, sizes.device))
    rates["device crc32c"] = _device_crc(source, sizes.device, stream)
    host = np.random.default_rng(0).integers(0, 256, sizes.host_crc, np.uint8)
    rates["host crc32c"] = sizes.host_crc / best(lambda: crc32c(host) and None)
    rates["pin"] = _pin(cupy, sizes.pin)
    return rates


def _device_crc(array: Any, nbytes: int, stream: Any) -> float:
    """0.0 where CuPy cannot compile kernels."""
    from gpusaver.device.cuda_kernels import load
    from gpusaver.device.cuda_memory import Held

    kernels, _ = load(0)
    if kernels is None:
        return 0.0

    def run() -> None:
        held = Held()
        kernels.crc32c(np.array([array.data.ptr]), np.array([nbytes]), held)(stream)
        stream.synchronize()
        held.release()

    return nbytes / best(run)


def _pin(cupy: Any, nbytes: int) -> float:
    """Of memory that is in use already."""
    memory = mmap.mmap(-1, nbytes)
    array = np.frombuffer(memory, np.uint8)
    array.fill(1)
    start = time.perf_counter()
    cupy.cuda.runtime.hostRegister(array.ctypes.data, nbytes, 0)
    seconds = time.perf_counter() - start
    cupy.cuda.runtime.hostUnregister(array.ctypes.data)
    return nbytes / seconds


# ---------------------------------------------------------------------------------------------------------------- files


def file_ceilings(directory: str, nbytes: int, threads: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    """Raw writes and reads of one file of ``nbytes`` bytes: the best rates and how they came about.

    A write reserves its space, which is timed, fills it from a few warm buffers and syncs.  Reads are warm.
    """
    path = os.path.join(directory, "raw")
    every: dict[str, float] = {}
    for direct, count in itertools.product((False, True) if hasattr(os, "O_DIRECT") else (False,), threads):
        with contextlib.suppress(OSError):  # tmpfs of older kernels has no O_DIRECT
            mode = "O_DIRECT" if direct else "page cache"
            every[f"write {mode} x{count}"] = nbytes / _timed(lambda: raw_write(path, nbytes, count, direct=direct))  # noqa: B023
    for count in threads:
        every[f"read x{count}"] = nbytes / best(lambda: raw_read(path, nbytes, count), 1)  # noqa: B023
    os.remove(path)
    writes = {name: rate for name, rate in every.items() if name.startswith("write")}
    reads = {name: rate for name, rate in every.items() if name.startswith("read")}
    return {"write": max(writes.values()), "read": max(reads.values()), "every": every}


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def raw_write(path: str, nbytes: int, threads: int, *, direct: bool) -> None:
    """Requires for ``direct``: whole pages."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0), 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)

        def write(buffer: memoryview, start: int) -> None:
            end = min(start + PIECE_NBYTES, nbytes)
            while start < end:
                start += os.pwrite(fd, buffer[: -(-(end - start) // 4096) * 4096 if direct else end - start], start)

        _share_pieces(write, nbytes, threads)
        os.ftruncate(fd, nbytes)
        os.fsync(fd)
    finally:
        os.close(fd)


def raw_read(path: str, nbytes: int, threads: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:

        def read(buffer: memoryview, start: int) -> None:
            end = min(start + PIECE_NBYTES, nbytes)
            while start < end:
                start += os.preadv(fd, [buffer[: end - start]], start)

        _share_pieces(read, nbytes, threads)
    finally:
        os.close(fd)


def _share_pieces(work: Callable[[memoryview, int], None], nbytes: int, threads: int) -> None:
    """``work(buffer, start)`` for every piece, each thread with a page-aligned buffer of its own."""
    starts = iter(range(0, nbytes, PIECE_NBYTES))
    errors: list[BaseException] = []

    def run(starts: Iterator[int]) -> None:
        try:
            for start in starts:  # the GIL makes each start go to one thread
                work(buffers[threading.current_thread().name], start)
        except BaseException as error:
            errors.append(error)

    helpers = [threading.Thread(target=run, args=(starts,), name=f"raw-{number}") for number in range(threads)]
    buffers = {helper.name: memoryview(_warm_buffer(number)) for number, helper in enumerate(helpers)}
    for helper in helpers:
        helper.start()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


_buffers: dict[int, mmap.mmap] = {}


def _warm_buffer(number: int) -> mmap.mmap:
    if number not in _buffers:
        _buffers[number] = mmap.mmap(-1, PIECE_NBYTES)
        np.frombuffer(_buffers[number], np.uint8).fill(number + 1)
    return _buffers[number]


def drop_from_page_cache(directory: str) -> bool:
    """Whether later reads of the files come from the disk: tmpfs keeps them in memory."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for folder, _, files in os.walk(directory):
        for name in files:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    return True
