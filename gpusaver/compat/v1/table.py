"""The table of ops: one row says all that gpusaver knows of a TensorFlow op.

::

    op("MatMul", "a:T b:T -> T", "T:type transpose_a:bool=False transpose_b:bool=False",
       shape=..., kernel=..., gradient=...)

    inputs and outputs   name:T        the type that the attribute T gives      name:int32   always this type
                         name:&T       a reference to a variable                name:N*T     N tensors of type T
                         name:Ts*      one tensor for each type in the list Ts  name:T!      always on the host
    attributes           name:kind=default; kinds: type bool int float string shape tensor list(type) list(int)

``shape(node)`` gives the static shapes of the outputs, or raises ValueError.  ``kernel(run, node, *values)`` computes
on ``run.xp`` and returns the output, or a tuple of several; it never writes into its inputs.
``gradient(node, *grads)`` gives a tensor or None for each input.  ``node`` is an
:class:`~gpusaver.compat.v1.graph.Operation`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpusaver.compat.v1.shapes import Shape
from gpusaver.tensor import DataType

#: Stands for "no default": the attribute must be given, or follows from the inputs.
REQUIRED: Any = object()

ShapeRule = Callable[[Any], Sequence[Shape]]
Kernel = Callable[..., Any]
Gradient = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Arg:
    """One input or output of an op, as its signature says."""

    name: str
    type_attr: str | None = None
    dtype: DataType | None = None
    number_attr: str | None = None
    list_attr: str | None = None
    is_ref: bool = False
    on_host: bool = False

    @property
    def is_list(self) -> bool:
        return self.number_attr is not None or self.list_attr is not None

    def dtypes(self, attrs: dict[str, Any]) -> list[DataType]:
        """The types of the tensors that this one argument stands for."""
        if self.list_attr is not None:
            return list(attrs[self.list_attr])
        dtype = self.dtype if self.type_attr is None else attrs[self.type_attr]
        assert dtype is not None
        return [dtype] * (attrs[self.number_attr] if self.number_attr is not None else 1)


@dataclass(frozen=True, slots=True)
class OpRow:
    """What is known of one op; see the module's docstring."""

    name: str
    inputs: tuple[Arg, ...]
    outputs: tuple[Arg, ...]
    attrs: dict[str, tuple[str, Any]]
    shape: ShapeRule
    kernel: Kernel
    gradient: Gradient | None = None

    def input_args(self, attrs: dict[str, Any]) -> list[Arg]:
        """The argument behind each single input tensor."""
        return [arg for arg in self.inputs for _ in arg.dtypes(attrs)]

    def output_dtypes(self, attrs: dict[str, Any]) -> list[tuple[DataType, bool]]:
        """Type of each output, and whether it is a reference to a variable."""
        return [(dtype, arg.is_ref) for arg in self.outputs for dtype in arg.dtypes(attrs)]


TABLE: dict[str, OpRow] = {}

_ARG = re.compile(r"(\w+):(&?)(?:(\w+)\*(\w+)|(\w+)(\*?))(!?)")
_ATTR = re.compile(r"(\w+):([\w()]+)(?:=(\S+))?")


def op(
    name: str,
    signature: str,
    attributes: str = "",
    *,
    shape: ShapeRule,
    kernel: Kernel,
    gradient: Gradient | None = None,
) -> None:
    """Adds a row.  Without ``gradient`` the op is not differentiable."""
    inputs, _, outputs = signature.partition("->")
    TABLE[name] = OpRow(
        name,
        tuple(_parse_arg(text) for text in inputs.split()),
        tuple(_parse_arg(f"{number}:{text}") for number, text in enumerate(outputs.split())),
        dict(_parse_attr(text) for text in attributes.split()),
        shape,
        kernel,
        gradient,
    )


def _parse_arg(text: str) -> Arg:
    match = _ARG.fullmatch(text)
    assert match is not None, text
    name, ref, number, of, single, is_type_list, host = match.groups()
    if is_type_list:
        return Arg(name, list_attr=single, on_host=bool(host))
    type_name = of or single
    dtype = DataType.__members__.get(type_name)
    return Arg(name, None if dtype is not None else type_name, dtype, number, None, bool(ref), bool(host))


def _parse_attr(text: str) -> tuple[str, tuple[str, Any]]:
    match = _ATTR.fullmatch(text)
    assert match is not None, text
    name, kind, default = match.groups()
    if default is None:
        return name, (kind, REQUIRED)
    return name, (kind, DataType[default] if kind == "type" else ast.literal_eval(default))
