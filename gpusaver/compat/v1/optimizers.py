"""Optimizers: gradient descent, and Adam, whose slots are variables and so are saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpusaver.compat.v1.convert import apply, convert_to_tensor
from gpusaver.compat.v1.functions import group, tuple_, zeros
from gpusaver.compat.v1.gradients import gradients
from gpusaver.compat.v1.graph import Operation, Tensor, get_default_graph
from gpusaver.compat.v1.names import GraphKeys
from gpusaver.compat.v1.variables import Variable, assign_add, trainable_variables


class Optimizer:
    """Base: gradients of a loss, and an operation that applies them.  ``use_locking`` has no effect."""

    GATE_NONE, GATE_OP, GATE_GRAPH = 0, 1, 2

    def __init__(self, use_locking: bool, name: str) -> None:
        if not name:
            raise ValueError("Must specify the optimizer name")
        self._name = name
        self._use_locking = use_locking
        self._slots: dict[str, dict[Any, Variable]] = {}
        self._others: dict[str, Variable] = {}

    def get_name(self) -> str:
        return self._name

    def minimize(
        self,
        loss: Any,
        global_step: Any = None,
        var_list: Sequence[Any] | None = None,
        gate_gradients: int = GATE_OP,
        aggregation_method: Any = None,
        colocate_gradients_with_ops: bool = False,
        name: str | None = None,
        grad_loss: Any = None,
    ) -> Any:
        """The operation of one training step; ``global_step`` counts them.  ValueError if no variable gets one."""
        pairs = self.compute_gradients(loss, var_list, gate_gradients, grad_loss=grad_loss)
        if all(gradient is None for gradient, _ in pairs):
            raise ValueError(
                "No gradients provided for any variable, check your graph for ops that do not support gradients, "
                f"between variables {[variable.name for _, variable in pairs]} and loss {loss!r}."
            )
        return self.apply_gradients(pairs, global_step, name)

    def compute_gradients(
        self,
        loss: Any,
        var_list: Sequence[Any] | None = None,
        gate_gradients: int = GATE_OP,
        aggregation_method: Any = None,
        colocate_gradients_with_ops: bool = False,
        grad_loss: Any = None,
    ) -> list[tuple[Tensor | None, Any]]:
        """Pairs of gradient and variable; by default of all trainable variables."""
        variables = trainable_variables() if var_list is None else list(var_list)
        if not variables:
            raise ValueError("No variables to optimize.")
        found = gradients(loss, variables, grad_loss, gate_gradients=gate_gradients == self.GATE_OP)
        if gate_gradients == self.GATE_GRAPH:
            found = tuple_(found)
        return list(zip(found, variables, strict=True))

    def apply_gradients(self, grads_and_vars: Any, global_step: Any = None, name: str | None = None) -> Any:
        pairs = [(convert_to_tensor(g), variable) for g, variable in grads_and_vars if g is not None]
        if not pairs:
            raise ValueError(f"No gradients provided for any variable: {list(grads_and_vars)}.")
        graph = get_default_graph()
        with graph.control_dependencies(None):
            self._create_slots([variable for _, variable in pairs])
        with graph.name_scope(name or self._name) as scope:
            self._prepare()
            updates = []
            for gradient, variable in pairs:
                with graph.name_scope(f"update_{variable.op.name}"):
                    updates.append(self._apply(gradient, variable))
            finish = self._finish(updates)
            if global_step is None:
                train: Any = group(*finish, name=scope)
            else:
                with graph.control_dependencies([group(*finish, name="update")]):
                    step = assign_add(global_step, convert_to_tensor(1, global_step.dtype))
                    train = group(step, name=scope)
        graph.add_to_collection(GraphKeys.TRAIN_OP, train)
        return train

    # -- slots

    def get_slot(self, var: Any, name: str) -> Variable | None:
        """The variable that goes with ``var`` under this name, such as Adam's "m"."""
        return self._slots.get(name, {}).get(var)

    def get_slot_names(self) -> list[str]:
        return sorted(self._slots)

    def variables(self) -> list[Variable]:
        slots = [slot for slots in self._slots.values() for slot in slots.values()]
        return sorted([*self._others.values(), *slots], key=lambda variable: variable.name)

    def _slot(self, var: Any, name: str, op_name: str) -> Variable:
        slots = self._slots.setdefault(name, {})
        if var not in slots:
            sizes = var.shape.as_list()
            graph = get_default_graph()
            with graph.name_scope(None), graph.device(var.device or None):
                slots[var] = Variable(
                    lambda: zeros(sizes, var.dtype),
                    trainable=False,
                    name=f"{var.op.name}/{op_name}",
                    use_resource=var.is_resource,
                )
            info = var._get_save_slice_info()
            if info is not None:
                part = info.part
                slots[var]._set_save_slice_info(type(info)(part._replace(full_name=f"{part.full_name}/{op_name}")))
        return slots[var]

    def _create_slots(self, variables: Sequence[Any]) -> None:
        pass

    def _prepare(self) -> None:
        raise NotImplementedError

    def _apply(self, gradient: Tensor, variable: Any) -> Operation:
        raise NotImplementedError

    def _finish(self, updates: list[Operation]) -> list[Operation]:
        return updates


def _as_op(result: Any) -> Operation:
    return result if isinstance(result, Operation) else result.op


class GradientDescentOptimizer(Optimizer):
    """``variable -= learning_rate * gradient``."""

    def __init__(self, learning_rate: Any, use_locking: bool = False, name: str = "GradientDescent") -> None:
        super().__init__(use_locking, name)
        self._learning_rate = learning_rate

    def _prepare(self) -> None:
        rate = self._learning_rate() if callable(self._learning_rate) else self._learning_rate
        self._rate = convert_to_tensor(rate, name="learning_rate")

    def _apply(self, gradient: Tensor, variable: Any) -> Operation:
        kind = "ResourceApplyGradientDescent" if variable.is_resource else "ApplyGradientDescent"
        rate = self._rate if self._rate.dtype == variable.dtype else apply("Cast", self._rate, DstT=variable.dtype)
        return _as_op(apply(kind, variable, rate, gradient, name=kind))


class AdamOptimizer(Optimizer):
    """Adam.  Slots "m" and "v" are the variables ``<variable>/Adam`` and ``<variable>/Adam_1``."""

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        use_locking: bool = False,
        name: str = "Adam",
    ) -> None:
        super().__init__(use_locking, name)
        self._hyper = (learning_rate, beta1, beta2, epsilon)

    def _get_beta_accumulators(self) -> tuple[Variable, Variable]:
        return self._others["beta1_power"], self._others["beta2_power"]

    def _create_slots(self, variables: Sequence[Any]) -> None:
        first = min(variables, key=lambda variable: variable.name)
        for name, beta in (("beta1_power", self._hyper[1]), ("beta2_power", self._hyper[2])):
            if name not in self._others:
                with get_default_graph().name_scope(None):
                    self._others[name] = Variable(beta, trainable=False, name=name, use_resource=first.is_resource)
        for variable in variables:
            self._slot(variable, "m", self._name)
            # The second variable below the same name gets a number, here and in TensorFlow.
            self._slot(variable, "v", self._name)

    def _prepare(self) -> None:
        names = ("learning_rate", "beta1", "beta2", "epsilon")
        values = [value() if callable(value) else value for value in self._hyper]
        self._tensors = [convert_to_tensor(value, name=name) for value, name in zip(values, names, strict=True)]

    def _apply(self, gradient: Tensor, variable: Any) -> Operation:
        powers: list[Any] = [power.value() for power in self._get_beta_accumulators()]
        values = [
            value if value.dtype == variable.dtype else apply("Cast", value, DstT=variable.dtype)
            for value in [*powers, *self._tensors]
        ]
        slots = [self.get_slot(variable, "m"), self.get_slot(variable, "v")]
        kind = "ResourceApplyAdam" if variable.is_resource else "ApplyAdam"
        return _as_op(apply(kind, variable, *slots, *values, gradient, name=kind))

    def _finish(self, updates: list[Operation]) -> list[Operation]:
        graph = get_default_graph()
        _, beta1, beta2, _ = self._tensors
        with graph.control_dependencies(updates):
            powers = [
                _as_op(power.assign(apply("Mul", power.value(), beta), read_value=False))
                for power, beta in zip(self._get_beta_accumulators(), (beta1, beta2), strict=True)
            ]
        return [*updates, *powers]
