"""What several ranks have saved together TensorFlow reads to the bit, and the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_side as tensorflow
from generated import FIXED, QUANTIZED, Index, Tensor, few, folder, grids, random_bits
from hypothesis import given
from hypothesis import strategies as st
from simulated_ranks import SimulatedTransport, run

import gpusaver
from gpusaver import PartitionedVariable
from gpusaver.metagraph.reading import read_meta_graph

PLAIN = [dtype for dtype in FIXED if dtype not in QUANTIZED and dtype in tensorflow.SLICED_FREELY]


@st.composite
def held_tensors(draw: st.DrawFn) -> tuple[Tensor, list[Index]]:
    """A tensor and how it is cut; one piece: every rank has it whole."""
    dtype = draw(st.sampled_from(PLAIN))
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    return Tensor(dtype, random_bits(dtype, shape, draw(st.integers(0, 2**32 - 1)))), draw(grids(shape))


def state_of(held: dict[str, tuple[Tensor, list[Index]]], rank: int, count: int) -> dict[str, Any]:
    state: dict[str, Any] = {"note": b"all ranks"}
    for name, ((_, array), grid) in held.items():
        if len(grid) == 1:
            state[name] = array.copy()
        elif grid[rank::count]:
            state[name] = [PartitionedVariable(array.shape, index, array[index].copy()) for index in grid[rank::count]]
    return state


@few
@given(st.dictionaries(st.sampled_from(["emb", "a/b", "w", "ü"]), held_tensors(), min_size=1), st.integers(1, 4))
def test_saved_by_ranks(held: dict[str, tuple[Tensor, list[Index]]], count: int) -> None:
    with folder() as directory:

        def save(transport: SimulatedTransport) -> str:
            with gpusaver.Saver(state_of(held, transport.rank, count), comm=transport) as saver:
                return saver.save(directory / "k")

        assert run(count, save) == [f"{directory}/k"] * count
        found = tensorflow.read(directory / "k")
        assert found.pop("note") == b"all ranks"
        assert found.keys() == held.keys()
        assert all(tensor.matches(found[name]) for name, (tensor, _) in held.items())
        assert tf.train.latest_checkpoint(str(directory)) == f"{directory}/k"


@pytest.mark.parametrize("count", [1, 3])
def test_tensorflows_are_restored_by_ranks(tmp_path: Path, count: int) -> None:
    tensor = Tensor(gpusaver.DataType.float32, np.arange(60, dtype=np.float32).reshape(12, 5))
    grid = [(slice(0, 7), slice(0, 5)), (slice(7, 12), slice(0, 2)), (slice(7, 12), slice(2, 5))]
    spec = tensorflow.slice_spec
    stored = [(b"emb", spec(tensor.shape, index), Tensor(tensor.dtype, tensor.array[index])) for index in grid]
    tensorflow.save_op(tmp_path / "k", stored)

    def restore(transport: SimulatedTransport) -> None:
        rows = (slice(12 * transport.rank // count, 12 * (transport.rank + 1) // count), slice(None))
        part = PartitionedVariable(tensor.shape, rows, np.zeros_like(tensor.array[rows]))
        with gpusaver.Saver({"emb": part}, comm=transport) as saver:
            saver.restore(tmp_path / "k")
        np.testing.assert_array_equal(part.value, tensor.array[rows])

    assert run(count, restore) == [None] * count


def test_the_meta_graph_is_imported_by_tensorflow(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(12, 2)

    def save(transport: SimulatedTransport) -> str:
        rows = (slice(6 * transport.rank, 6 * transport.rank + 6), slice(None))
        state = {"emb": PartitionedVariable(array.shape, rows, array[rows]), f"own{transport.rank}": np.ones(3)}
        with gpusaver.Saver(state, comm=transport) as saver:
            return saver.save(tmp_path / "k")

    assert run(2, save) == [f"{tmp_path}/k"] * 2
    assert read_meta_graph(tmp_path / "k.meta").saver_def.restore_op_name
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        saver = tf.compat.v1.train.import_meta_graph(f"{tmp_path}/k.meta")
        saver.restore(session, f"{tmp_path}/k")
        values = {variable.name: session.run(variable) for variable in tf.compat.v1.global_variables()}
    np.testing.assert_array_equal(np.concatenate([values["emb/part_0:0"], values["emb/part_1:0"]]), array)
    assert all((values[f"own{rank}:0"] == 1).all() for rank in (0, 1))
