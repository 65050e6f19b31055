"""What tests under simulation share: schedules as marks, pinned memory, and arrays bit for bit."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest


def schedule(name: str | int, **options: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sim", [{"schedule": name, **options}], indirect=True, ids=[str(name)])


late, eager, racing, dragging = map(schedule, ("late", "eager", "racing", "dragging"))


def pinned(sim: Any, nbytes: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(sim.cupy.cuda.alloc_pinned_memory(nbytes), np.uint8)


def unpin(sim: Any, host: np.ndarray[Any, Any]) -> None:
    sim.cupy.cuda.runtime.hostUnregister(host.ctypes.data)


def to_host(sim: Any, array: Any, host: np.ndarray[Any, Any], stream: Any) -> None:
    sim.cupy.cuda.runtime.memcpyAsync(host.ctypes.data, array.data.ptr, array.nbytes, 2, stream.ptr)


def expect_violation(sim: Any, text: str) -> None:
    assert any(text in violation for violation in sim.violations), sim.violations
    sim.violations.clear()


def values(dtype: np.dtype[Any], seed: int = 0) -> np.ndarray[Any, Any]:
    """Shape (6, 5, 4), every byte random (booleans are 0 or 1)."""
    octets = np.random.default_rng(seed).integers(0, 256, 120 * dtype.itemsize, np.uint8)
    return (octets & 1 if dtype.kind == "b" else octets).view(dtype).reshape(6, 5, 4)


def on_device(sim: Any, host: np.ndarray[Any, Any]) -> Any:
    """A simulated array of the same bytes, also for types that CuPy cannot compute with."""
    plain = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
    return sim.cupy.asarray(plain).view(host.dtype).reshape(host.shape)


def stored(array: np.ndarray[Any, Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def on_host(array: Any) -> bytes:
    """What the device array holds in row-major order."""
    unsigned = np.dtype(f"u{min(array.itemsize, 8)}")
    plain = array.view(unsigned) if array.itemsize <= 8 else array
    return stored(plain.get())


@pytest.fixture(name="small_chunks")
def chunks_of_kilobytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, blocks of images and what counts as large are so small that a few kilobytes show everything.

    Requires: the simulated CuPy is installed already.
    """
    import gpusaver.device.cuda as cuda
    import gpusaver.device.cuda_image as cuda_image
    import gpusaver.device.cuda_kernels as cuda_kernels

    for module in ("pipeline.save", "pipeline.restore", "saving", "reader"):
        monkeypatch.setattr(f"gpusaver.{module}.CHUNK_NBYTES", 8192)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("gpusaver.bundle.layout.LARGE_NBYTES", 4096)
    monkeypatch.setattr(cuda, "_BUFFER_NBYTES", 8192)
    monkeypatch.setattr(cuda, "DIRECT_NBYTES", 2048)
    monkeypatch.setattr(cuda_kernels, "TABLE_NBYTES", 4096)
    monkeypatch.setattr(cuda_image, "BLOCK_NBYTES", 12288)
