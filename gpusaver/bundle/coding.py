"""The small encodings inside a table: varints, and the keys under which parts of tensors are stored.

A varint is the base-128 number of protocol buffers, least significant group first.  A slice key (specification,
section 6.3) is written in an order-preserving code::

    Num(0)  Str(name)  Num(rank)  { Snum(start)  Snum(length) } per dimension; a whole dimension is start 0, length -1

    Num(n)   one byte L, then n in L bytes, big-endian            0 = 00    256 = 02 01 00
    Str(s)   00 -> 00 ff, ff -> ff 00, then 00 01                 p0 = 70 30 00 01
    Snum(v)  n bytes of two's complement, the first n bits inverted by a header     4 = 84    100 = c0 64    -1 = 7f
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from gpusaver.errors import DataLossError, InvalidArgumentError
from gpusaver.tensor import TensorSlice

_UNESCAPED = re.compile(rb"[\x00\xff]")
_ESCAPED = re.compile(rb"\x00\xff|\xff\x00")
_SLICE_KEY_NAME = re.compile(rb"\x00((?:[^\x00\xff]++|\x00\xff|\xff\x00)*+)\x00\x01")
_HEADERS = [b""] + [((0xFFFF << (16 - n)) & 0xFFFF).to_bytes(2, "big") for n in range(1, 11)]
_ONE_BYTE = [bytes((n,)) for n in range(128)]


#: Tensors that are cut alike have the same slices: one for each of some thousand ranks, in each tensor.
CACHED_SLICES = 1 << 14
_MAX_CACHED_RANK = 8

#: Longer names are shown by their beginning.
_SHOWN_NBYTES = 240


def printable(name: bytes) -> str:
    """A key or name as it appears in messages: bytes that are not UTF-8 as ``\\xff``."""
    if len(name) > _SHOWN_NBYTES:
        return f"{name[: _SHOWN_NBYTES - 40].decode('utf-8', 'backslashreplace')}... ({len(name)} bytes)"
    return name.decode("utf-8", "backslashreplace")


def varint(number: int) -> bytes:
    """Encodes a number from 0 to 2^64 - 1."""
    if number < 1 << 7:
        return _ONE_BYTE[number]
    if number < 1 << 14:
        return (number & 127 | 128 | number << 1 & 127 << 8).to_bytes(2, "little")
    # An index holds tens of thousands of offsets and sizes: a loop over their groups of seven bits would show.
    spread = number & 127 | number << 1 & 127 << 8 | number << 2 & 127 << 16 | number << 3 & 127 << 24
    if number < 1 << 21:
        return (spread | 0x8080).to_bytes(3, "little")
    if number < 1 << 28:
        return (spread | 0x808080).to_bytes(4, "little")
    return (spread | 0x80808080).to_bytes(4, "little") + varint(number >> 28)


def rows_at(octets: npt.NDArray[np.uint8], places: npt.NDArray[np.int64], nbytes: int) -> npt.NDArray[np.uint8]:
    """The octets from each place on, as rows; zeros for what lies behind the end.  A seventh of the time of indices."""
    if len(octets) < int(places.max(initial=0)) + nbytes:
        octets = np.concatenate((octets, np.zeros(nbytes, np.uint8)))
    windows = np.ndarray(len(octets) - nbytes + 1, f"V{nbytes}", octets.data, 0, (1,))
    return windows[places].view(np.uint8).reshape(*places.shape, nbytes)


def texts_at(
    octets: npt.NDArray[np.uint8], places: npt.NDArray[np.int64], nbytes: npt.NDArray[Any]
) -> npt.NDArray[np.bytes_]:
    """So many octets from each place on, one-dimensional; those that are shorter than others end in zeros."""
    longest = max(1, int(nbytes.max(initial=0)))
    letters = rows_at(octets, places, longest)
    letters &= octet_masks(longest).take(nbytes, axis=0)
    return letters.view(f"S{longest}")[..., 0]


def octet_masks(longest: int) -> npt.NDArray[np.uint8]:
    """Row ``n`` keeps the first ``n`` octets of so many."""
    return -np.tri(longest + 1, longest, -1, np.uint8)


def field(tag: bytes, content: bytes) -> bytes:
    """A field of a message whose content has a length: a string, bytes or a message."""
    nbytes = len(content)
    return tag + (_ONE_BYTE[nbytes] if nbytes < 128 else varint(nbytes)) + content


def read_varint32(data: bytes, position: int, limit: int) -> tuple[int, int]:
    """Decodes the varint at ``position``: ``(number, position after it)``.

    Raises DataLossError if it reaches ``limit`` (at most ``len(data)``) or does not fit 32 bits.
    """
    return _read_varint(data, position, limit, 32)


def read_varint64(data: bytes, position: int, limit: int) -> tuple[int, int]:
    """Like :func:`read_varint32`, for numbers of up to 64 bits."""
    return _read_varint(data, position, limit, 64)


def _read_varint(data: bytes, position: int, limit: int, bits: int) -> tuple[int, int]:
    number = shift = 0
    for at in range(position, limit):
        byte = data[at]
        number |= (byte & 127) << shift
        if byte < 128:
            if number >> bits:
                break
            return number, at + 1
        shift += 7
        if shift >= bits:
            break
    else:
        raise DataLossError(f"varint at byte {position} is cut off at byte {limit}")
    raise DataLossError(f"varint at byte {position} does not fit {bits} bits")


def encode_slice_key(name: bytes, part: TensorSlice) -> bytes:
    """The key of the entry that holds this part of the tensor ``name``."""
    escaped = _UNESCAPED.sub(lambda match: b"\x00\xff" if match[0] == b"\x00" else b"\xff\x00", name)
    # The cache must not keep what a hostile file was made of.
    extents = _extents if len(part.extents) <= _MAX_CACHED_RANK else _extents.__wrapped__
    return b"\x00" + escaped + b"\x00\x01" + extents(part)


@functools.lru_cache(maxsize=CACHED_SLICES)
def _extents(part: TensorSlice) -> bytes:
    pieces = [_number(len(part.extents))]
    for extent in part.extents:
        start, length = (0, -1) if extent is None else extent
        pieces.append(_signed(start))
        pieces.append(_signed(length))
    return b"".join(pieces)


def decode_slice_key(key: bytes) -> tuple[bytes, TensorSlice]:
    """The name and the part that :func:`encode_slice_key` was given.  Raises DataLossError for any other key."""
    match = _SLICE_KEY_NAME.match(key)
    if match is None:
        raise DataLossError(f"{printable(key)!r} is not a slice key: no zero byte and complete name at its start")
    name = _ESCAPED.sub(lambda escape: escape[0][:1], match[1])
    position = match.end()
    rank_nbytes = key[position] if position < len(key) else 9
    position += 1
    rank = int.from_bytes(key[position : position + rank_nbytes], "big")
    position += rank_nbytes
    if rank_nbytes > 8 or rank > (len(key) - position) // 2:
        raise DataLossError(f"slice key {printable(key)!r} ends before its extents")
    extents: list[tuple[int, int] | None] = []
    for _ in range(rank):
        start, position = _read_signed(key, position)
        length, position = _read_signed(key, position)
        extents.append(None if length == -1 else (start, length))
    part = TensorSlice(tuple(extents))
    if encode_slice_key(name, part) != key:
        raise DataLossError(f"slice key {printable(key)!r} is not in the one form it can have")
    return name, part


def _number(number: int) -> bytes:
    digits = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return bytes((len(digits),)) + digits


def _signed(number: int) -> bytes:
    if not -(2**63) <= number < 2**63:
        raise InvalidArgumentError(f"{number} in a slice does not fit 64 bits")
    nbytes = (number if number >= 0 else ~number).bit_length() // 7 + 1
    digits = bytearray(number.to_bytes(nbytes, "big", signed=True))
    for position, header in enumerate(_HEADERS[nbytes][:nbytes]):
        digits[position] ^= header
    return bytes(digits)


def _read_signed(key: bytes, position: int) -> tuple[int, int]:
    head = int.from_bytes(key[position : position + 2].ljust(2, b"\x00"), "big")
    ones = head if head >= 0x8000 else head ^ 0xFFFF
    nbytes = 16 - (ones ^ 0xFFFF).bit_length()
    digits = bytearray(key[position : position + nbytes])
    if nbytes > 10 or len(digits) < nbytes:
        raise DataLossError(f"slice key {printable(key)!r} has no number at byte {position}")
    for index, header in enumerate(_HEADERS[nbytes][:nbytes]):
        digits[index] ^= header
    return int.from_bytes(digits, "big", signed=True), position + nbytes
