"""Joins the indexes of several bundles into one; no data moves, files are only renamed (specification, section 7).

A data file is given the next free shard number when the first entry that names it is met, inputs in the order given,
entries in key order: the numbering that TensorFlow's MergeV2Checkpoints uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gpusaver.bundle.bulk import collector_paused
from gpusaver.bundle.coding import printable
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.index import BundleIndex
from gpusaver.errors import InvalidArgumentError, UnimplementedError
from gpusaver.tensor import TensorSlice


class MergedIndex(NamedTuple):
    """The joined index, and the renamings that make it true.

    ``entries`` are in key order, ready for ``encode_index(num_shards, entries)``.  A move is (position of the input,
    shard in that input, shard in the result); there is one for every shard of the result, in order.  Data files that
    no entry names have no move: nothing needs them.
    """

    num_shards: int
    entries: list[tuple[bytes, Entry]]
    moves: list[tuple[int, int, int]]


@collector_paused()
def merge_indexes(inputs: Sequence[BundleIndex], first_shards: Sequence[int] | None = None) -> MergedIndex:
    """Joins bundles that were written for different devices or by different processes.

    A tensor may be in several inputs only if it is partitioned and each holds other slices of it.  With
    ``first_shards`` the data files have their numbers already: those of input i from ``first_shards[i]`` on.  Raises
    InvalidArgumentError for a tensor given twice, or for inputs of different byte order or version.
    """
    if not inputs:
        raise InvalidArgumentError("merging needs at least one checkpoint")
    entries: dict[bytes, Entry] = {}
    slices: dict[bytes, list[TensorSlice]] = {}
    shards: dict[tuple[int, int], int] = {}
    if first_shards is not None:
        for number, (index, first) in enumerate(zip(inputs, first_shards, strict=True)):
            shards.update({(number, shard): first + shard for shard in range(index.num_shards)})
    for number, index in enumerate(inputs):
        if (index.big_endian, index.version) != (inputs[0].big_endian, inputs[0].version):
            raise InvalidArgumentError(f"{index.name} and {inputs[0].name} differ in byte order or version")
        for key, entry in index.items():
            existing = entries.get(key)
            if existing is None:
                shard = shards.setdefault((number, entry.shard), len(shards))
                entries[key] = entry._replace(shard=shard)
            else:
                _check_joint(key, existing, entry, index.name)
            if entry.slices:
                slices.setdefault(key, []).extend(entry.slices)
    for key, parts in slices.items():
        entries[key] = entries[key]._replace(slices=tuple(parts))
    if inputs[0].big_endian:
        raise UnimplementedError(f"{inputs[0].name} is big-endian: such checkpoints are read but not written")
    # A checkpoint without entries still has one data file; the count must not exceed the files that will exist.
    shards = shards or {(0, 0): 0}
    moves = [(number, old, new) for (number, old), new in shards.items()]
    return MergedIndex(len(shards), sorted(entries.items()), moves)


def _check_joint(key: bytes, existing: Entry, entry: Entry, name: str) -> None:
    if not (existing.slices and entry.slices):
        raise InvalidArgumentError(f"Duplicate tensor keyed by {printable(key)} encountered, when merging {name}")
    if existing.spec != entry.spec:
        raise InvalidArgumentError(
            f"partitioned tensor {printable(key)} is {entry.spec} in {name}, but {existing.spec} in an earlier input"
        )
