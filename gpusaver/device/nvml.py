"""What NVML knows of a GPU: its name, its memory, its link to the host, and the CPUs next to it.

The only module that imports ``pynvml``.  Nothing here raises: a machine without a driver, an old driver, a container
and a MIG slice each hide something, and what is hidden has its neutral value (``""``, 0, no CPUs).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Answer = TypeVar("Answer")

#: Bytes per second and lane by PCIe generation, after the line code (8b/10b, 128b/130b, FLIT), before packet headers.
_LANE_RATES = {1: 0.25e9, 2: 0.5e9, 3: 8e9 / 8 * 128 / 130, 4: 16e9 / 8 * 128 / 130, 5: 32e9 / 8 * 128 / 130}
_LANE_RATES[6] = 64e9 / 8 * 242 / 256
#: Words of 64 bits in a set of CPUs: Linux's own limit is 8,192 CPUs.
_CPU_WORDS = 128


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A CUDA device, as :func:`gpusaver.devices` describes it; what the system hides is "", 0, or an empty set.

    ``name``: "cuda:0" and so on, as CuPy counts them; ``model``: "NVIDIA H200".  ``memory_nbytes``, ``free_nbytes``: of
    a MIG slice its own.  ``pcie_generation``: the link's now, which an idle device lowers; ``max_pcie_generation``: at
    best, with this machine; ``pcie_width``, ``max_pcie_width``: lanes.  ``link_rate``: what to expect of the link at
    its highest generation and present width, in bytes per second and direction, before packet headers, which take some
    more; 0.0 if unknown.  ``cpus``: the host's CPUs closest to the device.
    """

    name: str
    pci_bus_id: str = ""
    model: str = ""
    memory_nbytes: int = 0
    free_nbytes: int = 0
    is_mig: bool = False
    pcie_generation: int = 0
    max_pcie_generation: int = 0
    pcie_width: int = 0
    max_pcie_width: int = 0
    link_rate: float = 0.0
    cpus: frozenset[int] = frozenset()


def describe(name: str, pci_bus_id: str) -> DeviceInfo:
    """What NVML tells of the GPU at ``pci_bus_id``, as CUDA spells it ("0000:1B:00.0").

    With ``is_mig`` the device that CUDA sees is a slice of it, and the memory, which NVML knows of the whole GPU alone,
    is 0.
    """
    nvml = _nvml()
    handle = _ask(lambda: nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id.encode()), None)
    if handle is None:
        return DeviceInfo(name, pci_bus_id)

    def number(function: str) -> int:
        return _ask(lambda: int(getattr(nvml, function)(handle)), 0)

    is_mig = _ask(lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0]), False)
    memory: Any = None if is_mig else _ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle), None)
    max_generation = number("nvmlDeviceGetMaxPcieLinkGeneration")
    width, max_width = number("nvmlDeviceGetCurrPcieLinkWidth"), number("nvmlDeviceGetMaxPcieLinkWidth")
    return DeviceInfo(
        name,
        pci_bus_id,
        model=_ask(lambda: _text(nvml.nvmlDeviceGetName(handle)), ""),
        memory_nbytes=_ask(lambda: int(memory.total), 0),
        free_nbytes=_ask(lambda: int(memory.free), 0),
        is_mig=is_mig,
        pcie_generation=number("nvmlDeviceGetCurrPcieLinkGeneration"),
        max_pcie_generation=max_generation,
        pcie_width=width,
        max_pcie_width=max_width,
        link_rate=_LANE_RATES.get(max_generation, 0.0) * (width or max_width),
        cpus=_ask(lambda: _cpus(nvml.nvmlDeviceGetCpuAffinity(handle, _CPU_WORDS)), frozenset()),
    )


def driver_version() -> str:
    """As ``nvidia-smi`` prints it; "" where there is no NVML."""
    return _ask(lambda: _text(_nvml().nvmlSystemGetDriverVersion()), "")


def bind_thread(cpus: frozenset[int]) -> None:
    """Keeps the calling thread on those of ``cpus`` that it may use; does nothing if there are none or the system has
    no such call (macOS)."""
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    nearby = allowed & cpus
    if nearby and nearby != allowed:
        _ask(lambda: os.sched_setaffinity(0, nearby), None)


def _ask(question: Callable[[], Answer], neutral: Answer) -> Answer:
    """NVMLError has a class for every way in which a driver refuses, an older library or package lacks functions
    (AttributeError), and containers have been seen to bend the rest."""
    try:
        return question()
    except Exception:
        return neutral


@functools.cache
def _nvml() -> Any:
    """The library, initialised for the life of the process; None where there is none."""

    def start() -> Any:
        import pynvml

        pynvml.nvmlInit()
        return pynvml

    return _ask(start, None)


def _text(value: str | bytes) -> str:
    """Older versions of the package return bytes; a driver may cut a name within a character."""
    text = value if isinstance(value, str) else value.decode("utf-8", "replace")
    return text.partition("\0")[0].strip()


def _cpus(words: Any) -> frozenset[int]:
    return frozenset(64 * place + bit for place, word in enumerate(words) for bit in range(64) if int(word) >> bit & 1)
