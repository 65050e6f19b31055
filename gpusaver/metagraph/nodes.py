"""One node of a graph, and the names that its inputs use.

::

    inputs: "w"          output 0 of the node w           "w:1"    output 1
            "^w"         a control input: w runs before; control inputs come last
    attributes: Python values; bool, int, float, str and bytes as such, DataType for a type, a tuple for a shape,
                a TensorProto for a constant, a list for a list of those
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from gpusaver.bundle.coding import field
from gpusaver.metagraph.tensors import shape_proto, tensor_proto
from gpusaver.protos.graph_pb2 import AttrValue, NodeDef
from gpusaver.protos.types_pb2 import TensorProto
from gpusaver.tensor import DataType

_NODE_NAME = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*")


def node(op: str, name: str, inputs: Iterable[str] = (), device: str = "", **attributes: Any) -> NodeDef:
    """A NodeDef.  An attribute may be an AttrValue that is ready."""
    return NodeDef.FromString(node_octets(op, name, inputs, device, **attributes))


def node_octets(op: str, name: str, inputs: Iterable[str] = (), device: str = "", **attributes: Any) -> bytes:
    """A NodeDef, serialized: of a large graph that takes a third of the time of its messages.

    The tags are those of tensorflow/core/framework/node_def.proto (specification, section 9).
    """
    octets = bytearray(field(b"\x0a", name.encode()) + field(b"\x12", op.encode()))
    for text in inputs:  # of some nodes one for each variable
        octets += field(b"\x1a", text.encode())
    if device:
        octets += field(b"\x22", device.encode())
    for key in sorted(attributes):
        value = attributes[key]
        # Of few values, in many nodes: types, shapes, flags.
        is_frequent = isinstance(value, DataType | tuple | bool)
        octets += _frequent_entry(key, value) if is_frequent else _attr_entry(key, value)
    return bytes(octets)


def _attr_entry(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        attr = field(b"\x12", value.encode("utf-8", "surrogateescape"))
    else:
        attr = as_attr(value).SerializeToString(deterministic=True)
    return field(b"\x2a", field(b"\x0a", key.encode()) + field(b"\x12", attr))


_frequent_entry = functools.lru_cache(maxsize=4096, typed=True)(_attr_entry)


def constant(name: str, value: Any, device: str = "") -> bytes:
    """A Const of ``value``, anything that :func:`gpusaver.metagraph.tensors.tensor_proto` takes or gave; serialized."""
    proto = value if isinstance(value, TensorProto) else tensor_proto(value)
    return node_octets("Const", name, (), device, dtype=DataType(proto.dtype), value=proto)


def as_attr(value: Any) -> AttrValue:
    """Raises TypeError for a value that no attribute can have."""
    if isinstance(value, AttrValue):
        return value
    if isinstance(value, list):
        return AttrValue(list=_list_value(value))
    return AttrValue(**{_kind(value): _plain(value)})


def _list_value(values: list[Any]) -> AttrValue.ListValue:
    if not values:
        return AttrValue.ListValue()
    return AttrValue.ListValue(**{_kind(values[0]): [_plain(value) for value in values]})


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "b"
    if isinstance(value, DataType):
        return "type"
    if isinstance(value, tuple) or value is None:
        return "shape"
    for kind, classes in (("i", int), ("f", float), ("s", (str, bytes)), ("tensor", TensorProto)):
        if isinstance(value, classes):
            return kind
    raise TypeError(f"an attribute cannot be {value!r:.60} ({type(value).__name__})")


def _plain(value: Any) -> Any:
    if isinstance(value, DataType):
        return int(value)
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    return shape_proto(value) if isinstance(value, tuple) or value is None else value


def colocated(name: str) -> list[str]:
    """The attribute ``_class`` of a node that lives where ``name`` does."""
    return [f"loc:@{name}"]


def node_of(reference: str) -> str:
    """The node that an input names: "w" for "w", "w:1" and "^w"."""
    return reference.removeprefix("^").partition(":")[0]


def output_of(reference: str) -> int:
    """Which output of its node an input names; 0 for "w"."""
    number = reference.partition(":")[2]
    return int(number) if number.isdecimal() and number.isascii() and len(number) < 10 else 0


def is_node_name(name: str) -> bool:
    return _NODE_NAME.fullmatch(name) is not None


def node_name(text: str) -> str:
    """A name that a node can have, as like ``text`` as possible."""
    name = re.sub(r"[^A-Za-z0-9_.\\/>-]", "_", text)
    return name if is_node_name(name) else f".{name}"


class Names:
    """Hands out names that no other node has: ``a``, ``a_1``, ``a_2``, as TensorFlow does."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._next: dict[str, int] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._taken

    def unique(self, name: str) -> str:
        found, number = name, self._next.get(name, 1)
        while found in self._taken:
            found = f"{name}_{number}"
            number += 1
        self._next[name] = number
        self._taken.add(found)
        return found


def by_name(nodes: Iterable[NodeDef]) -> dict[str, NodeDef]:
    return {node.name: node for node in nodes}


__all__ = [
    "Names",
    "as_attr",
    "by_name",
    "colocated",
    "constant",
    "is_node_name",
    "node",
    "node_name",
    "node_octets",
    "node_of",
    "output_of",
]
