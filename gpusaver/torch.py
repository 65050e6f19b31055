"""PyTorch's modules, optimizers and schedulers as variables of a Saver or a CheckpointManager.

>>> import gpusaver.torch
>>> state = gpusaver.torch.variables(model=model, optimizer=optimizer, scheduler=scheduler)
>>> saver = gpusaver.Saver({**state, "step": 0})

Saved is what ``state_dict()`` holds, restored is into the same tensors::

    model/<name>                           parameters and buffers, as named by PyTorch
    optimizer/param_groups/<n>/<option>    numbers, strings and tensors among the options: lr, betas, ...
    optimizer/state/<n>/<slot>             of the n-th parameter: step, exp_avg, ...
    optimizer/state/<n>/initialized        whether that parameter has taken a step, and so has a state at all
    scheduler/<attribute>                  numbers, strings and tensors among the attributes

An optimizer makes the state of a parameter at its first step.  Until then stand-ins of the same kind, found by a step
of a twin of that parameter, take their place, so that a Saver can be made, and a checkpoint restored, before any
training; the optimizer itself does not notice.  (One that needs a closure cannot be asked: make the Saver later.)

The mappings look at the objects anew at every save and restore, so ``model.half()`` or ``load_state_dict`` in between
do no harm.  Threads: those of the Saver.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np
import torch

from gpusaver.errors import FailedPreconditionError


def variables(**objects: Any) -> dict[str, MutableMapping[str, Any]]:
    """A dict for a Saver's ``var_list``: one entry for each named module, optimizer or learning-rate scheduler.

    Raises TypeError for anything else (put arrays, tensors and numbers into the dict yourself), FailedPreconditionError
    when the state of an optimizer cannot be known yet.
    """
    return {name: _view(name, value) for name, value in objects.items()}


def _view(name: str, value: Any) -> MutableMapping[str, Any]:
    if isinstance(value, torch.nn.Module):
        return _Module(value)
    if isinstance(value, torch.optim.Optimizer):
        return _Optimizer(value)
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return _Options(vars(value), ("optimizer",))
    raise TypeError(
        f"{name}: expected a torch.nn.Module, a torch.optim.Optimizer or an LRScheduler, found {type(value).__name__}"
    )


class _Live(MutableMapping[str, Any]):
    """A mapping that is made anew whenever it is looked at."""

    def content(self) -> dict[str, Any]:
        raise NotImplementedError

    def items(self) -> Any:
        return self.content().items()

    def __iter__(self) -> Iterator[str]:
        return iter(self.content())

    def __len__(self) -> int:
        return len(self.content())

    def __getitem__(self, key: str) -> Any:
        return self.content()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError(f"{key} cannot be replaced, only overwritten in place")

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{key} cannot be removed")


class _Module(_Live):
    def __init__(self, module: Any) -> None:
        self._module = module

    def content(self) -> dict[str, Any]:
        return dict(self._module.state_dict())


class _Options(_Live):
    """The numbers, strings and tensors in a dict, and the tuples and lists of numbers: the rest is not state."""

    def __init__(self, options: MutableMapping[str, Any], without: tuple[str, ...] = ()) -> None:
        self._options = options
        self._without = without

    def content(self) -> dict[str, Any]:
        found = {key: _storable(value) for key, value in self._options.items() if key not in self._without}
        return {key: value for key, value in found.items() if value is not None}

    def __setitem__(self, key: str, value: Any) -> None:
        kind = type(self._options[key])
        self._options[key] = kind(value.tolist()) if kind in (list, tuple) else value


def _storable(value: Any) -> Any:
    """None if it is none of these."""
    if isinstance(value, torch.Tensor | bool | int | float | str):
        return value
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return _Options(vars(value), ("optimizer",))
    if isinstance(value, list | tuple) and value:
        if all(isinstance(item, bool | int | float) for item in value):
            array = np.array(value)
            array.flags.writeable = False  # so that a new one replaces it; two schedulers may share a list
            return array
        items = [_storable(item) for item in value]
        if all(isinstance(item, torch.Tensor | _Options) for item in items):
            return items
    return None


class _Optimizer(_Live):
    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._slots: dict[Any, _Slots] = {}

    def content(self) -> dict[str, Any]:
        groups = self._optimizer.param_groups
        members = [(group, parameter) for group in groups for parameter in group["params"]]
        slots = {}
        for number, (group, parameter) in enumerate(members):
            if parameter.requires_grad or self._optimizer.state.get(parameter):
                if parameter not in self._slots:
                    self._slots[parameter] = _Slots(self._optimizer, group, parameter)
                slots[str(number)] = self._slots[parameter]
        return {"param_groups": [_Options(group, ("params", "param_names")) for group in groups], "state": slots}


class _Slots(_Live):
    """What an optimizer keeps for one parameter."""

    def __init__(self, optimizer: Any, group: dict[str, Any], parameter: Any) -> None:
        self._optimizer = optimizer
        self._group = group
        self._parameter = parameter
        self._stand_in: dict[str, Any] | None = None

    def content(self) -> dict[str, Any]:
        state = self._optimizer.state.get(self._parameter)
        if state:
            self._stand_in = None
        return _Options(state or self._stand_ins()).content() | {"initialized": bool(state)}

    def _stand_ins(self) -> dict[str, Any]:
        if self._stand_in is None:
            self._stand_in = _state_after_a_step(self._optimizer, self._group, self._parameter)
        return self._stand_in

    def __setitem__(self, key: str, value: Any) -> None:
        state = self._optimizer.state
        if key != "initialized":
            _Options(state.get(self._parameter) or self._stand_ins())[key] = value
        elif not value:
            state.pop(self._parameter, None)
        elif not state.get(self._parameter):
            state[self._parameter] = self._stand_ins()
            self._stand_in = None


def _state_after_a_step(optimizer: Any, group: dict[str, Any], parameter: Any) -> dict[str, Any]:
    """Of a twin: the right names, types, shapes and devices, values without meaning."""
    twin = torch.zeros_like(parameter, requires_grad=True)
    twin.grad = torch.zeros_like(parameter)
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    try:
        trial = type(optimizer)([{**options, "params": [twin]}])
        trial.step()
    except Exception as error:  # whatever somebody's optimizer raises
        raise FailedPreconditionError(
            f"{type(optimizer).__name__} does not tell what state it keeps before its first step ({error}): take one "
            "before the Saver is made"
        ) from error
    return dict(trial.state[twin])
