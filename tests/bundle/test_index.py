"""The index: TensorFlow's bytes, both ways, and what an entry may say."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from bundle_tools import Item, check_damage, check_every_prefix, only_our_errors, split_table
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle.entry import Entry, decode_entry, encode_entry
from gpusaver.bundle.index import BundleIndex, encode_index
from gpusaver.bundle.slices import slice_key
from gpusaver.bundle.table_writer import TableWriter
from gpusaver.errors import DataLossError, InvalidArgumentError, UnimplementedError
from gpusaver.protos import tensor_bundle_pb2, types_pb2
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

# Specification, section 14: a whole file by TensorFlow.
REAL_INDEX = bytes.fromhex(
    "0000 06 0801 1a02 0801"
    "00 03 0f 612f62 0801 1204 1202 0804 2810 35b96f57d8"
    "02 01 15 77 0801 1208 1202 0803 1202 0804 2010 2830 357d05f6ea"
    "00 0b 0d 676c6f62616c5f73746570 0809 1200 2040 2808 3529039807"
    "00000000 01000000 00 151e6894"
    "00000000 01000000 00 c0f2a1b0"
    "00 01 02 68 005a 00000000 01000000 00 edb0a4c2"
    "5f08 6c0e" + "00" * 36 + "57fb808b247547db"
)
REAL_ENTRIES = [
    (b"a/b", Entry(TensorSpec(DataType.float32, (4,)), 0, 0, 16, 0xD8576FB9)),
    (b"a/w", Entry(TensorSpec(DataType.float32, (3, 4)), 0, 16, 48, 0xEAF6057D)),
    (b"global_step", Entry(TensorSpec(DataType.int64, ()), 0, 64, 8, 0x07980329)),
]
FLOATS = TensorSpec(DataType.float32, (6, 2))
HEADER = bytes.fromhex("08011a020801")

sizes = st.integers(0, 2**62) | st.integers(0, 200)
fixed_size = st.sampled_from([dtype for dtype in DataType if dtype.is_fixed_size])


@st.composite
def entries(draw: st.DrawFn, num_shards: int = 3) -> Entry:
    shape = tuple(draw(st.lists(st.integers(0, 300), max_size=4)))
    shard, offset, crc = draw(st.integers(0, num_shards - 1)), draw(sizes), draw(st.integers(0, 2**32 - 1))
    if draw(st.booleans()):
        spec = TensorSpec(draw(fixed_size), shape)
        return Entry(spec, shard, offset, spec.nbytes, crc)
    spec = TensorSpec(draw(st.sampled_from([DataType.string, DataType.variant])), shape)
    return Entry(spec, shard, offset, spec.num_elements + draw(sizes), crc)


names = st.binary(min_size=1, max_size=8)
indexes = st.dictionaries(names, entries(), max_size=40).map(lambda content: sorted(content.items()))


def table(items: Sequence[Item]) -> bytes:
    writer = TableWriter()
    for key, value in items:
        writer.add(key, value)
    return writer.finish()


def index_of(**fields: object) -> BundleIndex:
    """An index whose header has these fields."""
    header = tensor_bundle_pb2.BundleHeaderProto(**fields)
    return BundleIndex(table([(b"", header.SerializeToString())]), "dir/t.index")


def index_with(value: bytes) -> BundleIndex:
    """A one-shard index with one entry, ``t``."""
    return BundleIndex(table([(b"", HEADER), (b"t", value)]), "dir/t.index")


def message_of(entry: Entry) -> tensor_bundle_pb2.BundleEntryProto:
    message = tensor_bundle_pb2.BundleEntryProto(
        dtype=entry.spec.dtype, shard_id=entry.shard, offset=entry.offset, size=entry.nbytes, crc32c=entry.crc
    )
    message.shape.SetInParent()
    for size in entry.spec.shape:
        message.shape.dim.add(size=size)
    for part in entry.slices:
        slice_message = message.slices.add()
        for extent in part.extents:
            added = slice_message.extent.add()
            if extent is not None:
                added.start, added.length = extent
    return message


def specs(items: list[tuple[bytes, Entry]]) -> list[tuple[bytes, TensorSpec]]:
    return [(key, entry.spec) for key, entry in items]


def test_the_real_index() -> None:
    index = BundleIndex(REAL_INDEX, "t.index")
    assert (index.num_shards, index.big_endian) == (1, False)
    assert list(index.items()) == REAL_ENTRIES
    assert list(index.tensors()) == specs(REAL_ENTRIES)
    assert encode_index(1, REAL_ENTRIES) == REAL_INDEX
    assert index.get(b"a/w") == REAL_ENTRIES[1][1]
    assert index.get(b"a") is index.get(b"") is None


def test_tensors_are_listed_without_an_entry_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which take most of the time of listing 100,000."""
    monkeypatch.setattr("gpusaver.bundle.index.Entry", None)
    index = BundleIndex(REAL_INDEX, "t.index")
    assert list(index.tensors()) == specs(REAL_ENTRIES)
    with pytest.raises(TypeError):
        list(index.items())


def test_prefixes_and_damage_of_the_real_index() -> None:
    def parse(data: bytes) -> list[tuple[bytes, Entry]]:
        return list(BundleIndex(data, "t.index").items())

    check_every_prefix(parse, REAL_INDEX)
    assert check_damage(parse, REAL_INDEX) <= 2


@given(indexes)
def test_round_trip(items: list[tuple[bytes, Entry]]) -> None:
    data = encode_index(3, items)
    index = BundleIndex(data, "t.index")
    assert index.num_shards == 3
    assert list(index.items()) == items
    assert all(index.get(key) == entry for key, entry in items)


@given(indexes, st.integers(1, 10), st.integers(1, 20))
def test_other_block_sizes(items: list[tuple[bytes, Entry]], block_entries: int, restarts: int) -> None:
    raw = [(b"", b"\x08\x03"), *((key, encode_entry(entry)) for key, entry in items)]
    index = BundleIndex(split_table(raw, block_entries, restarts, snappy=[1]), "t.index")
    assert list(index.items()) == items
    assert list(index.tensors()) == specs(items)


@given(entries(), st.lists(st.none() | st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)), max_size=3))
def test_entries_are_written_as_the_messages_are(entry: Entry, extents: list[tuple[int, int] | None]) -> None:
    parts = (TensorSlice(tuple(extents)), TensorSlice(tuple(extents[::-1])))
    for written in (entry, entry._replace(slices=parts)):
        assert encode_entry(written) == message_of(written).SerializeToString(deterministic=True)


@given(entries())
def test_field_order_and_unknown_fields_do_not_matter(entry: Entry) -> None:
    one_by_one = [
        tensor_bundle_pb2.BundleEntryProto(**{field.name: value}).SerializeToString()
        for field, value in message_of(entry).ListFields()
    ]
    unknown = b"\xa2\x06\x03abc"
    for value in (b"".join(one_by_one[::-1]), unknown + b"".join(one_by_one), b"".join(one_by_one) + unknown):
        assert decode_entry(value, 3) == entry


def test_slice_keys_are_hidden_but_found() -> None:
    parts = (TensorSlice(((0, 4), None)), TensorSlice(((4, 2), (0, 2))))
    items = sorted(
        [
            (b"\0not a slice", REAL_ENTRIES[2][1]),
            (b"p", Entry(FLOATS, 0, 0, 0, 0, parts)),
            (slice_key(b"p", parts[0]), Entry(TensorSpec(DataType.float32, (4, 2)), 0, 0, 32, 1)),
            (slice_key(b"p", parts[1]), Entry(TensorSpec(DataType.float32, (2, 2)), 0, 32, 16, 2)),
        ]
    )
    index = BundleIndex(encode_index(1, items), "t.index")
    assert list(index.items()) == items
    assert [key for key, _ in index.tensors()] == [b"\0not a slice", b"p"]
    assert index.slice_keys() == {slice_key(b"p", part) for part in parts}
    assert index.get(slice_key(b"p", parts[1])) == dict(items)[slice_key(b"p", parts[1])]


def test_no_tensors() -> None:
    assert list(BundleIndex(encode_index(1, []), "t").items()) == []


@pytest.mark.parametrize("name", [b"", b"a"])
def test_names_given_twice_or_empty(name: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="Adding duplicate key"):
        encode_index(
            1, [(b"a", REAL_ENTRIES[0][1]), (name, REAL_ENTRIES[0][1])] if name else [(name, REAL_ENTRIES[0][1])]
        )


def test_a_table_of_another_kind() -> None:
    with pytest.raises(DataLossError, match=r"dir/t\.index: a table, but not the index of a checkpoint"):
        BundleIndex(table([(b"a", b"b")]), "dir/t.index")
    with pytest.raises(DataLossError, match="not a BundleHeaderProto"):
        BundleIndex(table([(b"", b"\xff")]), "dir/t.index")


@pytest.mark.parametrize("fields", [{}, {"num_shards": 0}, {"num_shards": -1}, {"num_shards": 1, "endianness": 2}])
def test_impossible_headers(fields: dict[str, int]) -> None:
    with pytest.raises(DataLossError, match="header with"):
        index_of(**fields)


def test_byte_order_and_versions() -> None:
    version = types_pb2.VersionDef
    assert index_of(num_shards=2, endianness=1).big_endian
    for accepted in (version(), version(producer=2), version(producer=1, min_consumer=1, bad_consumers=[0, 2])):
        assert index_of(num_shards=1, version=accepted).num_shards == 1
    for refused, message in [
        (version(min_consumer=2), "min consumer version 2 above current version 1"),
        (version(bad_consumers=[3, 1]), "disallows readers of version 1"),
        (version(producer=-1), "producer version -1"),
    ]:
        with pytest.raises(InvalidArgumentError, match=rf"dir/t\.index: .*{message}"):
            index_of(num_shards=1, version=refused)


GOOD = Entry(FLOATS, 0, 0, 48, 1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (GOOD._replace(nbytes=47), "47 bytes are stored, but float32[6, 2] needs 48"),
        (GOOD._replace(shard=1), "shard 1 of 1"),
        (GOOD._replace(spec=TensorSpec(DataType.string, (6, 9))), "48 bytes cannot hold string[6, 9]"),
        (GOOD._replace(spec=TensorSpec(DataType.variant, (49,))), "48 bytes cannot hold variant[49]"),
        (GOOD._replace(spec=TensorSpec(DataType.invalid, ())), "dtype number 0 is never stored"),
        (GOOD._replace(spec=TensorSpec(DataType.resource, ())), "dtype number 20 is never stored"),
        (GOOD._replace(spec=TensorSpec(DataType.float32, (2**32, 2**31))), "more than"),
        (GOOD._replace(spec=TensorSpec(DataType.float32, (1,) * 255)), "255 dimensions"),
        (GOOD._replace(slices=(TensorSlice(((0, 7), None)),)), "Extent in dimension 0 out of bounds"),
        (GOOD._replace(slices=(TensorSlice((None,)),)), "a slice has 1 dimensions, the tensor has 2"),
    ],
)
def test_entries_that_contradict_themselves(entry: Entry, message: str) -> None:
    index = index_with(encode_entry(entry))
    expected = r"dir/t\.index: index entry of t: .*" + re.escape(message)
    with pytest.raises(DataLossError, match=expected):
        index.get(b"t")
    with pytest.raises(DataLossError, match=expected):
        list(index.items())


def test_negative_numbers_and_unknown_shapes() -> None:
    for field in ("shard_id", "offset", "size"):
        message = message_of(GOOD)
        setattr(message, field, -1)
        with pytest.raises(DataLossError, match="-1"):
            index_with(message.SerializeToString()).get(b"t")
    message = message_of(GOOD)
    message.shape.unknown_rank = True
    with pytest.raises(DataLossError, match="not fully known"):
        index_with(message.SerializeToString()).get(b"t")
    message = message_of(GOOD)
    message.shape.dim[0].size = -1
    with pytest.raises(DataLossError, match="not fully known"):
        index_with(message.SerializeToString()).get(b"t")


@pytest.mark.parametrize("number", [101, 133, 1000, -1])
def test_dtypes_never_stored(number: int) -> None:
    message = message_of(GOOD)
    message.dtype = number
    with pytest.raises(DataLossError, match=f"dtype number {number} is never stored"):
        index_with(message.SerializeToString()).get(b"t")


def test_dtypes_of_the_future() -> None:
    message = message_of(GOOD)
    message.dtype = 34
    with pytest.raises(UnimplementedError, match="index entry of t: dtype number 34 is newer than this gpusaver"):
        index_with(message.SerializeToString()).get(b"t")


def test_no_strings_without_length_checksum() -> None:
    empty = Entry(TensorSpec(DataType.string, (0,)), 0, 0, 0, 1)
    assert decode_entry(encode_entry(empty), 1) == empty


@given(st.binary(max_size=60) | st.binary(max_size=30).map(lambda tail: b"\x08\x01\x12\x04" + tail))
def test_arbitrary_bytes(value: bytes) -> None:
    only_our_errors(lambda: decode_entry(value, 2))
    only_our_errors(lambda: BundleIndex(table([(b"", value)]), "t"))
    only_our_errors(lambda: list(index_with(value).tensors()))


@given(st.lists(st.tuples(st.integers(0, len(REAL_INDEX) - 1), st.integers(0, 255)), max_size=8))
def test_mangled_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(REAL_INDEX)
    for position, byte in changes:
        data[position] = byte
    only_our_errors(lambda: list(BundleIndex(data, "t").tensors()))
