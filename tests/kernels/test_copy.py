"""gather, scatter and their strided forms, bit for bit against NumPy, at every alignment of either side."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.device import launch_plan
from gpusaver.device.launch_plan import column, cut_tiles, plan_strided
from kernels.shim import SANITIZED, Memory, launch, library, need_compiler

pytestmark = pytest.mark.usefixtures("compiled")
CANARY = 0xA5
THREADS = 256


@pytest.fixture(scope="module")
def compiled() -> None:
    need_compiler()


class Piece(NamedTuple):
    array: Memory
    offset: int


def random_bytes(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def table_of(pieces: Sequence[Piece], image: Memory, *, to_image: bool) -> np.ndarray[Any, Any]:
    arrays = column([piece.array.address for piece in pieces])
    offsets = column([piece.offset for piece in pieces])
    sizes = column([len(piece.array.array) for piece in pieces])
    return cut_tiles(arrays, offsets, sizes, image.address + offsets if to_image else arrays)


def check_both_ways(pieces: Sequence[Piece], image_nbytes: int) -> None:
    """Gathers the pieces into an image and scatters them back; what lies between them stays as it was."""
    values = [random_bytes(len(piece.array.array), seed) for seed, piece in enumerate(pieces)]
    image = Memory(image_nbytes)
    image.array[:] = CANARY
    expected = image.array.copy()
    for piece, value in zip(pieces, values, strict=True):
        piece.array.array[:] = value
        expected[piece.offset : piece.offset + len(value)] = value
    tiles = table_of(pieces, image, to_image=True)
    launch("gather", len(tiles), (THREADS,), tiles.ctypes.data, image.address)
    assert np.array_equal(image.array, expected)

    for piece in pieces:
        piece.array.array[:] = CANARY
    tiles = table_of(pieces, image, to_image=False)
    launch("scatter", len(tiles), (THREADS,), tiles.ctypes.data, image.address)
    assert np.array_equal(image.array, expected)
    for piece, value in zip(pieces, values, strict=True):
        assert np.array_equal(piece.array.array, value)


# ------------------------------------------------------------------------------------------------------ gather, scatter


def test_the_host_cuts_to_what_the_kernels_take():
    for name in ("TILE_NBYTES", "TILE_UNITS", "MAX_DIMS"):
        assert ctypes.c_uint32.in_dll(library(), f"SHIM_{name}").value == getattr(launch_plan, name)


@pytest.mark.parametrize("misalignment", [0, 1, 2, 3, 4, 8, 15] if SANITIZED else range(16))
def test_every_length_at_every_alignment_of_both_sides(misalignment):
    pieces, place = [], 0
    for nbytes in range(71):
        for target in range(16):
            place += (target - place) % 16
            pieces.append(Piece(Memory(nbytes, misalignment), place))
            place += nbytes + 1
    check_both_ways(pieces, place)


@given(
    st.lists(
        st.tuples(st.integers(0, 15), st.integers(0, 40), st.one_of(st.integers(0, 70), st.integers(0, 100_000))),
        max_size=12,
    )
)
def test_pieces_of_many_tiles(cut):
    pieces, place = [], 0
    for misalignment, gap, nbytes in cut:
        pieces.append(Piece(Memory(nbytes, misalignment), place + gap))
        place += gap + nbytes
    check_both_ways(pieces, place + 3)


@given(st.integers(0, 2**47), st.integers(0, 300_000))
def test_tiles_cover_a_piece_once_and_begin_on_lines(target, nbytes):
    tiles = cut_tiles(column([5000]), column([300]), column([nbytes]), column([target]))
    assert tiles["nbytes"].sum() == nbytes
    assert (tiles["nbytes"] > 0).all()
    assert (tiles["nbytes"] <= launch_plan.TILE_NBYTES).all()
    begins = np.concatenate([[0], np.cumsum(tiles["nbytes"])])[:-1]
    assert np.array_equal(tiles["array"], 5000 + begins)
    assert np.array_equal(tiles["offset"], 300 + begins)
    assert ((target + begins[1:]) % launch_plan.LINE_NBYTES == 0).all()


# -------------------------------------------------------------------------------------------------------------- strided


class View(NamedTuple):
    """A view of a fresh array of random bytes, and part of its row-major form against any address."""

    memory: Memory
    array: np.ndarray[Any, Any]
    start: int
    nbytes: int
    misalignment: int


DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


@st.composite
def views(draw: st.DrawFn, *, writable: bool) -> View:
    itemsize = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.sampled_from([1, 2, 2, 3, 3, 4, 5]), max_size=9).filter(lambda s: math.prod(s) <= 3000))
    memory = Memory(math.prod(shape) * itemsize, itemsize % 16 * draw(st.integers(0, 16 // itemsize - 1)))
    memory.array[:] = random_bytes(len(memory.array))
    array = memory.array.view(DTYPES[itemsize]).reshape(shape)
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    steps = st.sampled_from([slice(None), np.s_[::-1], np.s_[::2], np.s_[1:], np.s_[:0:-2]])
    array = array[(*(draw(steps) for _ in shape), ...)]
    if not writable and draw(st.booleans()):
        array = np.broadcast_to(array, (2, *array.shape))
    start, end = sorted(draw(st.tuples(st.integers(0, array.nbytes), st.integers(0, array.nbytes))))
    if draw(st.booleans()):  # whole elements
        start, end = start // itemsize * itemsize, end // itemsize * itemsize
    return View(memory, array, start, end - start, draw(st.sampled_from([0, 0, 8, 4, 2, 1, 15])))


def pointer_of(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def move(name: str, view: View, flat: Memory) -> None:
    pointer = pointer_of(view.array)
    plan = plan_strided(
        pointer, view.array.shape, view.array.strides, view.array.itemsize, view.start, view.nbytes, flat.address
    )
    dims, padding = len(plan.sizes), launch_plan.MAX_DIMS - len(plan.sizes)
    assert dims <= launch_plan.MAX_DIMS
    if plan.units:
        blocks = -(-plan.units // launch_plan.TILE_UNITS)
        sizes, strides = [*plan.sizes, *[1] * padding], [*plan.strides, *[0] * padding]
        arguments = (pointer, flat.address, plan.first, plan.units, plan.unit_nbytes, dims)
        launch(name, blocks, (THREADS,), *arguments, *sizes, *strides)


def row_major(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(array.tobytes(), np.uint8)


def fits(view: View) -> bool:
    plan = plan_strided(0, view.array.shape, view.array.strides, view.array.itemsize, 1, 1, 1)
    return len(plan.sizes) <= launch_plan.MAX_DIMS


def check_gather(view: View) -> None:
    flat = Memory(view.nbytes, view.misalignment)
    flat.array[:] = CANARY
    move("gather_strided", view, flat)
    assert np.array_equal(flat.array, row_major(view.array)[view.start : view.start + view.nbytes])


def check_scatter(view: View) -> None:
    flat = Memory(view.nbytes, view.misalignment)
    flat.array[:] = random_bytes(view.nbytes, seed=1)
    expected = view.memory.array.copy()
    octets = row_major(view.array).copy()
    octets[view.start : view.start + view.nbytes] = flat.array
    if view.array.size:
        offset = pointer_of(view.array) - view.memory.address
        like = np.ndarray(view.array.shape, view.array.dtype, expected.data, offset, view.array.strides)
        like[...] = octets.view(like.dtype).reshape(like.shape)
    move("scatter_strided", view, flat)
    assert np.array_equal(view.memory.array, expected)


@given(views(writable=False).filter(fits))
def test_any_part_of_any_view_is_gathered(view):
    check_gather(view)


@given(views(writable=True).filter(fits))
def test_any_part_of_any_view_is_scattered(view):
    check_scatter(view)


VIEWS = {
    "transposed": lambda array: array.T,
    "reversed": lambda array: array[::-1, ::-1],
    "every other": lambda array: array[:, ::2],
    "columns": lambda array: array[:, 1:-1],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("shape", [(3, 5000), (5000, 3), (1, 9001), (70, 130)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 16] if SANITIZED else sorted(DTYPES))
def test_dimensions_longer_and_shorter_than_a_block(view, shape, itemsize):
    memory = Memory(math.prod(shape) * itemsize)
    memory.array[:] = random_bytes(len(memory.array))
    array = view(memory.array.view(DTYPES[itemsize]).reshape(shape))
    middle = array.size // 3 * itemsize
    for start, nbytes in ((0, array.nbytes), (middle, middle), (array.nbytes - 3, 3)):
        check_gather(View(memory, array, start, nbytes, 0))
        check_scatter(View(memory, array, start, nbytes, 0))


def test_a_dimension_beyond_32_bits():
    memory, flat = Memory(2), Memory(3000)
    memory.array[:] = 17, 99
    array = np.broadcast_to(memory.array[:, None], (2, 2**33 + 5))
    move("gather_strided", View(memory, array, 2**33 + 5 - 1600, 3000, 0), flat)
    assert flat.array.tolist() == [17] * 1600 + [99] * 1400


def test_units_are_as_wide_as_everything_is_aligned():
    array = np.zeros((4, 6, 8), np.float32)
    for view, flat, unit, sizes in (
        (array[:, ::2], 0, 16, [2, 12]),  # rows of 32 bytes stay together
        (array[:, ::2], 4, 4, [8, 12]),
        (array[:, :, ::2], 0, 4, [96]),  # what is evenly spaced is one dimension
        (array.T, 0, 4, [4, 6, 8]),
        (array[::2, :, 1:3], 0, 8, [6, 2]),  # pairs
        (array[::2, :, 1:3], 4, 4, [2, 6, 2]),
        (np.zeros((5, 3), np.complex128).T, 0, 16, [5, 3]),
        (np.zeros((5, 3), np.complex128).T, 8, 8, [2, 5, 3]),
    ):
        plan = plan_strided(1 << 20, view.shape, view.strides, view.itemsize, 0, view.nbytes, flat)
        assert (plan.unit_nbytes, plan.sizes) == (unit, sizes)
        assert plan.units * unit == view.nbytes
