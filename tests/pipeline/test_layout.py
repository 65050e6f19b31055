"""Where bytes go: every byte of every tensor once, in windows that O_DIRECT can write."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle import layout as layout_module
from gpusaver.bundle.layout import LARGE_NBYTES, MAX_PIECES, PAGE, PHASE, Chunk, chunks, plan_layout

# Tensors count as large from here on in these tests, so that a few kilobytes show everything.
LARGE = 3 * PAGE

sizes = st.one_of(
    st.just(0),
    st.integers(1, 40),
    st.integers(PAGE - 20, PAGE + 20),
    st.integers(LARGE - 2, LARGE + 2),
    st.integers(1, 10 * PAGE),
)


class Tensor(NamedTuple):
    nbytes: int
    owner: int
    shard: int


tensors = st.lists(st.builds(Tensor, sizes, st.integers(0, 2), st.integers(0, 2)), max_size=40)
windows = st.integers(1, 5).map(lambda pages: pages * PAGE)


def plan(given_tensors: list[Tensor]) -> layout_module.Layout:
    nbytes, owners, shards = ([tensor[column] for tensor in given_tensors] for column in range(3))
    with mock.patch.object(layout_module, "LARGE_NBYTES", LARGE):
        return plan_layout(nbytes, owners, shards, 3)


def check_coverage(found: Iterable[Chunk], shard: Any, offset: Any, nbytes: Any, owner: Any) -> None:
    """Every byte of every range is in exactly one piece, which is where the range says."""
    parts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for chunk in found:
        end = 0
        for piece in chunk.pieces:
            assert piece.offset >= end
            assert piece.nbytes > 0
            end = piece.offset + piece.nbytes
            assert (chunk.shard, chunk.owner) == (shard[piece.tensor], owner[piece.tensor])
            assert chunk.offset + piece.offset == offset[piece.tensor] + piece.start
            parts[piece.tensor].append((piece.start, piece.nbytes))
        assert 0 < end <= chunk.nbytes
        assert len(chunk.pieces) <= MAX_PIECES
    for tensor, size in enumerate(nbytes):
        position = 0
        for start, length in sorted(parts[tensor]):
            assert start == position
            position += length
        assert position == size


@given(tensors)
def test_tensors_do_not_overlap_and_are_aligned(given_tensors: list[Tensor]) -> None:
    layout = plan(given_tensors)
    assert layout.nbytes.tolist() == [tensor.nbytes for tensor in given_tensors]
    for shard, shard_nbytes in enumerate(layout.shard_nbytes):
        inside = [t for t in range(len(given_tensors)) if given_tensors[t].shard == shard and given_tensors[t].nbytes]
        inside.sort(key=lambda t: layout.offset[t])
        end = 0
        for tensor in inside:
            if given_tensors[tensor].nbytes >= LARGE:
                assert layout.offset[tensor] % PAGE == PHASE
            assert layout.offset[tensor] >= end
            end = layout.offset[tensor] + layout.nbytes[tensor]
        assert end <= shard_nbytes
        assert shard_nbytes - end < PAGE


@given(tensors)
def test_tensors_keep_their_order_within_a_run(given_tensors: list[Tensor]) -> None:
    layout = plan(given_tensors)
    runs: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for tensor, (nbytes, owner, shard) in enumerate(given_tensors):
        runs[shard, owner, nbytes >= LARGE].append(int(layout.offset[tensor]))
    for offsets in runs.values():
        assert offsets == sorted(offsets)


@given(tensors, windows)
def test_chunks_cover_every_byte_once(given_tensors: list[Tensor], window: int) -> None:
    layout = plan(given_tensors)
    found = list(layout.chunks(window))
    check_coverage(found, layout.shard, layout.offset, layout.nbytes, layout.owner)
    assert all(chunk.nbytes <= window for chunk in found)


@given(tensors, windows)
def test_chunks_suit_o_direct(given_tensors: list[Tensor], window: int) -> None:
    """They start on pages, and padding the last one of a run to whole pages hits nobody else's bytes."""
    layout = plan(given_tensors)
    by_shard = defaultdict(list)
    for chunk in layout.chunks(window):
        assert chunk.offset % PAGE == 0
        by_shard[chunk.shard].append(chunk)
    for found in by_shard.values():
        found.sort(key=lambda chunk: chunk.offset)
        for first, second in itertools.pairwise(found):
            assert -(-(first.offset + first.nbytes) // PAGE) * PAGE <= second.offset


@given(tensors, windows)
def test_chunks_and_their_gaps_are_the_whole_files(given_tensors: list[Tensor], window: int) -> None:
    """Also where each owner's are asked for by themselves: a file may be one that is written over."""
    layout = plan(given_tensors)
    ends = [0] * 3
    found = [chunk for owner in range(3) for chunk in layout.chunks(window, owner)]
    for chunk in sorted(found, key=lambda chunk: chunk.offset):
        assert chunk.offset == ends[chunk.shard]
        ends[chunk.shard] += chunk.nbytes
    assert ends == list(layout.shard_nbytes)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 20_000), st.integers(0, 9_000), st.integers(0, 1)), max_size=30
    ),
    windows,
    st.sampled_from([0, 100, PAGE - 1]),
)
def test_arbitrary_ranges_are_read_once(ranges: list[tuple[int, int, int, int]], window: int, max_gap: int) -> None:
    """Overlapping ranges too: two names of one stored tensor, or what a hostile index says."""
    columns = np.array(ranges, np.int64).reshape(-1, 4).T
    found = list(chunks(*columns, window, max_gap=max_gap))
    check_coverage(found, *columns)
    for chunk in found:
        assert chunk.nbytes <= window
        ends = [0, *(piece.offset + piece.nbytes for piece in chunk.pieces)]
        starts = [*(piece.offset for piece in chunk.pieces), chunk.nbytes]
        assert all(start - end <= max_gap for end, start in zip(ends, starts, strict=True))


def test_many_tiny_tensors_are_split_at_the_limit_of_pieces() -> None:
    count = 2 * MAX_PIECES + 10
    layout = plan_layout([1] * count, [0] * count, [0] * count, 1)
    found = list(layout.chunks(1 << 23))
    check_coverage(found, layout.shard, layout.offset, layout.nbytes, layout.owner)
    assert len(found) == 3
    assert all(chunk.nbytes % PAGE == 0 for chunk in found[:-1])


@pytest.mark.parametrize("nbytes", [LARGE_NBYTES - 1, LARGE_NBYTES])
def test_only_large_tensors_start_as_arrays_do(nbytes: int) -> None:
    layout = plan_layout([5, nbytes], [0, 0], [0, 0], 1)
    assert layout.offset.tolist() == ([0, 5] if nbytes < LARGE_NBYTES else [PHASE + nbytes, PHASE])


def test_nothing_at_all() -> None:
    layout = plan_layout([], [], [], 1)
    assert layout.shard_nbytes == (0,)
    assert list(layout.chunks(PAGE)) == []
