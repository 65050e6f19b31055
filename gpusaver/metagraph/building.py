"""A MetaGraphDef of variables alone: what a program without a graph can say about itself.

Initial values are zeros, a few bytes whatever the shape, one constant for all variables of a type and shape.  That and
the absence of everything TensorFlow can do without keep a file of 10,000 variables below 10 MB.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpusaver.metagraph.collections import GLOBAL_STEP, TRAINABLE_VARIABLES, VARIABLES, collection_def
from gpusaver.metagraph.nodes import Names, constant, node_name
from gpusaver.metagraph.saver_nodes import Saveable, saver_nodes
from gpusaver.metagraph.tensors import zeros_proto
from gpusaver.metagraph.variables import GraphVariable, variable_def, variable_nodes
from gpusaver.protos.graph_pb2 import GraphDef
from gpusaver.protos.meta_graph_pb2 import MetaGraphDef
from gpusaver.protos.saver_pb2 import SaverDef
from gpusaver.protos.types_pb2 import VersionDef
from gpusaver.tensor import DataType

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
) -> MetaGraphDef:
    """The variables of ``saveables`` (sorted by key), the nodes of a Saver over them, and the collections.

    ``scope``: of the Saver's nodes, as :func:`saver_scope` takes it.  ``collections``: which of "variables",
    "trainable_variables" and "global_step" to write; None: all.
    """
    graph = GraphDef(versions=VersionDef(producer=_PRODUCER))
    listed: dict[str, list[bytes]] = {VARIABLES: [], TRAINABLE_VARIABLES: [], GLOBAL_STEP: []}
    names = [variable.name for _, variable in saveables]
    zeros = _Zeros(graph, _free_scope("zeros", names))
    for key, variable in saveables:
        initial = zeros.of(variable)
        graph.node.extend(variable_nodes(variable, initial))
        item = variable_def(variable, initial).SerializeToString()
        listed[VARIABLES].append(item)
        if variable.trainable:
            listed[TRAINABLE_VARIABLES].append(item)
        if key == GLOBAL_STEP and variable.dtype in (DataType.int64, DataType.int32) and variable.shape == ():
            listed[GLOBAL_STEP].append(item)
    saver_def = SaverDef()
    if saveables:
        found = saver_scope(names, scope)
        nodes, saver_def = saver_nodes(saveables, scope=found, sharded=sharded, reshape=reshape, filename=filename)
        graph.node.extend(nodes)
    meta_graph = MetaGraphDef(graph_def=graph, saver_def=saver_def)
    for key, items in listed.items():
        if items and (collections is None or key in collections):
            meta_graph.collection_def[key].CopyFrom(collection_def(items))
    return meta_graph


def saver_scope(names: Sequence[str], wanted: str | None = None) -> str:
    """Where the Saver's nodes are in a graph with variables of these names: below ``wanted`` if possible, or "save"."""
    return _free_scope(node_name(wanted or "save").replace("/", "_"), names)


class _Zeros:
    """The constants that are initial values, one for each type and shape."""

    def __init__(self, graph: GraphDef, scope: str) -> None:
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
            self._graph.node.append(constant(self._made[kind], zeros_proto(*kind)))
        return self._made[kind]


def _free_scope(base: str, names: Sequence[str]) -> str:
    taken = {name.partition("/")[0] for name in names}
    scope, number = base, 0
    while scope in taken:
        number += 1
        scope = f"{base}_{number}"
    return scope
