"""gpusaver's own kernels in the simulation: the compiled sources (tests/kernels) on the simulated devices' memory.

``install(sim)`` makes them what a RawModule finds.  Every byte that a kernel is told to touch must be the device's, or
its launch fails as an illegal address would; what it touches beyond that, tests/kernels would have seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from kernels.shim import launch, library

from gpusaver.device.launch_plan import PART, TILE
from sim.engine import Engine
from sim.kernels import Kernel, Launch


def install(engine: Engine) -> None:
    """Skips the test where the kernels cannot be compiled for the CPU."""
    library()
    engine.kernels.update(KERNELS)


def _address(here: Launch, pointer: int, nbytes: int) -> int:
    """Where on the host the device's memory is."""
    return int(here.memory(pointer, nbytes).ctypes.data)


def _table(here: Launch, pointer: int, count: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    return np.array(here.memory(pointer, count * dtype.itemsize).view(dtype))


def _copy(name: str) -> Kernel:
    def run(here: Launch, tiles: int, image: int) -> None:
        table = _table(here, tiles, here.grid[0], TILE)
        for tile in table:
            tile["array"] = _address(here, int(tile["array"]), int(tile["nbytes"]))
            here.memory(image + int(tile["offset"]), int(tile["nbytes"]))
        launch(name, here.grid[0], here.block, table.ctypes.data, _address(here, image, 1))

    return Kernel(run, ("pointer", "pointer"))


def _copy_strided(name: str) -> Kernel:
    def run(here: Launch, array: int, flat: int, first: int, units: int, unit: int, dims: int, *rest: int) -> None:
        sizes, strides = rest[:8], rest[8:]
        spans = [(size - 1) * stride for size, stride in zip(sizes, strides, strict=True)]
        low, high = sum(min(span, 0) for span in spans), sum(max(span, 0) for span in spans)
        host = _address(here, array + low, high - low + unit) - low
        flat_host = _address(here, flat, units * unit)
        launch(name, here.grid[0], here.block, host, flat_host, first, units, unit, dims, *rest)

    return Kernel(run, ("pointer", "pointer", np.int64, np.int64, np.uint32, np.uint32, *[np.int64] * 16))


def _crc32c(here: Launch, parts: int, count: int, checksums: int) -> None:
    table = _table(here, parts, count, PART)
    for part in table:
        part["address"] = _address(here, int(part["address"]), int(part["nbytes"]))
    results = _address(here, checksums, 4 * (int(table["piece"].max()) + 1))
    launch("crc32c", here.grid[0], here.block, table.ctypes.data, count, results)


KERNELS = {
    "gather": _copy("gather"),
    "scatter": _copy("scatter"),
    "gather_strided": _copy_strided("gather_strided"),
    "scatter_strided": _copy_strided("scatter_strided"),
    "crc32c": Kernel(_crc32c, ("pointer", np.uint32, "pointer")),
}
