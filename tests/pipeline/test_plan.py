"""Leaves described by columns, and one by one: the same where both can be."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

import gpusaver
from gpusaver.pipeline.plan import Rows, _one_by_one, _plain
from gpusaver.pipeline.save import Sources
from gpusaver.variables import flatten

DTYPES = [np.dtype(name) for name in ("f4", "f8", "i1", "u4", "?", "c8")] + [np.dtype(ml_dtypes.bfloat16)]
BASE = np.zeros((4, 6), np.float32)

plain = st.builds(
    lambda shape, dtype, order: np.zeros(shape, dtype, order),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.sampled_from("CF"),
)
others = st.sampled_from(
    [
        BASE,  # one array twice
        BASE[1:],
        BASE.T,
        np.zeros(3, ">f4"),
        np.array(["a", "bc"]),
        np.array([b"a"], object),
        np.float32(1),
        2,
        "text",
    ]
)


def described(found: tuple[Rows, Sources, dict[int, int]]) -> Any:
    rows, sources, strings = found
    return rows, list(map(id, sources.arrays)), sources.runtimes, strings


@given(st.lists(plain, max_size=8), st.lists(others, max_size=2), st.randoms(use_true_random=False))
@example([], [BASE], None)
def test_columns_say_what_each_leaf_says(arrays: list[Any], rest: list[Any], random: Any) -> None:
    values = arrays + rest
    if random is not None:
        random.shuffle(values)
    leaves = flatten({f"v{number}": value for number, value in enumerate(values)})
    found = _plain(leaves)
    if found is not None:
        assert described(found) == described(_one_by_one(leaves, None))
    if not rest:
        assert found is not None


def test_what_is_not_an_array_that_lies_in_a_dict_has_no_columns() -> None:
    whole = np.zeros((4, 2), np.float32)
    for state in (
        [gpusaver.Variable(whole, name="w")],
        {"w": gpusaver.PartitionedVariable((8, 2), gpusaver.TensorSlice(((0, 4), None)), whole)},
        {"w": whole, "again": whole},
        {"w": whole, "view": whole[:2]},
        {"w": whole, "step": 3},
        {"w": np.array(["text"])},
        {"w": np.zeros(2, ">i4")},
        {"w": np.zeros(2, "M8[s]")},
    ):
        assert _plain(flatten(state)) is None, state
