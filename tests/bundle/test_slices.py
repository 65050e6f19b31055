"""Overlaps of slices, and whether they make up a tensor."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle import slices
from gpusaver.bundle.slices import check_tiling, intersect, slice_key
from gpusaver.errors import Error, InternalError, InvalidArgumentError, UnimplementedError
from gpusaver.tensor import TensorSlice

P = TensorSlice.parse


def boxes(shape: tuple[int, ...]) -> st.SearchStrategy[TensorSlice]:
    def extent(size: int) -> st.SearchStrategy[tuple[int, int] | None]:
        return st.none() | st.integers(0, size).flatmap(
            lambda start: st.tuples(st.just(start), st.integers(0, size - start))
        )

    return st.tuples(*map(extent, shape)).map(TensorSlice)


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[TensorSlice]]:
    """A tensor cut again and again, so that no axis need separate all parts."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    parts = [tuple((0, size) for size in shape)]
    for _ in range(draw(st.integers(0, 12))):
        part = parts.pop(draw(st.integers(0, len(parts) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        start, length = part[axis]
        at = draw(st.integers(0, length))
        for extent in ((start, at), (start + at, length - at)):
            parts.append((*part[:axis], extent, *part[axis + 1 :]))
    return shape, draw(st.permutations([TensorSlice(part) for part in parts]))


def elements(part: TensorSlice, shape: tuple[int, ...]) -> np.ndarray:
    covered = np.zeros(shape, dtype=int)
    covered[part.index(shape)] = 1
    return covered


@given(st.data(), shapes)
def test_intersect(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = elements(a, shape) & elements(b, shape)
    part = intersect(a, b, shape)
    if part is None:
        assert not common.any()
    else:
        assert common.any()
        assert None not in part.extents
        np.testing.assert_array_equal(elements(part, shape), common)


@given(st.data(), shapes, st.integers(0, 5))
def test_check_tiling_counts_every_element(data: st.DataObject, shape: tuple[int, ...], count: int) -> None:
    parts = [data.draw(boxes(shape)) for _ in range(count)]
    wanted = data.draw(st.none() | boxes(shape))
    covered = sum((elements(part, shape) for part in parts), start=np.zeros(shape, dtype=int))
    missing = elements(wanted or TensorSlice.full(len(shape)), shape) > covered
    if (covered > 1).any():
        with pytest.raises(InternalError, match="Overlapping slices of tensor t"):
            check_tiling(b"t", shape, parts, wanted)
    elif missing.any():
        with pytest.raises(InvalidArgumentError, match="Does not have sufficient slices for partitioned tensor t"):
            check_tiling(b"t", shape, parts, wanted)
    else:
        check_tiling(b"t", shape, parts, wanted)


@given(tilings(), st.data())
def test_tilings(tiling: tuple[tuple[int, ...], list[TensorSlice]], data: st.DataObject) -> None:
    shape, parts = tiling
    check_tiling(b"t", shape, parts)
    check_tiling(b"t", shape, parts, data.draw(boxes(shape)))
    part = data.draw(st.sampled_from(parts))
    if 0 not in part.shape(shape):
        with pytest.raises(InternalError):
            check_tiling(b"t", shape, [*parts, part])
        with pytest.raises(InvalidArgumentError):
            check_tiling(b"t", shape, [other for other in parts if other != part])


def test_thousands_of_slices() -> None:
    rows = [TensorSlice(((start, 1), None)) for start in range(5000)]
    check_tiling(b"t", (5000, 3), rows[::-1])
    grid = [TensorSlice(((x, 2), (y, 3))) for x, y in itertools.product(range(0, 120, 2), range(0, 180, 3))]
    check_tiling(b"t", (120, 180), grid)
    with pytest.raises(InternalError, match=re.escape("existing slice = 60,2:90,3, new slice = 61,1:92,1")):
        check_tiling(b"t", (120, 180), [*grid, P("61,1:92,1")])


def test_gives_up_on_arrangements_no_program_would_write(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [TensorSlice(((x, 1), (y, 1))) for x, y in itertools.product(range(4), range(4))]
    check_tiling(b"t", (4, 4), grid)
    monkeypatch.setattr(slices, "_MAX_PAIRS", 4 * 3 * 2 - 1)
    with pytest.raises(UnimplementedError, match="16 slices of one tensor lie too intricately"):
        check_tiling(b"t", (4, 4), grid)


def test_messages() -> None:
    with pytest.raises(
        InvalidArgumentError,
        match=re.escape(
            "Does not have sufficient slices for partitioned tensor a\\xff to restore in slice_spec: 0,4:-; "
            "the 1 stored slices hold 6 of its 12 elements"
        ),
    ):
        check_tiling(b"a\xff", (10, 3), [P("0,2:0,3")], P("0,4:-"))


def test_huge_tensors() -> None:
    half = 2**61
    check_tiling(b"t", (2 * half, 1), [TensorSlice(((0, half), None)), TensorSlice(((half, half), None))])
    with pytest.raises(InternalError):
        check_tiling(b"t", (2 * half,), [TensorSlice(((0, half + 1),)), TensorSlice(((half, half),))])


def test_no_elements_need_no_slices() -> None:
    check_tiling(b"t", (0, 3), [])
    check_tiling(b"t", (4, 3), [], P("2,0:-"))


def test_scalars() -> None:
    check_tiling(b"t", (), [P("")])
    with pytest.raises(InvalidArgumentError):
        check_tiling(b"t", (), [])
    with pytest.raises(InternalError):
        check_tiling(b"t", (), [P(""), P("")])


@pytest.mark.parametrize("part", ["0,5", "3,2", "-1,1", "0,1:0,1", ""])
def test_slices_must_fit(part: str) -> None:
    with pytest.raises(Error):
        check_tiling(b"t", (4,), [P(part)])


def test_slice_key() -> None:
    assert slice_key(b"p0", P("4,3:0,3")).hex() == "0070300001010284838083"
