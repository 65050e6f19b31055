"""Joining the indexes of several bundles."""

from __future__ import annotations

import pytest
from bundle_tools import GOLDEN

from gpusaver.bundle.entry import Entry
from gpusaver.bundle.index import BundleIndex, encode_index
from gpusaver.bundle.merge import MergedIndex, merge_indexes
from gpusaver.bundle.slices import slice_key
from gpusaver.bundle.table_writer import TableWriter
from gpusaver.errors import InvalidArgumentError, UnimplementedError
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

VECTOR = TensorSpec(DataType.float32, (2,))
WHOLE = TensorSpec(DataType.float32, (4,))
LOW, HIGH = TensorSlice(((0, 2),)), TensorSlice(((2, 2),))


def entry(shard: int = 0, offset: int = 0) -> Entry:
    return Entry(VECTOR, shard, offset, 8, 7)


def bundle(name: str, num_shards: int, **entries: Entry) -> BundleIndex:
    items = sorted((key.encode("latin-1"), value) for key, value in entries.items())
    return BundleIndex(encode_index(num_shards, items), name)


def partitioned(part: TensorSlice, spec: TensorSpec = WHOLE) -> dict[str, Entry]:
    key = slice_key(b"p", part).decode("latin-1")
    return {"p": Entry(spec, 0, 0, 0, 0, (part,)), key: entry()}


def header_only(header: bytes) -> BundleIndex:
    writer = TableWriter()
    writer.add(b"", header)
    return BundleIndex(writer.finish(), "odd")


def test_shards_are_numbered_as_they_are_met() -> None:
    first = bundle("first", 2, a=entry(1), b=entry(0, 8), c=entry(1, 8))
    second = bundle("second", 1, aa=entry())
    merged = merge_indexes([first, second])
    assert merged == MergedIndex(
        3,
        [(b"a", entry(0)), (b"aa", entry(2)), (b"b", entry(1, 8)), (b"c", entry(0, 8))],
        [(0, 1, 0), (0, 0, 1), (1, 0, 2)],
    )


def test_slices_are_joined_in_the_order_of_the_inputs() -> None:
    merged = merge_indexes([bundle("high", 1, **partitioned(HIGH)), bundle("low", 1, **partitioned(LOW))])
    entries = dict(merged.entries)
    assert entries[b"p"] == Entry(WHOLE, 0, 0, 0, 0, (HIGH, LOW))
    assert [entries[slice_key(b"p", part)].shard for part in (HIGH, LOW)] == [0, 1]
    index = BundleIndex(encode_index(merged.num_shards, merged.entries), "merged")
    assert [key for key, _ in index.tensors()] == [b"p"]


def test_inputs_without_entries_add_no_shard() -> None:
    empty, full = bundle("empty", 1), bundle("full", 1, a=entry())
    assert merge_indexes([empty, full, empty]) == MergedIndex(1, [(b"a", entry())], [(1, 0, 0)])
    assert merge_indexes([empty, empty]) == MergedIndex(1, [], [(0, 0, 0)])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"a": entry()}, {"a": entry()}, "Duplicate tensor keyed by a encountered, when merging second"),
        ({"p": entry()}, partitioned(LOW), "Duplicate tensor keyed by p"),
        (partitioned(LOW), {"p": entry()}, "Duplicate tensor keyed by p"),
        (partitioned(LOW), partitioned(LOW), "Duplicate tensor keyed by"),
        (partitioned(LOW), partitioned(HIGH, TensorSpec(DataType.float32, (5,))), r"p is float32\[5\] in second"),
        (partitioned(LOW), partitioned(HIGH, TensorSpec(DataType.int32, (4,))), r"p is int32\[4\] in second"),
    ],
)
def test_conflicts(first: dict[str, Entry], second: dict[str, Entry], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        merge_indexes([bundle("first", 1, **first), bundle("second", 1, **second)])


def test_headers_must_agree() -> None:
    plain = bundle("plain", 1)
    for odd in (header_only(bytes.fromhex("080110011a020801")), header_only(bytes.fromhex("08011a020802"))):
        with pytest.raises(InvalidArgumentError, match="odd and plain differ in byte order or version"):
            merge_indexes([plain, odd])
    big_endian = header_only(bytes.fromhex("080110011a020801"))
    with pytest.raises(UnimplementedError, match="big-endian"):
        merge_indexes([big_endian, big_endian])


def test_nothing_to_merge() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one"):
        merge_indexes([])


@pytest.mark.parametrize("folder", ["sharded_tf1", "sharded_tf2"])
def test_gives_what_tensorflow_gave(folder: str) -> None:
    """Takes a merged file by TensorFlow apart into one bundle per shard, and merges those."""
    data = (GOLDEN / folder / "model-5.index").read_bytes()
    index = BundleIndex(data, folder)
    parts: list[dict[bytes, Entry]] = [{} for _ in range(index.num_shards)]
    for key, value in index.items():
        if not value.slices:
            parts[value.shard][key] = value._replace(shard=0)
    for name, _ in index.tensors():
        whole = index.get(name)
        for part in whole.slices:
            shard = parts[index.get(slice_key(name, part)).shard]
            known = shard.get(name, whole._replace(shard=0, slices=()))
            shard[name] = known._replace(slices=(*known.slices, part))
    inputs = [BundleIndex(encode_index(1, sorted(part.items())), f"part {number}") for number, part in enumerate(parts)]
    merged = merge_indexes(inputs)
    assert encode_index(merged.num_shards, merged.entries) == data
    assert merged.moves == [(number, 0, number) for number in range(index.num_shards)]
