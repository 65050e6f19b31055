"""What files can look like, between gpusaver and TensorFlow: large, overwritten, tied, of its other formats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_side as tensorflow
from generated import Tensor, differing, few, folder, placed, random_bits, save, tensors
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_side import v1

import gpusaver
from gpusaver import DataType

#: Beyond one chunk of the pipeline (8 MiB), of sizes that are no multiple of a page or of a chunk.
LARGE = {
    "a/row-major": (DataType.float32, (2_300_001,)),
    "b/column-major": (DataType.float64, (1_031, 1_201)),
    "c/interleaved": (DataType.int16, (3, 1_500_007)),
    "d/byte-swapped": (DataType.complex64, (1_111, 1_013)),
    "e/backwards": (DataType.int64, (11, 1_009, 101)),
    "f/unaligned": (DataType.bfloat16, (4_500_001,)),
    "g/read-only": (DataType.uint8, (8_388_609,)),
}
SMALL = {f"small/{number}": (DataType.float32, (number % 7,)) for number in range(500)}


def large_tensors() -> dict[str, Tensor]:
    shapes = LARGE | SMALL
    return {name: Tensor(dtype, random_bits(dtype, shape, len(name))) for name, (dtype, shape) in shapes.items()}


def layout_of(name: str) -> str:
    return name[2:] if name in LARGE else "row-major"


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_large_tensors_by_gpusaver(tmp_path: Path, direct: bool, sharded: bool) -> None:
    expected = large_tensors()
    state: dict[str, Any] = {name: placed(tensor, tensor.array, layout_of(name)) for name, tensor in expected.items()}
    with gpusaver.variables():
        for name in list(LARGE)[::2] if sharded else ():
            state[name] = gpusaver.Variable(state[name], device="cpu:1")
        save(tmp_path / "model", state, direct_io=direct, sharded=sharded)
    assert len(list(tmp_path.glob("*.data-*"))) == 1 + sharded
    assert not differing(expected, tensorflow.read(tmp_path / "model"))


def test_large_tensors_by_tensorflow(tmp_path: Path) -> None:
    expected = large_tensors()
    with tensorflow.Variables(
        expected, {"a/row-major": [np.s_[:1_000_000,], np.s_[1_000_000:2_300_001,]]}
    ) as variables:
        variables.save(tmp_path / "model")
    live = {name: placed(tensor, tensor.garbage(), layout_of(name)) for name, tensor in expected.items()}
    gpusaver.Saver(live).restore(tmp_path / "model")
    assert not differing(expected, live)


def test_tied_arrays(tmp_path: Path) -> None:
    """Bytes that two names share are stored once; TensorFlow reads them under both."""
    table = np.random.default_rng(1).standard_normal((300, 200)).astype(np.float32)
    state = {"decoder": table, "encoder": table, "other": table[:100], "rows": table[:300]}
    prefix = gpusaver.save(tmp_path / "model", state)
    assert os.path.getsize(f"{prefix}.data-00000-of-00001") < 1.5 * table.nbytes
    found = tensorflow.read(prefix)
    assert all((found[name] == array).all() for name, array in state.items())
    tensorflow.save_op(
        tmp_path / "tf", [(name, "", Tensor(DataType.float32, table)) for name in (b"decoder", b"encoder")]
    )
    tied = np.zeros_like(table)
    gpusaver.Saver({"decoder": tied, "encoder": tied}).restore(tmp_path / "tf")
    assert (tied == table).all()


def test_a_checkpoint_that_is_overwritten(tmp_path: Path) -> None:
    """Old and new data files never share a name: an empty shard is added, and taken away again."""
    prefix = tmp_path / "model"
    for number in range(4):
        state = {"a": np.full((5, 7), number, np.float32), "b": np.array([number], np.int64)}
        gpusaver.save(prefix, state, write_meta_graph=False)
        shards = 1 + number % 2
        names = [f"model.data-{shard:05d}-of-{shards:05d}" for shard in range(shards)]
        assert sorted(os.listdir(tmp_path)) == [*names, "model.index"]
        for attempt in range(1 + number % 2):
            found = tensorflow.read(prefix)
            assert all((found[name] == array).all() for name, array in state.items())
            if attempt == 0 and shards == 2:
                assert os.path.getsize(tmp_path / names[1]) == 0
                (tmp_path / names[1]).unlink()  # tools that drop empty files do no harm
    assert shards == 2


def test_sharded_checkpoints_that_are_overwritten(tmp_path: Path) -> None:
    for number in range(3):
        with gpusaver.variables():
            state = [gpusaver.Variable(np.full(9, number + n, np.int32), f"v{n}", device=f"cpu:{n}") for n in range(3)]
            save(tmp_path / "model", state, sharded=True)
        expected = {variable.name: Tensor(DataType.int32, variable.value) for variable in state}
        counts = {path.name[-5:] for path in tmp_path.glob("*.data-*")}
        assert counts == {["00003", "00004", "00005"][number]}  # none that was there, and nothing older is left
        assert not differing(expected, tensorflow.read(tmp_path / "model"))
        with tensorflow.Variables(expected, devices=3) as variables:
            assert not differing(expected, variables.restore(tmp_path / "model"))
            variables.save(tmp_path / "model")  # and by TensorFlow, which leaves the old data files
        assert not differing(expected, gpusaver.load(tmp_path / "model"))


#: What TensorFlow still writes in its first format.
V1_TYPES = [
    DataType[name]
    for name in (
        "float32 float64 int32 uint8 int16 int8 string complex64 int64 bool qint8 quint8 qint32 uint16 float16 "
        "complex128"
    ).split()
]


def quiet(tensor: Tensor) -> Tensor:
    """Without signalling NaNs of 32 bits: protobuf passes the numbers of a V1 file on as doubles, which ends those."""
    if tensor.dtype in (DataType.float32, DataType.complex64):
        numbers = tensor.array.reshape(-1).view(np.float32)
        numbers[np.isnan(numbers)] = np.nan
    return tensor


@few
@given(st.dictionaries(st.sampled_from("abcdef"), tensors(V1_TYPES).map(quiet), min_size=1, max_size=3), st.booleans())
def test_v1_checkpoints(stored: dict[str, Tensor], sharded: bool) -> None:
    with folder() as directory:
        with tensorflow.Variables(stored, devices=1 + sharded, version=v1.train.SaverDef.V1) as variables:
            prefix = variables.save(directory / "model")
        assert ("-?????-of-" in prefix) == sharded
        assert not differing(stored, gpusaver.load(prefix))
        state = {name: gpusaver.Variable(tensor.garbage(), dtype=tensor.dtype) for name, tensor in stored.items()}
        gpusaver.Saver(state).restore(prefix)
        assert not differing(stored, {name: variable.value for name, variable in state.items()})


class Model(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = {"a/b": tf.Variable(np.arange(6, dtype=np.float32).reshape(2, 3)), "k.x": tf.Variable([True])}
        self.layers = [tf.Variable(1, dtype=tf.int64), tf.Variable([b"\0word"])]
        self.half = tf.Variable(tf.constant([1.5, -2], tf.bfloat16), name="half")


def test_object_based_checkpoints(tmp_path: Path) -> None:
    model = Model()
    prefix = tf.train.Checkpoint(model=model, step=tf.Variable(7)).save(str(tmp_path / "ckpt"))
    assert gpusaver.latest_checkpoint(tmp_path) == prefix
    weights = np.zeros((2, 3), np.float32)
    state = {
        "model": {
            "weights": {"a/b": weights, "k.x": np.array([False])},
            "layers": [0, np.array([b""], object)],
            "half": np.zeros(2, ml_dtypes.bfloat16),
        },
        "step": np.int32(0),
    }
    report = gpusaver.Saver(state).restore(prefix)
    assert report.unexpected == ["_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter/.ATTRIBUTES/VARIABLE_VALUE"]
    assert (weights == np.arange(6).reshape(2, 3)).all()
    assert state["model"]["weights"]["k.x"].tolist() == [True]
    assert state["model"]["layers"][0] == 1
    assert state["model"]["layers"][1].tolist() == [b"\0word"]
    assert state["model"]["half"].tolist() == [1.5, -2]
    assert state["step"] == 7
