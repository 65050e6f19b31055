"""From leaves to what is to be stored where: the plan of a save, reused while names, types and shapes stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpusaver.bundle.crc import mask
from gpusaver.bundle.index import Entry
from gpusaver.bundle.layout import Layout, plan_layout
from gpusaver.bundle.slices import check_tiling, slice_key
from gpusaver.bundle.strings import encode_strings
from gpusaver.device import HOST, Admitted, Runtime, admit
from gpusaver.errors import InternalError, InvalidArgumentError
from gpusaver.pipeline.save import Source
from gpusaver.tensor import TensorSpec
from gpusaver.variables import Leaf

#: The masked checksum of no bytes.
_EMPTY_CRC = mask(0)


class Item(NamedTuple):
    """What one index entry with bytes stands for: a leaf, and the number of the stored tensor that has its bytes."""

    key: bytes
    spec: TensorSpec
    tensor: int


@dataclass(frozen=True, slots=True)
class Plan:
    """``partitioned``: the entries of partitioned tensors, which have no bytes of their own."""

    signature: list[Any]
    items: list[Item]
    partitioned: list[tuple[bytes, Entry]]
    layout: Layout

    def entries(self, checksums: dict[int, int]) -> Iterator[tuple[bytes, Entry]]:
        """The index, in key order; ``checksums`` by tensor number, unmasked."""
        shard, offset, nbytes = (c.tolist() for c in (self.layout.shard, self.layout.offset, self.layout.nbytes))
        entries = [
            (key, Entry(spec, shard[t], offset[t], nbytes[t], mask(checksums[t]) if t in checksums else _EMPTY_CRC))
            for key, spec, t in self.items
        ]
        if self.partitioned:
            entries += self.partitioned
            entries.sort(key=lambda entry: entry[0])
        return iter(entries)


@dataclass(frozen=True, slots=True)
class Save:
    """The variables at one moment: a plan and the arrays it applies to.

    ``string_checksums``: by tensor number, for tensors whose checksum is not that of their bytes.
    """

    plan: Plan
    sources: list[Source]
    string_checksums: dict[int, int]

    def runtimes(self) -> list[Runtime]:
        return list({source.runtime.name: source.runtime for source in self.sources}.values())


def plan_save(leaves: Sequence[Leaf], *, sharded: bool, cached: Plan | None) -> Save:
    """Raises TypeError for leaves that cannot be stored, InvalidArgumentError for slices that overlap."""
    sources: list[Source] = []
    strings: dict[int, int] = {}
    numbers: dict[Any, int] = {}
    signature: list[Any] = [sharded]
    plain_arrays = all(type(leaf.value) is not np.ndarray or leaf.value.base is None for leaf in leaves)
    for leaf in leaves:
        admitted = admit(leaf.value, leaf.name, leaf.dtype)
        array, identity = admitted.array, None
        if admitted.items is not None:
            stored, strings[len(sources)] = encode_strings(admitted.items)
            array = np.frombuffer(stored, np.uint8)
        else:
            identity = _identity(admitted, plain_arrays)
        number = numbers.setdefault(identity, len(sources)) if identity is not None else len(sources)
        if number == len(sources):
            sources.append(Source(admitted.runtime, array))
        slice_ = leaf.part.slice if leaf.part is not None else None
        full_shape = leaf.part.full_shape if leaf.part is not None else None
        label = leaf.device or admitted.runtime.name
        signature.append((leaf.name, admitted.spec, number, label, array.nbytes, slice_, full_shape))
    if cached is None or cached.signature != signature:
        cached = _make_plan(leaves, signature, sources, sharded)
    return Save(cached, sources, strings)


def _identity(admitted: Admitted, plain_arrays: bool) -> Any:
    """Equal for arrays that are the same bytes: tied variables are stored once.

    NumPy arrays that own their memory are the same bytes only if they are the same object, which is cheaper to see.
    """
    array = admitted.array
    if admitted.runtime is not HOST:
        return (array.data.ptr, array.shape, array.strides, array.dtype, admitted.runtime.name)
    if plain_arrays:
        return id(array)
    return (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype)


def _make_plan(leaves: Sequence[Leaf], signature: list[Any], sources: Sequence[Source], sharded: bool) -> Plan:
    runtimes = sorted({source.runtime.name: source.runtime for source in sources}.values(), key=_devices_first)
    owner_numbers = {runtime.name: number for number, runtime in enumerate(runtimes)}
    shard_names = sorted({row[3] for row in signature[1:]}) if sharded else []
    shard_numbers = {name: number for number, name in enumerate(shard_names)}
    nbytes = [0] * len(sources)
    shards = [0] * len(sources)
    items: list[Item] = []
    parts: dict[bytes, list[tuple[Leaf, TensorSpec]]] = {}
    for leaf, (name, spec, tensor, label, size, part, _) in zip(leaves, signature[1:], strict=True):
        key = name.encode("utf-8", "surrogateescape")
        nbytes[tensor], shards[tensor] = size, shard_numbers.get(label, 0)
        if part is not None and not part.is_whole(leaf.part.full_shape):  # type: ignore[union-attr]
            parts.setdefault(key, []).append((leaf, spec))
            key = slice_key(key, part)
        items.append(Item(key, spec, tensor))
    partitioned = [(key, _partitioned_entry(key, members)) for key, members in parts.items()]
    if partitioned:
        items.sort(key=lambda item: item.key)
    _check_keys(items, partitioned)
    layout = plan_layout(
        nbytes,
        [owner_numbers[source.runtime.name] for source in sources],
        shards,
        max(1, len(shard_names)),
        small_alignment=[runtime.small_alignment for runtime in runtimes],
    )
    return Plan(signature, items, partitioned, layout)


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
