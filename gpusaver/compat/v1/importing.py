"""Nodes of a GraphDef into a graph: linked, checked, and kept as they are, also those of unknown ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpusaver.compat.v1.attributes import is_of_kind
from gpusaver.compat.v1.graph import Graph, Operation, Tensor, decoded_attrs, get_default_graph, infer
from gpusaver.compat.v1.shapes import merge
from gpusaver.compat.v1.table import REQUIRED, OpRow
from gpusaver.metagraph.nodes import is_node_name, node_of, output_of
from gpusaver.protos.convert import adopt
from gpusaver.protos.graph_pb2 import GraphDef, NodeDef
from gpusaver.tensor import DataType

#: That one operation may take or give: what is more is damage, and would take memory.
_MAX_TENSORS = 1 << 16


def import_nodes(
    graph: Graph,
    nodes: Sequence[NodeDef],
    *,
    prefix: str = "",
    input_map: Mapping[str, Tensor] | None = None,
    clear_devices: bool = False,
) -> dict[str, Operation]:
    """Adds the nodes, ``prefix`` before their names; returns them by the names they had.

    ``input_map``: instead of these inputs, tensors of the graph.  Inputs that are no nodes of the list are looked for
    in the graph.  Raises ValueError, naming the node, for a name that is taken or is none, an input that is not there,
    a cycle, or attributes that do not fit.
    """
    made: dict[str, Operation] = {}
    for node in nodes:
        name = prefix + node.name
        if not is_node_name(name):
            raise ValueError(f"Node {node.name!r}: not a valid node name")
        if node.name in made or graph.find(name) is not None:
            raise ValueError(f"Node name '{name}' already exists in the Graph")
        device = "" if clear_devices else node.device
        made[node.name] = Operation(graph, name, node.op, decoded_attrs(node), device, imported=node)
    order = _in_order(nodes, made)
    for node in order:
        op = made[node.name]
        _link(graph, op, node, made, input_map or {})
        _set_outputs(op)
    for node in nodes:
        _finish_loops(made[node.name], node, made)
        graph.adopt(made[node.name])
    return made


def _in_order(nodes: Sequence[NodeDef], made: Mapping[str, Operation]) -> list[NodeDef]:
    """Each node after its inputs.  The edges that close a loop, from NextIteration to Merge, do not count."""
    by_name = {node.name: node for node in nodes}
    waiting = {node.name: 0 for node in nodes}
    after: dict[str, list[str]] = {}
    for node in nodes:
        for name in {node_of(reference) for reference in node.input}:
            if name in by_name and not _closes_loop(by_name[name], node):
                waiting[node.name] += 1
                after.setdefault(name, []).append(node.name)
    ready = [node.name for node in nodes if not waiting[node.name]]
    order = []
    for name in ready:  # grows while it is gone through
        order.append(by_name[name])
        for other in after.get(name, ()):
            waiting[other] -= 1
            if not waiting[other]:
                ready.append(other)
    if len(order) < len(nodes):
        stuck = next(node.name for node in nodes if waiting[node.name])
        raise ValueError(f"The graph couldn't be sorted in topological order: it has a cycle at node '{stuck}'.")
    return order


def _closes_loop(source: NodeDef, target: NodeDef) -> bool:
    return source.op in ("NextIteration", "RefNextIteration") and target.op in ("Merge", "RefMerge")


def _link(
    graph: Graph, op: Operation, node: NodeDef, made: Mapping[str, Operation], input_map: Mapping[str, Tensor]
) -> None:
    for reference in node.input:
        mapped = input_map.get(reference, input_map.get(f"{reference}:0"))
        if mapped is not None:
            op.inputs.append(mapped)
            continue
        source = made.get(node_of(reference)) or graph.find(node_of(reference))
        if source is None:
            raise ValueError(f"Node '{node.name}': Unknown input node '{reference}'")
        if reference.startswith("^"):
            op.control_inputs.append(source)
        elif _closes_loop(source.imported or NodeDef(), node):
            continue
        else:
            try:
                op.inputs.append(source.output(output_of(reference)))
            except KeyError:
                raise ValueError(
                    f"Node '{node.name}': Connecting to invalid output {output_of(reference)} of source node "
                    f"{source.name} which has {len(source.outputs)} outputs."
                ) from None


def _finish_loops(op: Operation, node: NodeDef, made: Mapping[str, Operation]) -> None:
    """The inputs of a Merge that come round, now that they are there."""
    for place, reference in enumerate(node.input):
        source = made.get(node_of(reference))
        if source is not None and source.imported is not None and _closes_loop(source.imported, node):
            op.inputs.insert(place, source.output(output_of(reference)))
            op.row = None  # loops are kept, not run


def _set_outputs(op: Operation) -> None:
    row = op.row
    if row is None:
        _known_outputs(op)
        return
    _check_attrs(op, row)
    expected = len(row.input_args(op.attrs))
    loops = sum(reference.startswith("^") for reference in op.imported.input) if op.imported is not None else 0
    given = len(op.imported.input) - loops if op.imported is not None else len(op.inputs)
    if given != expected:
        raise ValueError(f"Node '{op.name}': {given} inputs specified, the op {op.type} takes {expected}")
    try:
        infer(op)
    except Exception:  # whatever is wrong with it is said when it is run
        outputs = row.output_dtypes(op.attrs)
        op.outputs = [Tensor(op, number, dtype, ref, None) for number, (dtype, ref) in enumerate(outputs)]
    shapes = op.attrs.get("_output_shapes")
    if isinstance(shapes, list) and len(shapes) == len(op.outputs):
        for tensor, shape in zip(op.outputs, shapes, strict=True):
            try:
                tensor.static_shape = merge(tensor.static_shape, shape)
            except ValueError:
                continue


def _check_attrs(op: Operation, row: OpRow) -> None:
    """ValueError for attributes that are missing or of another kind."""
    for name, (kind, default) in row.attrs.items():
        if name not in op.attrs:
            if default is REQUIRED:
                raise ValueError(f"Node '{op.name}': NodeDef missing attr '{name}' from Op<name={op.type}>")
            op.attrs[name] = default
        elif not is_of_kind(op.attrs[name], kind):
            raise ValueError(
                f"Node '{op.name}': attr '{name}' of the op {op.type} is {op.attrs[name]!r:.60}, not a {kind}"
            )
    for arg in (*row.inputs, *row.outputs):
        count = op.attrs[arg.number_attr] if arg.number_attr is not None else 0
        if not 0 <= count <= _MAX_TENSORS:
            raise ValueError(f"Node '{op.name}': attr '{arg.number_attr}' is {count}, more tensors than there can be")


def _known_outputs(op: Operation) -> None:
    """Of an unknown op: what TensorFlow has noted about its outputs."""
    shapes = op.attrs.get("_output_shapes")
    if not isinstance(shapes, list):
        return
    types = [op.attrs[name] for name in ("T", "dtype") if isinstance(op.attrs.get(name), DataType)]
    dtype = types[0] if types else DataType.invalid
    op.outputs = [Tensor(op, number, dtype, False, shape) for number, shape in enumerate(shapes)]


def import_graph_def(
    graph_def: Any,
    input_map: Mapping[str, Any] | None = None,
    return_elements: Sequence[str] | None = None,
    name: str | None = None,
    op_dict: Any = None,
    producer_op_list: Any = None,
) -> list[Any] | None:
    """Adds the nodes of ``graph_def``, ours or TensorFlow's, to the default graph under the scope ``name`` ("import").

    Returns the ``return_elements`` if they are asked for.  Raises TypeError for what is no GraphDef, ValueError naming
    the node for graphs that do not fit together.
    """
    if not isinstance(graph_def, GraphDef):
        graph_def = adopt(graph_def, GraphDef)
    graph = get_default_graph()
    scope = "import" if name is None else name.rstrip("/")
    prefix = graph.unique_name(scope) + "/" if scope else ""
    tensors = {key: graph.as_graph_element(value) for key, value in (input_map or {}).items()}
    made = import_nodes(graph, graph_def.node, prefix=prefix, input_map=tensors)  # type: ignore[arg-type]
    if return_elements is None:
        return None
    found: list[Any] = []
    for element in return_elements:
        op = made.get(node_of(element))
        if op is None:
            raise ValueError(f"Requested return_element {element!r} not found in graph_def.")
        found.append(op.output(output_of(element)) if ":" in element else op)
    return found
