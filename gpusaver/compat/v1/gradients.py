"""Gradients: the graph of an output is walked backwards, each op adding what its row says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpusaver.compat.v1.convert import apply, convert_to_tensor
from gpusaver.compat.v1.functions import ones_like, tuple_
from gpusaver.compat.v1.graph import Operation, Tensor, get_default_graph


def gradients(
    ys: Any,
    xs: Any,
    grad_ys: Any = None,
    name: str = "gradients",
    colocate_gradients_with_ops: bool = False,
    gate_gradients: bool = False,
    aggregation_method: Any = None,
    stop_gradients: Any = None,
    unconnected_gradients: Any = None,
) -> list[Tensor | None]:
    """Of the sum of ``ys`` with respect to each of ``xs``; None where they do not depend on it.

    ``grad_ys``: start values, by default ones.  ``stop_gradients``: tensors taken for constants.  ``gate_gradients``:
    none of an op's gradients is there before all are, so that a variable which one of them still reads is not updated
    by way of another.  Raises LookupError, naming op and node, for an op without a gradient.
    """
    outputs = [convert_to_tensor(y) for y in _listed(ys)]
    targets = [_target(x) for x in _listed(xs)]
    starts = _listed(grad_ys) if grad_ys is not None else [None] * len(outputs)
    stopped = {_target(x) for x in _listed(stop_gradients or [])}
    graph = get_default_graph()
    with graph.name_scope(name):
        collected: dict[Tensor, list[Tensor]] = {}
        for y, start in zip(outputs, starts, strict=True):
            gradient = ones_like(y) if start is None else convert_to_tensor(start, y.dtype)
            collected.setdefault(y, []).append(gradient)
        order, wanted = _backwards(outputs, set(targets), stopped)
        for op in order:
            _step(op, collected, wanted, gate=gate_gradients)
        return [_total(collected.get(x)) for x in targets]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _target(x: Any) -> Tensor:
    found: Tensor = x.gradient_tensor if hasattr(x, "gradient_tensor") else convert_to_tensor(x)
    return found


def _backwards(
    outputs: Sequence[Tensor], targets: set[Tensor], stopped: set[Tensor]
) -> tuple[list[Operation], Callable[[Tensor], bool]]:
    """The operations between targets and outputs, each before those that it depends on; which tensors lead there."""
    reaches: dict[Operation, bool] = {}
    order: list[Operation] = []
    stack: list[tuple[Operation, bool]] = [(y.op, False) for y in outputs]
    while stack:
        op, is_ready = stack.pop()
        if is_ready:
            reaches[op] = any(t not in stopped and (t in targets or reaches.get(t.op, False)) for t in op.inputs)
            if reaches[op]:
                order.append(op)
        elif op not in reaches:
            reaches[op] = False  # until its inputs are known
            stack.append((op, True))
            stack.extend((t.op, False) for t in op.inputs if t.op not in reaches and t not in stopped)
    return order[::-1], lambda t: t not in stopped and (t in targets or reaches.get(t.op, False))


def _total(gradients: list[Tensor] | None) -> Tensor | None:
    if not gradients:
        return None
    return gradients[0] if len(gradients) == 1 else apply("AddN", gradients)


def _step(
    op: Operation, collected: dict[Tensor, list[Tensor]], wanted: Callable[[Tensor], bool], *, gate: bool
) -> None:
    given = [_total(collected.get(y)) for y in op.outputs]
    if all(gradient is None for gradient in given):
        return
    row = op.row
    if row is None or row.gradient is None:
        raise LookupError(f"No gradient defined for operation '{op.name}' (op type: {op.type})")
    with op.graph.name_scope(f"{op.name}_grad"):
        try:
            found = row.gradient(op, *given)
        except LookupError as error:
            raise LookupError(f"{error} (operation '{op.name}', op type: {op.type})") from error
        found = [g if wanted(tensor) else None for g, tensor in zip(found, op.inputs, strict=True)]
        if gate and sum(gradient is not None for gradient in found) > 1:
            found = tuple_(found)
    for tensor, gradient in zip(op.inputs, found, strict=True):
        if gradient is not None:
            gradient.set_shape(tensor.static_shape if tensor.op.type != "VarHandleOp" else None)
            collected.setdefault(tensor, []).append(gradient)
