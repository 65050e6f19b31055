"""Plans: the operations that some fetches need, in order, and the running of them.

::

    fetches, feeds --plan--> steps: (operation, kernel, slots of its inputs, slot of its output or slots of several)
    step by step             values[output] = kernel(run, operation, *[values[input] ...])

A plan is made once for each set of fetches and feeds.  Where an operation takes the value of a reference to a variable,
a step that reads it comes right before.  Constants are put in place when the plan is made; what
only hands on a value has no step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpusaver.compat.v1.convert import HOST_RUN
from gpusaver.compat.v1.graph import Operation, Tensor
from gpusaver.compat.v1.ops.state import DEAD, Slot, slot_key
from gpusaver.errors import Error, InvalidArgumentError, ResourceExhaustedError, UnimplementedError

Kernel = Callable[..., Any]


#: What comes out is what went in: values are never written to.
_PASSED_THROUGH = frozenset({"Identity", "StopGradient", "PreventGradient", "PlaceholderWithDefault"})
#: Ops on sizes and the like, which are computed when the plan is made if their inputs are constants.
_PURE = frozenset("Shape Size Rank Range Pack Cast FloorDiv FloorMod Maximum AddV2 Sub Mul InvertPermutation".split())
_MAX_COMPUTED = 64


class Step(NamedTuple):
    kernel: Kernel
    op: Operation
    inputs: tuple[int, ...]
    output: int
    #: Slots of all outputs where there are several, or none.
    outputs: tuple[int, ...] | None


class Plan(NamedTuple):
    """``values`` as they are before the first step; feeds and fetches by slot."""

    steps: list[Step]
    values: list[Any]
    feeds: dict[Tensor, int]
    fetches: list[int | None]
    has_branches: bool


def _read(run: Any, op: Operation, slot: Any) -> Any:
    return slot.read(run) if slot is not DEAD else DEAD


class _Planner:
    def __init__(self, feeds: Iterable[Tensor], to_device: Callable[[Any], Any]) -> None:
        self.steps: list[Step] = []
        self.values: list[Any] = []
        self.slots: dict[Tensor, int] = {}
        self._to_device = to_device
        self.feeds = {tensor: self._slot(tensor) for tensor in feeds}
        self._known: set[int] = set()
        self._done: set[Operation] = {tensor.op for tensor in self.feeds if len(tensor.op.outputs) == 1}

    def _new(self, value: Any = None) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _slot(self, tensor: Tensor) -> int:
        if tensor not in self.slots:
            self.slots[tensor] = self._new()
        return self.slots[tensor]

    def need(self, op: Operation) -> None:
        """Plans ``op`` after all that it depends on.  Without recursion: chains may be long."""
        stack: list[tuple[Operation, bool]] = [(op, False)]
        opened: set[Operation] = set()
        while stack:
            current, is_ready = stack.pop()
            if current in self._done:
                continue
            if is_ready:
                self._add(current)
                self._done.add(current)
                continue
            if current in opened:
                raise InvalidArgumentError(f"the graph has a cycle through {current.name!r} (op: {current.type!r})")
            opened.add(current)
            stack.append((current, True))
            # The first input on top, so that it is computed first.
            before = [*[t.op for t in current.inputs if t not in self.feeds], *current.control_inputs]
            stack.extend((other, False) for other in reversed(before) if other not in self._done)

    def _add(self, op: Operation) -> None:
        row = op.row
        if row is None:
            raise UnimplementedError(
                f"The op {op.type!r} of node {op.name!r} is not in gpusaver's table: the graph keeps it, and saves, "
                "restores and exports go on, but it cannot be run here."
            )
        args = row.input_args(op.attrs)
        inputs = tuple(
            self.read(tensor) if tensor.is_ref and not arg.is_ref else self._slot(tensor)
            for tensor, arg in zip(op.inputs, args, strict=True)
        )
        if op.type in _PASSED_THROUGH:
            self.slots.setdefault(op.outputs[0], inputs[0])
        elif op.type == "NoOp" or self._is_computed(op, inputs):
            return
        else:
            outputs = tuple(self._slot(tensor) for tensor in op.outputs)
            single = outputs[0] if len(outputs) == 1 and not row.outputs[0].is_list else None
            self.steps.append(Step(row.kernel, op, inputs, single or 0, None if single is not None else outputs))

    def _is_computed(self, op: Operation, inputs: tuple[int, ...]) -> bool:
        """Computes what never changes, now: constants, places of variables, and small things that follow from them."""
        if op.type == "Const":
            value = op.attrs["value"]
            if not isinstance(value, np.ndarray):
                raise UnimplementedError(f"The value of the constant {op.name!r} cannot be read.")
            result = self._to_device(value)
        elif op.type in ("VariableV2", "VarHandleOp"):
            result = Slot(slot_key(op), op)
        elif inputs and op.type in _PURE and self._known.issuperset(inputs):
            try:
                result = op.row.kernel(HOST_RUN, op, *(self.values[slot] for slot in inputs))  # type: ignore[union-attr]
            except Exception:  # said when it is run
                return False
            if result.size > _MAX_COMPUTED:
                return False
        else:
            return False
        slot = self._slot(op.outputs[0])
        self.values[slot] = result
        if op.type == "Const" or op.type in _PURE:
            self._known.add(slot)
        return True

    def read(self, tensor: Tensor) -> int:
        """A new slot with what the reference ``tensor`` holds at this moment; if it was fed, that."""
        if tensor in self.feeds:
            return self.feeds[tensor]
        slot = self._new()
        self.steps.append(Step(_read, tensor.op, (self._slot(tensor),), slot, None))
        return slot


def make_plan(
    fetches: Sequence[Tensor | Operation],
    feeds: Iterable[Tensor],
    to_device: Callable[[Any], Any],
    wrap: Callable[[Step], Step] | None = None,
) -> Plan:
    """``to_device``: of constants; ``wrap``: of each step, for a run whose arrays are not all in one place.

    Raises UnimplementedError for ops that are not in the table, InvalidArgumentError for a cycle; both name the node.
    """
    planner = _Planner(feeds, to_device)
    for fetch in fetches:
        if isinstance(fetch, Operation):
            planner.need(fetch)
        elif fetch not in planner.feeds:
            planner.need(fetch.op)
    slots: list[int | None] = []
    for fetch in fetches:
        if isinstance(fetch, Operation):
            slots.append(None)
        else:
            slots.append(planner.read(fetch) if fetch.is_ref else planner.slots[fetch])
    steps = planner.steps if wrap is None else [wrap(step) for step in planner.steps]
    has_branches = any(step.op.type in ("Switch", "RefSwitch", "Merge") for step in steps)
    return Plan(steps, planner.values, planner.feeds, slots, has_branches)


def execute(plan: Plan, run: Any, fed: dict[Tensor, Any]) -> list[Any]:
    """The values of the fetches, None for operations.  Errors name the node."""
    values = plan.values.copy()
    for tensor, value in fed.items():
        values[plan.feeds[tensor]] = value
    step, has_branches = None, plan.has_branches
    try:
        for step in plan.steps:
            kernel, op, inputs, output, outputs = step
            given = [values[slot] for slot in inputs]
            if has_branches and op.type != "Merge" and any(value is DEAD for value in given):
                result: Any = DEAD if outputs is None else (DEAD,) * len(outputs)
            else:
                result = kernel(run, op, *given)
            if outputs is None:
                values[output] = result
            elif outputs:
                for slot, value in zip(outputs, result, strict=True):
                    values[slot] = value
    except Exception as error:
        assert step is not None
        raise _named(error, step.op) from error
    return [None if slot is None else values[slot] for slot in plan.fetches]


def _named(error: Exception, op: Operation) -> Exception:
    """The error as TensorFlow's class, with the node in the text and as ``.op``."""
    text = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
    where = f"{text}\n\t [[node {op.name} (op: {op.type})]]"
    kind: type[Error] = InvalidArgumentError
    if isinstance(error, Error):
        kind = type(error)
    elif isinstance(error, MemoryError):
        kind = ResourceExhaustedError
    named = kind(where)
    named.op, named.node_def = op, op.node_def
    return named


def refuse_dead(fetch: Any, value: Any) -> Any:
    if value is DEAD:
        raise InvalidArgumentError(f"Retval for {fetch!r} is dead: its branch was not taken")
    return value
