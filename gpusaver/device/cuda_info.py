"""What CuPy knows of the devices that CUDA sees: those that CUDA_VISIBLE_DEVICES and the container leave."""

from __future__ import annotations

import contextlib
from typing import Any

import cupy


def pci_bus_ids() -> list[str]:
    """Of every device, in CuPy's order; MIG slices of one GPU share theirs.  CUDARuntimeError without a driver."""
    return [cupy.cuda.runtime.deviceGetPCIBusId(device) for device in range(cupy.cuda.runtime.getDeviceCount())]


def model(device: int) -> str:
    """ "NVIDIA H200", and of a MIG slice "NVIDIA H200 MIG 1g.18gb"; "" if CUDA does not say."""
    with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
        return bytes(cupy.cuda.runtime.getDeviceProperties(device)["name"]).decode("utf-8", "replace").strip("\0 ")
    return ""


def memory(device: int) -> tuple[int, int]:
    """Free and total bytes; (0, 0) if CUDA does not say.  It makes a CUDA context on the device if there is none."""
    with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError), cupy.cuda.Device(device):
        free, total = cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)
    return 0, 0


def nvtx() -> Any:
    """CuPy's module with RangePush and RangePop, or None where it was built without."""
    with contextlib.suppress(ImportError):
        from cupy.cuda import nvtx

        return nvtx if nvtx.available else None
    return None
