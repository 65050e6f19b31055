"""A MetaGraphDef of variables alone: what a program without a graph can say about itself.

Initial values are zeros, a few bytes whatever the shape, one constant for all variables of a type and shape.  That and
the absence of everything TensorFlow can do without keep a file of 10,000 variables below 10 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from gpusaver.bundle.coding import field, varint
from gpusaver.metagraph.collections import GLOBAL_STEP, TRAINABLE_VARIABLES, VARIABLES
from gpusaver.metagraph.nodes import Names, constant, node_name
from gpusaver.metagraph.saver_nodes import Saveable, saver_nodes
from gpusaver.metagraph.tensors import zeros_proto
from gpusaver.metagraph.variables import GraphVariable, variable_def, variable_nodes
from gpusaver.protos.graph_pb2 import GraphDef
from gpusaver.protos.meta_graph_pb2 import MetaGraphDef
from gpusaver.protos.types_pb2 import VersionDef
from gpusaver.tensor import DataType

# As messages a graph of many variables takes ten times its bytes, so these fields are written by hand, those of
# tensorflow/core/framework/graph.proto and tensorflow/core/protobuf/meta_graph.proto (specification, section 9).
_NODE, _GRAPH_DEF = b"\x0a", b"\x12"
_COLLECTION_ENTRY, _KEY, _COLLECTION_DEF, _BYTES_LIST, _VALUE = b"\x22", b"\x0a", b"\x12", b"\x12", b"\x0a"

_PIECE_NBYTES = 1 << 18

#: Of the graph: what TensorFlow 1.10 wrote.  Both releases take it, and newer rules do not apply to such a graph.
_PRODUCER = 27


def variables_meta_graph(
    saveables: Sequence[Saveable],
    *,
    scope: str | None = None,
    sharded: bool = False,
    reshape: bool = False,
    filename: str = "model",
    collections: Collection[str] | None = None,
    max_to_keep: int = 0,
    keep_checkpoint_every_n_hours: float = 0.0,
    clear_devices: bool = False,
    emit: Callable[[bytes | bytearray], object],
) -> None:
    """A MetaGraphDef: the variables of ``saveables`` (sorted by key), a Saver's nodes, the collections.

    ``scope``: of the Saver's nodes, as :func:`saver_scope` takes it.  ``collections``: which of "variables",
    "trainable_variables" and "global_step" to write; None: all.  ``clear_devices``: no node says where it runs.
    ``emit`` gets it serialized, piece by piece: whole, it takes more memory than all else a save needs for a variable.
    """
    pieces = _Pieces(emit)
    graph = _Graph(pieces)
    #: By collection: the values of its bytes_list, serialized.
    listed = {key: bytearray() for key in sorted((VARIABLES, TRAINABLE_VARIABLES, GLOBAL_STEP))}
    names = [variable.name for _, variable in saveables]
    zeros = _Zeros(graph, _free_scope("zeros", names))
    for key, variable in saveables:
        initial = zeros.of(variable)
        for made in variable_nodes(variable._replace(device="") if clear_devices else variable, initial):
            graph.append(made)
        item = field(_VALUE, variable_def(variable, initial).SerializeToString())
        listed[VARIABLES] += item
        if variable.trainable:
            listed[TRAINABLE_VARIABLES] += item
        if key == GLOBAL_STEP and variable.dtype in (DataType.int64, DataType.int32) and variable.shape == ():
            listed[GLOBAL_STEP] += item
    rest = MetaGraphDef()
    if saveables:
        found = saver_scope(names, scope)
        saver_def = saver_nodes(
            saveables,
            scope=found,
            sharded=sharded,
            reshape=reshape,
            filename=filename,
            clear_devices=clear_devices,
            emit=graph.append,
        )
        rest.saver_def.CopyFrom(saver_def)
    rest.saver_def.max_to_keep = max_to_keep
    rest.saver_def.keep_checkpoint_every_n_hours = keep_checkpoint_every_n_hours
    graph.finish()
    pieces.add(rest.SerializeToString(deterministic=True))
    for key in [key for key in listed if listed[key] and (collections is None or key in collections)]:
        _add_collection(pieces, key, listed.pop(key))
    pieces.flush()


def saver_scope(names: Sequence[str], wanted: str | None = None) -> str:
    """Where the Saver's nodes are in a graph with variables of these names: below ``wanted`` if possible, or "save"."""
    return _free_scope(node_name(wanted or "save").replace("/", "_"), names)


class _Pieces:
    """Emits octets in pieces of at least this size, but for the last one."""

    def __init__(self, emit: Callable[[bytes | bytearray], object]) -> None:
        self._emit = emit
        self._octets = bytearray()

    def add(self, octets: bytes | bytearray) -> None:
        self._octets += octets
        if len(self._octets) >= _PIECE_NBYTES:
            self.flush()

    def flush(self) -> None:
        octets, self._octets = self._octets, bytearray()
        self._emit(octets)


class _Graph(_Pieces):
    """The field ``graph_def``, node by node; a large one is several such fields, of which parsers make one."""

    def __init__(self, pieces: _Pieces) -> None:
        def emit(octets: bytes | bytearray) -> None:
            pieces.add(_GRAPH_DEF + varint(len(octets)))
            pieces.add(octets)

        super().__init__(emit)

    def append(self, node: bytes) -> None:
        self.add(field(_NODE, node))

    def finish(self) -> None:
        self.add(GraphDef(versions=VersionDef(producer=_PRODUCER)).SerializeToString())
        self.flush()


def _add_collection(pieces: _Pieces, key: str, values: bytearray) -> None:
    """``values``: the content of its bytes_list."""
    head = field(_KEY, key.encode()) + _COLLECTION_DEF + varint(1 + len(varint(len(values))) + len(values))
    head += _BYTES_LIST + varint(len(values))
    pieces.add(_COLLECTION_ENTRY + varint(len(head) + len(values)) + head)
    pieces.add(values)


class _Zeros:
    """The constants that are initial values, one for each type and shape."""

    def __init__(self, graph: _Graph, scope: str) -> None:
        self._graph = graph
        self._scope = scope
        self._names = Names()
        self._made: dict[tuple[DataType, tuple[int, ...]], str] = {}

    def of(self, variable: GraphVariable) -> str:
        """Requires: the shape is known."""
        assert variable.shape is not None
        kind = (variable.dtype, variable.shape)
        if kind not in self._made:
            self._made[kind] = f"{self._scope}/{self._names.unique(variable.dtype.name)}"
            self._graph.append(constant(self._made[kind], zeros_proto(*kind)))
        return self._made[kind]


def _free_scope(base: str, names: Sequence[str]) -> str:
    taken = {name.partition("/")[0] for name in names}
    scope, number = base, 0
    while scope in taken:
        number += 1
        scope = f"{base}_{number}"
    return scope
