"""String tensors: stored form, running checksum, damage."""

from __future__ import annotations

import struct

import pytest
from bundle_tools import check_damage, check_every_prefix, only_our_errors, varint
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle.crc import crc32c, mask
from gpusaver.bundle.strings import decode_strings, encode_strings, variants_crc
from gpusaver.errors import DataLossError

# Specification, section 14: elements, stored bytes, masked checksum.
VECTORS = [
    ([], "d8ea82a2", 0x640CC1F6),
    ([b""], "00a67b113a", 0xBE0767BD),
    ([b"", b"ab"], "0002775199c46162", 0x8130DDA5),
]

string_lists = st.lists(st.binary(max_size=20) | st.binary(min_size=126, max_size=129), max_size=20)


@pytest.mark.parametrize(("items", "stored", "crc"), VECTORS)
def test_vectors(items: list[bytes], stored: str, crc: int) -> None:
    data, actual = encode_strings(items)
    assert (data.hex(), mask(actual)) == (stored, crc)
    assert decode_strings(data, len(items), "t", actual) == items


@given(string_lists)
def test_round_trip(items: list[bytes]) -> None:
    data, crc = encode_strings(items)
    assert decode_strings(data, len(items), "t", crc) == items
    assert decode_strings(memoryview(data), len(items), "t", None) == items
    for count in (len(items) - 1, len(items) + 1):
        with pytest.raises(DataLossError, match="tensor t"):
            decode_strings(data, max(count, 0) if items else 1, "t", crc)


@given(string_lists)
def test_big_endian(items: list[bytes]) -> None:
    lengths = b"".join(struct.pack(">I", len(item)) for item in items)
    check = struct.pack(">I", mask(crc32c(lengths)))
    data = b"".join(varint(len(item)) for item in items) + check + b"".join(items)
    crc = crc32c(lengths + check + b"".join(items))
    assert decode_strings(data, len(items), "t", crc, big_endian=True) == items
    if any(items):
        with pytest.raises(DataLossError, match="checksum of the lengths"):
            decode_strings(data, len(items), "t", crc)


def test_prefixes_and_damage() -> None:
    items = [b"", b"one", b"x" * 130, b"\0\xff"]
    data, crc = encode_strings(items)

    def parse(stored: bytes) -> list[bytes]:
        return decode_strings(stored, len(items), "t", crc)

    check_every_prefix(parse, data)
    assert check_damage(parse, data) == 0


def test_nothing_stands_for_no_elements() -> None:
    assert decode_strings(b"", 0, "t", 0) == []


def test_errors_name_the_tensor() -> None:
    data, crc = encode_strings([b"abc"])
    with pytest.raises(DataLossError, match=f"tensor some/name: checksum {crc:08x} of its strings, expected 00000001"):
        decode_strings(data, 1, "some/name", 1)
    with pytest.raises(DataLossError, match="tensor some/name: 8 bytes cannot hold 5 strings"):
        decode_strings(data, 5, "some/name", crc)


def test_absurd_lengths_cost_nothing() -> None:
    data = varint(2**63) * 2 + bytes(4)
    with pytest.raises(DataLossError):
        decode_strings(data, 2, "t", None)
    lengths = b"".join(struct.pack("<Q", 2**63) for _ in range(2))
    data = varint(2**63) * 2 + struct.pack("<I", mask(crc32c(lengths)))
    with pytest.raises(DataLossError, match=str(2**64)):
        decode_strings(data, 2, "t", None)


@given(st.binary(max_size=60), st.integers(0, 70), st.booleans())
def test_arbitrary_bytes(data: bytes, count: int, big_endian: bool) -> None:
    only_our_errors(lambda: decode_strings(data, count, "t", None, big_endian=big_endian))
    only_our_errors(lambda: variants_crc(data, count, "t"))
