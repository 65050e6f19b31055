"""TensorProto: against NumPy, against what TensorFlow wrote, and against messages that contradict themselves."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpusaver.errors import InvalidArgumentError, UnimplementedError
from gpusaver.metagraph.tensors import shape_proto, shape_tuple, tensor_array, tensor_proto, zeros_proto
from gpusaver.protos import MetaGraphDef
from gpusaver.protos.types_pb2 import TensorProto, TensorShapeProto
from gpusaver.tensor import DataType

GOLDEN = Path(__file__).parent.parent / "golden"
FIXED = [dtype for dtype in DataType if dtype.is_fixed_size]


def shape(*sizes: int) -> TensorShapeProto:
    return shape_proto(sizes)


@given(
    hnp.arrays(
        hnp.scalar_dtypes().filter(lambda d: d.kind in "biufc" and d.itemsize <= 16),
        hnp.array_shapes(min_dims=0, min_side=0),
    )
)
def test_arrays_come_back(array: np.ndarray) -> None:
    if array.dtype.char in "gG":
        return
    found = tensor_array(tensor_proto(array))
    assert found.shape == array.shape
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()


@pytest.mark.parametrize("dtype", FIXED, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("sizes", [(), (1,), (3, 2), (0, 4)], ids=str)
def test_every_type_comes_back(dtype: DataType, sizes: tuple[int, ...]) -> None:
    array = np.arange(6).astype(dtype.numpy_dtype)[: np.prod(sizes, dtype=int)].reshape(sizes)
    proto = TensorProto.FromString(tensor_proto(array, dtype).SerializeToString())
    assert proto.dtype == dtype
    assert tensor_array(proto).tobytes() == array.tobytes()
    assert tensor_array(proto).dtype == dtype.numpy_dtype


@given(hnp.arrays(object, hnp.array_shapes(min_dims=0, min_side=0), elements=st.binary(max_size=4)))
def test_strings_come_back(array: np.ndarray) -> None:
    found = tensor_array(tensor_proto(array))
    assert found.shape == array.shape
    assert found.tolist() == array.tolist()


@pytest.mark.parametrize("dtype", [*FIXED, DataType.string], ids=lambda dtype: dtype.name)
def test_zeros_of_any_shape_are_small(dtype: DataType) -> None:
    proto = zeros_proto(dtype, (1 << 20, 1 << 20))
    assert proto.ByteSize() < 40
    found = tensor_array(proto)
    assert found.shape == (1 << 20, 1 << 20)
    assert found[5, 5] == (b"" if dtype is DataType.string else dtype.numpy_dtype.type(0))
    assert tensor_array(zeros_proto(dtype, (2, 0))).shape == (2, 0)


def test_values_shorter_than_the_shape_are_filled_with_the_last() -> None:
    proto = TensorProto(dtype=1, tensor_shape=shape(2, 2), float_val=[1, 2])
    assert tensor_array(proto).tolist() == [[1, 2], [2, 2]]
    halves = TensorProto(dtype=14, tensor_shape=shape(2), half_val=[0x3F80])
    assert tensor_array(halves).tolist() == [ml_dtypes.bfloat16(1)] * 2
    pairs = TensorProto(dtype=8, tensor_shape=shape(2), scomplex_val=[1, 2, 3, 4])
    assert tensor_array(pairs).tolist() == [1 + 2j, 3 + 4j]


@pytest.mark.parametrize(
    ("proto", "text"),
    [
        (TensorProto(dtype=1, tensor_shape=shape(3), tensor_content=b"1234"), "expected 12"),
        (TensorProto(dtype=1, tensor_shape=shape(-1), float_val=[1]), "shape"),
        (TensorProto(dtype=1, tensor_shape=TensorShapeProto(unknown_rank=True)), "unknown"),
        (TensorProto(dtype=1, tensor_shape=shape(1), float_val=[1, 2]), "2 values"),
        (TensorProto(dtype=1, tensor_shape=shape(1 << 40), float_val=[1, 2]), "too large"),
        (TensorProto(dtype=1, tensor_shape=shape(1 << 62, 1 << 62), float_val=[1]), "shape"),
        (TensorProto(dtype=1, tensor_shape=shape(1 << 62), float_val=[1]), "shape"),
    ],
)
def test_contradictions(proto: TensorProto, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        tensor_array(proto)


@pytest.mark.parametrize("number", [0, 20, 21, 99, 101])
def test_types_without_values(number: int) -> None:
    with pytest.raises(UnimplementedError, match=str(number)):
        tensor_array(TensorProto(dtype=number))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.array([object()]), [None], np.datetime64("2020-01-01")])
def test_no_tensor(value: object) -> None:
    with pytest.raises(TypeError):
        tensor_proto(value)


@pytest.mark.parametrize("release", ["tf1", "tf2"])
def test_constants_that_tensorflow_wrote(release: str) -> None:
    meta_graph = MetaGraphDef.FromString((GOLDEN / f"meta_graph_{release}" / "net-3.meta").read_bytes())
    constants = {node.name: node.attr["value"].tensor for node in meta_graph.graph_def.node if node.op == "Const"}
    found = {name: tensor_array(proto) for name, proto in constants.items()}
    assert len(found) > 10
    assert found["save/SaveV2/tensor_names"].tolist()[:3] == [b"beta1_power", b"beta2_power", b"global_step"]
    for name, proto in constants.items():
        assert found[name].shape == shape_tuple(proto.tensor_shape)
        again = tensor_proto(found[name], DataType(proto.dtype))
        assert tensor_array(again).tolist() == found[name].tolist()
