"""Attributes of nodes: Python values <-> AttrValue.

::

    type -> DataType      shape -> tuple, None for an unknown size; None: unknown rank      string -> bytes
    tensor -> NumPy array (a Const that cannot be read stays a TensorProto)      func -> NameAttrList      list -> list
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpusaver.errors import Error
from gpusaver.metagraph.nodes import as_attr, node
from gpusaver.metagraph.tensors import shape_tuple, tensor_array, tensor_proto
from gpusaver.protos.graph_pb2 import AttrValue, NodeDef
from gpusaver.protos.types_pb2 import TensorProto
from gpusaver.tensor import DataType

_NUMBERS = frozenset(map(int, DataType))


def from_attr(value: AttrValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "list":
        for field, _ in value.list.ListFields():
            items = getattr(value.list, field.name)
            return [_plain(field.name, item) for item in items]
        return []
    return None if kind is None else _plain(kind, getattr(value, kind))


def _plain(kind: str, value: Any) -> Any:
    if kind == "type":
        return DataType(value) if value in _NUMBERS else DataType.invalid
    if kind == "shape":
        sizes = shape_tuple(value)
        return None if sizes is None else tuple(None if size < 0 else size for size in sizes)
    if kind == "tensor":
        try:
            return tensor_array(value)
        except Error:  # said when it is run
            return value
    return value


def is_of_kind(value: Any, kind: str) -> bool:
    """Whether a decoded attribute is what a row of the table says; see :mod:`gpusaver.compat.v1.table`."""
    if kind.startswith("list("):
        return isinstance(value, list) and all(is_of_kind(item, kind[len("list(") : -1]) for item in value)
    if kind == "shape":
        return value is None or isinstance(value, tuple)
    if isinstance(value, DataType) or kind == "type":
        return isinstance(value, DataType) and kind == "type"
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    kinds: dict[str, Any] = {"int": int, "float": float, "string": (bytes, str), "tensor": (np.ndarray, TensorProto)}
    return isinstance(value, kinds[kind])


def to_shape(shape: Any) -> tuple[int, ...] | None:
    """As messages have it: -1 for an unknown size."""
    return None if shape is None else tuple(-1 if size is None else size for size in shape)


def to_node(op: Any, inputs: list[str]) -> NodeDef:
    """The NodeDef of an operation: as it was imported, or from its attributes."""
    if op.imported is not None:
        made = NodeDef()
        made.CopyFrom(op.imported)
        made.name, made.device = op.name, op.device
        del made.input[:]
        made.input.extend(inputs)
        return made
    attrs = {name: _encoded(value, op.attrs.get("dtype")) for name, value in op.attrs.items()}
    return node(op.type, op.name, inputs, op.device, **attrs)


def _encoded(value: Any, dtype: Any) -> AttrValue:
    if isinstance(value, np.ndarray):
        value = tensor_proto(value, dtype)
    elif isinstance(value, tuple):
        value = to_shape(value)
    return as_attr(value)
