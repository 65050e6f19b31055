"""The sorted table: written as TensorFlow writes it, read whatever its shape, never believed."""

from __future__ import annotations

import itertools
import struct
import sys
import tracemalloc

import numpy as np
import pytest
from bundle_tools import (
    Item,
    build_block,
    build_table,
    check_damage,
    check_every_prefix,
    only_our_errors,
    split_table,
    varint,
)
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle import table_reader
from gpusaver.bundle.crc import crc32c, mask
from gpusaver.bundle.table_reader import Table
from gpusaver.bundle.table_runs import read_runs
from gpusaver.bundle.table_writer import TableWriter
from gpusaver.errors import DataLossError, InternalError, InvalidArgumentError, UnimplementedError

keys = (
    st.binary(max_size=6)
    | st.text("ab", max_size=8).map(str.encode)
    | st.text("\xfe\xff").map(lambda text: text.encode("latin-1"))
)
tables = st.dictionaries(keys, st.binary(max_size=10) | st.binary(min_size=120, max_size=140), max_size=60).map(
    lambda content: sorted(content.items())
)


def written(items: list[Item], **options: int) -> bytes:
    writer = TableWriter(**options)
    for key, value in items:
        writer.add(key, value)
    return writer.finish()


def read(data: bytes) -> list[Item]:
    return list(Table(data, "t.index").items())


def some_items(count: int) -> list[Item]:
    return [(b"layer/%05d/w" % number, b"%d" % number) for number in range(count)]


@given(tables, st.integers(1, 400), st.integers(1, 40), st.integers(1, 5))
def test_round_trip(items: list[Item], block_nbytes: int, restarts: int, index_restarts: int) -> None:
    data = written(items, block_nbytes=block_nbytes, restart_interval=restarts, index_restart_interval=index_restarts)
    table = Table(data, "t.index")
    assert list(table.items()) == items
    assert all(table.get(key) == value for key, value in items)


@given(tables, keys)
def test_get_without_items_before(items: list[Item], key: bytes) -> None:
    assert Table(written(items, block_nbytes=50), "t.index").get(key) == dict(items).get(key)


@given(tables.filter(bool), st.integers(1, 20), st.integers(1, 40), st.integers(1, 5), st.sets(st.integers(0, 60)))
def test_reads_what_others_write(
    items: list[Item], block_entries: int, restarts: int, index_restarts: int, snappy: set[int]
) -> None:
    data = split_table(items, block_entries, restarts, index_restart_interval=index_restarts, snappy=sorted(snappy))
    table = Table(data, "t.index")
    assert table.block_count == -(-len(items) // block_entries)
    assert [table.get(key) for key, _ in items] == [value for _, value in items]
    assert list(table.items()) == items


@given(tables, st.integers(1, 40))
def test_agrees_with_an_independent_writer(items: list[Item], restarts: int) -> None:
    # One block: its separator is the last key, shortened.
    data = written(items, restart_interval=restarts)
    last = items[-1][0] if items else b""
    stem = last.lstrip(b"\xff")
    separator = last[: len(last) - len(stem)] + bytes((stem[0] + 1,)) if stem else last
    assert data == build_table([(separator, build_block(items, restarts))] if items else [])


def test_restarts_are_stored_whole() -> None:
    block = written(some_items(40))
    assert [block.count(b"layer/%05d/w" % number) for number in (0, 1, 15, 16, 17, 32)] == [1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("last", "following", "separator"),
    [
        (b"abc", b"abz", b"abd"),
        (b"abc", b"abd", b"abc"),
        (b"ab", b"abc", b"ab"),
        (b"a\xff", b"b", b"a\xff"),
        (b"a\xfe", b"c", b"b"),
        (b"ac", b"b", b"ac"),
    ],
)
def test_separators_between_blocks(last: bytes, following: bytes, separator: bytes) -> None:
    items = [(last, b"x" * 20), (following, b"y" * 20)]
    blocks = [(separator, build_block(items[:1])), (bytes((following[0] + 1,)), build_block(items[1:]))]
    assert written(items, block_nbytes=20) == build_table(blocks)


def test_a_value_of_two_blocks_size_starts_a_block() -> None:
    items = [(b"a", b"1"), (b"b", b"2" * 199), (b"c", b"3")]
    data = written(items, block_nbytes=100)
    assert Table(data, "t").block_count == 3
    assert Table(written(items, block_nbytes=101), "t").block_count == 2
    assert read(data) == items


def test_keys_must_ascend() -> None:
    writer = TableWriter()
    writer.add(b"b", b"")
    with pytest.raises(InvalidArgumentError, match="Adding duplicate key: b"):
        writer.add(b"b", b"")
    with pytest.raises(InternalError, match="'a' was added after 'b'"):
        writer.add(b"a", b"")


@pytest.mark.parametrize("options", [{}, {"block_nbytes": 40}, {"restart_interval": 2}])
def test_prefixes_and_damage(options: dict[str, int]) -> None:
    data = written(some_items(9), **options)
    check_every_prefix(read, data)
    # A flipped bit can lengthen a footer's varint by a zero; nothing else may pass.
    assert check_damage(read, data) <= 2


def test_damage_in_a_snappy_block() -> None:
    data = split_table(some_items(8), 4, snappy=[1])
    check_every_prefix(read, data)
    assert check_damage(read, data) <= 2


def test_damage_is_found_by_get_too_and_only_where_it_is() -> None:
    items = some_items(100)
    data = bytearray(written(items, block_nbytes=200))
    data[data.index(b"layer/00000") + 6] ^= 1
    table = Table(data, "dir/t.index")
    assert table.get(items[99][0]) == items[99][1]
    with pytest.raises(DataLossError, match=r"dir/t\.index: block at 0: checksum [0-9a-f]{8}, expected [0-9a-f]{8}"):
        table.get(items[0][0])


def test_other_files() -> None:
    with pytest.raises(DataLossError, match="too short"):
        Table(b"", "x")
    with pytest.raises(DataLossError, match="bad magic number"):
        Table(bytes(100), "x")


def test_missing_snappy_library(monkeypatch: pytest.MonkeyPatch) -> None:
    data = split_table(some_items(4), 4, snappy=[0])
    monkeypatch.setitem(sys.modules, "cramjam", None)
    with pytest.raises(UnimplementedError, match="pip install 'gpusaver"):
        read(data)


def plain_block(entries: bytes, *restarts: int) -> bytes:
    return entries + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


entry = b"\0\1\1av"  # key "a", value "v"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (b"", "do not hold 0 restarts"),
        (b"\0\0\0\0", "do not hold 0 restarts"),
        (plain_block(entry), "do not hold 0 restarts"),
        (entry + b"\0\0\0\0\xff\xff\xff\xff", "do not hold 4294967295 restarts"),
        (plain_block(entry, 1), "restarts lie outside"),
        (plain_block(entry, 0, 5), "restarts lie outside"),
        (plain_block(entry * 2, 0, 5), "key 'a' follows 'a'"),
        (plain_block(entry + b"\0\1\0b" + b"\0\1\0c", 0, 9, 5), "do not ascend"),
        (plain_block(entry + b"\1\0\0", 0), "key 'a' follows 'a'"),
        (plain_block(entry + b"\0\1\0" + b"A", 0), "key 'A' follows 'a'"),
        (plain_block(b"\1\1\1av", 0), "beyond its key"),
        (plain_block(b"\0\1\2av", 0), "beyond its key or its block"),
        (plain_block(entry + b"\1\1\0b", 0, 5), "beyond its key"),
        (plain_block(entry + b"\0\1\0b", 0, 4), "beyond its key or its block"),
        (plain_block(entry + b"\0\1", 0), "cut off"),
        (plain_block(b"\0\xff\xff\xff\xff\x0f\0a", 0), "beyond its key or its block"),
        (plain_block(b"\0\xff\xff\xff\xff\x1f\0a", 0), "does not fit 32 bits"),
        (plain_block(b"\0\1\0z", 0), "above 'm'"),
    ],
)
def test_malformed_blocks_with_a_right_checksum(block: bytes, message: str) -> None:
    with pytest.raises(DataLossError, match=f"t.index: block at 0.*{message}"):
        read(build_table([(b"m", block)]))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([(b"a", b"\0\x0d"), (b"b", b"\0")], "cut off"),
        ([(b"a", varint(2**40) + b"\x05")], "beyond the end"),
        ([(b"a", b"\0" + varint(2**64 - 1))], "beyond the end"),
        ([(b"a", b"")], "cut off"),
        # Both separators lead to the same block, whose key cannot be in both ranges.
        ([(b"m", b"\0\x0d"), (b"n", b"\0\x0d")], "the block at 0 begins before 13"),
    ],
)
def test_malformed_index_blocks(index: list[Item], message: str) -> None:
    with pytest.raises(DataLossError, match=f"t.index: .*{message}"):
        read(build_table([(b"m", plain_block(entry, 0))], index=build_block(index)))


def test_bytes_after_a_handle_are_ignored() -> None:
    index = build_block([(b"m", b"\0\x0d and more")])
    assert read(build_table([(b"m", plain_block(entry, 0))], index=index)) == [(b"a", b"v")]


def test_unknown_block_type() -> None:
    data = build_table([(b"m", plain_block(entry, 0))])
    block = plain_block(entry, 0)
    odd = block + b"\2" + mask(crc32c(block + b"\2")).to_bytes(4, "little")
    with pytest.raises(DataLossError, match="block at 0 has unknown type 2"):
        read(odd + data[len(odd) :])


def compressed_table(stored: bytes) -> bytes:
    """A table whose only data block is marked as Snappy and holds these bytes."""
    plain = build_table([(b"m", stored)])
    trailer = b"\1" + mask(crc32c(stored + b"\1")).to_bytes(4, "little")
    return stored + trailer + plain[len(stored) + 5 :]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"", "cut off"),
        (varint(2**31) + bytes(100), "cannot stand for"),
        (varint(2200) + bytes(100), "cannot stand for"),
        (varint(100) + bytes(100), "Snappy block"),
        (varint(5) + b"\x10abcde"[:4], "Snappy block"),
    ],
)
def test_malformed_snappy(stored: bytes, message: str) -> None:
    with pytest.raises(DataLossError, match=message):
        read(compressed_table(stored))


def test_keys_that_expand_without_end() -> None:
    long = b"\0" + varint(40_000) + b"\0" + b"k" * 40_000
    steps = b"".join(varint(40_000 + step) + b"\1\0k" for step in range(10_000))
    table = build_table([(b"l", plain_block(long + steps, 0))])
    with pytest.raises(DataLossError, match="too long to be true"):
        read(table)


def test_long_keys_with_long_shared_prefixes_are_fine() -> None:
    items = [(b"k" * 17_000 + b"%03d" % number, b"v") for number in range(60)]
    assert read(written(items)) == items
    assert read(written(items, restart_interval=1000)) == items


@given(st.binary(max_size=120), st.binary(max_size=20))
def test_arbitrary_bytes(data: bytes, key: bytes) -> None:
    only_our_errors(lambda: read(data))
    only_our_errors(lambda: read(data.ljust(48, b"\0") + bytes.fromhex("57fb808b247547db")))
    only_our_errors(lambda: Table(build_table([(b"m", data)]), "t").get(key))
    only_our_errors(lambda: read(build_table([(b"m", data)])))
    only_our_errors(lambda: read(build_table([(b"m", build_block([(key, b"")]))], index=data)))
    only_our_errors(lambda: read(compressed_table(data)))


def content(data: bytes, min_runs: int) -> list[Item] | str:
    """What is in a table whose blocks are read side by side from so many runs on, or what is wrong with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_reader, "_MIN_RUNS", min_runs)
        try:
            return read(data)
        except DataLossError as error:
            return str(error)


@given(
    tables,
    st.integers(1, 20),
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=3),
)
def test_side_by_side_is_as_one_after_the_other(
    items: list[Item], restarts: int, block_entries: int, changes: list[tuple[int, int]]
) -> None:
    """Also where the bytes are wrong under a right checksum."""
    blocks = []
    for start in range(0, len(items), block_entries):
        part = items[start : start + block_entries]
        block = bytearray(build_block(part, restarts))
        for place, octet in changes:
            if place < len(block):
                block[place] = octet
        blocks.append((part[-1][0], bytes(block)))
    data = build_table(blocks)
    assert content(data, min_runs=1) == content(data, min_runs=sys.maxsize)


@given(tables, st.integers(1, 20), st.integers(1, 30), st.data())
def test_many_keys_are_found_at_once(items: list[Item], restarts: int, block_entries: int, data: st.DataObject) -> None:
    """Some may be left out: what other writers may write."""
    blocks = [items[start : start + block_entries] for start in range(0, len(items), block_entries)]
    table = Table(build_table([(part[-1][0], build_block(part, restarts)) for part in blocks]), "t.index")
    wanted = data.draw(st.lists(keys | st.sampled_from(items or [(b"", b"")]).map(lambda item: item[0]), max_size=40))
    found, octets, starts, ends = table.find(wanted)
    values = [octets[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    expected = sorted(item for item in items if item[0] in wanted)
    is_usual = all(len(value) < 128 for _, value in items)
    assert list(zip(found, values, strict=True)) == (
        expected if is_usual else [item for item in expected if item[0] in found]
    )


@given(st.binary(max_size=200), st.lists(keys, max_size=20))
def test_keys_in_arbitrary_bytes(octets: bytes, wanted: list[bytes]) -> None:
    block = build_block([(key, b"x" * len(key)) for key in sorted(set(wanted))], 4)
    for data in (octets, block[:20] + octets + block[20:], octets + block[-12:]):
        only_our_errors(lambda data=data: Table(build_table([(b"\xff" * 9, data)]), "t").find(wanted))


def test_keys_of_a_large_table_are_found_without_decoding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    items = some_items(20_000)
    table = Table(written(items, block_nbytes=40_000, index_restart_interval=64), "t.index")
    monkeypatch.setattr(table_reader._Block, "_read", None)
    few = [key for key, _ in items[::500]]  # of a block two or three
    many = [key for key, _ in items[7:9000]]  # more than are looked up at a time
    for wanted in (few, many, few + many, [b"layer/00001/v", b"layer/00001/w", b"layer/00001/x"], [b"a", b"z"], []):
        found, _, starts, ends = table.find(reversed(wanted))
        assert found == sorted({*wanted} & {key for key, _ in items})
        assert len(found) == len(starts) == len(ends)


@pytest.mark.parametrize("place", [0, 3, 200])
def test_an_unusual_entry_hides_only_what_follows_in_its_run(place: int) -> None:
    items = some_items(500)
    items[place] = (items[place][0], bytes(300))
    table = Table(build_table([(items[-1][0], build_block(items, 16))]), "t.index")
    found, data, starts, ends = table.find(key for key, _ in items)
    values = [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    hidden = slice(place, place // 16 * 16 + 16)
    assert list(zip(found, values, strict=True)) == items[: hidden.start] + items[hidden.stop :]
    assert read(written(items)) == items


def test_keys_that_end_in_zeros_are_told_apart() -> None:
    items = [(b"k%02d" % number + bytes(zeros), b"%d" % zeros) for number in range(50) for zeros in range(3)]
    for restarts in (1, 2, 3, 16):
        table = Table(build_table([(items[-1][0], build_block(items, restarts))]), "t.index")
        found, *_ = table.find(key for key, _ in items)
        assert found == [key for key, _ in items]
        assert list(table.items()) == items


def test_one_long_run_among_many_short_ones_takes_no_memory_for_all() -> None:
    """Which nobody writes: steps have a place for each run."""
    keys = [b"%05d" % number for number in range(8000)]
    whole = [build_block([(key, b"")])[:-8] for key in keys]  # an entry without its restart array
    long = b"".join(b"\5\1\0" + bytes([65 + number]) for number in range(60))  # each shares five octets, and adds one
    starts = list(itertools.accumulate(map(len, whole[:-1]), initial=0))
    block = b"".join(whole) + long + b"".join(start.to_bytes(4, "little") for start in [*starts, len(starts)])
    data = build_table([(b"99999", block)])
    tracemalloc.start()
    found = list(Table(data, "t.index").items())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 8060
    assert peak < 50 * len(data)


@pytest.mark.parametrize("restarts", [1, 16, 64])
def test_large_blocks_are_read_side_by_side(monkeypatch: pytest.MonkeyPatch, restarts: int) -> None:
    items = some_items(5000)
    table = Table(written(items, block_nbytes=40_000, restart_interval=restarts, index_restart_interval=64), "t.index")
    monkeypatch.setattr(table_reader._Block, "_read", None)
    assert list(table.items()) == items


@pytest.mark.parametrize("nbytes", [128, 300, 2000])
def test_a_long_value_leaves_other_runs_to_be_read_side_by_side(nbytes: int) -> None:
    lengths = bytes((0, 3, nbytes & 127 | 128, nbytes >> 7))
    entries = [b"\0\3\2abc\x08\x01"] * 100 + [lengths + b"abc" + bytes(nbytes)]
    stops = np.cumsum(np.fromiter(map(len, entries), np.int64))
    starts = np.concatenate(([0], stops[:-1]))
    found = read_runs(b"".join(entries), starts, stops, allowance=1 << 20)
    assert found is not None
    assert (found.is_usual.tolist(), len(found.keys)) == ([True] * 100 + [False], 1)
