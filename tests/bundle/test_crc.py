"""CRC-32C: vectors of the specification, and combining checksums without the bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle.crc import combine, crc32c, mask, unmask

VECTORS = [
    (b"", 0x00000000, 0xA282EAD8),
    (b"a", 0xC1D04330, 0x28E46E78),
    (b"123456789", 0xE3069283, 0xC78AB0E5),
    (bytes(32), 0x8A9136AA, 0x0FD7FFFA),
    (b"\xff" * 32, 0x62A8AB43, 0xF909B029),
    (bytes(range(32)), 0x46DD794E, 0x951F7892),
]


@pytest.mark.parametrize(("data", "crc", "masked"), VECTORS)
def test_vectors(data: bytes, crc: int, masked: int) -> None:
    assert (crc32c(data), mask(crc), unmask(masked)) == (crc, masked, crc)


@given(st.integers(0, 2**32 - 1))
def test_unmask_inverts_mask(crc: int) -> None:
    assert unmask(mask(crc)) == crc
    assert mask(crc) != crc


def test_takes_any_contiguous_buffer() -> None:
    data = bytes(range(24))
    array = np.frombuffer(data, np.float64)
    for buffer in (data, bytearray(data), memoryview(data), array, memoryview(array), array.reshape(3, 1)):
        assert crc32c(buffer) == crc32c(data)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_continues_and_combines(first: bytes, second: bytes) -> None:
    whole = crc32c(first + second)
    assert crc32c(second, crc32c(first)) == whole
    assert combine(crc32c(first), crc32c(second), len(second)) == whole


@given(st.binary(max_size=64), st.integers(0, 1 << 20))
def test_combines_long_runs(first: bytes, zeros: int) -> None:
    assert combine(crc32c(first), crc32c(bytes(zeros)), zeros) == crc32c(bytes(zeros), crc32c(first))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**61), st.integers(0, 2**61))
def test_lengths_add_up_beyond_what_fits_memory(crc: int, one: int, other: int) -> None:
    assert combine(combine(crc, 0, one), 0, other) == combine(crc, 0, one + other)


@given(*[st.integers(0, 2**32 - 1)] * 3, st.integers(0, 2**50), st.integers(0, 2**50))
def test_is_associative(a: int, b: int, c: int, b_nbytes: int, c_nbytes: int) -> None:
    assert combine(combine(a, b, b_nbytes), c, c_nbytes) == combine(a, combine(b, c, c_nbytes), b_nbytes + c_nbytes)
