"""V1 checkpoints: TensorFlow's files, every kind of value, slices, several files, damage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bundle_tools import GOLDEN, check_every_prefix, expected_tensors, only_our_errors
from golden_values import check_array
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle.slices import slice_key
from gpusaver.bundle.table_writer import TableWriter
from gpusaver.bundle.v1 import V1Bundle
from gpusaver.errors import (
    DataLossError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnimplementedError,
)
from gpusaver.protos import types_pb2
from gpusaver.protos.saved_tensor_slice_pb2 import SavedSliceMeta, SavedTensorSlices
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

P = TensorSlice.parse
FOLDER = GOLDEN / "v1_tf1"


def opened(*names: str) -> V1Bundle:
    return V1Bundle([(name, (FOLDER / name).read_bytes()) for name in names])


def slice_message(part: TensorSlice) -> types_pb2.TensorSliceProto:
    message = types_pb2.TensorSliceProto()
    for extent in part.extents:
        added = message.extent.add()
        if extent is not None:
            added.start, added.length = extent
    return message


def shape_message(shape: tuple[int, ...]) -> types_pb2.TensorShapeProto:
    return types_pb2.TensorShapeProto(dim=[types_pb2.TensorShapeProto.Dim(size=size) for size in shape])


def written(
    spec: TensorSpec, values: dict[str, dict[str, Any]], *, listed: list[str] | None = None, meta: bool = True
) -> bytes:
    """A V1 file with one tensor ``t``; values map slices to the fields of their TensorProto."""
    head = SavedTensorSlices()
    if meta:
        slices = [slice_message(P(text)) for text in (values if listed is None else listed)]
        head.meta.tensor.append(
            SavedSliceMeta(name="t", shape=shape_message(spec.shape), type=spec.dtype, slice=slices)
        )
        head.meta.versions.producer = 1
    items = [(b"", head.SerializeToString())]
    for text, fields in values.items():
        message = SavedTensorSlices()
        message.data.name = "t"
        message.data.slice.CopyFrom(slice_message(P(text)))
        message.data.data.CopyFrom(types_pb2.TensorProto(**fields))
        items.append((slice_key(b"t", P(text)), message.SerializeToString()))
    writer = TableWriter()
    for item in sorted(items):
        writer.add(*item)
    return writer.finish()


def read(data: bytes) -> np.ndarray:
    return V1Bundle([("dir/v1", data)]).get_array(b"t")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["legacy.ckpt"], "legacy.ckpt"),
        (["sh.ckpt-00000-of-00002", "sh.ckpt-00001-of-00002"], "sh.ckpt-QQQQQ-of-00002"),
    ],
)
def test_golden_values(names: list[str], expected: str) -> None:
    bundle = opened(*names)
    tensors = expected_tensors(FOLDER / f"expected-{expected}.json")
    assert list(bundle.tensors()) == sorted(tensors)
    for name, (spec, slices) in bundle.tensors().items():
        assert slices
        check_array(tensors[name], spec, bundle.get_array(name))


def test_the_golden_file_has_slices() -> None:
    spec, slices = opened("legacy.ckpt").tensors()[b"part"]
    assert (spec, [str(part) for part in slices]) == (
        TensorSpec(DataType.float32, (7, 2)),
        ["0,3:0,2", "3,2:0,2", "5,2:0,2"],
    )


VALUES = [
    (DataType.float32, {"float_val": [1.5, -0.0, np.inf]}, [1.5, -0.0, np.inf]),
    (DataType.float64, {"double_val": [1e300, -2.5, 0.1]}, [1e300, -2.5, 0.1]),
    (DataType.int8, {"int_val": [-128, 127, 0]}, [-128, 127, 0]),
    (DataType.int16, {"int_val": [-32768, 1, 2]}, [-32768, 1, 2]),
    (DataType.int32, {"int_val": [-(2**31), 2**31 - 1, 0]}, [-(2**31), 2**31 - 1, 0]),
    (DataType.uint8, {"int_val": [255, 0, 1]}, [255, 0, 1]),
    (DataType.uint16, {"int_val": [65535, 0, 1]}, [65535, 0, 1]),
    (DataType.qint8, {"int_val": [-1, 0, 1]}, [-1, 0, 1]),
    (DataType.quint8, {"int_val": [255, 0, 1]}, [255, 0, 1]),
    (DataType.qint16, {"int_val": [-1, 0, 1]}, [-1, 0, 1]),
    (DataType.quint16, {"int_val": [65535, 0, 1]}, [65535, 0, 1]),
    (DataType.qint32, {"int_val": [-1, 0, 1]}, [-1, 0, 1]),
    (DataType.int64, {"int64_val": [-(2**63), 2**63 - 1, 0]}, [-(2**63), 2**63 - 1, 0]),
    (DataType.bool, {"bool_val": [True, False, True]}, [True, False, True]),
    (DataType.complex64, {"scomplex_val": [1, 2, 3, 4, 5, 6]}, [1 + 2j, 3 + 4j, 5 + 6j]),
    (DataType.complex128, {"dcomplex_val": [1, 2, 3, 4, 5, 6]}, [1 + 2j, 3 + 4j, 5 + 6j]),
    (DataType.float16, {"half_val": [0x3C00, 0xC000, 0x7C00]}, [1.0, -2.0, np.inf]),
    (DataType.bfloat16, {"half_val": [0x3F80, 0xC000, 0x7F80]}, [1.0, -2.0, np.inf]),
    (DataType.string, {"string_val": [b"", b"\0\xff", b"abc"]}, [b"", b"\0\xff", b"abc"]),
]


@pytest.mark.parametrize(("dtype", "fields", "values"), VALUES)
def test_every_kind_of_value(dtype: DataType, fields: dict[str, Any], values: list[Any]) -> None:
    array = read(written(TensorSpec(dtype, (3, 1)), {"-:-": fields}))
    assert (array.dtype, array.shape) == (dtype.numpy_dtype, (3, 1))
    assert array.ravel().tolist() == values
    one_more = {name: [*stored, stored[-1]] for name, stored in fields.items()}
    none = {name: [] for name in fields}
    for wrong in (one_more, none, {"uint32_val": [1, 2, 3]}):
        with pytest.raises(DataLossError, match="dir/v1: slice -:- of tensor t: stored values do not fit shape"):
            read(written(TensorSpec(dtype, (3, 1)), {"-:-": wrong}))


def test_scalars_and_empty_tensors() -> None:
    assert read(written(TensorSpec(DataType.int64, ()), {"": {"int64_val": [7]}})).tolist() == 7
    assert read(written(TensorSpec(DataType.string, (0, 2)), {"-:-": {}})).shape == (0, 2)


def test_slices_of_strings() -> None:
    parts = {"1,2": {"string_val": [b"b", b"c"]}, "0,1": {"string_val": [b"a"]}}
    assert read(written(TensorSpec(DataType.string, (3,)), parts)).tolist() == [b"a", b"b", b"c"]


def test_slices_in_several_files() -> None:
    spec = TensorSpec(DataType.int32, (3,))
    files = [written(spec, {"0,2": {"int_val": [1, 2]}}), written(spec, {"2,1": {"int_val": [3]}})]
    bundle = V1Bundle([("0", files[0]), ("1", files[1])])
    assert bundle.tensors() == {b"t": (spec, (P("0,2"), P("2,1")))}
    assert bundle.get_array(b"t").tolist() == [1, 2, 3]
    with pytest.raises(InvalidArgumentError, match="sufficient slices"):
        V1Bundle([("0", files[0])]).get_array(b"t")
    with pytest.raises(InternalError, match="Overlapping"):
        V1Bundle([("0", files[0]), ("0", files[0])]).get_array(b"t")
    other = written(TensorSpec(DataType.int64, (3,)), {})
    with pytest.raises(DataLossError, match=r"1: tensor t is int64\[3\], but int32\[3\] in another file"):
        V1Bundle([("0", files[0]), ("1", other)])


def test_unknown_names() -> None:
    with pytest.raises(NotFoundError, match=r"Tensor name 'no such' not found in checkpoint files legacy\.ckpt"):
        opened("legacy.ckpt").get_array(b"no such")


def test_a_slice_that_is_listed_but_not_stored() -> None:
    with pytest.raises(DataLossError, match="slice -:- of tensor t is listed but not stored in dir/v1"):
        read(written(TensorSpec(DataType.int32, (2, 2)), {}, listed=["-:-"]))


def test_types_that_were_never_written() -> None:
    with pytest.raises(UnimplementedError, match="V1 checkpoints do not hold uint32"):
        read(written(TensorSpec(DataType.uint32, ()), {"": {"uint32_val": [1]}}))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (TensorSpec(DataType.resource, ()), DataLossError, "dir/v1: tensor t: dtype number 20"),
        (TensorSpec(DataType.float32, (2**40, 2**40)), DataLossError, "more than"),
        (TensorSpec(DataType.float32, (-1,)), DataLossError, "not fully known"),
    ],
)
def test_impossible_metadata(spec: TensorSpec, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(written(spec, {}))


def test_shapes_beyond_numpy() -> None:
    with pytest.raises(UnimplementedError, match="NumPy cannot hold"):
        read(written(TensorSpec(DataType.float32, (0,) + (1,) * 70), {}))


def test_absurd_shapes_cost_nothing() -> None:
    with pytest.raises(DataLossError, match="do not fit"):
        read(written(TensorSpec(DataType.float32, (2**50,)), {"-": {"float_val": [1.0]}}))


def test_a_table_of_another_kind() -> None:
    index = GOLDEN / "basic_f32_tf1" / "model.ckpt-1000.index"
    for data in (index.read_bytes(), written(TensorSpec(DataType.float32, ()), {}, meta=False)):
        with pytest.raises(InvalidArgumentError, match="without the metadata of a V1 checkpoint"):
            read(data)


def test_versions() -> None:
    head = SavedTensorSlices()
    head.meta.versions.min_consumer = 2
    writer = TableWriter()
    writer.add(b"", head.SerializeToString())
    with pytest.raises(InvalidArgumentError, match="dir/v1: min consumer version 2"):
        read(writer.finish())


def test_prefixes() -> None:
    check_every_prefix(read, written(TensorSpec(DataType.int32, (2,)), {"-": {"int_val": [1, 2]}}))


@given(st.binary(max_size=80))
def test_arbitrary_bytes(value: bytes) -> None:
    only_our_errors(lambda: read(value))

    def parse(*items: tuple[bytes, bytes]) -> None:
        writer = TableWriter()
        for item in items:
            writer.add(*item)
        bundle = V1Bundle([("v1", writer.finish())])
        for name in bundle.tensors():
            bundle.get_array(name)

    only_our_errors(lambda: parse((b"", value)))
    meta = SavedTensorSlices()
    meta.meta.tensor.add(name="t", type=DataType.int32, shape=shape_message((2,)), slice=[slice_message(P("-"))])
    only_our_errors(lambda: parse((b"", meta.SerializeToString()), (slice_key(b"t", P("-")), value)))
    only_our_errors(
        lambda: parse(
            (b"", meta.SerializeToString()), (slice_key(b"t", P("-")), b"\x12\x0a\x1a\x08\x3a\x06" + value[:6])
        )
    )
