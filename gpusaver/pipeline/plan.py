"""From leaves to what is to be stored where: the plan of a save, reused while names, types and shapes stay."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpusaver.bundle.bulk import collector_paused
from gpusaver.bundle.crc import mask
from gpusaver.bundle.index import Entry, IndexTemplate
from gpusaver.bundle.layout import Column, Layout, plan_layout
from gpusaver.bundle.slices import check_tiling, slice_key
from gpusaver.bundle.strings import encode_strings
from gpusaver.device import HOST, Event, Runtime, admit, runtimes_of
from gpusaver.device.host import address
from gpusaver.errors import InternalError, InvalidArgumentError
from gpusaver.pipeline.save import Sources
from gpusaver.tensor import TensorSlice, TensorSpec
from gpusaver.variables import Leaf

_KEY = operator.attrgetter("key")
_VALUE = operator.attrgetter("value")
_DTYPE = operator.attrgetter("dtype")
_SHAPE = operator.attrgetter("shape")
_BASE = operator.attrgetter("base")
#: The masked checksum of no bytes.
_EMPTY_CRC = mask(0)


class Item(NamedTuple):
    """What one index entry with bytes stands for: a leaf, and the number of the stored tensor that has its bytes."""

    key: bytes
    spec: TensorSpec
    tensor: int


class _Row(NamedTuple):
    """What the plan depends on, for one leaf.

    ``array_dtype``: of a NumPy or CuPy array that lies in a dict or list as it is; None for all else.
    """

    name: str
    spec: TensorSpec
    tensor: int
    device: str
    nbytes: int
    part: TensorSlice | None
    full_shape: tuple[int, ...] | None
    runtime: Runtime
    array_dtype: Any


class _Columns(NamedTuple):
    """What is compared of NumPy and CuPy arrays that lie in a dict or list as they are, all at once.

    ``others``: numbers of the leaves that are something else.
    """

    plain: list[int]
    runtimes: list[Runtime]
    dtypes: list[Any]
    shapes: list[tuple[int, ...]]
    others: list[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything goes.  ``rows`` is the signature: the plan holds as long as it stays the same."""

    rows: list[_Row]
    #: None where it would not help.
    columns: _Columns | None
    items: list[Item]
    #: The entries of partitioned tensors, which have no bytes of their own.
    partitioned: list[tuple[bytes, Entry]]
    #: Where the tensors are, by their owners' numbers in the layout.
    runtimes: list[Runtime]
    layout: Layout
    #: :meth:`Layout.places`
    places: Column
    #: Names of the variables that lie in data files of their own, and the numbers of these.
    frozen: frozenset[str] = frozenset()
    frozen_shards: frozenset[int] = frozenset()
    _templates: dict[int, tuple[IndexTemplate, npt.NDArray[np.int64]]] = field(default_factory=dict)

    def index(self, num_shards: int, checksums: dict[int, int]) -> bytes:
        """The index file; ``checksums`` by tensor number, unmasked (tensors without bytes need none)."""
        if num_shards not in self._templates:
            self._templates[num_shards] = self._template(num_shards)
        template, tensors = self._templates[num_shards]
        masked = np.full(len(self.layout.nbytes) + 1, _EMPTY_CRC, np.uint32)
        numbers = np.fromiter(checksums.keys(), np.int64, len(checksums))
        masked[numbers] = mask(np.fromiter(checksums.values(), np.uint32, len(checksums)))
        return template.fill(masked[tensors], lambda: ((key, entry) for key, entry, _ in self._keyed()))

    def _template(self, num_shards: int) -> tuple[IndexTemplate, npt.NDArray[np.int64]]:
        """The index without checksums, and for each entry the number of its tensor."""
        keyed = self._keyed()
        tensors = np.fromiter((tensor for _, _, tensor in keyed), np.int64, len(keyed))
        return IndexTemplate(num_shards, ((key, entry) for key, entry, _ in keyed)), tensors

    def _keyed(self) -> list[tuple[bytes, Entry, int]]:
        """Entries without checksums by key, each with the number of its tensor (-1: partitioned, has none)."""
        shard, offset, nbytes = (c.tolist() for c in (self.layout.shard, self.layout.offset, self.layout.nbytes))
        entries = [(key, Entry(spec, shard[t], offset[t], nbytes[t], 0), t) for key, spec, t in self.items]
        if self.partitioned:
            entries += [(key, entry, -1) for key, entry in self.partitioned]
            entries.sort(key=lambda row: row[0])
        return entries


@dataclass(frozen=True, slots=True)
class Save:
    """The variables at one moment: a plan and the arrays it applies to.

    ``string_checksums``: by tensor number, for tensors whose checksum is not that of their bytes.  ``is_snapshot``: the
    arrays are copies, which lie in memory as in the files, once all of ``copied`` has happened.
    """

    plan: Plan
    sources: Sources
    string_checksums: dict[int, int]
    is_snapshot: bool = False
    copied: Sequence[Event] = ()

    @property
    def runtimes(self) -> list[Runtime]:
        return self.plan.runtimes


@collector_paused()
def plan_save(
    leaves: Sequence[Leaf], *, sharded: bool, cached: Plan | None, frozen: frozenset[str] = frozenset()
) -> Save:
    """Raises TypeError for leaves that cannot be stored, InvalidArgumentError for slices that overlap.

    ``frozen``: names of the variables that get data files of their own.
    Requires: ``cached`` is a plan for leaves of the same names, and for the same ``sharded``.
    """
    if cached is not None and cached.frozen != frozen:
        cached = None
    if cached is not None and (unchanged := _unchanged(leaves, cached)) is not None:
        return unchanged
    sources = Sources()
    strings: dict[int, int] = {}
    numbers: dict[Any, int] = {}
    rows: list[_Row] = []
    own_memory = all(leaf.has_own_memory for leaf in leaves)
    cached_rows = cached.rows if cached is not None and len(cached.rows) == len(leaves) else None
    for leaf in leaves:
        value = leaf.value
        if cached_rows is not None and leaf.key is not None:
            row, number = cached_rows[len(rows)], len(sources)
            if (
                row.array_dtype is not None  # first: to NumPy it equals float64
                and row.runtime.owns(value)
                and row.array_dtype == value.dtype
                and row.spec.shape == value.shape
                and row.tensor == number
                and numbers.setdefault(_identity(row.runtime, value, own_memory), number) == number
            ):
                rows.append(row)
                sources.add(row.runtime, value)
                continue
        rows.append(_admit(leaf, own_memory, sources, strings, numbers))
    if cached is None or cached.rows != rows:
        cached = _make_plan(leaves, rows, sources, sharded, frozen)
    return Save(cached, sources, strings)


def _unchanged(leaves: Sequence[Leaf], cached: Plan) -> Save | None:
    """The save, if it is found quickly that the plan fits: by columns instead of leaf by leaf."""
    columns = cached.columns
    if columns is None or len(leaves) != len(cached.rows):
        return None
    values, keys = list(map(_VALUE, leaves)), list(map(_KEY, leaves))
    arrays = list(map(values.__getitem__, columns.plain)) if columns.others else values
    identities = set(map(id, arrays))
    if (
        runtimes_of(arrays) != columns.runtimes
        or list(map(_DTYPE, arrays)) != columns.dtypes
        or list(map(_SHAPE, arrays)) != columns.shapes
        or len(identities) != len(arrays)
        or not _are_apart(arrays, columns.runtimes)
        or keys.count(None) != sum(keys[number] is None for number in columns.others)  # a Variable took one's place
    ):
        return None
    sources = Sources()
    strings: dict[int, int] = {}
    numbers: dict[Any, int] = {}
    runtimes = iter(columns.runtimes)
    for number in columns.others:
        plain = values[len(sources) : number]
        sources.runtimes.extend(itertools.islice(runtimes, len(plain)))
        sources.arrays.extend(plain)
        if not leaves[number].has_own_memory or id(leaves[number].value) in identities:
            return None
        row = _admit(leaves[number], True, sources, strings, numbers)
        if row != cached.rows[number] or len(sources) != number + 1:
            return None
    sources.runtimes.extend(runtimes)
    sources.arrays.extend(values[len(sources) :])
    return Save(cached, sources, strings)


def _are_apart(arrays: Sequence[Any], runtimes: Sequence[Runtime]) -> bool:
    """Whether no two are the same bytes; of NumPy arrays that share memory that is not known."""
    if runtimes.count(HOST) < len(runtimes):
        is_on_host = [runtime is HOST for runtime in runtimes]
        pointers = [array.data.ptr for array in itertools.compress(arrays, map(operator.not_, is_on_host))]
        count = len(pointers) - pointers.count(0)  # of empty arrays
        if len(set(pointers) - {0}) < count:
            return False
        arrays = list(itertools.compress(arrays, is_on_host))
    return all(map(operator.is_, map(_BASE, arrays), itertools.repeat(None)))


def _columns(rows: Sequence[_Row]) -> _Columns | None:
    others = [n for n, row in enumerate(rows) if row.array_dtype is None]
    has_ties = any(row.tensor != n for n, row in enumerate(rows))
    if has_ties or len(others) > len(rows) // 8:
        return None
    apart = set(others)
    plain = [n for n in range(len(rows)) if n not in apart]
    return _Columns(
        plain,
        [rows[n].runtime for n in plain],
        [rows[n].array_dtype for n in plain],
        [rows[n].spec.shape for n in plain],
        others,
    )


def _admit(leaf: Leaf, own_memory: bool, sources: Sources, strings: dict[int, int], numbers: dict[Any, int]) -> _Row:
    """Adds the leaf to the sources, unless its bytes are there already, and describes it."""
    admitted = admit(leaf.value, leaf.name, leaf.dtype)
    array = admitted.array
    if admitted.items is not None:
        number = len(sources)
        stored, strings[number] = encode_strings(admitted.items)
        array = np.frombuffer(stored, np.uint8)
    else:
        number = numbers.setdefault(_identity(admitted.runtime, array, own_memory), len(sources))
    if number == len(sources):
        sources.add(admitted.runtime, array)
    part = leaf.part
    if part is not None and admitted.spec.shape != part.slice.shape(part.full_shape):
        raise InvalidArgumentError(
            f"{leaf.name}: slice {part.slice} of {list(part.full_shape)} has shape "
            f"{list(part.slice.shape(part.full_shape))}, the array has {list(admitted.spec.shape)}"
        )
    return _Row(
        leaf.name,
        admitted.spec,
        number,
        leaf.device or admitted.runtime.name,
        array.nbytes,
        part.slice if part is not None else None,
        part.full_shape if part is not None else None,
        admitted.runtime,
        array.dtype if leaf.key is not None and array is leaf.value else None,
    )


def _identity(runtime: Runtime, array: Any, own_memory: bool) -> Any:
    """Equal for arrays that are the same bytes: tied variables are stored once.

    NumPy arrays that own their memory are the same bytes only if they are the same object, which is cheaper to see.
    Empty arrays have none in common, whatever their address: on a device it is 0.
    """
    if own_memory or array.nbytes == 0:
        return id(array)
    if runtime is not HOST:
        return (array.data.ptr, array.shape, array.strides, array.dtype, runtime)
    return (address(array), array.shape, array.strides, array.dtype)


def _make_plan(
    leaves: Sequence[Leaf], rows: list[_Row], sources: Sources, sharded: bool, frozen: frozenset[str]
) -> Plan:
    runtimes = sorted(set(sources.runtimes), key=_devices_first)
    owner_numbers = {runtime.name: number for number, runtime in enumerate(runtimes)}
    frozen_tensors = {row.tensor for row in rows if row.name in frozen}
    # By tensor; one that has two names lies where the last one says.
    places = {row.tensor: (row.tensor in frozen_tensors, row.device if sharded else "") for row in rows}
    shard_numbers = {place: number for number, place in enumerate(sorted(set(places.values())))}
    nbytes = [0] * len(sources)
    shards = [0] * len(sources)
    items: list[Item] = []
    parts: dict[bytes, list[tuple[Leaf, TensorSpec]]] = {}
    for leaf, (name, spec, tensor, _, size, part, full_shape, _, _) in zip(leaves, rows, strict=True):
        nbytes[tensor], shards[tensor] = size, shard_numbers[places[tensor]]
        if part is not None and full_shape is not None and not part.is_whole(full_shape):
            parts.setdefault(name.encode("utf-8", "surrogateescape"), []).append((leaf, spec))
        items.append(Item(stored_key(leaf), spec, tensor))
    partitioned = [(key, _partitioned_entry(key, members)) for key, members in parts.items()]
    if partitioned:
        items.sort(key=lambda item: item.key)
    _check_keys(items, partitioned)
    layout = plan_layout(
        nbytes,
        [owner_numbers[runtime.name] for runtime in sources.runtimes],
        shards,
        max(1, len(shard_numbers)),
    )
    return Plan(
        rows,
        _columns(rows),
        items,
        partitioned,
        runtimes,
        layout,
        layout.places(),
        frozen,
        frozenset(number for (is_frozen, _), number in shard_numbers.items() if is_frozen),
    )


def stored_key(leaf: Leaf) -> bytes:
    """The key of the leaf's bytes: the name, or that of a part under it."""
    key, part = leaf.name.encode("utf-8", "surrogateescape"), leaf.part
    return key if part is None or part.slice.is_whole(part.full_shape) else slice_key(key, part.slice)


def _devices_first(runtime: Runtime) -> tuple[bool, str]:
    return (runtime is HOST, runtime.name)


def _partitioned_entry(key: bytes, members: Sequence[tuple[Leaf, TensorSpec]]) -> Entry:
    slices = tuple(leaf.part.slice for leaf, _ in members if leaf.part is not None)
    first_leaf, first_spec = members[0]
    assert first_leaf.part is not None
    full_shape = first_leaf.part.full_shape
    for leaf, spec in members:
        if spec.dtype != first_spec.dtype:
            raise InvalidArgumentError(
                f"Slices of {leaf.name} disagree: {spec.dtype.name} and {first_spec.dtype.name}; expected one dtype"
            )
    _check_no_overlap(key, full_shape, slices)
    return Entry(TensorSpec(first_spec.dtype, full_shape), 0, 0, 0, 0, slices)


def _check_no_overlap(key: bytes, full_shape: tuple[int, ...], slices: Sequence[Any]) -> None:
    """Some parts of a tensor may be saved alone, but no element twice."""
    if len(slices) == 1:
        return
    try:
        check_tiling(key, full_shape, slices)
    except InternalError as error:
        raise InvalidArgumentError(error.message) from error
    except InvalidArgumentError:
        pass


def _check_keys(items: Sequence[Item], partitioned: Sequence[tuple[bytes, Entry]]) -> None:
    keys = [item.key for item in items] + [key for key, _ in partitioned]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidArgumentError(f"Adding duplicate key: {twice.decode('utf-8', 'surrogateescape')}")
