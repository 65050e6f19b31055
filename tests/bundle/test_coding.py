"""Varints and slice keys."""

from __future__ import annotations

import pytest
from bundle_tools import only_our_errors
from bundle_tools import varint as slow_varint
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle.coding import (
    decode_slice_key,
    encode_slice_key,
    printable,
    read_varint32,
    read_varint64,
    varint,
)
from gpusaver.errors import DataLossError, InvalidArgumentError
from gpusaver.tensor import TensorSlice

# Specification, section 14.
SIGNED_NUMBERS = {
    0: "80",
    1: "81",
    63: "bf",
    64: "c040",
    100: "c064",
    8191: "dfff",
    8192: "e02000",
    10000: "e02710",
    2**20 - 1: "efffff",
    2**20: "f0100000",
    2**27: "f808000000",
    2**34: "fc0400000000",
    2**41: "fe020000000000",
    2**48: "ff01000000000000",
    2**55 - 1: "ff7fffffffffffff",
    2**55: "ff8080000000000000",
    2**60: "ff9000000000000000",
    -1: "7f",
    -64: "40",
    -65: "3fbf",
    -8192: "2000",
}

numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300)
# A length of -1 is how a whole dimension is written, so it cannot be a length.
extents = st.none() | st.tuples(numbers, numbers.filter(lambda length: length != -1))
slices = st.lists(extents, max_size=5).map(lambda items: TensorSlice(tuple(items)))
names = st.binary(max_size=12) | st.text("\0\1\xff", max_size=12).map(lambda text: text.encode("latin-1"))


@pytest.mark.parametrize("number", sorted({2**k + d for k in range(64) for d in (-1, 0, 1)} | {2**64 - 1}))
def test_varint(number: int) -> None:
    encoded = varint(number)
    assert encoded == slow_varint(number)
    assert read_varint64(b"?" + encoded + b"\x80", 1, len(encoded) + 1) == (number, len(encoded) + 1)
    for limit in range(len(encoded)):
        with pytest.raises(DataLossError, match="cut off"):
            read_varint64(encoded, 0, limit)
    if number < 2**32:
        assert read_varint32(encoded, 0, len(encoded))[0] == number
    else:
        with pytest.raises(DataLossError, match="32 bits"):
            read_varint32(encoded, 0, len(encoded))


def test_varint_beyond_64_bits() -> None:
    for encoded in (slow_varint(2**64), b"\x80" * 10 + b"\0", b"\xff" * 1000):
        with pytest.raises(DataLossError, match="64 bits"):
            read_varint64(encoded, 0, len(encoded))


def test_a_padded_varint_is_read() -> None:
    assert read_varint64(b"\x81\x80\x00", 0, 3) == (1, 3)


@pytest.mark.parametrize(("number", "encoded"), SIGNED_NUMBERS.items())
def test_signed_number_vectors(number: int, encoded: str) -> None:
    key = encode_slice_key(b"", TensorSlice(((number, 5),)))
    assert key == bytes.fromhex("00 0001 0101" + encoded + "85")
    assert decode_slice_key(key) == (b"", TensorSlice(((number, 5),)))


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        (b"p0", "4,3:0,3", "00 7030 0001 0102 8483 8083"),
        (b"name", "", "00 6e616d65 0001 00"),
        (b"t", "-:-", "00 74 0001 0102 807f 807f"),
        (b"\xff\x01\x00\x01", "-", "00 ff00 01 00ff 01 0001 0101 807f"),
    ],
)
def test_slice_key_vectors(name: bytes, text: str, key: str) -> None:
    assert encode_slice_key(name, TensorSlice.parse(text)) == bytes.fromhex(key)


@given(names, slices)
def test_slice_keys_round_trip(name: bytes, part: TensorSlice) -> None:
    assert decode_slice_key(encode_slice_key(name, part)) == (name, part)


@given(names, slices, names, slices)
def test_different_slices_have_different_keys(a: bytes, a_part: TensorSlice, b: bytes, b_part: TensorSlice) -> None:
    assert (encode_slice_key(a, a_part) == encode_slice_key(b, b_part)) == ((a, a_part) == (b, b_part))


@given(names, st.lists(numbers, min_size=2, max_size=2))
def test_keys_sort_like_what_they_stand_for(name: bytes, starts: list[int]) -> None:
    keys = [encode_slice_key(name, TensorSlice(((start, 1),))) for start in sorted(starts)]
    assert keys == sorted(keys)


@given(names, slices)
def test_slice_keys_cut_or_continued(name: bytes, part: TensorSlice) -> None:
    key = encode_slice_key(name, part)
    for other in [key[:nbytes] for nbytes in range(len(key))] + [key + b"\0"]:
        with pytest.raises(DataLossError):
            decode_slice_key(other)


@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda tail: b"\0p\0\1" + tail))
def test_arbitrary_keys(key: bytes) -> None:
    only_our_errors(lambda: decode_slice_key(key))


def test_numbers_beyond_64_bits_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="64 bits"):
        encode_slice_key(b"t", TensorSlice(((0, 2**63),)))


def test_printable() -> None:
    assert printable("größe".encode()) == "größe"
    assert printable(b"a\xffb") == "a\\xffb"
