"""Which values can be saved, how their bytes are reached, and how a restored value gets back into them.

==============================================  ====================================  ===========================
value                                           saved                                 restored
==============================================  ====================================  ===========================
NumPy, CuPy; any strides and byte order         from its own memory                   into its own memory
PyTorch, and others with ``__dlpack__``         from its own memory, detached         into its own memory
``__cuda_array_interface__``, buffer protocol   from its own memory                   into its own memory
read-only arrays, JAX                           from its own memory                   a new one replaces it
int, float, complex, bool, NumPy scalars        as a scalar tensor                    a new one replaces it
str, bytes, and arrays of them                  as a string tensor                    a new one replaces it
==============================================  ====================================  ===========================

Everything else is a TypeError that names the leaf.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from gpusaver.device.base import Runtime
from gpusaver.device.host import HostRuntime
from gpusaver.errors import Error, FailedPreconditionError
from gpusaver.tensor import DataType, TensorSpec

HOST = HostRuntime()

_DTYPE = operator.attrgetter("dtype")
_SHAPE = operator.attrgetter("shape")
#: Of NumPy's dtypes: objects, bytes, str.
_TEXT_KINDS = "OSU"

_NO_ARRAY = "expected an array, a Variable, a number, str, bytes, or dicts and lists of these"


class Admitted(NamedTuple):
    """A value that can be saved: where it lives, as what, and how to put a restored one in its place.

    ``array`` is a view on the value's own memory that ``runtime`` understands.  For strings it is None and ``items``
    has the elements.  ``rebuild`` makes a value of the same kind from an array (strings: a list of bytes) if the
    value cannot be overwritten; None means that it can.
    """

    runtime: Runtime
    array: Any
    spec: TensorSpec
    items: list[bytes] | None = None
    rebuild: Callable[[Any], Any] | None = None


def admit(value: Any, name: str, dtype: DataType | None = None) -> Admitted:
    """Raises TypeError, naming the leaf, for what cannot be stored.

    ``dtype`` is a type that shares its NumPy dtype with another (qint8 is int8 to NumPy); it must fit the array.
    """
    if type(value) is np.ndarray:
        return _from_numpy(value, name, dtype)
    if isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return _from_scalar(value, name, dtype)
    try:
        array, rebuild = _foreign(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        if isinstance(error, Error):
            raise
        raise TypeError(f"{name}: {type(value).__name__} cannot be stored in a checkpoint: {error}") from error
    if isinstance(array, np.ndarray):
        admitted = _from_numpy(array, name, dtype or _torch_dtype(value))
        return admitted._replace(rebuild=rebuild) if rebuild else admitted
    found = dtype or _torch_dtype(value) or _dtype_of(array.dtype, name)
    _check_dtype(found, array.dtype, name)
    if array.dtype.byteorder == ">":  # kernels and copies take the bytes as they are
        raise TypeError(f"{name}: a big-endian array on a device cannot be stored; convert it to little-endian")
    runtime = cuda_module().cuda_runtime(array.device.id)
    return Admitted(runtime, array, _spec(found, tuple(array.shape)), None, rebuild)


def array_types() -> frozenset[type]:
    """Of arrays that are taken as they are: NumPy's and, where it has been imported, CuPy's."""
    cupy = getattr(sys.modules.get("cupy"), "ndarray", None)
    return frozenset((np.ndarray,) if cupy is None else (np.ndarray, cupy))


def runtimes_of(values: Sequence[Any]) -> list[Runtime] | None:
    """Where arrays of NumPy's or CuPy's own class live; None if there are others among them."""
    types = set(map(type, values))
    if types <= {np.ndarray}:
        return [HOST] * len(values)
    if types - array_types():
        return None
    if np.ndarray in types:
        devices = [None if type(value) is np.ndarray else value.data.device_id for value in values]
    else:
        devices = [value.data.device_id for value in values]
    runtimes = {device: HOST if device is None else cuda_module().cuda_runtime(device) for device in set(devices)}
    if len(runtimes) == 1:
        return list(runtimes.values()) * len(values)
    return list(map(runtimes.__getitem__, devices))


def plain_types(dtypes: Iterable[np.dtype[Any]]) -> dict[np.dtype[Any], DataType | None]:
    """As what arrays of these are stored byte for byte; None for those that take another form, or none."""
    return {
        dtype: known_dtype(dtype) if dtype.isnative and dtype.kind not in _TEXT_KINDS else None for dtype in set(dtypes)
    }


def specs_of(arrays: Sequence[Any]) -> list[TensorSpec] | None:
    """Of arrays of NumPy's or CuPy's own class; None if :func:`admit` has to look at one of them."""
    dtypes = list(map(_DTYPE, arrays))
    types = plain_types(dtypes)
    if None in types.values():
        return None
    return list(map(_spec, map(types.__getitem__, dtypes), map(_SHAPE, arrays)))


def _from_numpy(array: np.ndarray[Any, Any], name: str, dtype: DataType | None) -> Admitted:
    kind = array.dtype.kind
    if kind in _TEXT_KINDS:
        return _from_strings(array, name)
    found = dtype or _dtype_of(array.dtype, name)
    if dtype is not None:
        _check_dtype(found, array.dtype, name)
    rebuild = None if array.flags.writeable else np.asarray
    return Admitted(HOST, array, _spec(found, array.shape), None, rebuild)


#: Plans keep one for each variable, and many variables are alike.
_spec = functools.lru_cache(maxsize=4096)(TensorSpec)


@functools.lru_cache(maxsize=256)
def known_dtype(dtype: np.dtype[Any]) -> DataType | None:
    """The type of an array with this dtype, or None if there is none."""
    try:
        return DataType.from_numpy(dtype)
    except TypeError:
        return None


def _dtype_of(dtype: np.dtype[Any], name: str) -> DataType:
    found = known_dtype(dtype)
    if found is None:
        raise TypeError(f"{name}: an array of dtype {dtype} cannot be stored in a checkpoint")
    return found


def _check_dtype(dtype: DataType, actual: np.dtype[Any], name: str) -> None:
    wanted = dtype.numpy_dtype
    if actual.newbyteorder("=") != wanted and not (actual.kind in "iu" and actual.itemsize == wanted.itemsize):
        raise TypeError(f"{name}: declared {dtype.name} (NumPy {wanted}), but the array is {actual}")


def _from_scalar(value: Any, name: str, dtype: DataType | None) -> Admitted:
    if isinstance(value, str | bytes):
        is_text = isinstance(value, str)
        item = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else bytes(value)

        def rebuild_text(items: Sequence[bytes]) -> str | bytes:
            return items[0].decode("utf-8", "surrogateescape") if is_text else items[0]

        return Admitted(HOST, None, TensorSpec(DataType.string, ()), [item], rebuild_text)
    if isinstance(value, np.generic):
        array = np.asarray(value)
        if array.dtype.kind in "OMmV" and known_dtype(array.dtype) is None:
            raise TypeError(f"{name}: a scalar of dtype {array.dtype} cannot be stored in a checkpoint")
        found = dtype or _dtype_of(array.dtype, name)
        return Admitted(HOST, array, TensorSpec(found, ()), None, lambda restored: restored[()])
    # bool first: it is an int to Python.
    kind = next(kind for kind in (bool, int, float, complex) if isinstance(value, kind))
    scalar = {bool: np.bool_, int: np.int64, float: np.float64, complex: np.complex128}[kind]
    try:
        array = np.array(value, dtype=scalar)
    except OverflowError as error:
        raise OverflowError(f"{name}: {value} does not fit int64, the type a Python int is stored as") from error
    return Admitted(HOST, array, TensorSpec(DataType.from_numpy(array.dtype), ()), None, lambda a: kind(a[()]))


def _from_strings(array: np.ndarray[Any, Any], name: str) -> Admitted:
    items: list[bytes] = []
    texts = 0
    for item in array.reshape(-1).tolist():
        if isinstance(item, str):
            texts += 1
            items.append(item.encode("utf-8", "surrogateescape"))
        elif isinstance(item, bytes):
            items.append(item)
        else:
            raise TypeError(
                f"{name}: an array of Python objects can be stored only if all are str or bytes; "
                f"one is {type(item).__name__}"
            )
    is_text = texts > 0 or array.dtype.kind == "U"
    if texts and texts != len(items):
        raise TypeError(f"{name}: an array of both str and bytes would not come back as it was")

    def rebuild(restored: Sequence[bytes]) -> np.ndarray[Any, Any]:
        decoded: Sequence[Any] = [s.decode("utf-8", "surrogateescape") for s in restored] if is_text else restored
        if array.dtype.kind in "SU":  # as wide as before, or wider
            fixed = np.array(decoded, dtype=array.dtype.kind).reshape(array.shape)
            return fixed.astype(np.promote_types(fixed.dtype, array.dtype))
        result = np.empty(len(decoded), dtype=object)
        result[:] = decoded
        return result.reshape(array.shape)

    return Admitted(HOST, None, TensorSpec(DataType.string, array.shape), items, rebuild)


def _foreign(value: Any) -> tuple[Any, Callable[[Any], Any] | None]:
    """``value`` as a NumPy or CuPy array on the same memory, and how to rebuild it if it must not be written."""
    if _is_of("cupy", "ndarray", value):
        return value, None
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("its mask would be lost")
    if isinstance(value, np.ndarray):  # a subclass, such as memmap
        return np.asarray(value), None
    if _is_of("torch", "Tensor", value):
        return _from_torch(value), None
    if _is_of("jax", "Array", value):

        def rebuild(restored: Any) -> Any:
            return sys.modules["jax"].device_put(restored, value.sharding)

        return _from_jax(value), rebuild
    if isinstance(value, type):  # has the attributes of its instances, but no memory
        raise TypeError(_NO_ARRAY)
    if hasattr(value, "__cuda_array_interface__"):
        cuda = cuda_module()
        array = cuda.from_cuda_array_interface(value)
        is_read_only = value.__cuda_array_interface__["data"][1]
        return array, functools.partial(cuda.to_device, device=array.device.id) if is_read_only else None
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(value), None
    try:
        array = np.asarray(memoryview(value))
    except TypeError:
        raise TypeError(_NO_ARRAY) from None
    if array.dtype.kind in "SUO":
        raise TypeError(f"its memory holds elements of format {memoryview(value).format!r}, not numbers")
    return array, None


def cuda_module() -> ModuleType:
    """:mod:`gpusaver.device.cuda`, once it is needed.  FailedPreconditionError where CuPy is not installed."""
    module = sys.modules.get("gpusaver.device.cuda")
    try:
        return module or importlib.import_module("gpusaver.device.cuda")
    except ImportError as error:
        raise FailedPreconditionError(
            f"arrays on a CUDA device need CuPy, which cannot be imported: {error}. Install gpusaver[cuda13], or "
            "gpusaver[cuda12] for an older driver"
        ) from error


def _from_jax(value: Any) -> Any:
    """Its own memory if that is the host's or one CUDA device's, a copy in the host's if it is spread over several."""
    with contextlib.suppress(BufferError, TypeError, ValueError, RuntimeError):
        if value.__dlpack_device__()[0] == 2:  # kDLCUDA
            return _from_dlpack(value)
    return np.asarray(value)


def _is_of(library: str, kind: str, value: Any) -> bool:
    """Whether ``value`` is an instance of a class, or of one derived from it, without importing the library."""
    module = sys.modules.get(library)
    expected = getattr(module, kind, None)
    return expected is not None and isinstance(value, expected)


def _from_dlpack(value: Any) -> Any:
    device_type, _ = value.__dlpack_device__()
    if device_type in (1, 3):  # kDLCPU, kDLCUDAHost
        array = np.from_dlpack(value)
        return array if array.flags.writeable or _says_read_only(value) else np.asarray(_Writable(array))
    return cuda_module().from_dlpack(value)


def _says_read_only(value: Any) -> bool:
    """Of a producer whose array NumPy holds to be read-only: DLPack before 1.0 cannot say so, and means writable."""
    try:
        return "versioned" in repr(value.__dlpack__(max_version=(1, 0)))
    except TypeError:
        return False


class _Writable:
    """The memory of an array, without the ban on writing."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._owner = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _torch_dtype(value: Any) -> DataType | None:
    """The type of a PyTorch tensor whose dtype NumPy lacks; it travels as integers of the same width."""
    if not _is_of("torch", "Tensor", value):
        return None
    return DataType.__members__.get(str(value.dtype).removeprefix("torch."))


def _from_torch(value: Any) -> Any:
    torch = sys.modules["torch"]
    tensor = value.detach()
    dtype = _torch_dtype(value)
    is_extension = dtype is not None and dtype.numpy_dtype.isbuiltin != 1  # bfloat16, float8: not NumPy's own
    if dtype is not None and is_extension:
        tensor = tensor.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    if tensor.device.type != "cpu":
        return _from_dlpack(tensor)
    return tensor.numpy().view(dtype.numpy_dtype) if dtype is not None and is_extension else tensor.numpy()
