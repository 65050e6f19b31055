"""Who writes which tensor, when several ranks save one checkpoint: bytes in, values out.

A rank describes what it holds as the index that it would write alone.  The parts of a tensor must fill it without
overlapping, over all ranks together.  What several ranks hold, whole tensors or the very same parts, is written by one
of them: the largest first, each by the holder that has least to write so far, so that all have about as much.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gpusaver.bundle.bulk import collector_paused
from gpusaver.bundle.coding import printable
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.index import BundleIndex
from gpusaver.bundle.slices import check_tiling, intersect, slice_key
from gpusaver.distributed.group import ranks_text
from gpusaver.errors import InternalError, InvalidArgumentError
from gpusaver.tensor import TensorSlice, TensorSpec


class Part(NamedTuple):
    """A tensor, or a part of one, as a `.meta` file needs it."""

    spec: TensorSpec
    name: bytes
    part: TensorSlice | None
    full_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Assignment:
    """``is_written[rank]``: of each entry with bytes that the rank holds, in the order of their keys, whether the rank
    writes it.  ``first_shards[rank]``, ``shard_counts[rank]``: its data files.  ``nbytes``: of all data, padding not
    counted.  ``parts``: everything, in no order.
    """

    is_written: list[npt.NDArray[np.bool_]]
    first_shards: list[int]
    shard_counts: list[int]
    nbytes: int
    parts: list[Part]

    @property
    def num_shards(self) -> int:
        return sum(self.shard_counts)


class _Place(NamedTuple):
    """``number`` among the entries with bytes of the group, ``shard`` among the data files of each of its ranks."""

    group: int
    number: int
    shard: int


class _Held(NamedTuple):
    """One row: a tensor or a part of one, and in which groups it is held."""

    nbytes: int
    part: Part
    places: list[_Place]


@collector_paused()
def assign(indexes: Sequence[BundleIndex], ranks_of: Sequence[Sequence[int]]) -> Assignment:
    """``indexes``: what is held, once for each group of ranks that hold alike; ``ranks_of``: the ranks of each group.

    Raises InvalidArgumentError naming tensor and ranks: for two dtypes or shapes of one tensor, for one that is whole
    here and partitioned there, for parts that overlap or leave a hole.
    """
    rows: dict[bytes, _Held] = {}
    wholes: dict[bytes, tuple[Entry, int]] = {}
    counts = []
    for group, index in enumerate(indexes):
        entries = list(index.items())
        parts = _parts(entries)
        number = 0
        for key, entry in entries:
            part = parts.get(key)
            if part is None:
                first, other = wholes.setdefault(key, (entry, group))
                if other != group:
                    _check_same(key, first, entry, ranks_of[other], ranks_of[group])
            if entry.slices:
                continue
            held = rows.get(key)
            if held is None:
                held = rows[key] = _Held(entry.nbytes, Part(entry.spec, *(part or (key, None, None))), [])
            held.places.append(_Place(group, number, entry.shard))
            number += 1
        counts.append(number)
    _check_tilings(rows, wholes, ranks_of)
    return _spread(list(rows.values()), counts, ranks_of)


def _parts(
    entries: Sequence[tuple[bytes, Entry]],
) -> dict[bytes, tuple[bytes, TensorSlice, tuple[int, ...]]]:
    """By their slice keys, which come before the names of their tensors: name, part and full shape."""
    return {slice_key(name, part): (name, part, entry.spec.shape) for name, entry in entries for part in entry.slices}


def _check_same(key: bytes, first: Entry, second: Entry, ranks: Sequence[int], others: Sequence[int]) -> None:
    if first.spec != second.spec or bool(first.slices) != bool(second.slices):
        one, other = (
            f"{'partitioned' if entry.slices else 'whole'} {entry.spec} on {ranks_text(holders)}"
            for entry, holders in ((first, ranks), (second, others))
        )
        raise InvalidArgumentError(f"tensor {printable(key)} is {one}, but {other}; the ranks must agree")


def _check_tilings(
    rows: dict[bytes, _Held], wholes: dict[bytes, tuple[Entry, int]], ranks_of: Sequence[Sequence[int]]
) -> None:
    parts: dict[bytes, list[_Held]] = defaultdict(list)
    for held in rows.values():
        if held.part.part is not None:
            parts[held.part.name].append(held)
    for name, members in parts.items():
        shape = wholes[name][0].spec.shape
        slices = [held.part.part for held in members if held.part.part is not None]
        try:
            check_tiling(name, shape, slices)
        except (InternalError, InvalidArgumentError) as error:
            members = _overlapping(members, shape) or members
            ranks = ranks_text({rank for held in members for place in held.places for rank in ranks_of[place.group]})
            raise InvalidArgumentError(f"{error.message} (held by {ranks})") from error


def _overlapping(members: Sequence[_Held], shape: Sequence[int]) -> list[_Held]:
    for number, held in enumerate(members):
        for other in members[:number]:
            if held.part.part and other.part.part and intersect(held.part.part, other.part.part, shape) is not None:
                return [other, held]
    return []


def _spread(rows: Sequence[_Held], counts: Sequence[int], ranks_of: Sequence[Sequence[int]]) -> Assignment:
    group_of = {rank: group for group, ranks in enumerate(ranks_of) for rank in ranks}
    size = len(group_of)
    is_written = [np.zeros(counts[group_of[rank]], np.bool_) for rank in range(size)]
    shards: list[set[int]] = [set() for _ in range(size)]
    load = np.zeros(size, np.int64)

    def give(held: _Held, rank: int) -> None:
        place = next(place for place in held.places if place.group == group_of[rank])
        is_written[rank][place.number] = True
        shards[rank].add(place.shard)
        load[rank] += held.nbytes

    shared = []
    for held in rows:
        if len(held.places) == 1 and len(ranks_of[held.places[0].group]) == 1:
            give(held, ranks_of[held.places[0].group][0])
        else:
            shared.append(held)
    shared.sort(key=lambda held: -held.nbytes)
    holders: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}
    for held in shared:
        groups = tuple(place.group for place in held.places)
        if groups not in holders:
            holders[groups] = np.array(sorted(rank for group in groups for rank in ranks_of[group]), np.int64)
        ranks = holders[groups]
        give(held, int(ranks[np.argmin(load[ranks])]))
    shard_counts = [len(numbers) for numbers in shards]
    if not any(shard_counts):
        shard_counts[0] = 1  # a checkpoint has one data file at least
    first_shards = (np.cumsum(shard_counts) - shard_counts).tolist()
    return Assignment(is_written, first_shards, shard_counts, int(load.sum()), [held.part for held in rows])


def in_order(part: Part) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """For sorting: by name, the parts of a tensor by where they begin."""
    return part.name, () if part.part is None or part.full_shape is None else part.part.resolve(part.full_shape)
