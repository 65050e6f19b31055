"""Raw kernels of the simulated CuPy: Python functions that work on device memory when their turn comes; and NVTX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sim.arrays import ndarray
from sim.engine import Engine
from sim.engine import Stream as Queue
from sim.errors import CUDARuntimeError
from sim.pools import MemoryPointer
from sim.state import active
from sim.streams import get_current_stream


class Launch:
    """What a kernel finds: its grid, and the device's memory by pointer."""

    def __init__(self, engine: Engine, device: int, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
        self.grid, self.block, self._engine, self._device = grid, block, engine, device

    def memory(self, pointer: int, nbytes: int) -> Any:
        """The bytes there, writable.  An illegal address ends the device's work."""
        memory = self._engine.memory[self._device]
        if not memory.is_allocated(pointer, nbytes):
            raise CUDARuntimeError(700)
        return memory.view(pointer, nbytes)


class Kernel(NamedTuple):
    """A kernel in Python: ``function(launch, *arguments)``, pointers as int.  ``types`` are the C types, in order:
    NumPy scalar types of the same width, or "pointer"."""

    function: Callable[..., None]
    types: tuple[Any, ...]


class RawModule:
    def __init__(
        self,
        code: str | None = None,
        *,
        path: str | None = None,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        name_expressions: Any = None,
    ) -> None:
        if (code is None) == (path is None):
            raise TypeError("Exactly one of `code` and `path` keyword arguments must be given.")
        self.code, self.file_path, self.options, self.backend = code, path, options, backend
        self._is_compiled = False

    def compile(self, log_stream: Any = None) -> None:
        if not self._is_compiled:
            if not active().has_nvrtc:
                raise RuntimeError('Failure finding "libnvrtc.so": No such file: libnvrtc.so')
            active().compiled.append((self.code or "", self.options))
            self._is_compiled = True

    def get_function(self, name: str) -> RawKernel:
        self.compile()
        if name not in active().kernels:
            raise CUDARuntimeError(400)
        return RawKernel(self.code or "", name, self.options)


class RawKernel:
    def __init__(self, code: str, name: str, options: tuple[str, ...] = (), backend: str = "nvrtc") -> None:
        self.code, self.name, self.options, self.backend = code, name, options, backend

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        with active().calling(f"launch {self.name}") as engine:
            queue = engine.stream((stream or get_current_stream()).ptr)
            if queue.device != engine.device:
                raise CUDARuntimeError(400)
            grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
            if min(grid + block) < 1 or max(grid[1:]) > 65535 or np.prod(block) > 1024 or shared_mem > 48 << 10:
                raise CUDARuntimeError(9)
            kernel: Kernel = engine.kernels[self.name]
            if len(args) != len(kernel.types):
                engine.refuse(f"kernel {self.name} takes {len(kernel.types)} arguments, got {len(args)}")
            values = [_argument(engine, queue, self.name, *pair) for pair in zip(kernel.types, args, strict=True)]
            launch = Launch(engine, queue.device, grid, block)
            engine.enqueue(queue, f"kernel {self.name}", lambda: kernel.function(launch, *values))


def _argument(engine: Engine, queue: Queue, name: str, wanted: Any, value: Any) -> Any:
    """CuPy passes the bits of whatever it gets: a Python int where the kernel wants 4 bytes goes unnoticed there."""
    if wanted != "pointer":
        if type(value) is not wanted:
            engine.refuse(f"kernel {name}: an argument is {type(value).__name__}, the kernel takes {wanted.__name__}")
        return value.item()
    value = value.data if isinstance(value, ndarray) else value
    if not isinstance(value, MemoryPointer | np.uint64 | np.int64):
        engine.refuse(f"kernel {name}: {type(value).__name__} is no pointer")
    pointer = int(value)
    device = engine.device_of(pointer)
    if pointer and (device != queue.device or not engine.memory[queue.device].is_live(pointer, 1)):
        engine.refuse(f"kernel {name} gets {pointer:#x}, which is no live memory of device {queue.device}")
    return pointer


def push_range(message: str, id_color: int = -1) -> None:
    ranges = active().ranges
    ranges[message] = ranges.get(message, 0) + 1
    _open_ranges().append(message)


def pop_range() -> None:
    if not _open_ranges():
        active().refuse("RangePop without RangePush")
    active().ranges[_open_ranges().pop()] -= 1


def _open_ranges() -> list[str]:
    local = active().local
    if not hasattr(local, "ranges"):
        local.ranges = []
    return local.ranges  # type: ignore[no-any-return]
