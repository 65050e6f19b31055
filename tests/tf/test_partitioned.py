"""Partitioned tensors, cut in different ways on either side: TensorFlow and gpusaver read each other's, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_side as tensorflow
from generated import FIXED, QUANTIZED, Index, Tensor, differing, direct_io, few, folder, grids, random_bits, save
from hypothesis import assume, given
from hypothesis import strategies as st
from tensorflow_side import slice_spec, v1

import gpusaver
from gpusaver import DataType, PartitionedVariable


class Cut(NamedTuple):
    """A tensor, and two ways to cut it."""

    tensor: Tensor
    written: list[Index]
    wanted: list[Index]


@st.composite
def cut_tensors(draw: st.DrawFn, dtypes: Sequence[DataType]) -> Cut:
    dtype = draw(st.sampled_from(dtypes))
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    if draw(st.integers(0, 5)) == 0:
        shape = (*shape[:2], 20_000)  # parts beyond 64 KiB are not copied
    tensor = Tensor(dtype, random_bits(dtype, shape, draw(st.integers(0, 2**32 - 1))))
    return Cut(tensor, draw(grids(shape)), draw(grids(shape)))


def cut_sets(dtypes: Sequence[DataType]) -> st.SearchStrategy[dict[str, Cut]]:
    return st.dictionaries(st.sampled_from(["emb", "a/b", "t\x01", "ü"]), cut_tensors(dtypes), min_size=1, max_size=3)


def parts(array: Any, grid: Sequence[Index]) -> list[PartitionedVariable]:
    """Views of one array."""
    return [PartitionedVariable(array.shape, index, array[index]) for index in grid]


def pieces(cuts: dict[str, Cut]) -> Iterator[tuple[bytes, str, Tensor]]:
    """Name, place and values of every part that is written, as TensorFlow's ops take them."""
    for name, (tensor, written, _) in cuts.items():
        for index in written:
            yield name.encode(), slice_spec(tensor.shape, index), Tensor(tensor.dtype, tensor.array[index])


def check_by_op(prefix: Path, cuts: dict[str, Cut]) -> None:
    """TensorFlow finds every part as it was written."""
    expected = list(pieces(cuts))
    found = tensorflow.restore_op(prefix, [(name, place, part.dtype) for name, place, part in expected])
    assert all(part.matches(values) for (_, _, part), values in zip(expected, found, strict=True))


# NumPy knows no quantized types, and a part has no other.
PLAIN = [dtype for dtype in FIXED if dtype not in QUANTIZED]
SLICED_FREELY = [dtype for dtype in PLAIN if dtype in tensorflow.SLICED_FREELY]
SLICED_AS_STORED = [dtype for dtype in PLAIN if dtype not in tensorflow.SLICED_FREELY]


@few
@given(cut_sets(SLICED_FREELY), direct_io)
def test_parts_by_gpusaver(cuts: dict[str, Cut], direct: Any) -> None:
    tensors = {name: cut.tensor for name, cut in cuts.items()}
    with folder() as directory:
        prefix = directory / "model.ckpt"
        save(prefix, {name: parts(cut.tensor.array, cut.written) for name, cut in cuts.items()}, direct_io=direct)
        assert tensorflow.specs(prefix) == {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        assert not differing(tensors, tensorflow.read(prefix))
        with tensorflow.Variables(tensors, {name: cut.wanted for name, cut in cuts.items()}, devices=2) as variables:
            assert not differing(tensors, variables.restore(prefix))
        check_by_op(prefix, cuts)


@few
@given(cut_sets(SLICED_AS_STORED))
def test_parts_by_gpusaver_that_tensorflow_reads_only_as_stored(cuts: dict[str, Cut]) -> None:
    with folder() as directory:
        save(directory / "model", {name: parts(cut.tensor.array, cut.written) for name, cut in cuts.items()})
        check_by_op(directory / "model", cuts)


@few
@given(cut_sets(FIXED), st.sampled_from(["saver", "op", "two shards"]))
def test_parts_by_tensorflow(cuts: dict[str, Cut], writer: str) -> None:
    if writer == "saver":
        cuts = {name: cut for name, cut in cuts.items() if cut.tensor.dtype not in tensorflow.WITHOUT_VARIABLES}
        assume(cuts)
    tensors = {name: cut.tensor for name, cut in cuts.items()}
    with folder() as directory:
        prefix = directory / "model.ckpt"
        write_by_tensorflow(prefix, cuts, writer)
        assert not differing(tensors, gpusaver.load(prefix))
        found = {name: tensor.garbage() for name, tensor in tensors.items()}
        state = {
            name: gpusaver.Variable(found[name], name, tensor.dtype)
            if tensor.dtype in QUANTIZED
            else parts(found[name], cuts[name].wanted)
            for name, tensor in tensors.items()
        }
        gpusaver.Saver(state).restore(prefix)
        assert not differing(tensors, found)


def write_by_tensorflow(prefix: Path, cuts: dict[str, Cut], writer: str) -> None:
    if writer == "saver":
        tensors = {name: cut.tensor for name, cut in cuts.items()}
        with tensorflow.Variables(tensors, {name: cut.written for name, cut in cuts.items()}, devices=3) as variables:
            variables.save(prefix)
        return
    stored = list(pieces(cuts))
    if writer == "op" or len(stored) < 2:
        tensorflow.save_op(prefix, stored)
        return
    halves = [Path(f"{prefix}-{number}") for number in (0, 1)]
    for number, half in enumerate(halves):
        tensorflow.save_op(half, stored[number::2])
    tensorflow.merge_op(halves, prefix)


@pytest.mark.parametrize(("axis", "count"), [(0, 3), (1, 4)])
def test_variables_that_tensorflow_partitions_itself(tmp_path: Path, axis: int, count: int) -> None:
    values = np.arange(70, dtype=np.float32).reshape(10, 7)
    with tf.Graph().as_default(), v1.Session() as session:
        v1.get_variable("emb", values.shape, partitioner=v1.fixed_size_partitioner(count, axis))
        cut = zip(v1.global_variables(), np.array_split(values, count, axis), strict=True)
        saver = v1.train.Saver()
        session.run([part.assign(piece) for part, piece in cut])
        theirs = saver.save(session, str(tmp_path / "theirs"), write_meta_graph=False)
        found = np.zeros_like(values)
        gpusaver.Saver({"emb": parts(found, [np.s_[0:5, 0:6], np.s_[5:10, 0:6], np.s_[0:10, 6:7]])}).restore(theirs)
        assert (found == values).all()
        ours = gpusaver.save(tmp_path / "ours", {"emb": parts(values + 1, [np.s_[0:4, :], np.s_[4:10, :]])})
        saver.restore(session, ours)
        restored = np.concatenate(session.run(v1.global_variables()), axis)
        assert (restored == values + 1).all()
