"""Variables, as reference (VariableV2, TensorFlow 1) or resource (VarHandleOp): the nodes, and what users hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gpusaver.compat.v1.convert import add_operation, apply, convert_to_tensor, emit
from gpusaver.compat.v1.dtypes import DType, as_dtype
from gpusaver.compat.v1.functions import cast, group, identity, no_op, reshape
from gpusaver.compat.v1.graph import Graph, Operation, Tensor, get_default_graph, get_default_session
from gpusaver.compat.v1.names import GraphKeys
from gpusaver.compat.v1.operators import Operators
from gpusaver.compat.v1.ops.state import branch, slot_key
from gpusaver.compat.v1.shapes import Shape, TensorShape, as_shape, is_compatible, is_known
from gpusaver.metagraph.variables import Part, part_of, slice_info
from gpusaver.protos.meta_graph_pb2 import VariableDef
from gpusaver.tensor import TensorSlice

_resource_by_default = True


def enable_resource_variables() -> None:
    """Variables made from now on are VarHandleOps, as in TensorFlow 2's compat.v1.  The default."""
    global _resource_by_default
    _resource_by_default = True


def disable_resource_variables() -> None:
    """Variables made from now on are VariableV2, as in TensorFlow 1."""
    global _resource_by_default
    _resource_by_default = False


def resource_variables_enabled() -> bool:
    return _resource_by_default


class SaveSliceInfo:
    """Which part of a partitioned variable this one is."""

    def __init__(self, part: Part) -> None:
        self.full_name = part.full_name
        self.full_shape = list(part.full_shape)
        box = part.slice.resolve(part.full_shape)
        self.var_offset = [start for start, _ in box]
        self.var_shape = [size for _, size in box]

    @property
    def spec(self) -> str:
        """As the Saver's ops write it: "10 3 0,4:0,3"."""
        extents = ":".join(f"{start},{size}" for start, size in zip(self.var_offset, self.var_shape, strict=True))
        return " ".join([*map(str, self.full_shape), extents])

    @property
    def part(self) -> Part:
        box = tuple(zip(self.var_offset, self.var_shape, strict=True))
        return Part(self.full_name, tuple(self.full_shape), TensorSlice(box))


class Variable(Operators):
    """A variable of the default graph.

    ``initial_value``: a value, a tensor, or a function of no arguments that makes one.  ``trainable``: in the
    collection ``trainable_variables`` too.  ``collections``: which ones it joins, by default the global variables.
    ``validate_shape=False``: of unknown shape.  ``use_resource``: None takes the default; see
    :func:`enable_resource_variables`.  ``variable_def``: made from this message instead, its nodes being in the graph.

    Raises ValueError for an initial value of unknown shape, TypeError for values that are no tensors.
    """

    def __init__(
        self,
        initial_value: Any = None,
        trainable: bool | None = None,
        collections: Sequence[str] | None = None,
        validate_shape: bool = True,
        caching_device: Any = None,
        name: str | None = None,
        variable_def: Any = None,
        dtype: Any = None,
        expected_shape: Any = None,
        import_scope: str | None = None,
        constraint: Any = None,
        use_resource: bool | None = None,
        synchronization: Any = None,
        aggregation: Any = None,
        shape: Any = None,
    ) -> None:
        self._save_slice_info: SaveSliceInfo | None = None
        self._variable_def: VariableDef | None = None
        self.constraint = constraint
        if variable_def is not None:
            self._from_def(variable_def, import_scope)
            return
        if initial_value is None:
            raise ValueError("initial_value must be specified.")
        self._trainable = True if trainable is None else trainable
        self.is_resource = _resource_by_default if use_resource is None else use_resource
        self.graph: Graph = get_default_graph()
        with self.graph.control_dependencies(None), self.graph.name_scope(name or "Variable") as scope:
            self._build(scope, initial_value, None if dtype is None else as_dtype(dtype), validate_shape, shape)
        names = [GraphKeys.GLOBAL_VARIABLES] if collections is None else list(collections)
        if self._trainable and GraphKeys.TRAINABLE_VARIABLES not in names:
            names.append(GraphKeys.TRAINABLE_VARIABLES)
        self.graph.add_to_collections(names, self)

    def _build(self, scope: str, initial: Any, dtype: DType | None, validate_shape: bool, shape: Any) -> None:
        if callable(initial):
            with self.graph.name_scope("Initializer"):
                value = convert_to_tensor(initial(), dtype)
        else:
            value = convert_to_tensor(initial, dtype, name="initial_value")
        sizes: Shape = as_shape(shape) if shape is not None else value.static_shape if validate_shape else None
        if validate_shape and shape is None and not is_known(value.static_shape):
            raise ValueError(
                f"initial_value must have a shape specified: {value!r}. Set it with set_shape, or validate_shape=False."
            )
        self.initial_value: Tensor = value
        attrs = {"dtype": value.dtype, "shape": sizes, "container": ""}
        if self.is_resource:
            self._handle: Tensor = emit("VarHandleOp", name=scope, shared_name=scope[:-1], **attrs)
            self._is_initialized = emit(
                "VarIsInitializedOp", self._handle, name=f"{scope}IsInitialized/VarIsInitializedOp/"
            )
            self.initializer = add_operation("AssignVariableOp", self._handle, value, name=f"{scope}Assign/")
            self._snapshot = emit(
                "ReadVariableOp", self._handle, dtype=value.dtype, name=f"{scope}Read/ReadVariableOp/"
            )
        else:
            self._handle = emit("VariableV2", name=scope, shared_name="", **attrs)
            self.initializer = add_operation(
                "Assign", self._handle, value, validate_shape=validate_shape, name=f"{scope}Assign/"
            )
            self._snapshot = identity(self._handle, f"{scope}read/")

    def _from_def(self, variable_def: VariableDef, import_scope: str | None) -> None:
        """KeyError or ValueError if one of the nodes is not in the default graph."""
        self.graph = get_default_graph()
        prefix = f"{import_scope}/" if import_scope else ""
        self._variable_def = variable_def
        self._handle = self.graph.get_tensor_by_name(prefix + variable_def.variable_name)
        if not {"dtype", "shape"} <= set(self.op.attrs):
            raise ValueError(f"{self.name} is no variable, but an operation {self.op.type}")
        found = self.graph.as_graph_element(prefix + variable_def.initializer_name)
        self.initializer = found.op if isinstance(found, Tensor) else found
        self._snapshot = self.graph.get_tensor_by_name(prefix + variable_def.snapshot_name)
        if variable_def.initial_value_name:
            self.initial_value = self.graph.get_tensor_by_name(prefix + variable_def.initial_value_name)
        self._trainable = variable_def.trainable
        self.is_resource = variable_def.is_resource
        if variable_def.HasField("save_slice_info_def"):
            self._save_slice_info = SaveSliceInfo(part_of(variable_def.save_slice_info_def))

    # -- what it is

    @property
    def name(self) -> str:
        return f"{self.op.name}:0"

    @property
    def op(self) -> Operation:
        return self._handle.op

    @property
    def handle(self) -> Tensor:
        """Of a resource variable: what its ops take."""
        return self._handle

    @property
    def dtype(self) -> DType:
        return as_dtype(self.op.attrs["dtype"])

    @property
    def shape(self) -> TensorShape:
        return TensorShape(self.op.attrs["shape"])

    @property
    def device(self) -> str:
        return self.op.device

    @property
    def trainable(self) -> bool:
        return self._trainable

    @property
    def key(self) -> str:
        """Under which a session holds its array."""
        return slot_key(self.op)

    def get_shape(self) -> TensorShape:
        return self.shape

    def _set_save_slice_info(self, info: Any) -> None:
        self._save_slice_info = info

    def _get_save_slice_info(self) -> SaveSliceInfo | None:
        return self._save_slice_info

    # -- its value

    def value(self) -> Tensor:
        return self._snapshot if not self.is_resource else self.read_value()

    def read_value(self) -> Tensor:
        """Read when it runs, after the control dependencies of this call."""
        if self.is_resource:
            with self.graph.name_scope(f"{self.op.name}/Read/"):
                return emit("ReadVariableOp", self._handle, dtype=self.dtype, name="ReadVariableOp")
        return identity(self._handle, "read")

    def as_value_tensor(self) -> Tensor:
        return self._snapshot if not self.is_resource else self.read_value()

    def as_ref_tensor(self) -> Tensor:
        return self._handle

    def as_graph_element(self) -> Tensor:
        """What a session fetches."""
        return self._handle if not self.is_resource else self._snapshot

    @property
    def gradient_tensor(self) -> Tensor:
        """Where ``tf.gradients`` stops when asked for this variable."""
        return self._handle

    def initialized_value(self) -> Tensor:
        """The value if there is one, else the initial value; for variables that start from others."""
        with self.graph.control_dependencies(None), self.graph.name_scope("cond"):
            is_initialized = is_variable_initialized(self)
            initial, _ = branch(is_initialized, self.initial_value)
            _, current = branch(is_initialized, self._handle)
            value = apply("ReadVariableOp", current, dtype=self.dtype) if self.is_resource else identity(current)
            merged: Tensor = apply("Merge", [initial, value], name="Merge")[0]
            merged.set_shape(self.shape)
            return merged

    def eval(self, session: Any = None) -> Any:
        return self.as_graph_element().eval(session=session)

    def load(self, value: Any, session: Any = None) -> None:
        """Sets the value in the session, without adding to the graph."""
        found = session or get_default_session()
        if found is None:
            raise ValueError("Either session argument should be provided or default session should be established.")
        found.run(self.initializer, {self.initializer.inputs[1]: value})

    # -- assignments

    def assign(self, value: Any, use_locking: bool = False, name: str | None = None, read_value: bool = True) -> Any:
        return self._change("Assign", value, name, read_value)

    def assign_add(
        self, delta: Any, use_locking: bool = False, name: str | None = None, read_value: bool = True
    ) -> Any:
        return self._change("AssignAdd", delta, name, read_value)

    def assign_sub(
        self, delta: Any, use_locking: bool = False, name: str | None = None, read_value: bool = True
    ) -> Any:
        return self._change("AssignSub", delta, name, read_value)

    def _change(self, type: str, value: Any, name: str | None, read_value: bool) -> Any:
        """The operation that changes it; with ``read_value`` what to fetch or use for the value afterwards."""
        tensor = convert_to_tensor(value, self.dtype)
        if not is_compatible(self.op.attrs["shape"], tensor.static_shape):
            raise ValueError(f"Shapes {self.shape} and {tensor.shape} are incompatible: {type} to {self.name}")
        if not self.is_resource:
            changed = apply(type, self._handle, tensor, name=name)
            return changed if read_value else changed.op
        operation = apply(
            "AssignVariableOp" if type == "Assign" else f"{type}VariableOp", self._handle, tensor, name=name
        )
        return _Assigned(self, operation) if read_value else operation

    # -- out

    def to_proto(self, export_scope: str | None = None) -> VariableDef | None:
        """As collections store it; None if it does not lie in the scope."""
        if export_scope and not self.op.name.startswith(f"{export_scope}/"):
            return None
        if self._variable_def is not None and not export_scope and self._variable_def.variable_name == self.name:
            copy = VariableDef()
            copy.CopyFrom(self._variable_def)
            return copy
        cut = len(export_scope) + 1 if export_scope else 0
        initial = getattr(self, "initial_value", None)
        message = VariableDef(
            variable_name=self.name[cut:],
            initializer_name=self.initializer.name[cut:],
            snapshot_name=self._snapshot.name[cut:],
            is_resource=self.is_resource,
            initial_value_name=initial.name[cut:] if initial is not None else "",
            trainable=self._trainable,
        )
        if self._save_slice_info is not None:
            message.save_slice_info_def.CopyFrom(slice_info(self._save_slice_info.part))
        return message

    @classmethod
    def from_proto(cls, variable_def: VariableDef, import_scope: str | None = None) -> Variable:
        return cls(variable_def=variable_def, import_scope=import_scope)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("'Variable' object is not iterable.")

    def __repr__(self) -> str:
        return f"<tf.Variable '{self.name}' shape={self.shape} dtype={self.dtype.name}>"


VariableV1 = RefVariable = Variable


class _Assigned(Operators):
    """What ``assign`` of a resource variable gives: fetched or used, the value after the assignment."""

    def __init__(self, variable: Variable, op: Operation) -> None:
        self.op = op
        self.graph = op.graph
        self.dtype = variable.dtype
        self._variable = variable
        self._value: Tensor | None = None

    @property
    def shape(self) -> TensorShape:
        return self._variable.shape

    def get_shape(self) -> TensorShape:
        return self.shape

    @property
    def name(self) -> str:
        return self.as_value_tensor().name

    def as_value_tensor(self) -> Tensor:
        if self._value is None:
            with self.graph.control_dependencies(None), self.graph.control_dependencies([self.op]):
                self._value = self._variable.read_value()
        return self._value

    as_graph_element = as_value_tensor

    def eval(self, feed_dict: Any = None, session: Any = None) -> Any:
        return self.as_value_tensor().eval(feed_dict, session)


class PartitionedVariable(Operators):
    """A variable in parts, each a variable of its own, along one axis."""

    def __init__(self, name: str, shape: Sequence[int], dtype: DType, variables: Sequence[Variable], axis: int) -> None:
        self._name = name
        self._shape = list(shape)
        self.dtype = dtype
        self._variables = list(variables)
        self._axis = axis

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> TensorShape:
        return TensorShape(self._shape)

    def get_shape(self) -> TensorShape:
        return self.shape

    def as_value_tensor(self) -> Tensor:
        if len(self._variables) == 1:
            return identity(self._variables[0])
        with get_default_graph().name_scope(f"{self._name}/ConcatPartitions/"):
            joined: Tensor = apply("ConcatV2", self._variables, self._axis, name="concat")
        return identity(joined, f"{self._name.rpartition('/')[2]}")

    as_tensor = as_value_tensor

    @property
    def graph(self) -> Graph:
        return self._variables[0].graph

    def as_graph_element(self) -> Tensor:
        return self.as_value_tensor()

    def assign(self, value: Any, use_locking: bool = False, name: str | None = None, read_value: bool = True) -> Any:
        tensor = convert_to_tensor(value, self.dtype)
        sizes = [variable.shape.as_list()[self._axis] for variable in self._variables]
        parts = apply("SplitV", tensor, sizes, self._axis, num_split=len(sizes))
        return [variable.assign(part) for variable, part in zip(self._variables, parts, strict=True)]

    def __iter__(self) -> Iterator[Variable]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def _get_variable_list(self) -> list[Variable]:
        return list(self._variables)


# -- functions on variables


def assign(ref: Any, value: Any, validate_shape: Any = None, use_locking: Any = None, name: str | None = None) -> Any:
    if isinstance(ref, Tensor):
        return apply("Assign", ref, value, validate_shape=validate_shape is not False, name=name)
    if validate_shape is False and not ref.is_resource:
        return apply("Assign", ref, value, validate_shape=False, name=name)
    return ref.assign(value, name=name)


def assign_add(ref: Any, value: Any, use_locking: Any = None, name: str | None = None) -> Any:
    return apply("AssignAdd", ref, value, name=name) if isinstance(ref, Tensor) else ref.assign_add(value, name=name)


def assign_sub(ref: Any, value: Any, use_locking: Any = None, name: str | None = None) -> Any:
    return apply("AssignSub", ref, value, name=name) if isinstance(ref, Tensor) else ref.assign_sub(value, name=name)


def is_variable_initialized(variable: Any) -> Tensor:
    if getattr(variable, "is_resource", False):
        return emit("VarIsInitializedOp", variable)
    ref = variable.as_ref_tensor() if hasattr(variable, "as_ref_tensor") else variable
    return emit("IsVariableInitialized", ref, dtype=ref.dtype)


def global_variables(scope: str | None = None) -> list[Any]:
    return get_default_graph().get_collection(GraphKeys.GLOBAL_VARIABLES, scope)


def local_variables(scope: str | None = None) -> list[Any]:
    return get_default_graph().get_collection(GraphKeys.LOCAL_VARIABLES, scope)


def trainable_variables(scope: str | None = None) -> list[Any]:
    return get_default_graph().get_collection(GraphKeys.TRAINABLE_VARIABLES, scope)


def model_variables(scope: str | None = None) -> list[Any]:
    return get_default_graph().get_collection(GraphKeys.MODEL_VARIABLES, scope)


all_variables = global_variables


def variables_initializer(var_list: Sequence[Any], name: str = "init") -> Operation:
    """Runs the initializers of all of them, in no order."""
    return group(*[variable.initializer for variable in var_list], name=name) if var_list else no_op(name)


def global_variables_initializer() -> Operation:
    return variables_initializer(global_variables())


def local_variables_initializer() -> Operation:
    return variables_initializer(local_variables(), "init_local")


initialize_all_variables = global_variables_initializer


def report_uninitialized_variables(
    var_list: Sequence[Any] | None = None, name: str = "report_uninitialized_variables"
) -> Tensor:
    """A vector with the names of those that have no value."""
    variables = global_variables() + local_variables() if var_list is None else list(var_list)
    graph = get_default_graph()
    with graph.name_scope(name):
        if not variables:
            return convert_to_tensor([], "string")
        missing = [apply("LogicalNot", is_variable_initialized(variable)) for variable in variables]
        names = convert_to_tensor([variable.op.name for variable in variables])
        places = reshape(apply("Where", apply("Pack", missing, axis=0)), [-1])
        return emit("GatherV2", names, cast(places, "int64"), 0)
