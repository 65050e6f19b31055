"""Which CUDA devices there are: CuPy counts them, NVML describes them, matched by PCI bus id."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

from gpusaver.device import nvml
from gpusaver.device.nvml import DeviceInfo


def devices() -> list[DeviceInfo]:
    """The CUDA devices that arrays can be saved from, in CuPy's order: "cuda:0", "cuda:1", ...

    Empty on a machine without a GPU, without a driver, or without CuPy; ``why_no_devices`` of this module tells which.
    Does not raise.  The first call imports CuPy.  A MIG slice, and a device that NVML hides, tells its memory to a CUDA
    context alone, which is then made.
    """
    found = []
    for number, bus_id in enumerate(_look()[0]):
        from gpusaver.device import cuda_info

        info = nvml.describe(f"cuda:{number}", bus_id)
        if info.is_mig or not info.model:
            info = dataclasses.replace(info, model=cuda_info.model(number))
        if not info.memory_nbytes:
            free, total = cuda_info.memory(number)
            info = dataclasses.replace(info, memory_nbytes=total, free_nbytes=free)
        found.append(info)
    return found


def why_no_devices() -> str:
    """ "" if there are any; else the reason in words."""
    return _look()[1]


def software() -> dict[str, str]:
    """What stands between arrays and devices, "" for what is not there.

    "cupy"; "cuda", for which it was built; "driver", the newest CUDA that the driver runs; "nvml", the driver's own
    version; "nvrtc"; and "cupy problem", "nvrtc problem": why there is none.  Does not raise; imports CuPy.
    """
    found = dict.fromkeys(("cupy", "cuda", "driver", "nvrtc", "cupy problem", "nvrtc problem"), "")
    found["nvml"] = nvml.driver_version()
    try:
        from gpusaver.device import cuda_info

        found |= cuda_info.versions()
    except Exception as error:  # CuPy raises what it likes if a library does not fit
        found["cupy problem"] = str(error)
        return found
    try:
        found["nvrtc"] = cuda_info.nvrtc_version()
    except Exception as error:
        found["nvrtc problem"] = str(error)
    return found


def link_rate(name: str) -> float:
    """``DeviceInfo.link_rate`` of the device called "cuda:0" and so on; 0.0 if unknown, and of the host."""
    return _lasting(name).link_rate


def nearby_cpus(name: str) -> frozenset[int]:
    """``DeviceInfo.cpus`` of the device called "cuda:0" and so on."""
    return _lasting(name).cpus


def nvtx() -> Any:
    """What profilers are told ranges with: an object with RangePush and RangePop; None while no device was used."""
    if "gpusaver.device.cuda" not in sys.modules:
        return None
    from gpusaver.device import cuda_info

    return cuda_info.nvtx()


@functools.cache
def _lasting(name: str) -> DeviceInfo:
    """What does not change while the process lives; no context is made for it."""
    kind, _, number = name.partition(":")
    bus_ids = _look()[0] if kind == "cuda" else []
    return nvml.describe(name, bus_ids[int(number)]) if bus_ids else DeviceInfo(name)


def _look() -> tuple[list[str], str]:
    """The devices' PCI bus ids, or why there are none."""
    try:
        from gpusaver.device import cuda_info
    except Exception as error:  # CuPy raises what it likes if a library does not fit
        return [], f"CuPy cannot be imported: {error}"
    try:
        return cuda_info.pci_bus_ids(), ""
    except Exception as error:
        return [], f"CuPy is installed, but CUDA cannot be used: {error}"
