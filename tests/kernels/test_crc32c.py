"""The device's checksums against the host's: every alignment, every short length, many pieces, pieces of many parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpusaver.bundle.crc import combine, crc32c
from gpusaver.device import launch_plan
from gpusaver.device.launch_plan import column, cut_parts, initial_checksums
from kernels.shim import Memory, launch, need_compiler

pytestmark = pytest.mark.usefixtures("compiled")
BLOCK = (32, launch_plan.WARPS_PER_BLOCK)


@pytest.fixture(scope="module")
def compiled() -> None:
    need_compiler()


def checksums(pieces: Sequence[Memory], part_nbytes: int, blocks: int = 2) -> list[int]:
    sizes = column([len(piece.array) for piece in pieces])
    parts = cut_parts(column([piece.address for piece in pieces]), sizes, part_nbytes)
    result = initial_checksums(sizes)
    launch("crc32c", blocks, BLOCK, parts.ctypes.data, len(parts), result.ctypes.data)
    return result.tolist()


def filled(nbytes: int, misalignment: int, seed: int = 0) -> Memory:
    memory = Memory(nbytes, misalignment)
    memory.array[:] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return memory


def expected(pieces: Sequence[Memory]) -> list[int]:
    return [crc32c(piece.array) for piece in pieces]


def test_every_short_length_at_every_alignment():
    pieces = [filled(nbytes, start, nbytes) for nbytes in range(71) for start in range(16)]
    assert checksums(pieces, 8192) == expected(pieces)


def test_known_answers():
    """RFC 3720, appendix B.4, and the check value of the catalogue of CRCs."""
    known = {
        b"123456789": 0xE3069283,
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        bytes(range(31, -1, -1)): 0x113FDB5C,
    }
    pieces = []
    for message in known:
        pieces.append(Memory(len(message), 3))
        pieces[-1].array[:] = np.frombuffer(message, np.uint8)
    assert checksums(pieces, 512) == list(known.values())


@pytest.mark.parametrize("part_nbytes", [512, 1024, 8192])
def test_lengths_around_the_borders_of_rows_and_parts(part_nbytes):
    borders = (512, 1024, 1536, 3072, 3584, 4096, part_nbytes, 2 * part_nbytes, 3 * part_nbytes + 16)
    pieces = [
        filled(border + more, start, border + more)
        for border in sorted(set(borders))
        for more in (-17, -16, -1, 0, 1, 15, 16, 17)
        for start in (0, 1, 4, 11, 15)
    ]
    assert checksums(pieces, part_nbytes, blocks=5) == expected(pieces)


@given(
    st.lists(st.tuples(st.integers(0, 40) | st.integers(0, 60_000), st.integers(0, 15)), min_size=1, max_size=9),
    st.sampled_from([512, 1024, 4096, 8192]),
    st.integers(1, 4),
)
@example([(200_000, 13)], 512, 3)
def test_any_pieces(shapes, part_nbytes, blocks):
    pieces = [filled(nbytes, start, nbytes) for nbytes, start in shapes]
    assert checksums(pieces, part_nbytes, blocks) == expected(pieces)


@pytest.mark.parametrize("behind", [0, 1, 15, 2**20 + 1, 2**31 - 1, 2**32 + 7, 12345678901234567])
def test_a_part_of_a_piece_of_any_size(behind):
    """Pieces too large to try: the result of a part that so many bytes of the piece follow."""
    piece = filled(1000, 5)
    parts = cut_parts(column([piece.address]), column([1000]), 8192)
    parts["exponent"] = (int(parts["exponent"][0]) + 8 * behind) % (2**31 - 1)
    result = np.zeros(1, np.uint32)
    launch("crc32c", 1, BLOCK, parts.ctypes.data, 1, result.ctypes.data)
    assert result[0] == combine(crc32c(piece.array) ^ 0xFFFFFFFF, 0, behind)


@given(st.integers(0, 2**48), st.integers(0, 2**21), st.sampled_from([512, 8192, 65536]))
@example(7, 2**40 + 5, 65536)
def test_parts_cover_a_piece_once(address, nbytes, size):
    if nbytes // size > 1 << 16:
        size = 2**27  # as many parts as one launch has at most
    parts = cut_parts(column([address]), column([nbytes]), size)
    assert int(parts["nbytes"].sum(dtype=np.int64)) == nbytes
    begins = address + np.concatenate([[0], np.cumsum(parts["nbytes"], dtype=np.int64)])[:-1]
    assert np.array_equal(parts["address"], begins)
    assert (parts["nbytes"] <= size + 16).all()
    assert (parts["address"][1:] % 16 == 0).all()
    assert parts["flips"].tolist() == [min(4, nbytes), *[0] * (len(parts) - 1)][: len(parts)]
    assert (parts["nbytes"] >= parts["flips"]).all()


@pytest.mark.parametrize(
    ("total", "multiprocessors", "expected_nbytes"),
    [(0, 132, 8192), (8 << 20, 132, 8192), (1 << 28, 132, 16384), (10**9, 132, 65536), (10**11, 132, 65536)],
)
def test_parts_are_small_enough_for_every_warp(total, multiprocessors, expected_nbytes):
    assert launch_plan.part_nbytes(total, multiprocessors) == expected_nbytes
