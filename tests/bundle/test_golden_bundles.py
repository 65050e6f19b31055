"""Every V2 checkpoint by TensorFlow: same bytes when written again, every checksum right, every value as expected."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from bundle_tools import GOLDEN, expected_tensors, golden_indexes, golden_shards, split_table
from golden_values import check_array, decode_array

from gpusaver.bundle.coding import decode_slice_key
from gpusaver.bundle.crc import crc32c, unmask
from gpusaver.bundle.entry import Entry, encode_entry
from gpusaver.bundle.index import BundleIndex, encode_index
from gpusaver.bundle.slices import check_tiling, slice_key
from gpusaver.bundle.strings import encode_strings, variants_crc
from gpusaver.bundle.table_reader import Table
from gpusaver.errors import DataLossError, Error
from gpusaver.tensor import DataType, TensorSpec

all_indexes = pytest.mark.parametrize("path", golden_indexes())


def tensors_of(index: BundleIndex) -> list[tuple[bytes, Entry]]:
    """With the entries, which :meth:`BundleIndex.tensors` does not make."""
    entries = dict(index.items())
    assert [(key, entries[key].spec) for key, _ in index.tensors()] == list(index.tensors())
    return [(key, entries[key]) for key, _ in index.tensors()]


class Golden:
    """One golden checkpoint, opened."""

    def __init__(self, path: Path) -> None:
        self.index = BundleIndex(path.read_bytes(), path.name)
        self.shards = golden_shards(path)
        assert len(self.shards) == self.index.num_shards

    def data(self, entry: Entry) -> bytes:
        return self.shards[entry.shard][entry.offset : entry.offset + entry.nbytes]

    def array(self, name: bytes, entry: Entry) -> np.ndarray:
        if not entry.slices:
            return decode_array(entry, self.data(entry))
        check_tiling(name, entry.spec.shape, entry.slices)
        array = np.zeros(entry.spec.shape, entry.spec.dtype.numpy_dtype)
        for part in entry.slices:
            stored = self.index.get(slice_key(name, part))
            assert stored is not None
            array[part.index(array.shape)] = decode_array(stored, self.data(stored))
        return array


@all_indexes
def test_written_again_byte_for_byte(path: Path) -> None:
    index = BundleIndex(path.read_bytes(), path.name)
    assert encode_index(index.num_shards, index.items()) == path.read_bytes()


@all_indexes
def test_every_checksum(path: Path) -> None:
    golden = Golden(path)
    for key, entry in golden.index.items():
        assert golden.index.get(key) == entry
        data = golden.data(entry)
        assert len(data) == entry.nbytes
        if entry.slices:
            assert (entry.crc, entry.nbytes) == (0, 0)
        elif entry.spec.dtype == DataType.string:
            items = decode_array(entry, data).ravel().tolist()
            assert encode_strings(items) == (data, unmask(entry.crc))
        elif entry.spec.dtype == DataType.variant:
            assert variants_crc(data, entry.spec.num_elements, "t") == unmask(entry.crc)
        else:
            assert crc32c(data) == unmask(entry.crc)


@pytest.mark.parametrize("path", [case for case in golden_indexes() if case.values[0].parent.name != "big_index"])
def test_every_value(path: Path) -> None:
    golden = Golden(path)
    expected = expected_tensors(path.parent / f"expected-{path.stem}.json")
    tensors = dict(tensors_of(golden.index))
    assert list(tensors) == sorted(expected)
    for name, entry in tensors.items():
        if "unreadable" in expected[name]:
            assert (entry.spec.dtype.name, list(entry.spec.shape)) == (expected[name]["dtype"], expected[name]["shape"])
        else:
            check_array(expected[name], entry.spec, golden.array(name, entry))


def test_the_index_of_two_blocks() -> None:
    path = GOLDEN / "big_index" / "big.index"
    expected = json.loads((path.parent / "expected-big.json").read_text())
    golden = Golden(path)
    tensors = dict(tensors_of(golden.index))
    assert Table(path.read_bytes(), "big").block_count == 2
    assert len(tensors) == expected["count"]
    for name, value in expected["samples"].items():
        assert golden.array(name.encode(), tensors[name.encode()]).tolist() == value
    digest = hashlib.sha256()
    for name, entry in tensors.items():
        digest.update(name + b"\0" + golden.data(entry))
    assert digest.hexdigest() == expected["sha256_of_sorted_name_nul_bytes"]


@all_indexes
def test_slice_keys_decode(path: Path) -> None:
    index = BundleIndex(path.read_bytes(), path.name)
    for name, entry in tensors_of(index):
        for part in entry.slices:
            key = slice_key(name, part)
            stored = index.get(key)
            assert stored is not None
            assert decode_slice_key(key) == (name, part)
            assert stored.spec == TensorSpec(entry.spec.dtype, part.shape(entry.spec.shape))


def test_partitioned_and_sharded_files_are_among_them() -> None:
    for folder, stem in (("partitioned_tf1", "part"), ("sharded_tf2", "model-5"), ("odd_keys", "odd")):
        index = BundleIndex((GOLDEN / folder / f"{stem}.index").read_bytes(), stem)
        assert any(entry.slices for _, entry in tensors_of(index))


@pytest.mark.parametrize(("folder", "stem"), [("dtypes", "all"), ("sharded_tf2", "model-5"), ("odd_keys", "odd")])
def test_other_tables_with_the_same_entries(folder: str, stem: str) -> None:
    data = (GOLDEN / folder / f"{stem}.index").read_bytes()
    items = list(Table(data, stem).items())
    for options in ({"block_entries": 1}, {"block_entries": 3, "restart_interval": 1, "snappy": [0, 2]}):
        other = BundleIndex(split_table(items, **options), stem)
        assert list(other.items()) == list(BundleIndex(data, stem).items())


def test_a_big_endian_bundle() -> None:
    """The golden dtypes as a big-endian machine would have written them."""
    path = GOLDEN / "dtypes" / "all.index"
    golden = Golden(path)
    header = b"\x08\x01\x10\x01\x1a\x02\x08\x01"
    items, swapped = [(b"", header)], {}
    for name, entry in golden.index.items():
        little = np.frombuffer(golden.data(entry), np.uint8)
        swapped[name] = little.reshape(-1, entry.spec.dtype.swap_width)[:, ::-1].tobytes()
        items.append((name, encode_entry(entry)))
    index = BundleIndex(split_table(items, 100), "big")
    assert index.big_endian
    for name, entry in tensors_of(index):
        assert decode_array(entry, swapped[name], big_endian=True).tobytes() == golden.data(entry)


@pytest.mark.parametrize("folder", ["sharded_tf1", "scalars_empty", "partitioned_tf2"])
def test_every_truncation_and_every_damaged_byte(folder: str) -> None:
    (path,) = (GOLDEN / folder).glob("*.index")
    data = path.read_bytes()
    entries = list(BundleIndex(data, path.name).items())
    for nbytes in range(len(data)):
        with pytest.raises(DataLossError):
            list(BundleIndex(data[:nbytes], path.name).items())
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x5A
        try:
            assert list(BundleIndex(damaged, path.name).items()) == entries
        except Error as error:
            assert path.name in str(error)  # noqa: PT017
