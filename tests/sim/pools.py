"""Memory of the simulated CuPy: blocks, pointers, the pool that lends freed blocks again, and pinned memory."""

from __future__ import annotations

import contextlib
import gc
import mmap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sim import runtime
from sim.engine import Engine
from sim.engine import Stream as Queue
from sim.errors import CUDARuntimeError, OutOfMemoryError
from sim.memory import round_up
from sim.state import active
from sim.streams import Device, get_current_stream


class BaseMemory:
    ptr: int
    size: int
    device_id: int

    @property
    def device(self) -> Device:
        return Device(self.device_id)

    def __int__(self) -> int:
        return self.ptr


class Memory(BaseMemory):
    """Memory straight from the driver."""

    def __init__(self, size: int) -> None:
        self._engine, self.size, self.device_id, self.ptr = active(), size, active().device, 0
        self.ptr = runtime.malloc(size) if size else 0

    def __del__(self) -> None:
        if self.ptr:
            self._engine.dropped.append(lambda pointer=self.ptr: runtime.free(pointer))  # type: ignore[misc]


class UnownedMemory(BaseMemory):
    def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
        if device_id < 0:
            if ptr == 0:
                raise RuntimeError("UnownedMemory requires explicit device ID for a null pointer.")
            device_id = runtime.pointerGetAttributes(ptr).device
        self.ptr, self.size, self._owner, self.device_id = ptr, size, owner, device_id


class MemoryPointer:
    def __init__(self, mem: BaseMemory, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    @property
    def device(self) -> Device:
        return Device(self.device_id)

    def copy_from_device_async(self, src: MemoryPointer, size: int, stream: Any = None) -> None:
        self._copy(self.ptr, src.ptr, size, runtime.memcpyDefault, stream)

    def copy_from_host_async(self, mem: int, size: int, stream: Any = None) -> None:
        self._copy(self.ptr, mem, size, runtime.memcpyHostToDevice, stream)

    def copy_to_host_async(self, mem: int, size: int, stream: Any = None) -> None:
        self._copy(mem, self.ptr, size, runtime.memcpyDeviceToHost, stream)

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        runtime.memsetAsync(self.ptr, value, size, (stream or get_current_stream()).ptr)

    @staticmethod
    def _copy(target: int, source: int, size: int, kind: int, stream: Any) -> None:
        if size > 0:
            runtime.memcpyAsync(target, source, size, kind, (stream or get_current_stream()).ptr)


class _Chunk(NamedTuple):
    ptr: int
    size: int
    whole: Memory


class PooledMemory(BaseMemory):
    def __init__(self, pool: MemoryPool, chunk: _Chunk, queue: Queue) -> None:
        self._engine, self._pool, self._chunk, self._queue = active(), pool, chunk, queue
        self.ptr, self.size, self.device_id = chunk.ptr, chunk.size, queue.device

    def __del__(self) -> None:
        give_back, engine, chunk, queue = self._pool._give_back, self._engine, self._chunk, self._queue
        engine.dropped.append(lambda: give_back(engine, chunk, queue))


class MemoryPool:
    """Keeps freed blocks by the stream that was current when they were allocated, and lends them again at once.

    What a block was freed with is overwritten in that stream, as its next user there may do without further ado.
    """

    def __init__(self, allocator: Callable[[int], MemoryPointer] | None = None) -> None:
        self._allocator = allocator or _malloc
        self._free: dict[Queue, list[_Chunk]] = {}
        self._used: dict[int, int] = {}
        self._total: dict[int, int] = {}
        self._limit: dict[int, int] = {}

    def malloc(self, size: int) -> MemoryPointer:
        if size == 0:
            return MemoryPointer(Memory(0), 0)
        size = round_up(size)
        with active().calling("pool", counted=False) as engine:
            queue = engine.stream(get_current_stream().ptr)
            fitting = [chunk for chunk in self._free.get(queue, []) if chunk.size >= size]
            chunk = min(fitting, key=lambda one: one.size) if fitting else self._grow(size)
            if fitting:
                self._free[queue].remove(chunk)
                engine.memory[queue.device].set_cached(chunk.ptr, chunk.size, False)
            if chunk.size > size:
                rest = _Chunk(chunk.ptr + size, chunk.size - size, chunk.whole)
                engine.memory[queue.device].set_cached(rest.ptr, rest.size, True)
                self._free[queue].append(rest)
            self._used[queue.device] = self._used.get(queue.device, 0) + size
            return MemoryPointer(PooledMemory(self, _Chunk(chunk.ptr, size, chunk.whole), queue), 0)

    def free_all_blocks(self, stream: Any = None) -> None:
        """Gives back to the driver what no array shares a block with."""
        with active().calling("pool", counted=False) as engine:
            for queue, chunks in self._free.items():
                if stream is not None and queue is not engine.stream(stream.ptr):
                    continue
                cached: dict[int, int] = {}
                for chunk in chunks:
                    cached[chunk.whole.ptr] = cached.get(chunk.whole.ptr, 0) + chunk.size
                whole = {chunk.whole.ptr for chunk in chunks if cached[chunk.whole.ptr] == chunk.whole.size}
                for chunk in chunks:
                    engine.memory[queue.device].set_cached(chunk.ptr, chunk.size, chunk.whole.ptr not in whole)
                self._total[queue.device] -= sum(chunk.size for chunk in chunks if chunk.whole.ptr in whole)
                self._free[queue] = [chunk for chunk in chunks if chunk.whole.ptr not in whole]

    def used_bytes(self) -> int:
        with active().calling("pool", counted=False) as engine:
            return self._used.get(engine.device, 0)

    def total_bytes(self) -> int:
        with active().calling("pool", counted=False) as engine:
            return self._total.get(engine.device, 0)

    def free_bytes(self) -> int:
        return self.total_bytes() - self.used_bytes()

    def set_limit(self, size: int = 0) -> None:
        self._limit[active().device] = size

    def _grow(self, size: int) -> _Chunk:
        device = active().device
        limit = self._limit.get(device, 0)
        whole: Any = None
        for _ in range(2):
            try:
                if not limit or self._total.get(device, 0) + size <= limit:
                    whole = self._allocator(size).mem
                    break
            except CUDARuntimeError as error:
                if error.status != 2:
                    raise
            gc.collect()
            self.free_all_blocks()
        else:
            raise OutOfMemoryError(size, self._total.get(device, 0), limit)
        self._total[device] = self._total.get(device, 0) + size
        return _Chunk(whole.ptr, size, whole)

    def _give_back(self, engine: Engine, chunk: _Chunk, queue: Queue) -> None:
        engine.memory[queue.device].set_cached(chunk.ptr, chunk.size, True)
        self._used[queue.device] -= chunk.size
        self._free.setdefault(queue, []).append(chunk)
        engine.poison(queue, chunk.ptr, chunk.size)


def _malloc(size: int) -> MemoryPointer:
    return MemoryPointer(Memory(size), 0)


def default_pool() -> MemoryPool:
    engine: Any = active()
    if not hasattr(engine, "default_pool"):
        engine.default_pool = MemoryPool()
    return engine.default_pool  # type: ignore[no-any-return]


def get_allocator() -> Callable[[int], MemoryPointer]:
    engine: Any = active()
    here = getattr(engine.local, "allocator", None)
    return here or getattr(engine, "allocator", None) or default_pool().malloc


def set_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> None:
    engine: Any = active()
    engine.allocator = allocator or _malloc


@contextlib.contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> Iterator[None]:
    local = active().local
    outer = getattr(local, "allocator", None)
    local.allocator = allocator or _malloc
    try:
        yield
    finally:
        local.allocator = outer


def alloc(size: int) -> MemoryPointer:
    return get_allocator()(size)


class PinnedMemoryPointer(mmap.mmap):
    """Page-locked host memory, with the buffer protocol."""

    ptr: int
    mem: PinnedMemoryPointer


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    memory = PinnedMemoryPointer(-1, size)
    memory.ptr = int(np.frombuffer(memory, np.uint8).ctypes.data)
    memory.mem = memory
    runtime.hostRegister(memory.ptr, size, 0)
    return memory


class PinnedMemory:
    """Raw page-locked host memory: a pointer, freed with the object."""

    def __init__(self, size: int, flags: int = 0) -> None:
        self._engine, self.ptr = active(), 0
        self.ptr = runtime.hostAlloc(size, flags)

    def __del__(self) -> None:
        if self.ptr:
            self._engine.dropped.append(lambda pointer=self.ptr: runtime.freeHost(pointer))  # type: ignore[misc]
