"""Variables by name: variable scopes, get_variable, reuse, and partitioned variables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpusaver.compat.v1.convert import convert_to_tensor
from gpusaver.compat.v1.dtypes import DType, as_dtype
from gpusaver.compat.v1.graph import Graph, get_default_graph
from gpusaver.compat.v1.initializers import GlorotUniform, Zeros
from gpusaver.compat.v1.names import GraphKeys
from gpusaver.compat.v1.shapes import TensorShape, as_shape, is_compatible, is_known
from gpusaver.compat.v1.variables import PartitionedVariable, SaveSliceInfo, Variable
from gpusaver.metagraph.variables import Part
from gpusaver.tensor import TensorSlice


class _ReuseMode:
    AUTO_REUSE = 1

    def __repr__(self) -> str:
        return "tf.AUTO_REUSE"


AUTO_REUSE: Any = _ReuseMode()


@dataclass
class VariableScope:
    """The scope that get_variable works in: a prefix, and what variables in it get unless they say otherwise."""

    name: str = ""
    reuse: Any = False
    initializer: Any = None
    regularizer: Any = None
    partitioner: Any = None
    dtype: Any = "float32"
    use_resource: bool | None = None
    custom_getter: Any = None
    original_name_scope: str = ""

    def reuse_variables(self) -> None:
        self.reuse = True

    def set_initializer(self, initializer: Any) -> None:
        self.initializer = initializer

    def set_partitioner(self, partitioner: Any) -> None:
        self.partitioner = partitioner

    def set_use_resource(self, use_resource: bool) -> None:
        self.use_resource = use_resource

    def global_variables(self) -> list[Any]:
        return get_default_graph().get_collection(GraphKeys.GLOBAL_VARIABLES, self.name)

    def trainable_variables(self) -> list[Any]:
        return get_default_graph().get_collection(GraphKeys.TRAINABLE_VARIABLES, self.name)


@dataclass
class _Store:
    """Of one graph: the variables that get_variable has made, by full name, and the scope it is in."""

    variables: dict[str, Any] = field(default_factory=dict)
    scope: VariableScope = field(default_factory=VariableScope)
    opened: dict[str, int] = field(default_factory=dict)


def _store(graph: Graph | None = None) -> _Store:
    graph = graph or get_default_graph()
    if graph.variable_store is None:
        graph.variable_store = _Store()
    store: _Store = graph.variable_store
    return store


def known_variables(graph: Graph) -> dict[str, Any]:
    """What get_variable has made in this graph, by name."""
    return dict(_store(graph).variables)


def get_variable_scope() -> VariableScope:
    return _store().scope


class variable_scope:  # TensorFlow's name
    """A context manager: opens a scope for get_variable, and a name scope with it.

    ``name_or_scope``: a name, appended to the outer one, or a scope to go back into.  ``reuse``: True takes variables
    that exist, AUTO_REUSE either; inside a scope that reuses, all do.  The other arguments are defaults for variables.
    """

    def __init__(
        self,
        name_or_scope: Any,
        default_name: str | None = None,
        values: Any = None,
        initializer: Any = None,
        regularizer: Any = None,
        caching_device: Any = None,
        partitioner: Any = None,
        custom_getter: Any = None,
        reuse: Any = None,
        dtype: Any = None,
        use_resource: bool | None = None,
        constraint: Any = None,
        auxiliary_name_scope: bool = True,
    ) -> None:
        if name_or_scope is None and default_name is None:
            raise TypeError("If default_name is None then name_or_scope is required")
        if custom_getter is not None:
            raise NotImplementedError("variable_scope: custom_getter is not there")
        if reuse is False:
            reuse = None  # as in TensorFlow: what the outer scope says
        self._target, self._default_name, self._reuse = name_or_scope, default_name, reuse
        self._changes = {
            "initializer": initializer,
            "regularizer": regularizer,
            "partitioner": partitioner,
            "dtype": dtype,
            "use_resource": use_resource,
        }
        self._has_name_scope = auxiliary_name_scope
        self._stack: Any = None

    def __enter__(self) -> VariableScope:
        graph = get_default_graph()
        store = _store(graph)
        outer = store.scope
        if isinstance(self._target, VariableScope):
            name, base, reuse = self._target.name, self._target, self._reuse or self._target.reuse or outer.reuse
            short = name.rpartition("/")[2]
        else:
            short = self._target if self._target is not None else _unique_scope(store, outer.name, self._default_name)
            if self._target is None and self._reuse:
                raise ValueError("reuse=True cannot be used without a name_or_scope")
            name, base, reuse = f"{outer.name}/{short}" if outer.name else short, outer, self._reuse or outer.reuse
        self._stack = contextlib.ExitStack()
        scope = replace(base, name=name, reuse=reuse, **{k: v for k, v in self._changes.items() if v is not None})
        if self._has_name_scope and short:
            scope.original_name_scope = self._stack.enter_context(graph.name_scope(short))
        store.opened[name] = store.opened.get(name, 0) + 1
        store.scope = scope
        self._stack.callback(lambda: setattr(store, "scope", outer))
        return scope

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def _unique_scope(store: _Store, outer: str, base: str | None) -> str:
    prefix = f"{outer}/" if outer else ""
    found, number = str(base), 0
    while prefix + found in store.opened:
        number += 1
        found = f"{base}_{number}"
    return found


@contextlib.contextmanager
def name_scope(name: str | None, default_name: str | None = None, values: Any = None) -> Iterator[str]:
    """A prefix for the names of operations; no part of the names of get_variable."""
    with get_default_graph().name_scope(name if name is not None else default_name) as scope:
        yield scope


def get_variable(
    name: str,
    shape: Any = None,
    dtype: Any = None,
    initializer: Any = None,
    regularizer: Any = None,
    trainable: bool | None = None,
    collections: Sequence[str] | None = None,
    caching_device: Any = None,
    partitioner: Any = None,
    validate_shape: bool = True,
    use_resource: bool | None = None,
    custom_getter: Any = None,
    constraint: Any = None,
    synchronization: Any = None,
    aggregation: Any = None,
) -> Any:
    """The variable of this name in the current scope: a new one, or the one that is there if the scope reuses.

    Raises ValueError if it exists and may not be reused, does not exist and must be, or has another shape or type.
    """
    if not name:
        raise ValueError("name cannot be empty")
    store = _store()
    scope = store.scope
    full = f"{scope.name}/{name}" if scope.name else name
    existing = store.variables.get(full)
    sizes = as_shape(shape)
    if existing is not None:
        return _reused(existing, full, scope, shape, dtype)
    if scope.reuse is True:
        raise ValueError(
            f"Variable {full} does not exist, or was not created with tf.get_variable(). Did you mean to set "
            "reuse=tf.AUTO_REUSE in VarScope?"
        )
    wanted = as_dtype(dtype or (initializer.dtype if hasattr(initializer, "static_shape") else scope.dtype))
    start = initializer if initializer is not None else scope.initializer
    if start is None:
        start = _default_initializer(wanted)
    elif isinstance(start, type):
        start = start()
    options: dict[str, Any] = {
        "trainable": trainable,
        "collections": collections,
        "validate_shape": validate_shape,
        "constraint": constraint,
        "use_resource": use_resource if use_resource is not None else scope.use_resource,
    }
    parts = partitioner or scope.partitioner
    graph = get_default_graph()
    with graph.name_scope(None):
        if parts is not None and callable(start) and sizes is not None and sizes:
            made = _partitioned(full, sizes, wanted, start, parts, options)
        else:
            made = _single(full, sizes, wanted, start, validate_shape, options)
    store.variables[full] = made
    if regularizer is not None or scope.regularizer is not None:
        loss = (regularizer or scope.regularizer)(made)
        if loss is not None:
            graph.add_to_collection(GraphKeys.REGULARIZATION_LOSSES, loss)
    return made


def _reused(existing: Any, full: str, scope: VariableScope, shape: Any, dtype: Any) -> Any:
    if not scope.reuse:
        raise ValueError(
            f"Variable {full} already exists, disallowed. Did you mean to set reuse=True or reuse=tf.AUTO_REUSE in "
            "VarScope?"
        )
    if shape is not None and not is_compatible(
        existing.shape.dims and tuple(existing.shape.as_list()), as_shape(shape)
    ):
        raise ValueError(
            f"Trying to share variable {full}, but specified shape {TensorShape(shape)} and found shape "
            f"{existing.shape}."
        )
    if dtype is not None and as_dtype(dtype) != existing.dtype:
        raise ValueError(
            f"Trying to share variable {full}, but specified dtype {as_dtype(dtype).name} and found dtype "
            f"{existing.dtype.name}."
        )
    return existing


def _default_initializer(dtype: DType) -> Callable[..., Any]:
    if dtype.is_floating:
        return GlorotUniform()
    if dtype.is_integer or dtype.is_bool or dtype.is_unsigned or dtype == "string":
        return Zeros()
    raise ValueError(f"An initializer for a variable of {dtype.name} is required")


def _single(full: str, sizes: Any, dtype: DType, start: Any, validate: bool, options: dict[str, Any]) -> Variable:
    if not callable(start):
        value = convert_to_tensor(start, dtype)
        if sizes is not None and not is_compatible(sizes, value.static_shape):
            raise ValueError(f"If initializer is a constant, do not specify shape: {full}, {TensorShape(sizes)}")
        return Variable(value, name=full, dtype=dtype, **options)
    if not is_known(sizes) and validate:
        raise ValueError(
            f"Shape of a new variable ({full}) must be fully defined, but instead was {TensorShape(sizes)}."
        )
    return Variable(lambda: start(list(sizes or ()), dtype=dtype), name=full, dtype=dtype, **options)


@dataclass(frozen=True)
class _PartitionInfo:
    full_shape: list[int]
    var_offset: list[int]


def _partitioned(
    full: str, sizes: tuple[int | None, ...], dtype: DType, start: Any, partitioner: Any, options: dict[str, Any]
) -> Any:
    shape = [int(size or 0) for size in sizes]
    counts = list(partitioner(shape=TensorShape(shape), dtype=dtype))
    axes = [axis for axis, count in enumerate(counts) if count > 1]
    if len(axes) > 1:
        raise ValueError(
            f"Can only slice a variable along one dimension: {full} of shape {shape}, partitioning {counts}"
        )
    axis = axes[0] if axes else 0
    count = counts[axis] if counts else 1
    parts: list[Variable] = []
    offset = 0
    for number in range(count):
        length = shape[axis] // count + (number < shape[axis] % count)
        part_shape = [*shape[:axis], length, *shape[axis + 1 :]]
        begin = [offset if n == axis else 0 for n in range(len(shape))]
        parts.append(_part(f"{full}/part_{number}", part_shape, dtype, start, _PartitionInfo(shape, begin), options))
        box = tuple(zip(begin, part_shape, strict=True))
        parts[-1]._set_save_slice_info(SaveSliceInfo(Part(full, tuple(shape), TensorSlice(box))))
        offset += length
    return PartitionedVariable(full, shape, dtype, parts, axis)


def _part(
    name: str, shape: list[int], dtype: DType, start: Any, info: _PartitionInfo, options: dict[str, Any]
) -> Variable:
    def initial() -> Any:
        try:
            return start(shape, dtype=dtype, partition_info=info)
        except TypeError:  # a function of one's own, without partition_info
            return start(shape, dtype=dtype)

    return Variable(initial, name=name, dtype=dtype, **options)


def get_local_variable(name: str, *args: Any, **kwargs: Any) -> Any:
    """The same in the collection of local variables, not trainable: no part of a checkpoint."""
    return get_variable(name, *args, **{**kwargs, "trainable": False, "collections": [GraphKeys.LOCAL_VARIABLES]})


def fixed_size_partitioner(num_shards: int, axis: int = 0) -> Callable[..., list[int]]:
    """Cuts into ``num_shards`` parts along ``axis``, or into as many as there are rows."""

    def partitioner(shape: TensorShape, dtype: Any = None, **_: Any) -> list[int]:
        counts = [1] * len(shape)
        counts[axis] = min(num_shards, int(shape[axis] or 1))
        return counts

    return partitioner
