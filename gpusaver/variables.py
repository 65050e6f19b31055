"""From what the user hands in to named leaves: Variables, and containers of arrays."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import numpy as np

from gpusaver.device import admit, array_types, cuda_module
from gpusaver.errors import InvalidArgumentError
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

_DEVICE = re.compile(r"(cpu|cuda|gpu)(?::(\d+))?")


class Variable:
    """A named holder of an array, known to the current collection so that ``Saver()`` finds it.

    ``initial_value``: an array of any library gpusaver takes (held, not copied), or a number, list or string that
    NumPy makes one of.  ``name``: default "Variable", then "Variable_1", ...  ``dtype``: a :class:`DataType` or NumPy
    dtype; converts the initial value, and names the types that share a NumPy dtype (qint8).  ``device``: "cpu:1",
    "cuda:0"; moves the value there; with ``sharded=True`` each device gives a shard (numbered CPU devices are one
    memory, as in TensorFlow).

    Raises ValueError if the current collection has a variable of this name, TypeError for what cannot be stored.
    """

    def __init__(
        self,
        initial_value: Any,
        name: str | None = None,
        dtype: DataType | np.dtype[Any] | type | str | None = None,
        trainable: bool = True,
        device: str | None = None,
    ) -> None:
        collection = _current()
        self._name = collection.unique_name("Variable") if name is None else _checked_name(name)
        self._declared = DataType[dtype] if isinstance(dtype, str) and dtype in DataType.__members__ else dtype
        self.trainable = trainable
        self.device = None if device is None else _canonical_device(device)
        self._value = _on_device(_as_array(initial_value, self._declared), self.device)
        self._spec = self._admitted_spec(self._value)
        collection.add(self)

    def _admitted_spec(self, value: Any) -> TensorSpec:
        spec = admit(value, self._name, self.declared_dtype).spec
        declared = self._declared
        if declared is not None and not isinstance(declared, DataType) and spec.dtype is not DataType.string:
            wanted = np.dtype(declared).newbyteorder("=")
            if spec.dtype.numpy_dtype != wanted:  # a value of another library, which has no ``astype``
                raise TypeError(
                    f"{self._name}: declared {wanted}, but the array is {spec.dtype.name}; convert it first"
                )
        return spec

    @property
    def declared_dtype(self) -> DataType | None:
        """The DataType given at construction if there was one, else None."""
        return self._declared if isinstance(self._declared, DataType) else None

    @property
    def name(self) -> str:
        return self._name

    @property
    def dtype(self) -> DataType:
        return self._spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._spec.shape

    @property
    def value(self) -> Any:
        """The array itself, not a copy."""
        return self._value

    def assign(self, value: Any) -> None:
        """Holds ``value`` from now on (an array is not copied).

        Raises InvalidArgumentError if its dtype or shape is not the variable's.
        """
        array = _on_device(_as_array(value, self._declared), self.device)
        spec = self._admitted_spec(array)
        if spec != self._spec:
            raise InvalidArgumentError(f"Variable {self._name}: cannot assign {spec}, expected {self._spec}")
        self._value = array

    def __repr__(self) -> str:
        return f"<gpusaver.Variable {self._name!r} {self._spec}>"


class PartitionedVariable:
    """One rectangular part of a larger named tensor, stored as a TensorFlow slice of it.

    ``full_shape``: of the whole tensor.  ``slice``: a :class:`TensorSlice`, or one Python slice per dimension
    (``np.s_[0:4, :]``).  ``array``: the part; its shape must be the slice's.  ``name``: of the whole tensor; needed in
    a list, ignored in a dict.  Parts of one tensor in one Saver may not overlap.

    Raises InvalidArgumentError if shape and slice do not fit, TypeError for what cannot be stored.
    """

    def __init__(
        self,
        full_shape: Sequence[int],
        slice: TensorSlice | Sequence[slice] | slice,
        array: Any,
        name: str | None = None,
    ) -> None:
        self.full_shape = tuple(int(size) for size in full_shape)
        if not isinstance(slice, TensorSlice):
            slices = slice if isinstance(slice, Sequence) else (slice,)  # np.s_[0:4] is no sequence
            slice = TensorSlice.from_slices(slices, self.full_shape)
        self.slice = slice
        self.name = None if name is None else _checked_name(name)
        self.value = array
        spec = admit(array, name or "PartitionedVariable").spec
        if spec.dtype is DataType.string:
            raise TypeError(f"PartitionedVariable {name or ''}: strings stored in slices could not be read again")
        expected, found = self.slice.shape(self.full_shape), spec.shape
        if expected != found:
            raise InvalidArgumentError(
                f"PartitionedVariable {name or ''}: slice {self.slice} of {list(self.full_shape)} has shape "
                f"{list(expected)}, the array has {list(found)}"
            )

    def __repr__(self) -> str:
        return f"<gpusaver.PartitionedVariable {self.name!r} {list(self.full_shape)} {self.slice}>"


class _Collection:
    def __init__(self) -> None:
        self.variables: dict[str, Variable] = {}

    def add(self, variable: Variable) -> None:
        other = self.variables.setdefault(variable.name, variable)
        if other is not variable:
            raise ValueError(
                f"At least two variables have the same name: {variable.name} ({other!r} and {variable!r}); give the "
                "second another name, or make it in a collection of its own: with gpusaver.variables(): ..."
            )

    def unique_name(self, base: str) -> str:
        name, number = base, 0
        while name in self.variables:
            number += 1
            name = f"{base}_{number}"
        return name


_default = _Collection()
_scoped: contextvars.ContextVar[_Collection | None] = contextvars.ContextVar("gpusaver_variables", default=None)


def _current() -> _Collection:
    return _scoped.get() or _default


@contextlib.contextmanager
def variables() -> Iterator[None]:
    """A collection of its own for the variables made, and the Savers built, inside the ``with``."""
    token = _scoped.set(_Collection())
    try:
        yield
    finally:
        _scoped.reset(token)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Variables made inside the ``with`` join the current collection together, if it ends without an error."""
    outer, inner = _current(), _Collection()
    token = _scoped.set(inner)
    try:
        yield
    finally:
        _scoped.reset(token)
    for name in inner.variables.keys() & outer.variables.keys():
        outer.add(inner.variables[name])  # raises
    outer.variables.update(inner.variables)


def reset_default_variables() -> None:
    """Empties the current collection (the variables live on where they are referred to)."""
    _current().variables.clear()


def current_variables() -> list[Variable]:
    """The variables of the current collection, in order of creation."""
    return list(_current().variables.values())


def _as_array(value: Any, dtype: DataType | np.dtype[Any] | type | str | None) -> Any:
    numpy_dtype = dtype.numpy_dtype if isinstance(dtype, DataType) else dtype
    if isinstance(value, bool | int | float | complex | str | bytes | list | tuple | np.generic):
        return np.array(value, dtype=numpy_dtype)
    if numpy_dtype is not None and hasattr(value, "astype") and value.dtype != np.dtype(numpy_dtype):
        return value.astype(numpy_dtype)
    return value


def _canonical_device(device: str) -> str:
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise ValueError(f"device {device!r}: expected 'cpu', 'cpu:1', 'cuda:0' or the like")
    return f"{'cpu' if match[1] == 'cpu' else 'cuda'}:{int(match[2] or 0)}"


def _on_device(value: Any, device: str | None) -> Any:
    if device is None:
        return value
    if device.startswith("cpu"):
        return value.get() if type(value).__module__.startswith("cupy") else value
    return cuda_module().to_device(value, int(device.partition(":")[2]))


def _checked_name(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"Name is not a string: {name!r}")
    if not name:
        raise ValueError("the empty name is reserved in a checkpoint; name the variable")
    if not name.isascii():
        try:
            name.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise ValueError(f"the name {name!r} cannot be stored as UTF-8: {error.reason}") from error
    return name


class Leaf(NamedTuple):
    """A value to be saved or restored, and where a new one goes: ``holder[key]``, or a Variable itself."""

    name: str
    value: Any
    holder: Any
    key: Any
    part: PartitionedVariable | None = None

    @property
    def dtype(self) -> DataType | None:
        return self.holder.declared_dtype if isinstance(self.holder, Variable) else None

    @property
    def device(self) -> str | None:
        return self.holder.device if isinstance(self.holder, Variable) else None

    @property
    def has_own_memory(self) -> bool:
        """True for arrays that share memory with no other leaf of which this is true, but for the same object."""
        value = self.value
        if type(value) is np.ndarray:
            return value.base is None
        return isinstance(value, bool | int | float | complex | str | bytes | np.generic)

    def replace(self, value: Any) -> None:
        if isinstance(self.holder, Variable):
            self.holder._value = value
        elif self.part is not None:
            self.part.value = value
        else:
            self.holder[self.key] = value


_leaf = functools.partial(tuple.__new__, Leaf)  # half the time of Leaf(...)


class Leaves:
    """Leaves as columns: to make an object for each takes as long as most of what is done with it."""

    def __init__(self, *columns: list[Any]) -> None:
        self.names: list[str]
        self.values: list[Any]
        self.holders: list[Any]
        self.keys: list[Any]
        self.parts: list[PartitionedVariable | None]
        self.names, self.values, self.holders, self.keys, self.parts = columns or ([], [], [], [], [])

    def add(self, name: str, value: Any, holder: Any, key: Any, part: PartitionedVariable | None = None) -> None:
        self.names.append(name)
        self.values.append(value)
        self.holders.append(holder)
        self.keys.append(key)
        self.parts.append(part)

    def add_arrays(self, names: list[str], mapping: MutableMapping[Any, Any]) -> None:
        """All values of a mapping."""
        self.names += names
        self.values += mapping.values()
        self.holders += [mapping] * len(names)
        self.keys += mapping
        self.parts += [None] * len(names)

    def take(self, numbers: Sequence[int]) -> Leaves:
        return Leaves(*(list(map(column.__getitem__, numbers)) for column in self._columns))

    def split(self, is_first: Sequence[bool]) -> tuple[Leaves, Leaves]:
        """Those of which it is true, and the others."""
        if all(is_first):
            return self, Leaves()
        numbers = range(len(self))
        others = itertools.compress(numbers, map(operator.not_, is_first))
        return self.take(list(itertools.compress(numbers, is_first))), self.take(list(others))

    def in_order(self) -> Leaves:
        """By name, as its bytes sort; those of one name as they are."""
        numbers = _sorting(self.names)
        return self if numbers is None else self.take(numbers)

    def merged(self, others: Leaves) -> Leaves:
        return Leaves(*(mine + theirs for mine, theirs in zip(self._columns, others._columns, strict=True))).in_order()

    @property
    def _columns(self) -> tuple[list[Any], ...]:
        return self.names, self.values, self.holders, self.keys, self.parts

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Leaf:
        return _leaf([column[number] for column in self._columns])

    def __iter__(self) -> Iterator[Leaf]:
        return map(_leaf, zip(*self._columns, strict=True))


def _sorting(names: list[str]) -> list[int] | None:
    """The places of names in the order of their bytes; None if they are in that order."""
    octets: list[Any] = names  # text sorts so if it is ASCII
    if not all(map(str.isascii, names)):
        octets = [name.encode("utf-8", "surrogateescape") for name in names]
    return None if octets == sorted(octets) else sorted(range(len(octets)), key=octets.__getitem__)


class NameOrder:
    """How the names of one var_list sort, kept from one time to the next: they are most likely the same again."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._numbers: list[int] | None = None
        self._names: list[str] = []

    def learn(self, found: list[str], numbers: list[int] | None, names: list[str]) -> None:
        """That ``found``, of which no two are equal, sort by these numbers, and then are ``names``."""
        self._found, self._numbers, self._names = found, numbers, names

    def in_order(self, leaves: Leaves) -> Leaves | None:
        """By name; None if their names are others, or not those of whole tensors."""
        if leaves.names != self._found or any(leaves.parts):
            return None
        values, holders, keys = leaves.values, leaves.holders, leaves.keys
        if self._numbers is not None:
            values, holders, keys = (list(map(column.__getitem__, self._numbers)) for column in (values, holders, keys))
        return Leaves(self._names, values, holders, keys, leaves.parts)


def flatten(var_list: Any, order: NameOrder | None = None) -> Leaves:
    """The leaves of a var_list, sorted by name (the slices of one tensor in the order given).

    ``order``: what the last time left to know of the same var_list; learns of this time.
    Raises TypeError for what a var_list cannot hold, ValueError for two leaves of one name.
    """
    leaves = Leaves()
    if isinstance(var_list, MutableMapping):
        _flatten_mapping(var_list, "", leaves, [])
    elif isinstance(var_list, list | tuple | AbstractSet):
        _flatten_list(var_list, leaves)
    else:
        raise TypeError(
            f"Variables to save should be passed in a dict or a list, found {type(var_list).__name__}: {var_list!r:.80}"
        )
    known = order.in_order(leaves) if order is not None else None
    if known is not None:
        return known
    found, numbers = leaves.names, _sorting(leaves.names)
    if numbers is not None:
        leaves = leaves.take(numbers)
    names = leaves.names
    if any(map(operator.eq, names, itertools.islice(names, 1, None))):
        for first, second in itertools.pairwise(leaves):
            if first.name == second.name:
                _check_same_name(first, second)
    elif order is not None:
        order.learn(found, numbers, names)
    return leaves


def _flatten_list(items: Iterable[Any], leaves: Leaves) -> None:
    for item in items:
        if isinstance(item, Variable):
            leaves.add(item.name, item.value, item, None)
        elif isinstance(item, PartitionedVariable):
            if item.name is None:
                raise TypeError(f"{item!r} in a list needs a name")
            leaves.add(item.name, item.value, None, None, item)
        elif isinstance(item, list | tuple):
            _flatten_list(item, leaves)
        else:
            raise TypeError(
                f"a list of variables holds {type(item).__name__}, which has no name; pass a dict "
                "{name: array} instead, or a gpusaver.Variable"
            )


def _flatten_mapping(mapping: MutableMapping[Any, Any], scope: str, leaves: Leaves, above: list[int]) -> None:
    types = array_types()
    if type(mapping) is dict and types.issuperset(map(type, mapping.values())) and set(map(type, mapping)) <= {str}:
        names = [scope + key for key in mapping] if scope else list(mapping)
        if all(names) and all(map(str.isascii, names)):  # all at once
            leaves.add_arrays(names, mapping)
            return
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise TypeError(f"Name is not a string: key {key!r} {_inside(scope)}")
        if type(value) in types:  # by far the most frequent
            name = scope + key
            leaves.add(name if name and name.isascii() else _checked_name(name), value, mapping, key)
            continue
        _flatten_value(value, scope + key, mapping, key, leaves, above)


def _flatten_value(value: Any, name: str, holder: Any, key: Any, leaves: Leaves, above: list[int]) -> None:
    if isinstance(value, Variable):
        leaves.add(_checked_name(name), value.value, value, None)
    elif isinstance(value, PartitionedVariable):
        leaves.add(_checked_name(name), value.value, None, None, value)
    elif isinstance(value, MutableMapping | list):
        if id(value) in above:
            raise ValueError(f"{name}: a container that holds itself")
        above.append(id(value))
        if isinstance(value, MutableMapping):
            _flatten_mapping(value, name + "/", leaves, above)
        elif value and all(isinstance(item, PartitionedVariable) for item in value):
            for item in value:
                leaves.add(_checked_name(name), item.value, None, None, item)
        elif any(isinstance(item, PartitionedVariable) for item in value):
            raise ValueError(f"{name}: Slices must all be slices; the list mixes PartitionedVariables and other values")
        else:
            for number, item in enumerate(value):
                _flatten_value(item, f"{name}/{number}", value, number, leaves, above)
        above.pop()
    elif isinstance(value, tuple | AbstractSet):
        raise TypeError(f"{name}: a {type(value).__name__} cannot take restored values; use a list or a dict")
    elif value is None:
        raise TypeError(f"{name}: None cannot be stored in a checkpoint; leave the name out, or store a number")
    else:
        leaves.add(_checked_name(name), value, holder, key)


def _inside(scope: str) -> str:
    return f"under {scope!r}" if scope else "at the top of the var_list"


def _check_same_name(first: Leaf, second: Leaf) -> None:
    if first.part is None and second.part is None:
        raise ValueError(f"At least two variables have the same name: {first.name}")
    if first.part is None or second.part is None:
        raise ValueError(f"Mixing slices and non-slices with the same name: {first.name}")
    if first.part.full_shape != second.part.full_shape:
        raise ValueError(
            f"Slices must all be from the same tensor: {first.name} has full shapes {first.part.full_shape} and "
            f"{second.part.full_shape}"
        )


def check_variables_once(leaves: Iterable[Leaf]) -> None:
    """Raises ValueError if one Variable is there under two names: a restore could not serve both."""
    seen: dict[int, str] = {}
    for leaf in leaves:
        if isinstance(leaf.holder, Variable):
            other = seen.setdefault(id(leaf.holder), leaf.name)
            if other != leaf.name:
                raise ValueError(f"The same saveable will be restored with two names: {leaf.name} (and {other})")


__all__ = [
    "Leaf",
    "Leaves",
    "PartitionedVariable",
    "Variable",
    "check_variables_once",
    "current_variables",
    "flatten",
    "reset_default_variables",
    "variables",
]
