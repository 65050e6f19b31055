"""From leaves to what is to be stored where: the plan of a save, reused while names, types and shapes stay."""

from __future__ import annotations

import array
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
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
from gpusaver.device import HOST, Event, Runtime, admit, are_different, runtimes_of, specs_of
from gpusaver.device.host import address, own_memory
from gpusaver.errors import InternalError, InvalidArgumentError
from gpusaver.pipeline.save import Sources
from gpusaver.tensor import TensorSlice, TensorSpec
from gpusaver.variables import Leaf, Leaves

_DTYPE = operator.attrgetter("dtype")
_SHAPE = operator.attrgetter("shape")
_NBYTES = operator.attrgetter("nbytes")
#: The masked checksum of no bytes.
_EMPTY_CRC = mask(0)


class Item(NamedTuple):
    """What one index entry with bytes stands for: a leaf, and the number of the stored tensor that has its bytes."""

    key: bytes
    spec: TensorSpec
    tensor: int


class Row(NamedTuple):
    """What a plan depends on, for one leaf.

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

    @property
    def is_part(self) -> bool:
        """Of a tensor that other leaves may have more of."""
        return self.part is not None and self.full_shape is not None and not self.part.is_whole(self.full_shape)

    @property
    def key(self) -> bytes:
        """Of the leaf's bytes: the name, or that of a part under it."""
        key = self.name.encode("utf-8", "surrogateescape")
        return slice_key(key, self.part) if self.is_part and self.part is not None else key


class Rows:
    """Rows as columns, which take a third of the memory; equal if all rows are.

    ``names``: of all leaves; kept by whoever made them, too.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.specs: list[TensorSpec] = []
        self.tensors = array.array("q")
        self.devices: list[str] = []
        self.runtimes: list[Runtime] = []
        self.dtypes: list[Any] = []
        #: By number, what few rows have: parts, and sizes that do not follow from the spec.
        self.parts: dict[int, tuple[TensorSlice | None, tuple[int, ...] | None]] = {}
        self.sizes: dict[int, int] = {}

    def add(self, row: Row) -> None:
        """The next one; its name is there."""
        number = len(self.specs)
        if row.part is not None:
            self.parts[number] = row.part, row.full_shape
        if not row.spec.dtype.is_fixed_size:
            self.sizes[number] = row.nbytes
        self._append(row.spec, row.tensor, row.device, row.runtime, row.array_dtype)

    def add_same(self, other: Rows) -> None:
        """As ``other`` has it at this place, where it has an ``array_dtype``."""
        n = len(self.specs)
        self._append(other.specs[n], other.tensors[n], other.devices[n], other.runtimes[n], other.dtypes[n])

    def _append(self, spec: TensorSpec, tensor: int, device: str, runtime: Runtime, dtype: Any) -> None:
        self.specs.append(spec)
        self.tensors.append(tensor)
        self.devices.append(device)
        self.runtimes.append(runtime)
        self.dtypes.append(dtype)

    def fits(self, number: int, value: Any) -> bool:
        """Whether the row has an ``array_dtype``, and is that of this value but for the tensor's number."""
        dtype = self.dtypes[number]
        return (
            dtype is not None  # first: to NumPy it equals float64
            and self.runtimes[number].owns(value)
            and dtype == value.dtype
            and self.specs[number].shape == value.shape
        )

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Row:
        spec, size = self.specs[number], self.sizes.get(number)
        return Row(
            self.names[number],
            spec,
            self.tensors[number],
            self.devices[number],
            spec.nbytes if size is None else size,
            *self.parts.get(number, (None, None)),
            self.runtimes[number],
            self.dtypes[number],
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # mutable, as a list is


class _Columns(NamedTuple):
    """What is compared of NumPy and CuPy arrays that lie in a dict or list as they are, all at once.

    ``plain``: numbers of the leaves that are such; ``others``: of those that are something else.
    """

    plain: Sequence[int]
    runtimes: list[Runtime]
    dtypes: list[Any]
    shapes: list[tuple[int, ...]]
    others: list[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything goes.  ``rows`` is the signature: the plan holds as long as it stays the same."""

    rows: Rows
    #: None where it would not help.
    columns: _Columns | None
    #: The numbers of the rows in the order of their keys.
    order: Sequence[int]
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

    def items(self) -> Iterator[Item]:
        """One for each row, in the order of their keys."""
        return (Item(row.key, row.spec, row.tensor) for row in map(self.rows.__getitem__, self.order))

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
        tensors: list[int] = []

        def entries() -> Iterator[tuple[bytes, Entry]]:
            for key, entry, tensor in self._keyed():
                tensors.append(tensor)
                yield key, entry

        return IndexTemplate(num_shards, entries()), np.array(tensors, np.int64)

    def _keyed(self) -> Iterable[tuple[bytes, Entry, int]]:
        """Entries without checksums by key, each with the number of its tensor (-1: partitioned, has none)."""
        shard, offset, nbytes = (column.item for column in (self.layout.shard, self.layout.offset, self.layout.nbytes))
        entries = ((key, Entry(spec, shard(t), offset(t), nbytes(t), 0), t) for key, spec, t in self.items())
        if not self.partitioned:
            return entries
        partitioned = [(key, entry, -1) for key, entry in self.partitioned]
        return sorted([*entries, *partitioned], key=lambda row: row[0])


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
def plan_save(leaves: Leaves, *, sharded: bool, cached: Plan | None, frozen: frozenset[str] = frozenset()) -> Save:
    """Raises TypeError for leaves that cannot be stored, InvalidArgumentError for slices that overlap.

    ``frozen``: names of the variables that get data files of their own.
    Requires: ``cached`` is a plan for leaves of the same names, and for the same ``sharded``.
    """
    if cached is not None and cached.frozen != frozen:
        cached = None
    if cached is not None and (unchanged := _unchanged(leaves, cached)) is not None:
        return unchanged
    rows, sources, strings = _plain(leaves) or _one_by_one(leaves, cached)
    if cached is None or cached.rows != rows:
        cached = _make_plan(rows, sources, sharded, frozen)
    return Save(cached, sources, strings)


_Described = tuple[Rows, Sources, dict[int, int]]


def _plain(leaves: Leaves) -> _Described | None:
    """What :func:`_one_by_one` finds, in an eighth of the time, where all are whole arrays, and no two the same."""
    arrays, count = leaves.values, len(leaves)
    runtimes = runtimes_of(arrays)
    if runtimes is None or None in leaves.keys or leaves.parts.count(None) < count:
        return None
    specs = specs_of(arrays)
    if specs is None or not are_different(arrays) or not _are_apart(arrays, runtimes):
        return None
    rows = Rows(leaves.names)
    rows.specs, rows.tensors, rows.runtimes = specs, array.array("q", range(count)), runtimes
    rows.devices, rows.dtypes = [runtime.name for runtime in runtimes], list(map(_DTYPE, arrays))
    return rows, Sources(list(runtimes), list(arrays)), {}


def _one_by_one(leaves: Leaves, cached: Plan | None) -> _Described:
    sources = Sources()
    strings: dict[int, int] = {}
    numbers: dict[Any, int] = {}
    rows = Rows(leaves.names)
    own_memory = all(leaf.has_own_memory for leaf in leaves)
    known = cached.rows if cached is not None and len(cached.rows) == len(leaves) else None
    for place, leaf in enumerate(leaves):
        value = leaf.value
        if known is not None and leaf.key is not None and known.fits(place, value):
            runtime, number = known.runtimes[place], len(sources)
            if (
                known.tensors[place] == number
                and numbers.setdefault(_identity(runtime, value, own_memory), number) == number
            ):
                rows.add_same(known)
                sources.add(runtime, value)
                continue
        rows.add(_admit(leaf, own_memory, sources, strings, numbers))
    return rows, sources, strings


def _unchanged(leaves: Leaves, cached: Plan) -> Save | None:
    """The save, if it is found quickly that the plan fits: by columns instead of leaf by leaf."""
    columns = cached.columns
    if columns is None or len(leaves) != len(cached.rows):
        return None
    values, keys = leaves.values, leaves.keys
    arrays = list(map(values.__getitem__, columns.plain)) if columns.others else values
    if (
        runtimes_of(arrays) != columns.runtimes
        or list(map(_DTYPE, arrays)) != columns.dtypes
        or not all(map(operator.eq, map(_SHAPE, arrays), columns.shapes))
        or not are_different(arrays)
        or not _are_apart(arrays, columns.runtimes)
        or keys.count(None) != sum(keys[number] is None for number in columns.others)  # a Variable took one's place
    ):
        return None
    sources = Sources()
    strings: dict[int, int] = {}
    numbers: dict[Any, int] = {}
    runtimes = iter(columns.runtimes)
    identities = set(map(id, arrays)) if columns.others else ()
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
    return own_memory(arrays)


def _columns(rows: Rows) -> _Columns | None:
    others = [n for n, dtype in enumerate(rows.dtypes) if dtype is None]
    has_ties = any(map(operator.ne, rows.tensors, range(len(rows))))
    if has_ties or len(others) > len(rows) // 8:
        return None
    shapes = list(map(_SHAPE, rows.specs))
    if not others:
        return _Columns(range(len(rows)), rows.runtimes, rows.dtypes, shapes, others)
    is_plain = [dtype is not None for dtype in rows.dtypes]
    runtimes, dtypes, shapes = (
        list(itertools.compress(column, is_plain)) for column in (rows.runtimes, rows.dtypes, shapes)
    )
    return _Columns(list(itertools.compress(range(len(rows)), is_plain)), runtimes, dtypes, shapes, others)


def _admit(leaf: Leaf, own_memory: bool, sources: Sources, strings: dict[int, int], numbers: dict[Any, int]) -> Row:
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
    return Row(
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


def _make_plan(rows: Rows, sources: Sources, sharded: bool, frozen: frozenset[str]) -> Plan:
    runtimes = sorted(set(sources.runtimes), key=_devices_first)
    owner_numbers = {runtime.name: number for number, runtime in enumerate(runtimes)}
    frozen_tensors = {t for t, name in zip(rows.tensors, rows.names, strict=True) if name in frozen} if frozen else ()
    # By tensor; one that has two names lies where the last one says.
    places = [(False, "")] * len(sources)
    if sharded or frozen:
        for tensor, device in zip(rows.tensors, rows.devices, strict=True):
            places[tensor] = tensor in frozen_tensors, device if sharded else ""
    shard_numbers = {place: number for number, place in enumerate(sorted(set(places)))}
    parts: dict[bytes, list[Row]] = {}
    for row in map(rows.__getitem__, rows.parts):
        if row.is_part:
            parts.setdefault(row.name.encode("utf-8", "surrogateescape"), []).append(row)
    partitioned = [(key, _partitioned_entry(key, members)) for key, members in parts.items()]
    order: Sequence[int] = range(len(rows))
    if partitioned:
        keys = [row.key for row in rows]
        order = sorted(order, key=keys.__getitem__)
    _check_keys(rows, partitioned)
    count = len(sources)
    layout = plan_layout(
        np.fromiter(map(_NBYTES, sources.arrays), np.int64, count),
        np.fromiter((owner_numbers[runtime.name] for runtime in sources.runtimes), np.int64, count),
        np.fromiter(map(shard_numbers.__getitem__, places), np.int64, count),
        max(1, len(shard_numbers)),
    )
    return Plan(
        rows,
        _columns(rows),
        order,
        partitioned,
        runtimes,
        layout,
        layout.places(),
        frozen,
        frozenset(number for (is_frozen, _), number in shard_numbers.items() if is_frozen),
    )


def _devices_first(runtime: Runtime) -> tuple[bool, str]:
    return (runtime is HOST, runtime.name)


def _partitioned_entry(key: bytes, members: Sequence[Row]) -> Entry:
    slices = tuple(row.part for row in members if row.part is not None)
    first = members[0]
    assert first.full_shape is not None
    full_shape = first.full_shape
    for row in members:
        if row.spec.dtype != first.spec.dtype:
            raise InvalidArgumentError(
                f"Slices of {row.name} disagree: {row.spec.dtype.name} and {first.spec.dtype.name}; expected one dtype"
            )
    _check_no_overlap(key, full_shape, slices)
    return Entry(TensorSpec(first.spec.dtype, full_shape), 0, 0, 0, 0, slices)


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


def _check_keys(rows: Rows, partitioned: Sequence[tuple[bytes, Entry]]) -> None:
    if not rows.parts and all(map(str.isascii, rows.names)):
        return  # as different as the names
    keys = [row.key for row in rows] + [key for key, _ in partitioned]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidArgumentError(f"Adding duplicate key: {twice.decode('utf-8', 'surrogateescape')}")
