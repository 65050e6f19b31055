"""Variables, of both kinds, and what changes them; the update rules of optimizers; branches.

A reference (``&T``) and a resource are the same here when it runs: a :class:`Slot`, the place in the session that holds
the variable's array.  Arrays in there are never written to, only replaced: what has read one keeps what it has read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpusaver.compat.v1.convert import apply
from gpusaver.compat.v1.ops.rules import from_attr, no_gradient, nothing, scalar, unchanged
from gpusaver.compat.v1.shapes import Shape, is_compatible, numbers
from gpusaver.compat.v1.table import op
from gpusaver.errors import FailedPreconditionError, InvalidArgumentError


class Slot(NamedTuple):
    """Which variable of the session: the key of its array, and the node that says its type and shape."""

    key: str
    node: Any

    def read(self, run: Any) -> Any:
        value = run.variables.get(self.key)
        if value is None:
            raise FailedPreconditionError(f"Attempting to use uninitialized value {self.key}")
        return value

    def write(self, run: Any, value: Any) -> Slot:
        run.variables[self.key] = value if isinstance(value, run.array_types) else run.xp.asarray(value)
        return self


#: What comes out of the branch that is not taken, and of all that depends on it.
DEAD: Any = object()


def _slot(run: Any, node: Any) -> Slot:
    return Slot(slot_key(node), node)


def slot_key(node: Any) -> str:
    """Under which key a session holds the variable of a VariableV2 or VarHandleOp node."""
    shared = node.attrs.get("shared_name") or ""
    return (shared.decode() if isinstance(shared, bytes) else shared) or str(node.name)


def _of_variable(node: Any) -> list[Shape]:
    """The shape of the variable that the first input leads to."""
    source = node.inputs[0].op
    while source.type in ("Identity", "Switch", "RefSwitch") and source.inputs:
        source = source.inputs[0].op
    return [source.attrs.get("shape")]


def _assigned_shape(node: Any) -> list[Shape]:
    variable, value = node.inputs[0].static_shape, node.inputs[1].static_shape
    if node.attrs.get("validate_shape", True) and not is_compatible(variable, value):
        raise ValueError(f"Shapes must be equal, but are {numbers(variable)} and {numbers(value)}")
    return [variable if node.attrs.get("validate_shape", True) else value]


def _assign(run: Any, node: Any, slot: Slot, value: Any) -> Slot:
    wanted = slot.node.attrs.get("shape")
    if node.attrs["validate_shape"] and not is_compatible(wanted, value.shape):
        raise InvalidArgumentError(
            "Assign requires shapes of both tensors to match. "
            f"lhs shape= {list(numbers(wanted))} rhs shape= {list(value.shape)}"
        )
    return slot.write(run, value)


def _assign_resource(run: Any, node: Any, slot: Slot, value: Any) -> tuple[()]:
    wanted = slot.node.attrs.get("shape")
    if not is_compatible(wanted, value.shape):
        raise InvalidArgumentError(
            f"Cannot update variable {slot.key} with shape {list(numbers(wanted))} using a Tensor with shape "
            f"{list(value.shape)}, shapes must be equal."
        )
    slot.write(run, value)
    return ()


def _change(run: Any, slot: Slot, value: Any, sign: int) -> Slot:
    old = slot.read(run)
    if old.shape != value.shape:
        raise InvalidArgumentError(
            f"Cannot update variable {slot.key} with shape {list(old.shape)} using a Tensor with shape "
            f"{list(value.shape)}, shapes must be equal."
        )
    return slot.write(run, old + value if sign > 0 else old - value)


def _silently(result: Any) -> tuple[()]:
    """For resource ops, which have no output."""
    return ()


op(
    "VariableV2",
    "-> &dtype",
    "shape:shape dtype:type container:string='' shared_name:string=''",
    shape=from_attr,
    kernel=_slot,
    gradient=no_gradient,
)
op(
    "VarHandleOp",
    "-> resource",
    "container:string='' shared_name:string='' dtype:type shape:shape",
    shape=scalar,
    kernel=_slot,
    gradient=no_gradient,
)
op(
    "Assign",
    "ref:&T value:T -> &T",
    "T:type validate_shape:bool=True use_locking:bool=True",
    shape=_assigned_shape,
    kernel=_assign,
)
op("AssignVariableOp", "resource:resource value:dtype ->", "dtype:type", shape=nothing, kernel=_assign_resource)
op(
    "ReadVariableOp",
    "resource:resource -> dtype",
    "dtype:type",
    shape=_of_variable,
    kernel=lambda run, node, slot: slot.read(run),
    gradient=lambda node, g: [g],
)
op(
    "IsVariableInitialized",
    "ref:&dtype -> bool",
    "dtype:type",
    shape=scalar,
    kernel=lambda run, node, slot: np.asarray(slot.key in run.variables),
    gradient=no_gradient,
)
op(
    "VarIsInitializedOp",
    "resource:resource -> bool",
    shape=scalar,
    kernel=lambda run, node, slot: np.asarray(slot.key in run.variables),
    gradient=no_gradient,
)
for _name, _sign in (("AssignAdd", 1), ("AssignSub", -1)):
    op(
        _name,
        "ref:&T value:T -> &T",
        "T:type use_locking:bool=False",
        shape=unchanged,
        kernel=lambda run, node, slot, value, s=_sign: _change(run, slot, value, s),
    )
    op(
        f"{_name}VariableOp",
        "resource:resource value:dtype ->",
        "dtype:type",
        shape=nothing,
        kernel=lambda run, node, slot, value, s=_sign: _silently(_change(run, slot, value, s)),
    )


# -- optimizers


def _descend(run: Any, node: Any, slot: Slot, rate: Any, gradient: Any) -> Slot:
    return slot.write(run, slot.read(run) - rate * gradient)


def _adam(run: Any, node: Any, variable: Slot, m: Slot, v: Slot, *values: Any) -> Slot:
    """In the order in which TensorFlow's kernel computes it, so that rounding is the same."""
    # Of rank 0: NumPy computes faster with scalars.
    beta1_power, beta2_power, rate, beta1, beta2, epsilon = (value[()] for value in values[:-1])
    gradient = values[-1]
    one = gradient.dtype.type(1)
    alpha = rate * run.xp.sqrt(one - beta2_power) / (one - beta1_power)
    old = m.read(run)
    mean = old + (gradient - old) * (one - beta1)
    old = v.read(run)
    square = old + (gradient * gradient - old) * (one - beta2)
    m.write(run, mean)
    v.write(run, square)
    step = beta1 * mean + (one - beta1) * gradient if node.attrs["use_nesterov"] else mean
    return variable.write(run, variable.read(run) - step * alpha / (epsilon + run.xp.sqrt(square)))


_SCALARS = "beta1_power:T beta2_power:T lr:T beta1:T beta2:T epsilon:T grad:T"
_FLAGS = "T:type use_locking:bool=False"
op("ApplyGradientDescent", "var:&T alpha:T delta:T -> &T", _FLAGS, shape=unchanged, kernel=_descend)
op(
    "ResourceApplyGradientDescent",
    "var:resource alpha:T delta:T ->",
    _FLAGS,
    shape=nothing,
    kernel=lambda *args: _silently(_descend(*args)),
)
op(
    "ApplyAdam",
    f"var:&T m:&T v:&T {_SCALARS} -> &T",
    f"{_FLAGS} use_nesterov:bool=False",
    shape=unchanged,
    kernel=_adam,
)
op(
    "ResourceApplyAdam",
    f"var:resource m:resource v:resource {_SCALARS} ->",
    f"{_FLAGS} use_nesterov:bool=False",
    shape=nothing,
    kernel=lambda *args: _silently(_adam(*args)),
)


# -- branches


def _switch(run: Any, node: Any, data: Any, predicate: Any) -> tuple[Any, Any]:
    return (DEAD, data) if bool(predicate) else (data, DEAD)


def _merge(run: Any, node: Any, *inputs: Any) -> tuple[Any, Any]:
    for number, value in enumerate(inputs):
        if value is not DEAD:
            return value, np.asarray(number, np.int32)
    return DEAD, DEAD


op("Switch", "data:T pred:bool! -> T T", "T:type", shape=lambda node: [node.inputs[0].static_shape] * 2, kernel=_switch)
op(
    "RefSwitch",
    "data:&T pred:bool! -> &T &T",
    "T:type",
    shape=lambda node: [node.inputs[0].static_shape] * 2,
    kernel=_switch,
)
op("Merge", "inputs:N*T -> T int32", "N:int T:type", shape=lambda node: [None, ()], kernel=_merge)


def branch(predicate: Any, data: Any) -> tuple[Any, Any]:
    """``data`` if ``predicate`` is false, and if it is true; the other one of the two is dead."""
    type_name = "RefSwitch" if data.is_ref else "Switch"
    if_false, if_true = apply(type_name, data, predicate)
    return if_false, if_true
