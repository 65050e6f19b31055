"""Readable names for the keys of object-based checkpoints: tf.train.Checkpoint, SavedModel (specification, section 10).

A variable's key is the path of attributes that leads to it, ``model/table/a.Sb/.ATTRIBUTES/VARIABLE_VALUE``.  The
graph of objects, a string tensor in the same checkpoint, also knows the name a name-based Saver would have used.
"""

from __future__ import annotations

import re

from google.protobuf.message import DecodeError

from gpusaver.errors import DataLossError
from gpusaver.protos import trackable_object_graph_pb2

#: The key of the graph: a scalar string tensor holding a TrackableObjectGraph.
OBJECT_GRAPH_KEY = b"_CHECKPOINTABLE_OBJECT_GRAPH"

_VARIABLE_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_ESCAPE = re.compile(r"\.([.S])")


def readable_names(graph: bytes) -> dict[str, str]:
    """Maps a variable's graph-style name to its key in the checkpoint.

    Several variables may have the same name; the last one wins, as in TensorFlow.  Raises DataLossError if the bytes
    are not a TrackableObjectGraph.
    """
    try:
        message = trackable_object_graph_pb2.TrackableObjectGraph.FromString(graph)
    except DecodeError as error:
        raise DataLossError(f"the object graph of the checkpoint is not a TrackableObjectGraph: {error}") from error
    return {
        attribute.full_name: attribute.checkpoint_key
        for node in message.nodes
        for attribute in node.attributes
        if attribute.full_name
    }


def variable_name(key: str) -> str | None:
    """The path to a variable as its program wrote it, ``model/table/a/b``; None if the key is not a variable's.

    Optimizer slots keep their marker: ``model/w/.OPTIMIZER_SLOT/opt/m``.  Two keys can have the same readable name.
    """
    if not key.endswith(_VARIABLE_SUFFIX):
        return None
    path = key.removesuffix(_VARIABLE_SUFFIX)
    return _ESCAPE.sub(lambda escape: "/" if escape[1] == "S" else ".", path) or None
