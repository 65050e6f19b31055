"""From a Saver's var_list to what is saved under which name, refused as TensorFlow refuses it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpusaver.compat.v1.graph import Graph, get_default_graph
from gpusaver.compat.v1.names import GraphKeys
from gpusaver.compat.v1.variables import PartitionedVariable, Variable
from gpusaver.metagraph.saver_nodes import Saveable
from gpusaver.metagraph.variables import GraphVariable
from gpusaver.tensor import DataType


def all_saveables(graph: Graph | None = None) -> list[Any]:
    """What a Saver without a var_list saves."""
    graph = graph or get_default_graph()
    found = graph.get_collection(GraphKeys.GLOBAL_VARIABLES) + graph.get_collection(GraphKeys.SAVEABLE_OBJECTS)
    return list(dict.fromkeys(found)) if len(set(map(id, found))) == len(found) else found


def saveables_of(var_list: Any) -> list[Saveable]:
    """Sorted by key, the parts of one variable in their order.

    Raises TypeError for what is no list or dict of variables, ValueError for names given twice and slices that do not
    belong together.
    """
    named = _named(var_list)
    found: list[Saveable] = []
    seen: dict[int, str] = {}
    for key in sorted(named, key=lambda name: name.encode("utf-8", "surrogateescape")):
        variables, is_sliced = named[key]
        for variable in variables:
            other = seen.setdefault(id(variable.op), key)
            if other != key or sum(v.op is variable.op for v in variables) > 1:
                raise ValueError(f"The same saveable will be restored with two names: {key}")
            found.append(Saveable(key, graph_variable(variable, is_sliced)))
    return found


def graph_variable(variable: Variable, is_sliced: bool) -> GraphVariable:
    shape = variable.op.attrs["shape"]
    info = variable._get_save_slice_info()
    return GraphVariable(
        variable.op.name,
        DataType(variable.dtype.as_datatype_enum),
        None if shape is None else tuple(-1 if size is None else size for size in shape),
        variable.trainable,
        variable.is_resource,
        variable.device,
        info.part if is_sliced and info is not None else None,
    )


def _named(var_list: Any) -> dict[str, tuple[list[Variable], bool]]:
    """Key -> its variables, and whether they are slices of one tensor."""
    if isinstance(var_list, Mapping):
        return {_key(key): _of_dict(key, value) for key, value in var_list.items()}
    if not isinstance(var_list, list | tuple | set):
        raise TypeError(f"Variables to save should be passed in a dict or a list: {var_list!r:.80}")
    named: dict[str, tuple[list[Variable], bool]] = {}
    for variable in _flat(var_list):
        if isinstance(variable, PartitionedVariable):
            _add(named, variable.name, list(variable), True)
            continue
        _check(variable)
        info = variable._get_save_slice_info()
        _add(named, info.full_name if info is not None else variable.op.name, [variable], info is not None)
    return named


def _add(named: dict[str, tuple[list[Variable], bool]], key: str, variables: list[Variable], is_sliced: bool) -> None:
    if key not in named:
        named[key] = (variables, is_sliced)
        return
    others, were_sliced = named[key]
    if is_sliced != were_sliced:
        raise ValueError(f"Mixing slices and non-slices with the same name: {key}")
    if not is_sliced:
        raise ValueError(f"At least two variables have the same name: {key}")
    others.extend(variables)


def _flat(items: Iterable[Any]) -> list[Any]:
    found = []
    for item in items:
        found += _flat(item) if isinstance(item, list | tuple) else [item]
    return found


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"Names to save must be strings: {key!r} ({type(key).__name__}). Name is not a string")
    return key


def _of_dict(key: str, value: Any) -> tuple[list[Variable], bool]:
    if isinstance(value, PartitionedVariable):
        return list(value), True
    if not isinstance(value, list | tuple):
        _check(value)
        return [value], False
    return _slices(key, value), True


def _slices(key: str, values: Sequence[Any]) -> list[Variable]:
    for value in values:
        if not isinstance(value, Variable):
            raise ValueError(f"Slices must all be variables: {value!r:.60} under {key!r}")
    infos = [value._get_save_slice_info() for value in values]
    if None in infos:
        raise ValueError(f"Slices must all be slices: {[value.name for value in values]}")
    if len({(info.full_name, tuple(info.full_shape)) for info in infos if info is not None}) > 1:
        raise ValueError(f"Slices must all be from the same tensor: {[value.name for value in values]}")
    return list(values)


def _check(variable: Any) -> None:
    if not isinstance(variable, Variable):
        raise TypeError(f"Variable to save is not a Variable: {variable!r:.80} ({type(variable).__name__})")
