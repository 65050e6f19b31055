"""Moving any part of any array to and from bytes, against NumPy."""

from __future__ import annotations

import itertools
import random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.device.base import Transfer
from gpusaver.device.host import HostRuntime, allocate_pages, byte_bounds, byte_view, copy_elements, is_plain

DTYPES = [
    *("?", "i1", "<u2", ">u2", "<f4", ">f8", "<c8", ">c16", "f2"),
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.int4,
]

RUNTIME = HostRuntime()


def stored_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """What a data file has of the array."""
    dtype = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    return np.ascontiguousarray(array, dtype).tobytes()


def filled(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Random bits, which for booleans must be 0 or 1."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    octets = random.Random(7).randbytes(count * dtype.itemsize)
    if dtype == np.bool_:
        octets = bytes(octet & 1 for octet in octets)
    return np.frombuffer(bytearray(octets), dtype).reshape(shape)


@st.composite
def strided(draw: st.DrawFn, *, writable: bool) -> np.ndarray[Any, Any]:
    """Views with steps, reversals, transposed axes and, to read from, repetition."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    array = filled(shape, draw(st.sampled_from(DTYPES)))
    steps = [draw(st.sampled_from([1, 1, 2, -1, -3])) for _ in shape]
    array = array[tuple(slice(None, None, step) for step in steps)] if shape else array
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    if not writable and draw(st.booleans()):
        array = np.broadcast_to(array, (draw(st.integers(1, 3)), *array.shape))
    return array


@given(strided(writable=False), st.data())
def test_a_range_of_elements_out_of_an_array(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    first, last = sorted((data.draw(st.integers(0, array.size)), data.draw(st.integers(0, array.size))))
    flat = np.zeros(last - first, array.dtype)
    copy_elements(array, first, last, flat, to_array=False)
    assert flat.tobytes() == array.reshape(-1)[first:last].tobytes()


@given(strided(writable=True), st.data())
def test_a_range_of_elements_into_an_array(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    first, last = sorted((data.draw(st.integers(0, array.size)), data.draw(st.integers(0, array.size))))
    expected = array.reshape(-1).copy()
    flat = filled((last - first,), array.dtype)[::-1].copy()
    expected[first:last] = flat
    copy_elements(array, first, last, flat, to_array=True)
    assert array.tobytes() == expected.tobytes()


def pieces(data: st.DataObject, nbytes: int) -> list[tuple[int, int]]:
    """``(start, nbytes)`` of parts that make up an array, cut anywhere, in any order."""
    cuts = sorted(data.draw(st.sets(st.integers(0, nbytes), max_size=5)) | {0, nbytes})
    parts = [(start, end - start) for start, end in itertools.pairwise(cuts)]
    return data.draw(st.permutations(parts))


@given(strided(writable=False), st.data(), st.integers(0, 9))
def test_any_pieces_to_a_slot(array: np.ndarray[Any, Any], data: st.DataObject, shift: int) -> None:
    expected = stored_bytes(array)
    slot = bytearray(len(expected) + shift)
    transfers = [Transfer(array, start, shift + start, nbytes) for start, nbytes in pieces(data, len(expected))]
    assert RUNTIME.to_slot(transfers, memoryview(slot)) is None
    assert slot[shift:] == expected


@given(strided(writable=True), st.data(), st.integers(0, 9))
def test_any_pieces_from_a_slot(array: np.ndarray[Any, Any], data: st.DataObject, shift: int) -> None:
    wanted = stored_bytes(array)
    array[...] = np.zeros((), array.dtype)
    slot = memoryview(bytes(shift) + wanted)
    for start, nbytes in pieces(data, len(wanted)):
        RUNTIME.from_slot([Transfer(array, start, shift + start, nbytes)], slot)
    assert stored_bytes(array) == wanted


@pytest.mark.parametrize("dtype", [">f8", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_copied_without_the_gil(dtype: str, order: Any) -> None:
    """Another branch than for small ones."""
    array = np.asarray(filled((130, 200), dtype), order=order)
    expected = stored_bytes(array)
    slot = bytearray(len(expected))
    RUNTIME.to_slot([Transfer(array, 3, 3, len(expected) - 3)], memoryview(slot))
    assert slot[3:] == expected[3:]
    other = np.zeros_like(array)
    RUNTIME.from_slot([Transfer(other, 0, 0, len(expected))], memoryview(expected))
    assert other.tobytes() == array.tobytes()


@given(strided(writable=False))
def test_snapshots_are_plain_copies(array: np.ndarray[Any, Any]) -> None:
    expected = stored_bytes(array)
    (copy, empty), memory, _ = RUNTIME.snapshot([array, np.zeros((0, 3))], np.array([0, array.nbytes]), None)
    assert is_plain(copy)
    assert not np.may_share_memory(copy, array)
    assert byte_view(copy).tobytes() == expected
    assert empty.shape == (0, 3)
    (again,), reused, _ = RUNTIME.snapshot([array], np.array([0]), memory)
    assert reused is memory
    assert byte_view(again).tobytes() == expected


@given(strided(writable=False))
def test_bounds_of_an_array(array: np.ndarray[Any, Any]) -> None:
    theirs = np.lib.array_utils if hasattr(np.lib, "array_utils") else np  # NumPy 1 has it at the top
    assert byte_bounds(array) == theirs.byte_bounds(array)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_memory_of_a_plain_array_as_bytes(shape: tuple[int, ...], dtype: Any) -> None:
    array = np.zeros(shape, dtype)
    if array.dtype.byteorder != ">":
        assert is_plain(array)
    view = byte_view(array)
    assert (view.format, view.ndim, view.nbytes) == ("B", 1, array.nbytes)
    if array.size:
        view[:] = b"\1" * array.nbytes
        assert array.tobytes() == b"\1" * array.nbytes


def test_pages() -> None:
    for nbytes in (0, 1, 5000):
        pages = allocate_pages(nbytes)
        assert pages.nbytes == max(nbytes, 1)
        assert pages.ctypes.data % 4096 == 0


def test_too_many_pages() -> None:
    from gpusaver.errors import ResourceExhaustedError

    for nbytes in (1 << 62, 1 << 70):
        with pytest.raises(ResourceExhaustedError, match=str(nbytes)):
            allocate_pages(nbytes)
