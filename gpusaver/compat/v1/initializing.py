"""``tf.train.init_from_checkpoint``: variables that start with what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpusaver.compat.v1.convert import apply
from gpusaver.compat.v1.graph import Operation, get_default_graph
from gpusaver.compat.v1.scopes import known_variables
from gpusaver.compat.v1.shapes import is_compatible
from gpusaver.compat.v1.variables import PartitionedVariable, Variable
from gpusaver.reader import CheckpointReader, load_checkpoint


def init_from_checkpoint(ckpt_dir_or_file: Any, assignment_map: Any) -> None:
    """Replaces the initial values of variables by tensors of a checkpoint, read when the initializers run.

    ``assignment_map``: items (sorted by key) from a name in the checkpoint to a variable, the list of a partitioned
    one's parts, or the name of a variable that get_variable has made; or from a scope in the checkpoint to a scope of
    the graph, both ending in "/".  Also a list of pairs.

    Raises ValueError for names that are not there and shapes that do not fit, NotFoundError for a missing checkpoint.
    """
    reader = load_checkpoint(ckpt_dir_or_file)
    pairs = assignment_map.items() if isinstance(assignment_map, Mapping) else assignment_map
    store = known_variables(get_default_graph())
    for name, target in sorted(pairs, key=lambda pair: pair[0]):
        if isinstance(target, str):
            _init_by_name(reader, name, target, store)
        else:
            _init_variable(reader, name, target)


def _init_by_name(reader: CheckpointReader, name: str, target: str, store: Mapping[str, Any]) -> None:
    if target in store:
        _init_variable(reader, name, store[target])
        return
    if not name.endswith("/"):
        raise ValueError(
            f"Assignment map with scope only name {target} should map to scope only {name}. Should be "
            "'scope/': 'other_scope/'."
        )
    source = "" if name == "/" else name
    scope = "" if target == "/" else target
    inside = {key: variable for key, variable in store.items() if not scope or key.startswith(scope)}
    if not inside:
        raise ValueError(f"The graph has no variable below {target!r}")
    for key, variable in sorted(inside.items()):
        rest = key.removeprefix(scope)
        _init_variable(reader, source + rest, variable)


def _init_variable(reader: CheckpointReader, name: str, variable: Any) -> None:
    shapes = reader.get_variable_to_shape_map()
    if name not in shapes:
        raise ValueError(
            f"Tensor {name} is not found in {reader.prefix} checkpoint {{{', '.join(sorted(shapes)[:50])}}}"
        )
    parts = list(variable) if isinstance(variable, list | PartitionedVariable) else [variable]
    for part in parts:
        if not isinstance(part, Variable):
            raise TypeError(f"init_from_checkpoint: expected a variable for {name!r}, found {part!r:.60}")
        info = part._get_save_slice_info() if len(parts) > 1 or isinstance(variable, PartitionedVariable) else None
        wanted = tuple(info.full_shape) if info is not None else part.op.attrs["shape"]
        if not is_compatible(wanted, tuple(shapes[name])):
            raise ValueError(
                f"Shape of variable {part.name} ({part.shape}) doesn't match with shape of tensor {name} "
                f"({shapes[name]}) from checkpoint reader."
            )
        _set_initial_value(reader.prefix, name, info.spec if info is not None else "", part)


def _set_initial_value(prefix: str, name: str, spec: str, variable: Variable) -> None:
    graph = variable.graph
    with graph.as_default(), graph.control_dependencies(None), graph.name_scope("checkpoint_initializer"):
        restored = apply("RestoreV2", prefix, [name], [spec], dtypes=[variable.dtype.datatype])[0]
        restored.set_shape(variable.shape)
        initializer: Operation
        if variable.is_resource:
            initializer = apply("AssignVariableOp", variable.handle, restored)
        else:
            initializer = apply("Assign", variable.as_ref_tensor(), restored).op
    variable.initializer = initializer
    variable.initial_value = restored
