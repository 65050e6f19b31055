"""The clock of ``doctor`` and ``bench``."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpusaver.bundle.crc import crc32c
from gpusaver.bundle.filenames import is_data_of
from gpusaver.device import cuda_module
from gpusaver.device.inventory import devices
from gpusaver.errors import Error
from gpusaver.pending import SaveReport
from gpusaver.saver import Saver
from gpusaver.storage.base import Storage
from gpusaver.tensor import DataType, TensorSpec

_BLOCK = 8 << 20
_TENSORS = 16


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-9)


def checksum(nbytes: int = 32 << 20) -> float:
    """Bytes per second."""
    data = np.ones(nbytes, np.uint8)
    return nbytes / min(timed(lambda: crc32c(data)) for _ in range(3))


def write(storage: Storage, directory: str, nbytes: int, *, direct: bool) -> float | None:
    """Bytes per second until durable, by one thread; None if the directory has no O_DIRECT.  The file is removed."""
    block = mmap.mmap(-1, _BLOCK)  # page-aligned, as O_DIRECT wants
    data = np.frombuffer(block, np.uint8)
    data[:] = 1
    nbytes = -(-nbytes // _BLOCK) * _BLOCK
    file = storage.create(os.path.join(directory, f"bench-{os.getpid()}.gpusaver-tmp"), nbytes, direct=direct)
    try:
        if direct and file.alignment == 1:
            return None

        def all_of_it() -> None:
            for offset in range(0, nbytes, _BLOCK):
                file.write_at(offset, [data])
            file.sync()

        return nbytes / timed(all_of_it)
    finally:
        file.abort()


def bench(storage: Storage, folder: str, nbytes: int) -> list[dict[str, Any]]:
    """Rows of ``what``, ``seconds``, ``rate`` in bytes per second, ``ceiling`` by name, and ``share`` of that."""
    rows: list[dict[str, Any]] = []

    def add(what: str, rate: float, ceiling: str | None = None) -> None:
        limit = next((row["rate"] for row in rows if row["what"] == ceiling), None)
        share = rate / limit if limit else None
        rows.append({"what": what, "seconds": nbytes / rate, "rate": rate, "share": share, "ceiling": ceiling})

    state = _state(nbytes)
    first = next(iter(state.values()))
    copy = np.empty_like(first)
    np.copyto(copy, first)
    add("memory copy", first.nbytes / timed(lambda: np.copyto(copy, first)))
    add("checksum, one thread", checksum())
    cached = write(storage, folder, nbytes, direct=False)
    direct = write(storage, folder, nbytes, direct=True)
    assert cached is not None
    add("raw write, page cache", cached)
    if direct is not None:
        add("raw write, O_DIRECT", direct)
    best = "raw write, O_DIRECT" if direct is not None and direct > cached else "raw write, page cache"
    prefix = os.path.join(folder, "model")
    report, restore = _save_and_restore(state, prefix)
    data = [os.path.join(folder, name) for name in storage.list(folder) if is_data_of(name, "model-2")]
    add("raw read, page cache", nbytes / timed(lambda: _read(storage, data)))
    add("save, until durable", nbytes / report.durable_seconds, best)
    add("restore, verified", restore, "raw read, page cache")
    for info in devices():
        if info.link_rate:
            add(f"link of {info.name} (NVML)", info.link_rate)
        with contextlib.suppress(Error):  # a device that is full is no reason to keep the rest back
            runtime = cuda_module().cuda_runtime(int(info.name.partition(":")[2]))
            spec = TensorSpec(DataType.float32, first.shape)
            report, restore = _save_and_restore({name: runtime.empty(spec) for name in state}, prefix)
            ceiling = f"link of {info.name} (NVML)"
            add(f"save from {info.name}, until durable", nbytes / report.durable_seconds, best)
            add(f"copies from {info.name} meanwhile", report.copy_rate or nbytes / report.durable_seconds, ceiling)
            add(f"restore to {info.name}, verified", restore, "raw read, page cache")
    return rows


def _state(nbytes: int) -> dict[str, npt.NDArray[Any]]:
    elements = max(1, nbytes // _TENSORS // 4)
    return {f"w{n}": np.full(elements, n + 1, np.float32) for n in range(_TENSORS)}


def save(prefix: str, nbytes: int) -> SaveReport:
    """The second save of made-up arrays: the first makes what the Saver keeps."""
    with Saver(_state(nbytes), max_to_keep=None) as saver:
        _saved(saver, f"{prefix}-1")
        return _saved(saver, f"{prefix}-2")


def _save_and_restore(state: dict[str, Any], prefix: str) -> tuple[SaveReport, float]:
    """Of the second save, and the rate of the second restore."""
    with Saver(state, max_to_keep=None) as saver:
        _saved(saver, f"{prefix}-1")
        report = _saved(saver, f"{prefix}-2")
        saver.restore(report.prefix)
        return report, saver.restore(report.prefix).rate


def _saved(saver: Saver, prefix: str) -> SaveReport:
    pending = saver.save_async(prefix, write_state=False, write_meta_graph=False, capture="blocking")
    assert pending is not None
    pending.result()
    assert pending.report is not None
    return pending.report


def _read(storage: Storage, paths: Sequence[str]) -> None:
    buffer = memoryview(bytearray(_BLOCK))
    for path in paths:
        with contextlib.closing(storage.open(path)) as file:
            for offset in range(0, file.size, _BLOCK):
                file.read_into(offset, [buffer[: file.size - offset]])
