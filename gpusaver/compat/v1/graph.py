"""Graphs: operations, the tensors between them, scopes and collections.  No values: those live in sessions."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpusaver.compat.v1.attributes import from_attr, to_node, to_shape
from gpusaver.compat.v1.dtypes import DType, as_dtype
from gpusaver.compat.v1.operators import Operators
from gpusaver.compat.v1.shapes import Shape, TensorShape, as_shape, merge
from gpusaver.compat.v1.table import REQUIRED, TABLE, OpRow
from gpusaver.metagraph.nodes import as_attr
from gpusaver.protos.graph_pb2 import GraphDef, NodeDef
from gpusaver.tensor import DataType

_NAME = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*")
_SCOPE = re.compile(r"[A-Za-z0-9_.\\/>-]*")
_DEVICE = re.compile(r"/?(?:device:)?(cpu|gpu)(?::(\d+))?", re.IGNORECASE)


class Tensor(Operators):
    """One output of an operation.  Equal only to itself."""

    def __init__(self, op: Operation, value_index: int, datatype: DataType, is_ref: bool, shape: Shape) -> None:
        self.op = op
        self.value_index = value_index
        self.datatype = datatype
        self.is_ref = is_ref
        self.static_shape = shape

    @property
    def name(self) -> str:
        return f"{self.op.name}:{self.value_index}"

    @property
    def graph(self) -> Graph:
        return self.op.graph

    @property
    def device(self) -> str:
        return self.op.device

    @property
    def dtype(self) -> DType:
        return as_dtype(self.datatype)

    @property
    def shape(self) -> TensorShape:
        return TensorShape(self.static_shape)

    def get_shape(self) -> TensorShape:
        return self.shape

    def set_shape(self, shape: Any) -> None:
        """Adds what is known; ValueError if it contradicts what is known already."""
        self.static_shape = merge(self.static_shape, as_shape(shape))

    def consumers(self) -> list[Operation]:
        return [op for op in self.graph.get_operations() if any(given is self for given in op.inputs)]

    def eval(self, feed_dict: Any = None, session: Any = None) -> Any:
        """The value, in ``session`` or the default one."""
        return _session(session, self.graph, "evaluate tensor").run(self, feed_dict)

    def __iter__(self) -> Iterator[Tensor]:
        if not self.static_shape or self.static_shape[0] is None:
            raise TypeError(f"Tensor {self.name} cannot be iterated over: its first size is not known")
        return iter([self[number] for number in range(self.static_shape[0])])

    def __bool__(self) -> bool:
        raise TypeError("Using a `tf.Tensor` as a Python `bool` is not allowed: run it in a session")

    def __repr__(self) -> str:
        return f"<tf.Tensor '{self.name}' shape={self.shape} dtype={self.dtype.name}>"


class Operation:
    """A node.  ``attrs``: its attributes as Python values; ``row``: its row of the table, None for an unknown op."""

    def __init__(
        self,
        graph: Graph,
        name: str,
        type: str,
        attrs: dict[str, Any],
        device: str = "",
        imported: NodeDef | None = None,
    ) -> None:
        self.graph = graph
        self.name = name
        self.type = type
        self.attrs = attrs
        self.device = device
        self.row: OpRow | None = TABLE.get(type)
        self.inputs: list[Tensor] = []
        self.control_inputs: list[Operation] = []
        self.outputs: list[Tensor] = []
        #: What an imported node was made from: it goes out again as it came in, but for names.
        self.imported = imported

    def output(self, number: int) -> Tensor:
        """An output; of an unknown op any number is taken to exist."""
        while self.row is None and len(self.outputs) <= number:
            self.outputs.append(Tensor(self, len(self.outputs), DataType.invalid, False, None))
        if not 0 <= number < len(self.outputs):
            raise KeyError(
                f"The name '{self.name}:{number}' refers to a Tensor which does not exist. The operation "
                f"'{self.name}' exists but only has {len(self.outputs)} outputs."
            )
        return self.outputs[number]

    def values(self) -> tuple[Tensor, ...]:
        return tuple(self.outputs)

    def get_attr(self, name: str) -> Any:
        """ValueError if there is none of this name."""
        if name not in self.attrs:
            raise ValueError(f"Operation '{self.name}' has no attr named '{name}'.")
        value = self.attrs[name]
        return as_dtype(value) if isinstance(value, DataType) else value

    @property
    def node_def(self) -> NodeDef:
        inputs = [tensor.op.name if tensor.value_index == 0 else tensor.name for tensor in self.inputs]
        inputs += [f"^{op.name}" for op in self.control_inputs]
        return to_node(self, inputs)

    def run(self, feed_dict: Any = None, session: Any = None) -> None:
        _session(session, self.graph, "execute operation").run(self, feed_dict)

    def __repr__(self) -> str:
        return f"<tf.Operation '{self.name}' type={self.type}>"


class Graph:
    """A dataflow graph.  Grows only; one thread at a time may add to it."""

    def __init__(self) -> None:
        self._operations: dict[str, Operation] = {}
        self._names: dict[str, int] = {}
        self._collections: dict[Any, list[Any]] = {}
        self._controls: list[list[Operation]] = []
        self._devices: list[str | Callable[[Operation], str | None] | None] = []
        self._scope = ""
        self._finalized = False
        #: Seed for all random ops; None: drawn anew in each session.
        self.seed: int | None = None
        #: What an imported MetaGraphDef holds beyond nodes and collections, to be exported again.
        self.imported: Any = None
        #: Of variable_scope: state of its own module.
        self.variable_store: Any = None

    # -- adding

    def add(self, type: str, inputs: Sequence[Tensor], attrs: dict[str, Any], name: str | None = None) -> Operation:
        """Adds an operation of a known type; ``inputs`` flat.  TypeError or ValueError if they do not fit."""
        row = TABLE[type]
        self.check_open()
        for tensor in inputs:
            if tensor.graph is not self:
                raise ValueError(f"{tensor!r} must be from the same graph as the operation {name or type}.")
        attrs = _complete(row, inputs, dict(attrs))
        op = Operation(self, self.unique_name(name or type), type, attrs)
        op.inputs = list(inputs)
        op.device = self._device_for(op)
        above = {id(tensor.op) for tensor in inputs}
        op.control_inputs = list(
            {id(control): control for control in itertools.chain(*self._controls) if id(control) not in above}.values()
        )
        infer(op)
        self._operations[op.name] = op
        return op

    def adopt(self, op: Operation) -> None:
        """Takes in an operation made elsewhere (an import).  Requires: its name is free."""
        self.check_open()
        self._names.setdefault(op.name, 1)
        self._operations[op.name] = op

    def check_open(self) -> None:
        """RuntimeError if the graph is finalized."""
        if self._finalized:
            raise RuntimeError("Graph is finalized and cannot be modified.")

    def finalize(self) -> None:
        self._finalized = True

    @property
    def finalized(self) -> bool:
        return self._finalized

    # -- names

    def unique_name(self, name: str, mark_as_used: bool = True) -> str:
        """``name`` under the current name scope, made unique; one ending in "/" is taken as it is, less the slash."""
        full = name[:-1] if name.endswith("/") else f"{self._scope}{name}"
        if not _NAME.fullmatch(full):
            raise ValueError(f"'{full}' is not a valid node name")
        taken = self._names
        found, number = full, taken.get(full, 0)
        if number and not (name.endswith("/") and full not in self._operations):
            while found in taken:
                found = f"{full}_{number}"
                number += 1
        if mark_as_used:
            taken[full] = max(number, 1)
            taken.setdefault(found, 1)
        return found

    @contextlib.contextmanager
    def name_scope(self, name: str | None) -> Iterator[str]:
        """Prefixes the names of what is made inside; "" or None: no prefix; a final "/": that scope again."""
        if name and not _SCOPE.fullmatch(name):
            raise ValueError(f"'{name}' is not a valid scope name")
        if not name:
            scope = ""
        elif name.endswith("/"):
            scope = name
        else:
            scope = self.unique_name(name) + "/"
        before, self._scope = self._scope, scope
        try:
            yield scope
        finally:
            self._scope = before

    def get_name_scope(self) -> str:
        return self._scope.rstrip("/")

    # -- control and device scopes

    @contextlib.contextmanager
    def control_dependencies(self, control_inputs: Sequence[Any] | None) -> Iterator[None]:
        """What is made inside runs after ``control_inputs`` (None: after nothing of the outer ones)."""
        before = self._controls
        if control_inputs is None:
            self._controls = []
        else:
            ops = [self.as_graph_element(item) for item in control_inputs]
            self._controls = [*before, [op.op if isinstance(op, Tensor) else op for op in ops]]
        try:
            yield
        finally:
            self._controls = before

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """Where operations made inside say that they belong; what it means for us: the shards of a Saver."""
        self._devices.append(device if device is None or callable(device) else canonical_device(device))
        try:
            yield
        finally:
            self._devices.pop()

    def _device_for(self, op: Operation) -> str:
        for device in reversed(self._devices):
            found = canonical_device(device(op) or "") if callable(device) else device
            if found is None or found:
                return found or ""
        return ""

    @contextlib.contextmanager
    def as_default(self) -> Iterator[Graph]:
        _stack().append(self)
        try:
            yield self
        finally:
            _stack().remove(self)

    # -- finding

    def get_operations(self) -> list[Operation]:
        return list(self._operations.values())

    @property
    def version(self) -> int:
        return len(self._operations)

    def get_operation_by_name(self, name: str) -> Operation:
        found = self.as_graph_element(name, allow_tensor=False)
        assert isinstance(found, Operation)
        return found

    def get_tensor_by_name(self, name: str) -> Tensor:
        found = self.as_graph_element(name, allow_operation=False)
        assert isinstance(found, Tensor)
        return found

    def as_graph_element(self, obj: Any, allow_tensor: bool = True, allow_operation: bool = True) -> Tensor | Operation:
        """The tensor or operation for itself, a variable, or a name.

        Raises TypeError for other objects, KeyError for unknown names, ValueError for malformed ones and for what
        belongs to another graph.
        """
        if hasattr(obj, "as_graph_element"):
            obj = obj.as_graph_element()
        if isinstance(obj, Tensor | Operation):
            if obj.graph is not self:
                raise ValueError(f"{obj!r} is not an element of this graph.")
            if not (allow_tensor if isinstance(obj, Tensor) else allow_operation):
                raise TypeError(f"Can not convert {obj!r} into a {'Tensor' if allow_tensor else 'Operation'}.")
            return obj
        if not isinstance(obj, str | bytes):
            raise TypeError(f"Can not convert a {type(obj).__name__} into a Tensor or Operation: {obj!r:.60}")
        name = obj.decode() if isinstance(obj, bytes) else obj
        base, colon, number = name.partition(":")
        if colon and allow_tensor:
            if not number.isdecimal():
                raise ValueError(f"The name {name!r} looks like a tensor's but is not one: expected 'op_name:number'.")
            return self._operation(base, name).output(int(number))
        if colon:
            raise ValueError(f"Name {name!r} appears to refer to a Tensor, not a Operation.")
        op = self._operation(base, name)
        if not allow_operation:
            raise ValueError(f"The name {name!r} refers to an Operation, not a Tensor; its first output is '{name}:0'.")
        return op

    def find(self, name: str) -> Operation | None:
        """The operation of this name, if there is one."""
        return self._operations.get(name)

    def _operation(self, base: str, name: str) -> Operation:
        op = self._operations.get(base)
        if op is None:
            what = "a Tensor" if ":" in name else "an Operation"
            raise KeyError(
                f"The name {name!r} refers to {what} which does not exist. The operation, {base!r}, does not exist in "
                "the graph. tf.train.import_meta_graph(path + '.meta') rebuilds the graph of a checkpoint."
            )
        return op

    def is_fetchable(self, element: Any) -> bool:
        return getattr(element, "graph", None) is self

    # -- collections

    def add_to_collection(self, name: Any, value: Any) -> None:
        self._collections.setdefault(name, []).append(value)

    def add_to_collections(self, names: Any, value: Any) -> None:
        for name in [names] if isinstance(names, str) else dict.fromkeys(names):
            self.add_to_collection(name, value)

    def get_collection_ref(self, name: Any) -> list[Any]:
        return self._collections.setdefault(name, [])

    def get_collection(self, name: Any, scope: str | None = None) -> list[Any]:
        """A new list; ``scope``: a regular expression at the start of the names."""
        items = list(self._collections.get(name, ()))
        if scope is None:
            return items
        return [item for item in items if hasattr(item, "name") and re.match(scope, item.name)]

    def get_all_collection_keys(self) -> list[str]:
        return [key for key in self._collections if isinstance(key, str) and not key.startswith("__")]

    def clear_collection(self, name: Any) -> None:
        self._collections.pop(name, None)

    # -- out

    def as_graph_def(self, from_version: int | None = None, add_shapes: bool = False) -> GraphDef:
        """The graph as TensorFlow's GraphDef, operations in order of creation.

        ``add_shapes``: with the static shapes of their outputs.
        """
        graph_def = GraphDef()
        if self.imported is not None:
            graph_def.CopyFrom(self.imported.graph_def)
        else:
            graph_def.versions.producer = PRODUCER
        for op in list(self._operations.values())[from_version or 0 :]:
            node = op.node_def
            if add_shapes:
                shapes = [to_shape(tensor.static_shape) for tensor in op.outputs]
                node.attr["_output_shapes"].CopyFrom(as_attr(shapes))
            graph_def.node.append(node)
        return graph_def


#: The version of graphs written here: what TensorFlow 1.10 wrote, so that later rules do not apply to them.
PRODUCER = 27


def _complete(row: OpRow, inputs: Sequence[Tensor], attrs: dict[str, Any]) -> dict[str, Any]:
    """All attributes: those given, those that follow from the inputs, and defaults."""
    rest = list(inputs)
    for arg in row.inputs:
        if arg.list_attr is not None:
            count = len(attrs[arg.list_attr]) if arg.list_attr in attrs else len(rest)
        else:
            count = attrs[arg.number_attr] if arg.number_attr is not None else 1
        taken, rest = rest[:count], rest[count:]
        if len(taken) < count:
            raise TypeError(f"{row.name}: {len(inputs)} inputs, more are needed for {arg.name!r}")
        if arg.list_attr is not None:
            attrs.setdefault(arg.list_attr, [tensor.datatype for tensor in taken])
        for tensor in taken:
            expected = attrs.setdefault(arg.type_attr, tensor.datatype) if arg.type_attr is not None else arg.dtype
            if arg.list_attr is None and tensor.datatype not in (expected, DataType.invalid):
                raise TypeError(
                    f"Input '{arg.name}' of '{row.name}' Op has type {tensor.dtype.name} ({tensor.name}) that does not "
                    f"match expected type of {getattr(expected, 'name', expected)}."
                )
    for name, (_, default) in row.attrs.items():
        if name not in attrs:
            if default is REQUIRED:
                raise TypeError(f"{row.name}: the attribute {name!r} is missing")
            attrs[name] = default
    return attrs


def infer(op: Operation) -> None:
    """Sets the outputs.  Requires: inputs and attributes.  ValueError, naming the node, for shapes that do not fit."""
    assert op.row is not None
    outputs = op.row.output_dtypes(op.attrs)
    try:
        shapes = op.row.shape(op)
    except (ValueError, IndexError) as error:
        given = ", ".join(str(tensor.shape) for tensor in op.inputs)
        raise ValueError(f"{error} for '{op.name}' (op: '{op.type}') with input shapes: {given}.") from error
    op.outputs = [
        Tensor(op, number, dtype, is_ref, shape)
        for number, ((dtype, is_ref), shape) in enumerate(zip(outputs, shapes, strict=True))
    ]


def canonical_device(device: str) -> str:
    """ "/gpu:0" as "/device:GPU:0"; anything longer as it is."""
    match = _DEVICE.fullmatch(device)
    return f"/device:{match[1].upper()}:{match[2] or 0}" if match else device


def decoded_attrs(node: NodeDef) -> dict[str, Any]:
    return {name: from_attr(value) for name, value in node.attr.items()}


# The default graph


class _Local(threading.local):
    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.sessions: list[Any] = []


_local = _Local()
_global_graph = Graph()


def _stack() -> list[Graph]:
    return _local.graphs


def session_stack() -> list[Any]:
    """Sessions that are the default one of this thread, the innermost last."""
    return _local.sessions


def get_default_graph() -> Graph:
    return _local.graphs[-1] if _local.graphs else _global_graph


def reset_default_graph() -> None:
    """AssertionError inside a ``with graph.as_default()``."""
    global _global_graph
    if _local.graphs:
        raise AssertionError("Do not use tf.reset_default_graph() to clear nested graphs.")
    _global_graph = Graph()


def get_default_session() -> Any:
    return _local.sessions[-1] if _local.sessions else None


def _session(session: Any, graph: Graph, what: str) -> Any:
    found = session or get_default_session()
    if found is None:
        raise ValueError(
            f"Cannot {what} using `eval()` or `run()`: No default session is registered. Use `with sess.as_default()` "
            "or pass an explicit session."
        )
    if found.graph is not graph:
        raise ValueError(f"Cannot use the default session to {what}: it belongs to another graph.")
    return found
