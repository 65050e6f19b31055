"""The nodes of one variable, and the VariableDef by which collections name it.

::

    reference form (TensorFlow 1)                resource form (TensorFlow 2; also 1)
    w            VariableV2                      w                         VarHandleOp
    w/Assign     Assign(w, initial value)        w/Assign                  AssignVariableOp(w, initial value)
    w/read       Identity(w)                     w/Read/ReadVariableOp     ReadVariableOp(w)

A part of a partitioned variable is a variable of its own, ``p/part_0``, whose VariableDef says where in ``p`` it lies.
Attributes are those that TensorFlow 1.15 knows, so that both releases take the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gpusaver.metagraph.nodes import colocated, node_octets, node_of
from gpusaver.protos.meta_graph_pb2 import SaveSliceInfoDef, VariableDef
from gpusaver.tensor import DataType, TensorSlice


class Part(NamedTuple):
    """Which part of which whole a variable is: ``slice`` of the tensor ``full_name`` of ``full_shape``."""

    full_name: str
    full_shape: tuple[int, ...]
    slice: TensorSlice


class GraphVariable(NamedTuple):
    """A variable of a graph.  ``shape`` None or with -1: not fully known.  ``device``: as "/device:GPU:0", or empty."""

    name: str
    dtype: DataType
    shape: tuple[int, ...] | None
    trainable: bool = True
    is_resource: bool = True
    device: str = ""
    part: Part | None = None

    @property
    def read(self) -> str:
        """The node whose output 0 is the value."""
        return f"{self.name}/Read/ReadVariableOp" if self.is_resource else f"{self.name}/read"


def variable_nodes(variable: GraphVariable, initial_value: str) -> list[bytes]:
    """The handle, its initializer and its read, serialized.  ``initial_value``: names a tensor of another node."""
    name, dtype, shape, device = variable.name, variable.dtype, variable.shape, variable.device
    if variable.is_resource:
        return [
            node_octets("VarHandleOp", name, (), device, dtype=dtype, shape=shape, container="", shared_name=name),
            node_octets("AssignVariableOp", f"{name}/Assign", [name, initial_value], device, dtype=dtype),
            node_octets("ReadVariableOp", variable.read, [name], device, dtype=dtype),
        ]
    where = colocated(name)
    known = is_fully_known(shape)
    return [
        node_octets("VariableV2", name, (), device, dtype=dtype, shape=shape, container="", shared_name=""),
        node_octets(
            "Assign",
            f"{name}/Assign",
            [name, initial_value],
            device,
            T=dtype,
            validate_shape=known,
            use_locking=True,
            _class=where,
        ),
        node_octets("Identity", variable.read, [name], device, T=dtype, _class=where),
    ]


def variable_def(variable: GraphVariable, initial_value: str = "") -> VariableDef:
    """``initial_value``: the name of a tensor, if there is one."""
    message = VariableDef(
        variable_name=f"{variable.name}:0",
        initializer_name=f"{variable.name}/Assign",
        snapshot_name=f"{variable.read}:0",
        is_resource=variable.is_resource,
        initial_value_name=f"{node_of(initial_value)}:0" if initial_value else "",
        trainable=variable.trainable,
    )
    if variable.part is not None:
        message.save_slice_info_def.CopyFrom(slice_info(variable.part))
    return message


def slice_info(part: Part) -> SaveSliceInfoDef:
    box = part.slice.resolve(part.full_shape)
    name = part.full_name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return SaveSliceInfoDef(
        full_name=name,
        full_shape=part.full_shape,
        var_offset=[start for start, _ in box],
        var_shape=[length for _, length in box],
    )


def part_of(info: SaveSliceInfoDef) -> Part:
    """Raises InvalidArgumentError if the part does not lie in the whole."""
    box = tuple(zip(info.var_offset, info.var_shape, strict=False))
    part = Part(info.full_name, tuple(info.full_shape), TensorSlice(box))
    part.slice.resolve(part.full_shape)
    return part


def slice_spec(part: Part | None) -> str:
    """The text by which the ops SaveV2 and RestoreV2 name a part: "10 3 0,4:0,3"; empty for the whole."""
    if part is None:
        return ""
    box = TensorSlice(part.slice.resolve(part.full_shape))  # TensorFlow writes numbers for a whole dimension too
    return " ".join([*map(str, part.full_shape), str(box)])


def is_fully_known(shape: Sequence[int] | None) -> bool:
    return shape is not None and min(shape, default=0) >= 0
