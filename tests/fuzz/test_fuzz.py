"""Mutated files of every kind, as many as fit into a test; `make fuzz` goes on for as long as one likes."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from size import sized
from targets import MEMORY_NBYTES, TARGETS, prepared, run, seeds

EXAMPLES = sized(400, 20_000)

Edit = tuple[int, int, bytes]


def mutated(seed: bytes, edits: list[Edit]) -> bytes:
    """Each edit replaces ``cut`` bytes at a place by others."""
    data = bytearray(seed)
    for at, cut, new in edits:
        at %= len(data) + 1
        data[at : at + cut] = new
    return bytes(data)


def inputs(name: str) -> st.SearchStrategy[bytes]:
    numbers = st.sampled_from([b"\0", b"\x7f", b"\x80", b"\xff", b"\xff" * 4, b"\xff" * 9 + b"\x01"])
    edit = st.tuples(st.integers(0, 1 << 14), st.integers(0, 8), st.one_of(numbers, st.binary(max_size=8)))
    return st.one_of(
        st.binary(max_size=200), st.builds(mutated, st.sampled_from(list(seeds(name))), st.lists(edit, max_size=6))
    )


def peak_nbytes(call: Callable[[], Any]) -> int:
    """The most memory that Python and NumPy held during the call, beyond what they held before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer takes time of its own")
@pytest.mark.parametrize("name", TARGETS)
def test_only_our_errors_in_bounded_time_and_memory(name: str, count_cases: Callable[[int], None]) -> None:
    count = max(EXAMPLES, settings().max_examples)
    seen = 0

    @settings(max_examples=count)
    @given(inputs(name))
    def check(data: bytes) -> None:
        nonlocal seen
        seen += 1
        assert peak_nbytes(lambda: run(name, data)) < MEMORY_NBYTES + len(data)

    with prepared():
        check()
    count_cases(seen)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str, count_cases: Callable[[int], None]) -> None:
    """Also every prefix of every seed."""
    count = 0
    with prepared():
        for seed in seeds(name):
            for stop in range(0, len(seed) + 1, max(1, len(seed) // 50)):
                run(name, seed[:stop])
                count += 1
    assert count
    count_cases(count)
