"""Memory of gpusaver's own for copies: pinned on the host, and private on the device.

The host's is ``mmap`` registered with CUDA: page-aligned, so that O_DIRECT takes it as well, and not inherited by
forked children, whose writes would otherwise move its pages under a copy (cudaHostAlloc promises neither).  The
device's is allocated past CuPy's pool, whose arenas belong to the calling thread's streams, and whose out-of-memory
path frees the user's blocks.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import cupy
import numpy as np

from gpusaver.errors import ResourceExhaustedError

#: cudaHostRegisterPortable: pinned for every device of the process.
_PORTABLE = 1
OUT_OF_MEMORY = 2


class PinnedBuffer:
    """See :class:`gpusaver.device.base.HostBuffer`."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_DONTFORK"):
            self._memory.madvise(mmap.MADV_DONTFORK)
        array = np.frombuffer(self._memory, np.uint8)
        array[:: mmap.PAGESIZE] = 0  # pages are made now, not one by one under the first copy
        self.view = array.data
        self._address: int | None = array.ctypes.data
        try:
            cupy.cuda.runtime.hostRegister(self._address, nbytes, _PORTABLE)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            self._address = None
            if error.status != OUT_OF_MEMORY:
                raise
            raise ResourceExhaustedError(f"cannot pin {nbytes} bytes of host memory for copies: {error}") from error

    def free(self) -> None:
        """Unregisters first: unmapping registered memory leaves the driver with pages that are no longer there."""
        if self._address is not None:
            cupy.cuda.runtime.hostUnregister(self._address)
            self._address = None


class _Allocation:
    """Frees a device allocation when it is dropped."""

    def __init__(self, pointer: int, device: int) -> None:
        self._pointer, self._device = pointer, device

    def __del__(self) -> None:
        with contextlib.suppress(Exception), cupy.cuda.Device(self._device):
            cupy.cuda.runtime.free(self._pointer)


class DeviceMemory:
    """``nbytes`` bytes on the current device, outside every pool; freed when the last array on them is gone.

    Raises ResourceExhaustedError if the device has no room.
    """

    def __init__(self, nbytes: int) -> None:
        size = max(nbytes, 1)
        try:
            pointer = cupy.cuda.runtime.malloc(size)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status == OUT_OF_MEMORY:
                raise ResourceExhaustedError(f"no room for {nbytes} bytes on the device: {error}") from error
            raise
        device = cupy.cuda.Device().id
        self.nbytes = nbytes
        self.pointer = int(pointer)
        self._memory = cupy.cuda.UnownedMemory(pointer, size, _Allocation(pointer, device), device)

    def array(self, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A CuPy array on a part of it."""
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(self._memory, start))
