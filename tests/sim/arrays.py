"""``cupy.ndarray`` of the simulated CuPy, and the functions that make arrays.

An array is a NumPy view into the arena of its device plus a reference to the memory; what is done with it is queued in
the current stream.  Work that is queued holds no reference to the arrays, as on a real device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from sim import runtime
from sim.pools import MemoryPointer, UnownedMemory, alloc
from sim.runtime import _on_device
from sim.state import active
from sim.streams import Device, Event, get_current_stream

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Flags:
    def __init__(self, view: Any, is_owner: bool) -> None:
        self.c_contiguous, self.f_contiguous = view.flags.c_contiguous, view.flags.f_contiguous
        self.owndata = is_owner

    def __getitem__(self, name: str) -> bool:
        return bool(getattr(self, name.lower()))


class Capsule:
    """What ``__dlpack__`` hands over: for one consumer."""

    def __init__(self, array: ndarray) -> None:
        self.array: ndarray | None = array


class ndarray:
    __module__ = "cupy"
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: MemoryPointer | None = None, strides: Any = None, order: str = "C"
    ) -> None:
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        dtype = np.dtype(dtype)
        if memptr is None:
            memptr = alloc(math.prod(shape) * dtype.itemsize)
        self.data = memptr
        self.base: ndarray | None = None
        self._view = np.empty(shape, dtype) if 0 in shape else _view(memptr, shape, dtype, strides, order)

    # -------------------------------------------------------------------------------------------------- what it is

    dtype = property(lambda self: self._view.dtype)
    shape = property(lambda self: self._view.shape)
    strides = property(lambda self: self._view.strides)
    ndim = property(lambda self: self._view.ndim)
    size = property(lambda self: self._view.size)
    itemsize = property(lambda self: self._view.itemsize)
    nbytes = property(lambda self: self._view.nbytes)
    device = property(lambda self: Device(self.data.device_id))
    flags = property(lambda self: Flags(self._view, self.base is None))
    T = property(lambda self: self._as_view(self._view.T))

    def __len__(self) -> int:
        return len(self._view)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __repr__(self) -> str:
        return f"<simulated cupy.ndarray {self.dtype}{list(self.shape)} on device {self.data.device_id}>"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "stream": get_current_stream().ptr or runtime.streamLegacy,
            "version": 3,
            "strides": None if self._view.flags.c_contiguous else self.strides,
            "data": (self.data.ptr if self.size else 0, False),
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.data.device_id

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Capsule:
        """The consumer's stream waits for the current one; -1 asks for no synchronisation."""
        if self.dtype.kind not in "uifcb" and self.dtype != _BFLOAT16:
            raise BufferError("dtype is not supported for dlpack export")
        with self.device:
            current = get_current_stream()
            if stream not in (None, -1, current.ptr or runtime.streamLegacy):
                event = Event()
                event.record(current)
                runtime.streamWaitEvent(stream, event.ptr)
        return Capsule(self)

    # ------------------------------------------------------------------------------------------- views of its memory

    def __getitem__(self, index: Any) -> ndarray:
        index = index if isinstance(index, tuple) else (index,)
        for part in index:
            if not (part is None or part is Ellipsis or isinstance(part, slice | int | np.integer)):
                active().refuse(f"indexing with {type(part).__name__} is not simulated")
        return self._as_view(self._view[index if Ellipsis in index else (*index, Ellipsis)])

    def view(self, dtype: Any = None) -> ndarray:
        return self._as_view(self._view.view(dtype) if dtype is not None else self._view[...])

    def reshape(self, *shape: Any) -> ndarray:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int | np.integer) else shape
        view = self._view.reshape(shape)
        if self.size and not np.may_share_memory(view, self._view):
            return self.copy().reshape(shape)
        return self._as_view(view)

    def transpose(self, *axes: Any) -> ndarray:
        return self._as_view(self._view.transpose(*axes))

    def ravel(self) -> ndarray:
        return self.reshape(-1)

    def _as_view(self, view: Any) -> ndarray:
        array = ndarray.__new__(ndarray)
        array._view, array.base = view, self.base if self.base is not None else self
        if self.size:
            array.data = self.data + (view.ctypes.data - self._view.ctypes.data)
        else:
            array.data = self.data
        return array

    # --------------------------------------------------------------------------------------------- work for the device

    def __setitem__(self, index: Any, value: Any) -> None:
        target = self[index]
        if not isinstance(value, ndarray):
            target.fill(value)
            return
        if (target.shape, target.strides) == (value.shape, value.strides):
            if target.data.ptr == value.data.ptr:
                return
            if target.dtype == value.dtype and target._view.flags.c_contiguous:
                target.data.copy_from_device_async(value.data, value.nbytes)
                return
        _launch("copy", target, [value], lambda out, source: np.copyto(out, source, casting="unsafe"))

    def fill(self, value: Any) -> None:
        if isinstance(value, np.ndarray):
            if value.shape != ():
                raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
            value = value.item()
        _launch("fill", self, [], lambda out: out.fill(value))

    def copy(self, order: str = "C") -> ndarray:
        """On the current device, whichever the array is on."""
        if self.data.device_id != active().device:
            with self.device:
                source = ascontiguousarray(self) if self.ndim else self
            result = empty(self.shape, self.dtype)
            result.data.copy_from_device_async(source.data, self.nbytes)
            return result
        result = ndarray(self.shape, self.dtype, order="F" if order == "F" else "C")
        if self.size:
            result[...] = self
        return result

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> ndarray:
        if not copy and self.dtype == np.dtype(dtype):
            return self
        result = ndarray(self.shape, dtype)
        result[...] = self
        return result

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> Any:
        if out is not None and (out.dtype, out.shape) != (self.dtype, self.shape):
            raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
        host = np.empty(self.shape, self.dtype) if out is None else out
        stream = stream or get_current_stream()
        with self.device:
            with stream:
                source = self if self._view.flags.c_contiguous else ascontiguousarray(self)
            source.data.copy_to_host_async(host.ctypes.data, self.nbytes, stream)
            if blocking:
                stream.synchronize()
        return host

    def set(self, arr: Any, stream: Any = None) -> None:
        if (arr.dtype, arr.shape) != (self.dtype, self.shape):
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if not self._view.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        arr = np.ascontiguousarray(arr)
        stream = stream or get_current_stream()
        with self.device:
            self.data.copy_from_host_async(arr.ctypes.data, self.nbytes, stream)

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    __bool__ = lambda self: bool(self.get())  # noqa: E731
    __int__ = lambda self: int(self.get())  # noqa: E731
    __float__ = lambda self: float(self.get())  # noqa: E731

    def __iadd__(self, other: Any) -> ndarray:
        return _binary(np.add, self, other, out=self)

    def __isub__(self, other: Any) -> ndarray:
        return _binary(np.subtract, self, other, out=self)

    def __imul__(self, other: Any) -> ndarray:
        return _binary(np.multiply, self, other, out=self)

    def __eq__(self, other: object) -> ndarray:  # type: ignore[override]
        return _binary(np.equal, self, other)

    def __add__(self, other: Any) -> ndarray:
        return _binary(np.add, self, other)

    def __sub__(self, other: Any) -> ndarray:
        return _binary(np.subtract, self, other)

    def __mul__(self, other: Any) -> ndarray:
        return _binary(np.multiply, self, other)

    def __matmul__(self, other: Any) -> ndarray:
        return _binary(np.matmul, self, other)

    __radd__, __rmul__ = __add__, __mul__

    def sum(self) -> ndarray:
        return _binary(lambda mine, _: np.sum(mine), self, 0)

    def all(self) -> ndarray:
        return _binary(lambda mine, _: np.all(mine), self, 0)


def _view(memptr: MemoryPointer, shape: Any, dtype: Any, strides: Any, order: str) -> Any:
    engine = active()
    device = engine.device_of(memptr.ptr)
    if device is None:
        engine.refuse(f"an array is made on {memptr.ptr:#x}, which is on no device")
    if strides is None:
        steps = np.cumprod([dtype.itemsize, *(shape if order == "F" else shape[::-1])])[:-1].tolist()
        strides = tuple(steps) if order == "F" else tuple(steps[::-1])
    return engine.memory[device].array_view(memptr.ptr, shape, dtype, strides)


def _launch(what: str, out: ndarray, inputs: list[ndarray], function: Callable[..., Any]) -> None:
    """Queues ``function(view of out, *views of inputs)`` in the current stream, as a kernel of CuPy's own."""
    if not out.size:
        return
    with active().calling(what) as engine:
        queue = engine.stream(get_current_stream().ptr)
        checks = []
        for array in (out, *inputs):
            if array.data.device_id != engine.device:
                raise ValueError(
                    f"The device where the array resides ({array.data.device_id}) is different from the current device "
                    f"({engine.device}). Peer access is unavailable between these devices."
                )
            _check_dtype(array.dtype)
            start, end = _byte_bounds(array._view)
            shift = array.data.ptr - array._view.ctypes.data
            checks.append(_on_device(engine, queue, start + shift, end - start))
        views = [array._view for array in (out, *inputs)]

        def run() -> None:
            for check in checks:
                check()
            function(*views)

        engine.enqueue(queue, what, run)


def _check_dtype(dtype: np.dtype[Any]) -> None:
    """What CuPy's kernels know: not float8, int4 and their kin, which it only stores."""
    if dtype != _BFLOAT16 and (dtype.kind not in "biufc" or dtype.isbuiltin == 2):
        raise ValueError(f"Unsupported dtype {dtype}")


def _byte_bounds(view: Any) -> tuple[int, int]:
    first = last = view.ctypes.data
    for length, stride in zip(view.shape, view.strides, strict=True):
        first, last = first + min(0, (length - 1) * stride), last + max(0, (length - 1) * stride)
    return first, last + view.itemsize


def _binary(function: Callable[..., Any], mine: ndarray, other: Any, out: ndarray | None = None) -> ndarray:
    """A new array, or ``out``, gets the result."""
    if isinstance(other, np.ndarray):
        raise TypeError(f"Unsupported type {type(other)}")
    operands = [mine, other] if isinstance(other, ndarray) else [mine]
    constants = () if isinstance(other, ndarray) else (other,)
    if out is None:
        zeros = [np.zeros(operand.shape, operand.dtype) for operand in operands]
        model = np.asarray(function(*zeros, *constants))
        out = empty(model.shape, model.dtype)
    _launch(
        "arithmetic", out, operands, lambda to, *args: np.copyto(to, function(*args, *constants), casting="same_kind")
    )
    return out


# ------------------------------------------------------------------------------------------------------------ creation


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    result = empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype, order)
    result.fill(fill_value)
    return result


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 0, dtype, order)


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, dtype, order)


def empty_like(a: ndarray, dtype: Any = None) -> ndarray:
    return empty(a.shape, a.dtype if dtype is None else dtype)


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    first, last = (0, start) if stop is None else (start, stop)
    return array(np.arange(first, last, step, dtype=dtype))


def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    """The host's bytes are taken at once, the device's are written when their turn comes."""
    if not isinstance(obj, ndarray) and hasattr(obj, "__cuda_array_interface__"):
        obj = _from_interface(obj)
    if isinstance(obj, ndarray):
        if obj.data.device_id != active().device:
            obj, copy = obj.copy(), False
        return obj.astype(obj.dtype if dtype is None else dtype, copy=copy)
    host = np.ascontiguousarray(np.asarray(obj, dtype)) if np.ndim(obj) else np.asarray(obj, dtype)
    _check_dtype(host.dtype)
    result = empty(host.shape, host.dtype.newbyteorder("="))
    result.set(host.astype(result.dtype))
    return result


def asarray(a: Any, dtype: Any = None, order: Any = None) -> ndarray:
    return array(a, dtype, copy=False)


def ascontiguousarray(a: ndarray, dtype: Any = None) -> ndarray:
    if a._view.flags.c_contiguous and (dtype is None or a.dtype == np.dtype(dtype)):
        return a
    return a.astype(a.dtype if dtype is None else dtype)


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> Any:
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a)


def copyto(dst: ndarray, src: Any) -> None:
    dst[...] = src


def from_dlpack(array: Any, *, device: Any = None, copy: Any = None) -> ndarray:
    kind, number = array.__dlpack_device__()
    if kind == 1:
        raise TypeError(
            "CPU arrays cannot be directly imported to CuPy. Use `cupy.array(numpy.from_dlpack(input))` instead."
        )
    with Device(number):
        stream = get_current_stream().ptr or runtime.streamLegacy
        capsule = array.__dlpack__(stream=stream, max_version=(1, 0), copy=copy)
    found, capsule.array = capsule.array, None
    if found is None:
        raise ValueError("A DLPack tensor object cannot be consumed multiple times")
    return found.view()  # type: ignore[no-any-return]


def _from_interface(obj: Any) -> ndarray:
    """CuPy waits, on the host, for the stream that the producer names."""
    interface = obj.__cuda_array_interface__
    pointer, _ = interface["data"]
    shape, dtype, strides = interface["shape"], np.dtype(interface["typestr"]), interface.get("strides")
    device = active().device if pointer == 0 else -1
    result = ndarray(
        shape, dtype, MemoryPointer(UnownedMemory(pointer, math.prod(shape) * dtype.itemsize, obj, device), 0), strides
    )
    stream = interface.get("stream")
    if stream is not None:
        runtime.streamSynchronize(stream)
    return result
