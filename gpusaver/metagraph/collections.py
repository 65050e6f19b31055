"""Collections: named lists of variables, tensors, strings and numbers that travel with a graph.

::

    node_list     names of tensors ("y:0") and operations ("train")
    bytes_list    strings; and messages, of a type that the collection's name implies: VariableDef, SaverDef
    int64_list, float_list, any_list

Node_list and bytes_list look alike on the wire: which one it is says only the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message

from gpusaver.errors import DataLossError
from gpusaver.protos.meta_graph_pb2 import CollectionDef, MetaGraphDef, VariableDef
from gpusaver.protos.saver_pb2 import SaverDef

VARIABLES = "variables"
TRAINABLE_VARIABLES = "trainable_variables"
GLOBAL_STEP = "global_step"

#: Collections of messages.
_MESSAGES: Mapping[str, type[Message]] = {
    **dict.fromkeys((VARIABLES, TRAINABLE_VARIABLES, GLOBAL_STEP), VariableDef),
    **dict.fromkeys(("local_variables", "model_variables", "moving_average_variables"), VariableDef),
    "metric_variables": VariableDef,
    "savers": SaverDef,
}


class NodeName(str):
    """The name of a tensor or an operation, in a collection: no mere string."""

    __slots__ = ()


def collection_def(items: Sequence[Any]) -> CollectionDef:
    """``items``: all strings, NodeNames, ints, floats, or messages; the first one decides the kind, as in TensorFlow.

    Raises TypeError for anything else, and for a mixture.
    """
    kind = _kind(items[0]) if items else "node_list"
    if kind == "bytes_list":
        items = [_as_bytes(item) for item in items]
    try:
        field = getattr(CollectionDef(), kind)
        field.value.extend(items)
    except (TypeError, ValueError) as error:
        raise TypeError(f"a collection that starts with {items[0]!r:.60} cannot hold all of {items!r:.200}") from error
    return CollectionDef(**{kind: field})


def _kind(item: Any) -> str:
    kinds: tuple[tuple[str, Any], ...] = (
        ("node_list", NodeName),
        ("any_list", AnyMessage),
        ("bytes_list", (str, bytes, Message)),
        ("int64_list", int),
        ("float_list", float),
    )
    for kind, classes in kinds:
        if isinstance(item, classes):
            return kind
    raise TypeError(f"a collection cannot be stored if it holds {item!r:.60} ({type(item).__name__})")


def _as_bytes(item: Any) -> Any:
    if isinstance(item, Message):
        return item.SerializeToString()
    return item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item


def collection_items(key: str, collection: CollectionDef) -> list[Any]:
    """What :func:`collection_def` was given: NodeNames, numbers, messages for the known collections, else bytes.

    Raises DataLossError if an item of a known collection is not its message.
    """
    kind = collection.WhichOneof("kind")
    if kind is None:
        return []
    items = list(getattr(collection, kind).value)
    if kind == "node_list":
        return [NodeName(item) for item in items]
    if kind == "bytes_list" and key in _MESSAGES:
        return [_parsed(key, item) for item in items]
    return items


def _parsed(key: str, item: bytes) -> Message:
    try:
        return _MESSAGES[key].FromString(item)
    except (DecodeError, UnicodeDecodeError) as error:  # the second from protobuf's pure Python runtime
        raise DataLossError(f"the collection {key} holds something that is no {_MESSAGES[key].__name__}") from error


def variable_defs(meta_graph: MetaGraphDef, key: str) -> list[VariableDef]:
    """The variables in the collection ``key``; none if there is no such collection, or it holds something else."""
    items = collection_items(key, meta_graph.collection_def[key]) if key in meta_graph.collection_def else []
    return [item for item in items if isinstance(item, VariableDef)]
