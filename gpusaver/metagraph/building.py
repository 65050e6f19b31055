"""A MetaGraphDef of variables alone: what a program without a graph can say about itself.

Every variable has a zero as initial value, in a few bytes whatever its shape, and no device unless asked: one that the
reader's machine lacks would keep TensorFlow from restoring.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpusaver.metagraph.collections import GLOBAL_STEP, TRAINABLE_VARIABLES, VARIABLES, collection_def
from gpusaver.metagraph.nodes import constant
from gpusaver.metagraph.saver_nodes import Saveable, saver_nodes
from gpusaver.metagraph.tensors import zeros_proto
from gpusaver.metagraph.variables import variable_def, variable_nodes
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
    sharded: bool = False,
    reshape: bool = False,
    filename: str = "model",
    collections: Collection[str] | None = None,
) -> MetaGraphDef:
    """The variables of ``saveables`` (sorted by key), the nodes of a Saver over them, and the collections.

    ``collections``: which of "variables", "trainable_variables" and "global_step" to write; None: all.
    """
    graph = GraphDef(versions=VersionDef(producer=_PRODUCER))
    listed: dict[str, list[bytes]] = {VARIABLES: [], TRAINABLE_VARIABLES: [], GLOBAL_STEP: []}
    for key, variable in saveables:
        initial = f"{variable.name}/Initializer/zeros"
        assert variable.shape is not None
        graph.node.append(constant(initial, zeros_proto(variable.dtype, variable.shape)))
        graph.node.extend(variable_nodes(variable, initial))
        item = variable_def(variable, initial).SerializeToString()
        listed[VARIABLES].append(item)
        if variable.trainable:
            listed[TRAINABLE_VARIABLES].append(item)
        if key == GLOBAL_STEP and variable.dtype in (DataType.int64, DataType.int32) and variable.shape == ():
            listed[GLOBAL_STEP].append(item)
    scope = _free_scope("save", [variable.name for _, variable in saveables])
    saver_def = SaverDef()
    if saveables:
        nodes, saver_def = saver_nodes(saveables, scope=scope, sharded=sharded, reshape=reshape, filename=filename)
        graph.node.extend(nodes)
    meta_graph = MetaGraphDef(graph_def=graph, saver_def=saver_def)
    for key, items in listed.items():
        if items and (collections is None or key in collections):
            meta_graph.collection_def[key].CopyFrom(collection_def(items))
    return meta_graph


def _free_scope(base: str, names: Sequence[str]) -> str:
    taken = {name.partition("/")[0] for name in names}
    scope, number = base, 0
    while scope in taken:
        number += 1
        scope = f"{base}_{number}"
    return scope
