"""The stored form of a string tensor (specification, section 4.3).

::

    varint64 length   x N        N elements, row-major
    fixed32                      "length checksum": masked CRC of the lengths
    bytes of element 0, 1, ...   no separators

The checksum of the tensor is not that of these bytes: it runs over the lengths as fixed 4-byte numbers (8 bytes
beyond 2^32 - 1), the length checksum as stored, and the bytes of the elements.  Zero elements are stored as the
length checksum alone.  In a big-endian bundle the fixed numbers are big-endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from gpusaver.bundle.coding import read_varint64, varint
from gpusaver.bundle.crc import crc32c, mask
from gpusaver.errors import DataLossError


def encode_strings(items: Sequence[bytes]) -> tuple[bytes, int]:
    """The stored bytes of a string tensor with these elements, and its (unmasked) checksum."""
    lengths = [len(item) for item in items]
    lengths_crc = _lengths_crc(lengths, "little")
    check = mask(lengths_crc).to_bytes(4, "little")
    body = b"".join(items)
    crc = crc32c(body, crc32c(check, lengths_crc))
    return b"".join([*map(varint, lengths), check, body]), crc


def decode_strings(
    data: bytes | bytearray | memoryview, count: int, name: str, expected_crc: int | None, *, big_endian: bool = False
) -> list[bytes]:
    """The ``count`` elements stored in ``data``.

    ``name`` is the tensor's, for messages; ``expected_crc`` the unmasked checksum it should have (None: unknown).
    Raises DataLossError if anything does not add up.  Time and memory are bounded by the size of ``data``.
    """
    data = bytes(data)
    lengths: list[int] = []
    position = crc = 0
    # Nothing at all is accepted for no elements, although TensorFlow writes a length checksum even then.
    if data or count:
        byte_order: Literal["little", "big"] = "big" if big_endian else "little"
        lengths, check_position = _read_lengths(data, count, name)
        lengths_crc = _lengths_crc(lengths, byte_order)
        position = check_position + 4
        check = data[check_position:position]
        expected_check = mask(lengths_crc).to_bytes(4, byte_order)
        if check != expected_check:
            raise DataLossError(
                f"tensor {name}: the checksum of the lengths of its {count} strings is {check.hex()}, expected "
                f"{expected_check.hex()}; the data file is damaged"
            )
        crc = crc32c(memoryview(data)[position:], crc32c(check, lengths_crc))
    if sum(lengths) != len(data) - position:
        raise DataLossError(
            f"tensor {name}: its strings should take {sum(lengths)} bytes, stored are {len(data) - position}"
        )
    if expected_crc is not None and crc != expected_crc:
        raise DataLossError(
            f"tensor {name}: checksum {crc:08x} of its strings, expected {expected_crc:08x}; the data file is damaged"
        )
    items = []
    for length in lengths:
        items.append(data[position : position + length])
        position += length
    return items


def _read_lengths(data: bytes, count: int, name: str) -> tuple[list[int], int]:
    limit = len(data) - 4
    if count > limit:
        raise DataLossError(f"tensor {name}: {len(data)} bytes cannot hold {count} strings")
    lengths = []
    position = 0
    try:
        for _ in range(count):
            length = data[position] if position < limit else 128
            position += 1
            if length > 127:
                length, position = read_varint64(data, position - 1, limit)
            lengths.append(length)
    except DataLossError as error:
        raise DataLossError(f"tensor {name}: length of string {len(lengths)}: {error}") from error
    return lengths, position


def _lengths_crc(lengths: Sequence[int], byte_order: Literal["little", "big"]) -> int:
    if max(lengths, default=0) <= 0xFFFFFFFF:
        return crc32c(np.array(lengths, dtype="<u4" if byte_order == "little" else ">u4"))
    return crc32c(b"".join([n.to_bytes(4 if n <= 0xFFFFFFFF else 8, byte_order) for n in lengths]))


def variants_crc(data: bytes | bytearray | memoryview, count: int, name: str) -> int:
    """The checksum of ``count`` stored variants, whose values gpusaver does not read (specification, section 4.4).

    Raises DataLossError if an element's own checksum is wrong or the elements do not fill ``data``.
    """
    data = bytes(data)
    crc = position = 0
    for number in range(count):
        try:
            nbytes, start = read_varint64(data, position, len(data))
        except DataLossError as error:
            raise DataLossError(f"tensor {name}: length of variant {number}: {error}") from error
        position = start + nbytes + 4
        if position > len(data):
            raise DataLossError(f"tensor {name}: variant {number} reaches beyond its {len(data)} bytes")
        crc = crc32c(memoryview(data)[start : start + nbytes], crc32c(nbytes.to_bytes(8, "little"), crc))
        check = data[start + nbytes : position]
        if check != mask(crc).to_bytes(4, "little"):
            raise DataLossError(f"tensor {name}: variant {number} is damaged: its checksum is wrong")
        crc = crc32c(check, crc)
    if position != len(data):
        raise DataLossError(f"tensor {name}: {count} variants take {position} bytes, stored are {len(data)}")
    return crc
