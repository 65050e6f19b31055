"""CRC-32C, the checksum of every part of a bundle (specification, section 5).

Checksums are stored *masked*, because the checksum of bytes that contain their own checksum is a constant::

    mask(c) = rotate_right(c, 15) + 0xa282ead8   (mod 2^32)

The checksum of a concatenation follows from those of its parts and the length of the second one, so chunks can be
checked by several threads, or on a device, and :func:`combine` joins the results without reading the bytes again.
All functions are pure and may be called from any thread; :func:`crc32c` releases the GIL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, overload

import fastcrc
import numpy as np
import numpy.typing as npt

_MASK_DELTA = 0xA282EAD8
_POLYNOMIAL = 0x82F63B78  # reflected: bit 31 is the coefficient of x^0
_ONE = 1 << 31


#: ``crc32c(buffer, value=0)``: the CRC-32C of any C-contiguous buffer, not copied; ``value`` is the checksum of the
#: bytes before it.
crc32c: Callable[..., int] = fastcrc.crc32.iscsi


@overload
def mask(crc: int) -> int: ...


@overload
def mask(crc: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]: ...


def mask(crc: Any) -> Any:
    """The form in which a checksum, or each of an array of them, is stored."""
    if isinstance(crc, np.ndarray):
        return ((crc >> np.uint32(15)) | (crc << np.uint32(17))) + np.uint32(_MASK_DELTA)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


@overload
def unmask(masked: int) -> int: ...


@overload
def unmask(masked: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]: ...


def unmask(masked: Any) -> Any:
    """The inverse of :func:`mask`."""
    if isinstance(masked, np.ndarray):
        rotated = masked - np.uint32(_MASK_DELTA)
        return (rotated >> np.uint32(17)) | (rotated << np.uint32(15))
    rotated = (masked - _MASK_DELTA) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


def combine(first: int, second: int, second_nbytes: int) -> int:
    """The checksum of A + B, given that of A, that of B and the number of bytes in B (below 2^63).

    Appending n bytes multiplies the remainder by x^(8 n) modulo the polynomial.  The factors of recent lengths are
    remembered, so combining chunks of equal size takes a few microseconds.
    """
    return _multiply(_power_of_x(second_nbytes), first) ^ second


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the polynomial of CRC-32C."""
    product = 0
    bit = _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


def _squares() -> list[int]:
    powers = [_ONE >> 1]
    while len(powers) < 66:
        powers.append(_multiply(powers[-1], powers[-1]))
    return powers


_X_TO_THE_POWER_OF_TWO = _squares()  # x^(2^k)


@functools.lru_cache(maxsize=1024)
def _power_of_x(nbytes: int) -> int:
    """x^(8 nbytes) modulo the polynomial."""
    power = _ONE
    exponent = 3
    while nbytes:
        if nbytes & 1:
            power = _multiply(_X_TO_THE_POWER_OF_TWO[exponent], power)
        nbytes >>= 1
        exponent += 1
    return power
