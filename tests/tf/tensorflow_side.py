"""TensorFlow as a writer and reader of checkpoints: its Saver in a graph, its ops, its reader."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from generated import QUANTIZED, Index, Tensor

from gpusaver import DataType

v1 = tf.compat.v1
DEVICES = 3
#: Types of which TensorFlow's CPU has no variables.  Its ops save and restore them nevertheless.
WITHOUT_VARIABLES = frozenset(
    DataType[name] for name in "qint16 quint16 float8_e4m3fnuz float8_e4m3b11fnuz float8_e5m2fnuz".split()
)
#: Types of which TensorFlow reads other slices than the stored ones.
SLICED_FREELY = [
    DataType[name]
    for name in (
        "float32 float64 int32 uint8 int16 int8 complex64 int64 bool qint32 quint8 qint8 bfloat16 complex128 int4 uint4"
    ).split()
]
_CONFIG = v1.ConfigProto(device_count={"CPU": DEVICES}, intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)


class Variables:
    """TensorFlow variables for some tensors in a graph of their own, whole or in parts, spread over ``devices``.

    A context manager: the session lives inside it.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        grids: Mapping[str, Sequence[Index]] | None = None,
        devices: int = 1,
        version: int = v1.train.SaverDef.V2,
    ) -> None:
        self._tensors = tensors
        self._grids = grids or {}
        self._devices = devices
        self._version = version

    def __enter__(self) -> Variables:
        with contextlib.ExitStack() as stack:
            graph = tf.Graph()
            stack.enter_context(graph.as_default())
            self._feeds: dict[Any, Any] = {}
            self._count = 0
            self._parts = {name: self._parts_of(name, tensor) for name, tensor in self._tensors.items()}
            names = {name: parts if name in self._grids else parts[0] for name, parts in self._parts.items()}
            self._saver = v1.train.Saver(names, sharded=self._devices > 1, write_version=self._version)
            self._session = stack.enter_context(v1.Session(graph=graph, config=_CONFIG))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _parts_of(self, name: str, tensor: Tensor) -> list[Any]:
        parts = []
        for index in self._grids.get(name, [(slice(None),) * len(tensor.shape)]):
            values = tensor.array[(*index, ...)]
            with tf.device(f"/cpu:{self._count % self._devices}"):
                holder = v1.placeholder(tf.dtypes.as_dtype(values.dtype) if values.dtype != object else tf.string)
                holder.set_shape(values.shape)
                initial = tf.bitcast(holder, int(tensor.dtype)) if tensor.dtype in QUANTIZED else holder
                variable = v1.get_variable(f"v{self._count}", initializer=initial, use_resource=True)
            if name in self._grids:
                offset = [part.start or 0 for part in index]
                info = v1.Variable.SaveSliceInfo(name, list(tensor.shape), offset, list(values.shape))
                variable._set_save_slice_info(info)
            self._feeds[holder] = values
            self._count += 1
            parts.append(variable)
        return parts

    def save(self, prefix: str | Path) -> str:
        self._session.run([part.initializer for parts in self._parts.values() for part in parts], self._feeds)
        return self._saver.save(self._session, str(prefix), write_meta_graph=False, write_state=False)

    def restore(self, prefix: str | Path) -> dict[str, Any]:
        """Whole tensors, put together from the parts."""
        self._saver.restore(self._session, str(prefix))
        found = self._session.run(self._parts)
        whole: dict[str, Any] = {}
        for name, tensor in self._tensors.items():
            if name not in self._grids:
                whole[name] = found[name][0]
                continue
            whole[name] = tensor.garbage()
            for index, values in zip(self._grids[name], found[name], strict=True):
                whole[name][index] = values
        return whole


def read(prefix: str | Path) -> dict[str, Any]:
    """Every tensor, by TensorFlow's reader."""
    reader = tf.train.load_checkpoint(str(prefix))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def specs(prefix: str | Path) -> dict[str, tuple[DataType, tuple[int, ...]]]:
    """Type and shape of every tensor, by TensorFlow's reader."""
    reader = tf.train.load_checkpoint(str(prefix))
    dtypes = reader.get_variable_to_dtype_map()
    shapes = reader.get_variable_to_shape_map()
    return {name: (DataType(dtypes[name].as_datatype_enum), tuple(shape)) for name, shape in shapes.items()}


def restore_op(prefix: str | Path, wanted: Sequence[tuple[bytes, str, DataType]]) -> list[Any]:
    """By the op under every Saver: ``(name, slice spec, type)`` -> value."""
    names, slices, dtypes = zip(*wanted, strict=True)
    found = tf.raw_ops.RestoreV2(
        prefix=str(prefix),
        tensor_names=list(names),
        shape_and_slices=list(slices),
        dtypes=[tf.dtypes.as_dtype(int(dtype)) for dtype in dtypes],
    )
    return [value.numpy() for value in found]


def save_op(prefix: str | Path, stored: Sequence[tuple[bytes, str, Tensor]]) -> None:
    """By the op under every Saver: ``(name, slice spec, values)``."""
    names, slices, tensors = zip(*stored, strict=True)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(names),
        shape_and_slices=list(slices),
        tensors=[_constant(tensor) for tensor in tensors],
    )


def merge_op(prefixes: Sequence[str | Path], prefix: str | Path) -> None:
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(part) for part in prefixes], destination_prefix=str(prefix), delete_old_dirs=False
    )


def _constant(tensor: Tensor) -> Any:
    if tensor.dtype is DataType.string:
        return tf.constant(tensor.array, tf.string)
    constant = tf.constant(np.ascontiguousarray(tensor.array).reshape(tensor.shape))
    return tf.bitcast(constant, int(tensor.dtype)) if tensor.dtype in QUANTIZED else constant


def slice_spec(shape: Sequence[int], index: Index) -> str:
    """The text form of a part, for the ops."""
    parts = ["-" if part == slice(None) else f"{part.start},{part.stop - part.start}" for part in index]
    return " ".join([*map(str, shape), ":".join(parts)])
