"""Whole graphs out to MetaGraphDefs and in again: ``tf.train.export_meta_graph`` and ``import_meta_graph``."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from gpusaver.arguments import make_directory
from gpusaver.compat.v1.attributes import from_attr
from gpusaver.compat.v1.graph import Graph, Operation, Tensor, get_default_graph
from gpusaver.compat.v1.importing import import_nodes
from gpusaver.compat.v1.names import GraphKeys
from gpusaver.compat.v1.saver import Saver, checked_saver_def
from gpusaver.compat.v1.table import TABLE
from gpusaver.compat.v1.variables import Variable
from gpusaver.metagraph.collections import NodeName, collection_def, collection_items
from gpusaver.metagraph.nodes import node_of
from gpusaver.metagraph.reading import read_meta_graph
from gpusaver.metagraph.rewriting import remove_devices, with_scope, write_meta_graph
from gpusaver.protos import MetaGraphDef
from gpusaver.protos.convert import adopt
from gpusaver.protos.graph_pb2 import GraphDef
from gpusaver.protos.meta_graph_pb2 import VariableDef
from gpusaver.storage.routing import RoutedStorage

_log = logging.getLogger("gpusaver")
_UNBOUND = "$unbound_inputs_"


def export_meta_graph(
    filename: str | None = None,
    meta_info_def: Any = None,
    graph_def: Any = None,
    saver_def: Any = None,
    collection_list: Sequence[str] | None = None,
    as_text: bool = False,
    graph: Graph | None = None,
    export_scope: str | None = None,
    clear_devices: bool = False,
    clear_extraneous_savers: bool = False,
    strip_default_attrs: bool = False,
    save_debug_info: bool = False,
    unbound_inputs_col_name: str = "unbound_inputs",
) -> MetaGraphDef:
    """The graph and its collections; written, atomically, if ``filename`` is given.

    ``collection_list``: None for all.  ``export_scope``: only what lies below it, the prefix removed; inputs from
    outside get the prefix ``$unbound_inputs_``.  ``save_debug_info`` has no effect.  Raises TypeError for messages of
    another kind.
    """
    graph = graph or get_default_graph()
    meta_graph = MetaGraphDef()
    if graph.imported is not None:
        meta_graph.CopyFrom(graph.imported)
    if meta_info_def is not None:
        meta_graph.meta_info_def.CopyFrom(adopt(meta_info_def, MetaGraphDef.MetaInfoDef))
    exported = adopt(graph_def, GraphDef) if graph_def is not None else graph.as_graph_def()
    meta_graph.graph_def.CopyFrom(exported)
    scoped = None if saver_def is None else checked_saver_def(saver_def)
    if clear_extraneous_savers:
        _drop_other_savers(meta_graph.graph_def, scoped)
    if export_scope:
        unbound = _cut(meta_graph.graph_def, export_scope)
        if unbound:
            meta_graph.collection_def[unbound_inputs_col_name].bytes_list.value.extend(unbound)
    if clear_devices:
        remove_devices(meta_graph)
    if strip_default_attrs:
        for node in meta_graph.graph_def.node:
            _strip(node)
    if scoped is not None:
        meta_graph.saver_def.CopyFrom(scoped)
    for key in graph.get_all_collection_keys() if collection_list is None else collection_list:
        _export_collection(graph, meta_graph, key, export_scope, scoped if clear_extraneous_savers else None)
    if filename is not None:
        path = os.fsdecode(filename)
        make_directory(RoutedStorage(), os.path.dirname(path), path)
        write_meta_graph(meta_graph, path, as_text=as_text)
    return meta_graph


def _export_collection(graph: Graph, meta_graph: MetaGraphDef, key: str, scope: str | None, only_saver: Any) -> None:
    """One that cannot be stored is left out with a warning, as in TensorFlow."""
    items: list[Any] = []
    for item in graph.get_collection(key):
        if isinstance(item, Variable):
            proto = item.to_proto(scope)
            if proto is not None:
                items.append(proto)
        elif isinstance(item, Saver):
            items.append(item.to_proto(scope))
        elif isinstance(item, Tensor | Operation) or hasattr(item, "as_graph_element"):
            name = item.name if isinstance(item, Tensor | Operation) else item.as_graph_element().name
            if not scope or name.startswith(f"{scope}/"):
                items.append(NodeName(name.removeprefix(f"{scope}/") if scope else name))
        else:
            items.append(item)
    if key == GraphKeys.SAVERS and only_saver is not None:
        items = [item for item in items if item == only_saver]
    if not items and graph.get_collection(key):
        return
    try:
        meta_graph.collection_def[key].CopyFrom(collection_def(items))
    except TypeError as error:
        del meta_graph.collection_def[key]
        _log.warning("the collection %s is left out of the MetaGraphDef: %s", key, error)


def _strip(node: Any) -> None:
    row = TABLE.get(node.op)
    if row is None:
        return
    for name, (kind, default) in row.attrs.items():
        value = from_attr(node.attr[name]) if name in node.attr else default
        value = value.decode("utf-8", "surrogateescape") if kind == "string" and isinstance(value, bytes) else value
        if name in node.attr and type(value) is type(default) and value == default:
            del node.attr[name]


def _drop_other_savers(graph_def: GraphDef, saver_def: Any) -> None:
    own = node_of(saver_def.restore_op_name).rpartition("/")[0] if saver_def is not None else None
    scopes = {
        node.name.rpartition("/")[0] for node in graph_def.node if node.op in ("SaveV2", "RestoreV2", "SaveSlices")
    } - {own, ""}
    kept = [node for node in graph_def.node if not any(node.name.startswith(f"{scope}/") for scope in scopes)]
    copies = GraphDef()
    copies.node.extend(kept)
    del graph_def.node[:]
    graph_def.node.extend(copies.node)


def _cut(graph_def: GraphDef, scope: str) -> list[bytes]:
    """Leaves the nodes below ``scope``, without it in their names; returns the inputs from outside."""
    prefix = f"{scope.rstrip('/')}/"
    unbound: dict[str, None] = {}
    kept = GraphDef()
    for node in graph_def.node:
        if not node.name.startswith(prefix):
            continue
        copy = kept.node.add()
        copy.CopyFrom(node)
        copy.name = node.name.removeprefix(prefix)
        del copy.input[:]
        for reference in node.input:
            control = "^" if reference.startswith("^") else ""
            bare = reference.removeprefix("^")
            if bare.startswith(prefix):
                copy.input.append(control + bare.removeprefix(prefix))
            else:
                unbound[control + bare] = None
                copy.input.append(f"{control}{_UNBOUND}{bare}")
        if "_class" in copy.attr:
            values = [value.replace(b"loc:@" + prefix.encode(), b"loc:@") for value in copy.attr["_class"].list.s]
            del copy.attr["_class"].list.s[:]
            copy.attr["_class"].list.s.extend(values)
    del graph_def.node[:]
    graph_def.node.extend(kept.node)
    return [name.encode() for name in unbound]


def import_meta_graph(
    meta_graph_or_file: Any, clear_devices: bool = False, import_scope: str | None = None, **kwargs: Any
) -> Saver | None:
    """Rebuilds graph, variables and collections in the default graph; returns the Saver that goes with them.

    ``meta_graph_or_file``: the path of a `.meta` file, binary or text, or a MetaGraphDef, ours or TensorFlow's.
    ``import_scope``: a prefix for all names but those in the checkpoint.  ``input_map`` (keyword): name of an input ->
    tensor instead.  Without a SaverDef: a Saver over all variables, or None if there are none.

    Raises OSError for a missing or damaged file, TypeError for something else than a path or message, ValueError naming
    the node for a graph that does not fit together or whose names are taken.
    """
    meta_graph = read_meta_graph(meta_graph_or_file)
    input_map = kwargs.pop("input_map", None)
    kwargs.pop("return_elements", None)
    wanted = kwargs.pop("restore_collections_predicate", lambda key: True)
    unbound_name = kwargs.pop("unbound_inputs_col_name", "unbound_inputs")
    if kwargs:
        raise TypeError(f"import_meta_graph() got an unexpected keyword argument {next(iter(kwargs))!r}")
    graph = get_default_graph()
    was_empty = not graph.version
    prefix = f"{graph.unique_name(import_scope.rstrip('/'))}/" if import_scope else ""
    tensors = _bound(graph, meta_graph, unbound_name, input_map or {})
    made = import_nodes(graph, meta_graph.graph_def.node, prefix=prefix, input_map=tensors, clear_devices=clear_devices)
    if prefix:
        _rename_scopes(made.values(), prefix)
    if was_empty and not import_scope:
        graph.imported = _rest(meta_graph)
    _import_collections(graph, meta_graph, prefix.rstrip("/"), wanted)
    if meta_graph.HasField("saver_def") and meta_graph.saver_def.restore_op_name:
        return Saver(saver_def=with_scope(meta_graph.saver_def, prefix.rstrip("/")), name=import_scope)
    return Saver() if graph.get_collection(GraphKeys.GLOBAL_VARIABLES) else None


def _bound(graph: Graph, meta_graph: MetaGraphDef, unbound_name: str, input_map: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors for inputs from outside; ValueError if one is missing."""
    given: dict[str, Any] = {key: graph.as_graph_element(value) for key, value in input_map.items()}
    unbound = (
        meta_graph.collection_def[unbound_name].bytes_list.value if unbound_name in meta_graph.collection_def else ()
    )
    given |= {key.removeprefix(_UNBOUND): value for key, value in given.items()}
    missing = [name for item in unbound if (name := item.decode()) not in given and name.partition(":")[0] not in given]
    if missing:
        raise ValueError(f"Graph contains unbound inputs: {missing}. Must provide these inputs through input_map.")
    return {**given, **{f"{_UNBOUND}{key}": value for key, value in given.items()}}


def _rename_scopes(ops: Any, prefix: str) -> None:
    """Colocation names other nodes, which have a prefix now."""
    for op in ops:
        classes = op.attrs.get("_class")
        if isinstance(classes, list) and op.imported is not None:
            renamed = [value.replace(b"loc:@", b"loc:@" + prefix.encode()) for value in classes]
            op.attrs["_class"] = renamed
            copy = type(op.imported)()
            copy.CopyFrom(op.imported)
            del copy.attr["_class"].list.s[:]
            copy.attr["_class"].list.s.extend(renamed)
            op.imported = copy


def _rest(meta_graph: MetaGraphDef) -> MetaGraphDef:
    """What is neither node nor collection nor Saver: exported again as it is."""
    rest = MetaGraphDef()
    rest.CopyFrom(meta_graph)
    del rest.graph_def.node[:]
    rest.collection_def.clear()
    rest.ClearField("saver_def")
    return rest


def _import_collections(graph: Graph, meta_graph: MetaGraphDef, scope: str, wanted: Any) -> None:
    variables: dict[str, Variable] = {}
    for key in meta_graph.collection_def:
        if not wanted(key):
            continue
        for item in collection_items(key, meta_graph.collection_def[key]):
            graph.add_to_collection(key, _imported_item(graph, item, scope, variables))


def _imported_item(graph: Graph, item: Any, scope: str, variables: dict[str, Variable]) -> Any:
    if isinstance(item, VariableDef):
        if item.variable_name not in variables:  # one object in all collections
            variables[item.variable_name] = Variable.from_proto(item, import_scope=scope)
        return variables[item.variable_name]
    if isinstance(item, NodeName):
        name = f"{scope}/{item}" if scope else str(item)
        return graph.as_graph_element(name)
    return item
