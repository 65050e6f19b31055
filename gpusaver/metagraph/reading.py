"""What a `.meta` file says: read within bounds, checked, and the variables that its Saver restores.

The way from the SaverDef to the variables, whatever the nodes are called::

    restore_op_name -> every node that must have run before it -> each Assign or AssignVariableOp
        input 0: the variable
        input 1: [Identity, Reshape, Cast] <- RestoreV2, output i: name i and slice i of its two constants
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt
from google.protobuf import text_format
from google.protobuf.message import DecodeError, Message

from gpusaver.errors import DataLossError, InvalidArgumentError, NotFoundError, UnimplementedError
from gpusaver.metagraph.collections import TRAINABLE_VARIABLES, VARIABLES, variable_defs
from gpusaver.metagraph.nodes import by_name, node_of, output_of
from gpusaver.metagraph.saver_nodes import Saveable
from gpusaver.metagraph.tensors import shape_tuple, tensor_array
from gpusaver.metagraph.variables import GraphVariable, Part, part_of
from gpusaver.protos.convert import adopt
from gpusaver.protos.graph_pb2 import NodeDef
from gpusaver.protos.meta_graph_pb2 import MetaGraphDef, VariableDef
from gpusaver.storage.base import Storage, read_bytes
from gpusaver.storage.routing import RoutedStorage
from gpusaver.tensor import DataType, TensorSlice

#: No message can be larger.
BINARY_LIMIT_BYTES = (1 << 31) - 1
#: Parsing text takes 0.3 s per megabyte.
TEXT_LIMIT_BYTES = 64 << 20
#: protobuf's parser takes quadratic time for a run of backslashes: this is the sum of squares that takes about 3 s.
_BACKSLASHES_LIMIT = 10**9

_BACKSLASHES = re.compile(r"\\{100,}")
_PASSED_THROUGH = ("Identity", "Reshape", "Cast")
_ASSIGNS = ("Assign", "AssignVariableOp")
#: Between a stored value and its assignment there are one or two nodes.
_MAX_STEPS = 16


def read_meta_graph(meta_graph_or_file: Any, *, storage: Storage | None = None) -> MetaGraphDef:
    """The message itself if it is one, ours or TensorFlow's; else that in the file of this path, binary or text.

    Raises FileNotFoundError if there is no such file, DataLossError (an OSError) if it is damaged or something else,
    InvalidArgumentError if it is larger than a message can be, TypeError if it is neither a path nor a message.
    """
    if isinstance(meta_graph_or_file, Message):
        return adopt(meta_graph_or_file, MetaGraphDef)
    if not isinstance(meta_graph_or_file, str | bytes | os.PathLike):
        raise TypeError(
            f"expected the path of a .meta file or a MetaGraphDef, found {meta_graph_or_file!r:.60} "
            f"({type(meta_graph_or_file).__name__})"
        )
    path = os.fsdecode(meta_graph_or_file)
    storage = storage or RoutedStorage()
    try:
        data = read_bytes(storage, path, limit=BINARY_LIMIT_BYTES)
    except NotFoundError as error:
        beside = f"{path}.meta"
        hint = f": pass {beside}" if storage.exists(beside) else ""
        raise FileNotFoundError(f"File {path} does not exist{hint}.") from error
    meta_graph = _from_binary(data) or _from_text(data, path)
    for number, node in enumerate(meta_graph.graph_def.node):
        if not node.name or not node.op:
            raise DataLossError(f"{path} is damaged: node {number} has the name {node.name!r} and the op {node.op!r}")
    return meta_graph


def _from_binary(data: bytes) -> MetaGraphDef | None:
    try:
        meta_graph = MetaGraphDef.FromString(data)
    except (DecodeError, UnicodeDecodeError):  # the second from protobuf's pure Python runtime
        return None
    # Text may parse as fields that no MetaGraphDef has.
    return meta_graph if meta_graph.ListFields() else None


def _from_text(data: bytes, path: str) -> MetaGraphDef:
    problem = "it is empty" if not data else f"it has {len(data)} bytes, expected at most {TEXT_LIMIT_BYTES} of text"
    if 0 < len(data) <= TEXT_LIMIT_BYTES:
        try:
            text = data.decode()
            if sum(len(run) ** 2 for run in _BACKSLASHES.findall(text)) > _BACKSLASHES_LIMIT:
                raise ValueError("too many backslashes in a row")
            meta_graph = text_format.Parse(text, MetaGraphDef())
            if meta_graph.ListFields():
                return meta_graph
            problem = "it says nothing"
        except UnicodeDecodeError:
            problem = "as a binary message it does not parse, and it is no text"
        except (text_format.ParseError, ValueError, RecursionError) as error:
            problem = f"{error}"[:200]
    wanted = re.sub(r"(\.index|\.data-\d{5}-of-\d{5})$", ".meta", path)
    hint = "" if wanted == path else f" Pass {wanted}."
    raise DataLossError(f"Cannot parse file {path}: expected a MetaGraphDef, binary or text; {problem}.{hint}")


def saved_variables(meta_graph: MetaGraphDef) -> list[Saveable]:
    """The variables that the Saver of ``meta_graph`` restores, sorted by key; the parts of one variable in their order.

    Without a SaverDef: those in the collection "variables".  What is restored but no variable, as a lookup table, is
    left out.  Raises DataLossError if the nodes do not lead to them, UnimplementedError for a dtype of a later
    TensorFlow.
    """
    nodes = by_name(meta_graph.graph_def.node)
    defs = {node_of(item.variable_name): item for item in variable_defs(meta_graph, VARIABLES)}
    trainable = {node_of(item.variable_name) for item in variable_defs(meta_graph, TRAINABLE_VARIABLES)}
    restore = node_of(meta_graph.saver_def.restore_op_name)
    found = []
    if restore:
        strings = _Strings(nodes)
        for assign in _run_before(nodes, restore):
            if assign.op in _ASSIGNS and (stored := _stored(nodes, strings, assign)) is not None:
                handle = _node(nodes, assign.input[0], assign.name)
                found.append(_saveable(handle, *stored, defs.get(handle.name), handle.name in trainable))
    else:
        for name, item in defs.items():
            handle = _node(nodes, name, "the collection variables")
            key = item.save_slice_info_def.full_name or name
            found.append(_saveable(handle, key, "", item, name in trainable))
    return sorted(found, key=_by_key)


def _by_key(saveable: Saveable) -> Any:
    part = saveable.variable.part
    return (saveable.key.encode("utf-8", "surrogateescape"), part.slice.extents if part is not None else ())


def _node(nodes: Mapping[str, NodeDef], reference: str, of: str) -> NodeDef:
    found = nodes.get(node_of(reference))
    if found is None:
        raise DataLossError(f"damaged graph: {of} names the node {node_of(reference)!r}, which is not there")
    return found


def _run_before(nodes: Mapping[str, NodeDef], name: str) -> Iterator[NodeDef]:
    """The node and all that it needs, each once, whatever circles the graph has."""
    waiting, seen = [_node(nodes, name, "the SaverDef")], {name}
    while waiting:
        node = waiting.pop()
        yield node
        for reference in node.input:
            if node_of(reference) not in seen:
                seen.add(node_of(reference))
                waiting.append(_node(nodes, reference, node.name))


def _stored(nodes: Mapping[str, NodeDef], strings: _Strings, assign: NodeDef) -> tuple[str, str] | None:
    """Name and slice of the stored tensor that is assigned; None if it is no stored one."""
    if len(assign.input) < 2:
        raise DataLossError(f"damaged graph: {assign.name} assigns, but has {len(assign.input)} inputs")
    reference = assign.input[1]
    for _ in range(_MAX_STEPS):
        node = _node(nodes, reference, assign.name)
        if node.op == "RestoreV2":
            number = output_of(reference)
            return strings.item(node, 1, number), strings.item(node, 2, number)
        if node.op not in _PASSED_THROUGH or not node.input:
            break
        reference = node.input[0]
    return None


class _Strings:
    """The constants by which RestoreV2 names what it reads."""

    def __init__(self, nodes: Mapping[str, NodeDef]) -> None:
        self._nodes = nodes
        self._arrays: dict[tuple[str, int], npt.NDArray[Any]] = {}

    def item(self, restore: NodeDef, position: int, number: int) -> str:
        """String ``number`` of the constant that is input ``position``."""
        try:
            if (restore.name, position) not in self._arrays:
                constant = _node(self._nodes, restore.input[position], restore.name)
                self._arrays[restore.name, position] = tensor_array(constant.attr["value"].tensor)
            item = self._arrays[restore.name, position].flat[number]
        except (IndexError, InvalidArgumentError, UnimplementedError) as error:
            raise DataLossError(f"damaged graph: {restore.name} names no tensor {number}: {error}") from error
        if not isinstance(item, bytes):
            raise DataLossError(f"damaged graph: {restore.name} names a tensor by {item!r:.60}")
        return item.decode("utf-8", "surrogateescape")


def _saveable(handle: NodeDef, key: str, spec: str, item: VariableDef | None, trainable: bool) -> Saveable:
    number = handle.attr["dtype"].type if "dtype" in handle.attr else 0
    try:
        dtype = DataType(number)
    except ValueError as error:
        raise UnimplementedError(f"the variable {handle.name} has a type of number {number}, not known here") from error
    shape = shape_tuple(handle.attr["shape"].shape) if "shape" in handle.attr else None
    try:
        part = _part(key, spec, item)
    except InvalidArgumentError as error:
        raise DataLossError(f"damaged graph: the variable {handle.name}: {error}") from error
    is_resource = handle.op == "VarHandleOp"
    return Saveable(key, GraphVariable(handle.name, dtype, shape, trainable, is_resource, handle.device, part))


def _part(key: str, spec: str, item: VariableDef | None) -> Part | None:
    info = part_of(item.save_slice_info_def) if item is not None and item.HasField("save_slice_info_def") else None
    if not spec:
        # A part that is stored under a name of its own is, in a checkpoint, a whole.
        return info if info is not None and info.full_name == key else None
    *sizes, box = spec.split(" ")
    try:
        full_shape = tuple(map(int, sizes))
    except ValueError as error:
        raise InvalidArgumentError(f"{spec!r} is no slice") from error
    part = Part(info.full_name if info is not None else key, full_shape, TensorSlice.parse(box))
    part.slice.resolve(full_shape)
    return part
