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


def versions() -> dict[str, str]:
    """Of CuPy, of the CUDA it was built for and of the newest that the driver runs; "" for what cannot be asked."""
    found = {"cupy": str(cupy.__version__), "cuda": "", "driver": ""}
    for name, ask in (("cuda", "runtimeGetVersion"), ("driver", "driverGetVersion")):
        with contextlib.suppress(Exception):  # without a driver both raise, with classes of their own
            number = int(getattr(cupy.cuda.runtime, ask)())
            found[name] = f"{number // 1000}.{number % 1000 // 10}"
    return found


def nvrtc_version() -> str:
    """Of the compiler of gpusaver's kernels.  Raises whatever CuPy does if it cannot be loaded."""
    major, minor = cupy.cuda.nvrtc.getVersion()
    return f"{major}.{minor}"


def nvtx() -> Any:
    """CuPy's module with RangePush and RangePop, or None where it was built without."""
    with contextlib.suppress(ImportError):
        from cupy.cuda import nvtx

        return nvtx if nvtx.available else None
    return None
