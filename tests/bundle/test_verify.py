"""Findings about a checkpoint: one line each, none for a good one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from bundle_tools import GOLDEN, golden_indexes, golden_shards, single_bit_flips

from gpusaver.bundle.crc import crc32c, mask
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.index import BundleIndex, encode_index
from gpusaver.bundle.slices import slice_key
from gpusaver.bundle.verify import structure_problems, tensor_problem
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

VECTOR = TensorSpec(DataType.float32, (2,))
WHOLE = TensorSpec(DataType.float32, (4,))
EMPTY = TensorSpec(DataType.float32, (0,))
LOW, HIGH = TensorSlice(((0, 2),)), TensorSlice(((2, 2),))


def problems(entries: Mapping[bytes, Entry], sizes: Mapping[int, int | None], num_shards: int = 2) -> list[str]:
    data = encode_index(num_shards, sorted(entries.items()))
    return list(structure_problems(BundleIndex(data, "t.index"), sizes))


@pytest.mark.parametrize("path", golden_indexes())
def test_golden_checkpoints_have_no_problems(path: Path) -> None:
    index = BundleIndex(path.read_bytes(), str(path))
    shards = golden_shards(path)
    assert list(structure_problems(index, {number: len(data) for number, data in enumerate(shards)})) == []
    for key, entry in index.items():
        if not entry.slices:
            data = memoryview(shards[entry.shard])[entry.offset : entry.offset + entry.nbytes]
            assert tensor_problem(key, entry, data) is None


@pytest.mark.parametrize(
    ("folder", "stem", "name"),
    [
        ("variant", "var", b"lists"),
        ("state_dir", "model.ckpt-30", b"w"),
        ("object_based_tf2", "ckpt-3", b"model/w/.ATTRIBUTES/VARIABLE_VALUE"),
    ],
)
def test_every_flipped_bit_of_a_tensor_is_found(folder: str, stem: str, name: bytes) -> None:
    path = GOLDEN / folder / f"{stem}.index"
    index = BundleIndex(path.read_bytes(), stem)
    name, entry = next((item for item in index.items() if item[0] == name), next(index.items()))
    data = golden_shards(path)[0][entry.offset : entry.offset + entry.nbytes]
    assert data
    for _, flipped in single_bit_flips(data):
        assert f"tensor {name.decode()}: " in str(tensor_problem(name, entry, flipped))
    for nbytes in range(len(data)):
        assert f"tensor {name.decode()}: {nbytes} bytes are there" in str(tensor_problem(name, entry, data[:nbytes]))


def test_tensor_problem_says_expected_and_found() -> None:
    entry = Entry(VECTOR, 3, 0, 8, mask(crc32c(bytes(8))))
    assert tensor_problem(b"a", entry, bytes(8)) is None
    damaged = b"\1" + bytes(7)
    assert tensor_problem(b"a", entry, damaged) == (
        f"tensor a: checksum {crc32c(damaged):08x}, expected {crc32c(bytes(8)):08x}; shard 3 is damaged"
    )


def test_missing_and_short_files() -> None:
    entries = {b"a": Entry(VECTOR, 0, 4, 8, 1), b"b": Entry(VECTOR, 1, 0, 8, 1), b"c": Entry(EMPTY, 1, 99, 0, 1)}
    assert problems(entries, {0: 12, 1: 8}) == []
    assert problems(entries, {0: 11, 1: None}) == [
        "tensor a: its 8 bytes at 4 reach beyond the end of the data file of shard 0, which has 11 bytes",
        "the data file of shard 1 of 2 is missing, and with it 2 tensors",
    ]


def test_a_shard_without_entries_may_be_absent() -> None:
    assert problems({b"a": Entry(VECTOR, 0, 0, 8, 1)}, {0: 8}) == []


def test_overlaps() -> None:
    shared = {b"a": Entry(VECTOR, 0, 8, 8, 1), b"b": Entry(VECTOR, 0, 8, 8, 1), b"c": Entry(VECTOR, 1, 12, 8, 1)}
    assert problems(shared, {0: 99, 1: 99}) == []
    inside = {b"a": Entry(WHOLE, 0, 0, 16, 1), b"b": Entry(VECTOR, 0, 0, 8, 1), b"c": Entry(VECTOR, 0, 15, 8, 1)}
    assert problems(inside, {0: 99}) == [
        "tensors b and a overlap at byte 0 of shard 0",
        "tensors a and c overlap at byte 15 of shard 0",
    ]


def partitioned(parts: dict[TensorSlice, Entry | None]) -> dict[bytes, Entry]:
    entries = {slice_key(b"p", part): entry for part, entry in parts.items() if entry is not None}
    return {b"p": Entry(WHOLE, 0, 0, 0, 0, tuple(parts)), **entries}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({LOW: Entry(VECTOR, 0, 0, 8, 1), HIGH: Entry(VECTOR, 0, 8, 8, 1)}, []),
        ({LOW: Entry(VECTOR, 0, 0, 8, 1), HIGH: None}, ["tensor p: its slice 2,2 is not in the index"]),
        ({LOW: Entry(VECTOR, 0, 0, 8, 1)}, ["Does not have sufficient slices for partitioned tensor p"]),
        (
            {LOW: Entry(VECTOR, 0, 0, 8, 1), HIGH: Entry(EMPTY, 0, 8, 0, 1)},
            ["tensor p: its slice 2,2 is stored as float32[0]"],
        ),
        (
            {LOW: Entry(VECTOR, 0, 0, 8, 1), HIGH: Entry(TensorSpec(DataType.int32, (2,)), 0, 8, 8, 1)},
            ["tensor p: its slice 2,2 is stored as int32[2]"],
        ),
        (
            {
                TensorSlice(((0, 3),)): Entry(TensorSpec(DataType.float32, (3,)), 0, 0, 12, 1),
                HIGH: Entry(VECTOR, 0, 12, 8, 1),
            },
            ["Overlapping slices of tensor p"],
        ),
    ],
)
def test_slices(parts: dict[TensorSlice, Entry | None], expected: list[str]) -> None:
    found = problems(partitioned(parts), {0: 99})
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert re.match(re.escape(start), problem)
