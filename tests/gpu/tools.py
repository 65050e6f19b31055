"""What tests on a device share: states of every kind of array, their bytes, and work that keeps the device busy."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import gpusaver

State = dict[str, Any]
#: What arrays are filled with when their values must be gone; as floats, a number.
GARBAGE = 0x3C


class Gpu(NamedTuple):
    """``cupy``, real or simulated.  A simulated device is small and slow, so there rounds and sizes are."""

    cupy: Any
    is_simulated: bool
    most_rounds: int | None = None

    def rounds(self, count: int) -> int:
        return min(count, 3 if self.is_simulated else self.most_rounds or count)

    def size(self, elements: int) -> int:
        return max(elements >> 8, 64) if self.is_simulated else elements

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def free_nbytes(self) -> int:
        """Of the driver, once everything that nobody holds has been given back."""
        gc.collect()
        self.synchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()
        return int(self.cupy.cuda.runtime.memGetInfo()[0])

    def upload(self, host: np.ndarray[Any, Any]) -> Any:
        """Also of types that CuPy stores but does not know."""
        octets = self.cupy.asarray(np.ascontiguousarray(host).reshape(-1).view(np.uint8))
        return octets.view(host.dtype).reshape(host.shape)

    def streams(self) -> dict[str, Any]:
        """Of each kind; on the null stream work waits for that of the blocking one, and the reverse."""
        stream = self.cupy.cuda.Stream
        return {"null": stream.null, "blocking": stream(), "non-blocking": stream(non_blocking=True)}


def host_values(gpu: Gpu, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random bytes in the shape of a model: large and small tensors of many types, a scalar, an empty one."""
    random = np.random.default_rng(seed)

    def array(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        octets = random.integers(0, 256, int(np.prod(shape)) * np.dtype(dtype).itemsize, np.uint8)
        return (octets & 1 if np.dtype(dtype) == np.bool_ else octets).view(dtype).reshape(shape)

    side = gpu.size(1 << 21)
    values = {
        "large": array((side, 3), np.float32),
        "middle": array((side // 8, 5), np.float64),
        "half": array((1000, 33), np.float16),
        "bfloat16": array((777, 13), ml_dtypes.bfloat16),
        "float8": array((501,), ml_dtypes.float8_e4m3fn),
        "complex": array((99, 7), np.complex64),
        "flags": array((1001,), np.bool_),
        "scalar": array((), np.int64),
        "empty": array((0, 4), np.float32),
    }
    return values | {f"small/{number}": array((number,), np.int16) for number in range(1, 60)}


def device_state(gpu: Gpu, values: dict[str, np.ndarray[Any, Any]]) -> State:
    """The values on the device, some of them strided; ``host_state`` has them under the same names."""
    state = {name: gpu.upload(value) for name, value in values.items()}
    return state | _views(state)


def host_state(values: dict[str, np.ndarray[Any, Any]]) -> State:
    return dict(values) | _views(values)


def _views(arrays: State) -> State:
    """Of the smaller arrays, in place of them: whoever changes both would change one value twice."""
    return {
        "half": arrays["half"].T,
        "middle": arrays["middle"][::-1, ::2],
        "bfloat16": arrays["bfloat16"][1::3, 1:],
    }


def plain(array: Any) -> Any:
    """The array as unsigned integers, which every kernel of CuPy knows."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def assign(state: State, source: State) -> None:
    """Queues copies in the current stream."""
    for name, array in state.items():
        if array.size:
            plain(array)[...] = plain(source[name])


def spoil(state: State) -> None:
    """Queues the end of all values in the current stream."""
    for array in state.values():
        if array.size:
            plain(array).fill(GARBAGE)


def octets(array: Any) -> bytes:
    """In row-major order, of a NumPy or a CuPy array."""
    host = array if isinstance(array, np.ndarray | np.generic) else plain(array).get()
    return np.ascontiguousarray(host).tobytes()


def contents(state: State) -> dict[str, bytes]:
    return {name: octets(array) for name, array in state.items()}


def assert_holds(prefix: str, expected: dict[str, bytes]) -> None:
    """The checkpoint, its checksums verified, bit for bit."""
    found = gpusaver.load(prefix)
    assert found.keys() == expected.keys()
    wrong = [name for name, array in found.items() if octets(array) != expected[name]]
    assert not wrong, f"{prefix}: other values in {wrong}"


def data_files(directory: Any) -> dict[str, bytes]:
    found = {}
    for name in sorted(os.listdir(directory)):
        if ".data-" in name or name.endswith(".index"):
            with open(os.path.join(directory, name), "rb") as file:
                found[name] = file.read()
    return found


def in_child(call: Callable[[], bool]) -> int:
    """The exit status of a forked child: 0 if the call returned true there, negative if a signal ended it."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            status = 0 if call() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Load:
    """Matrix products that keep a stream busy, milliseconds a call."""

    def __init__(self, gpu: Gpu) -> None:
        side = 32 if gpu.is_simulated else 4096
        self._matrix = gpu.cupy.full((side, side), 1 / side, np.float32)
        self._products = 2
        gpu.synchronize()

    def queue(self) -> None:
        product = self._matrix
        for _ in range(self._products):
            product = product @ self._matrix
