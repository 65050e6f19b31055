"""Which values can be saved, and where a restored value goes: the table of gpusaver/device/admission.py."""

from __future__ import annotations

import array
import ctypes
import datetime
import decimal
import fractions
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gpusaver
from gpusaver.device import HOST, admit
from gpusaver.errors import InvalidArgumentError
from gpusaver.reader import CheckpointReader
from gpusaver.tensor import DataType, TensorSpec


def save(directory: Path, state: dict[str, Any]) -> str:
    with gpusaver.Saver(state) as saver:
        return saver.save(directory / "k")


def restore(prefix: str, state: dict[str, Any], **options: Any) -> gpusaver.RestoreReport:
    with gpusaver.Saver(state) as saver:
        return saver.restore(prefix, **options)


def offsets(prefix: str) -> dict[str, tuple[int, int]]:
    """Where the bytes of each tensor are stored: shard and offset."""
    reader = CheckpointReader(prefix)
    entries = {name: reader.find(name).entry for name in reader}  # type: ignore[union-attr]
    return {name: (entry.shard, entry.offset) for name, entry in entries.items()}


ELEMENTS = np.arange(1, 25).reshape(4, 6)


def fortran() -> Any:
    return np.asfortranarray(ELEMENTS.astype("<f4"))


def every_second() -> Any:
    return np.arange(96, dtype="<i2").reshape(8, 12)[::2, ::2]


def reversed_both() -> Any:
    return ELEMENTS.astype("<f8")[::-1, ::-1]


def transposed() -> Any:
    return np.arange(24, dtype="<i8").reshape(2, 3, 4).transpose(1, 2, 0)


def big_endian() -> Any:
    return ELEMENTS.astype(">f8")


def big_endian_strided() -> Any:
    return np.arange(48, dtype=">i4").reshape(4, 12)[:, ::-2]


def field_of_a_structure() -> Any:
    return np.zeros(5, [("x", "<f4"), ("y", "<i4")])["y"]


def imaginary_part() -> Any:
    return (np.arange(6) * 1j).imag


def diagonal() -> Any:
    return np.einsum("ii->i", np.arange(16.0).reshape(4, 4))


def beyond_one_chunk() -> Any:
    return np.asfortranarray(np.arange(1_500_000, dtype="<f8").reshape(1000, 1500))


WRITABLE = [
    *(fortran, every_second, reversed_both, transposed, big_endian, big_endian_strided, field_of_a_structure),
    *(imaginary_part, diagonal, beyond_one_chunk),
]


@pytest.mark.parametrize("make", WRITABLE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("verify", ["during", "before"])
def test_any_memory_is_saved_and_restored_in_place(tmp_path: Path, make: Any, verify: Any) -> None:
    value = make()
    state = {"w": value}
    expected = value.copy()
    prefix = save(tmp_path, state)
    np.testing.assert_array_equal(gpusaver.load(prefix)["w"], expected)
    assert gpusaver.load(prefix)["w"].dtype == expected.dtype.newbyteorder("=")
    value[...] = 0
    report = restore(prefix, state, verify=verify)
    assert state["w"] is value
    np.testing.assert_array_equal(value, expected)
    assert report.values == {}


@pytest.mark.parametrize("name", [*(f"float{bits}" for bits in (16, 32, 64)), "complex64", "complex128", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3)])
def test_numpy_types_and_shapes(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    value = np.ones(shape, name)
    prefix = save(tmp_path, {"w": value})
    assert CheckpointReader(prefix).find("w").spec == TensorSpec(DataType[name], shape)  # type: ignore[union-attr]
    other = np.zeros(shape, name)
    restore(prefix, {"w": other})
    np.testing.assert_array_equal(other, value)


@pytest.mark.parametrize(
    "name",
    [
        *("bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz"),
        *("int4", "uint4", "int2", "uint2", "float4_e2m1fn"),
    ],
)
def test_types_of_ml_dtypes(tmp_path: Path, name: str) -> None:
    value = np.array([[0, 1], [1, 0]], getattr(ml_dtypes, name))
    prefix = save(tmp_path, {"w": value, "t": value.T[::-1], "s": value[0, 1]})
    assert {spec.name for spec in CheckpointReader(prefix).get_variable_to_dtype_map().values()} == {name}
    state = {"w": np.zeros_like(value), "t": np.zeros((4, 2), value.dtype)[::2], "s": value[0, 0]}
    restore(prefix, state)
    assert state["w"].tobytes() == value.tobytes()
    np.testing.assert_array_equal(state["t"], value.T[::-1])
    assert state["s"] == value[0, 1]
    assert type(state["s"]) is type(value[0, 1])


def test_broadcast_arrays_are_saved_and_refused(tmp_path: Path) -> None:
    value = np.broadcast_to(np.arange(3.0), (4, 3))
    prefix = save(tmp_path, {"w": value})
    np.testing.assert_array_equal(gpusaver.load(prefix)["w"], value)
    target = np.lib.stride_tricks.as_strided(np.zeros(3), (4, 3), (0, 8))
    with pytest.raises(InvalidArgumentError, match=r"w: several elements share one place"):
        restore(prefix, {"w": target})
    assert not target.any()


def test_a_broadcast_dimension_of_one_is_no_harm(tmp_path: Path) -> None:
    prefix = save(tmp_path, {"w": np.full((1, 3), 7.0)})
    target = np.lib.stride_tricks.as_strided(np.zeros(3), (1, 3), (0, 8))
    restore(prefix, {"w": target})
    assert (target == 7).all()


def test_windows_that_overlap_are_refused(tmp_path: Path) -> None:
    value = np.lib.stride_tricks.sliding_window_view(np.arange(6.0), 3)
    prefix = save(tmp_path, {"w": value})
    np.testing.assert_array_equal(gpusaver.load(prefix)["w"], value)
    base = np.zeros(6)
    with pytest.raises(InvalidArgumentError, match=r"w: several elements share one place"):
        restore(prefix, {"w": np.lib.stride_tricks.sliding_window_view(base, 3, writeable=True)})
    assert not base.any()
    apart = np.lib.stride_tricks.sliding_window_view(base, 3, writeable=True)[::3]
    restore(save(tmp_path, {"w": np.arange(6.0).reshape(2, 3)}), {"w": apart})
    np.testing.assert_array_equal(base, np.arange(6))


@pytest.mark.parametrize("second", [np.s_[1:4], np.s_[3:0:-1], np.s_[::2]])
def test_arrays_that_overlap_partly_are_saved_and_refused(tmp_path: Path, second: Any) -> None:
    base = np.arange(5.0)
    state = {"a": base[0:3], "b": base[second]}
    prefix = save(tmp_path, state)
    np.testing.assert_array_equal(gpusaver.load(prefix)["b"], base[second])
    with pytest.raises(InvalidArgumentError, match=r"a and b overlap"):
        restore(prefix, state)
    np.testing.assert_array_equal(base, np.arange(5))


def test_an_array_and_the_whole_of_which_it_is_a_part(tmp_path: Path) -> None:
    base = np.arange(5.0)
    state = {"a": base, "b": base[1:3]}
    with pytest.raises(InvalidArgumentError, match=r"a and b overlap"):
        restore(save(tmp_path, state), state)


def test_interleaved_views_do_not_overlap(tmp_path: Path) -> None:
    base = np.arange(12.0).reshape(6, 2)
    state = {"even": base[:, 0], "odd": base[:, 1], "none": base[:, :0]}
    prefix = save(tmp_path, state)
    base[...] = 0
    restore(prefix, state)
    np.testing.assert_array_equal(base, np.arange(12.0).reshape(6, 2))


def numpy_twins() -> tuple[Any, Any]:
    array = np.arange(10.0)
    return array, array


def equal_views() -> tuple[Any, Any]:
    array = np.arange(20.0)
    return array[2:12:2], array[2:12:2]


def view_and_owner() -> tuple[Any, Any]:
    array = np.arange(10.0)
    return array, array[:]


def owner_and_foreign() -> tuple[Any, Any]:
    array = np.arange(10.0)
    return memoryview(array), array


def foreign_twins() -> tuple[Any, Any]:
    memory = bytearray(range(10))
    return memory, np.frombuffer(memory, np.uint8)


@pytest.mark.parametrize("make", [numpy_twins, equal_views, view_and_owner, owner_and_foreign, foreign_twins])
def test_tied_arrays_are_stored_once_and_restored(tmp_path: Path, make: Any) -> None:
    first, second = make()
    state = {"a": first, "b": np.arange(3), "c": second}
    prefix = save(tmp_path, state)
    found = offsets(prefix)
    assert found["a"] == found["c"] != found["b"]
    expected = np.array(second)
    second[...] = 0
    restore(prefix, state)
    np.testing.assert_array_equal(np.asarray(first), expected)
    apart = {"a": np.zeros_like(expected), "b": np.zeros(3, int), "c": np.zeros_like(expected)}
    restore(prefix, apart)
    np.testing.assert_array_equal(apart["a"], apart["c"])


def test_equal_arrays_are_not_tied(tmp_path: Path) -> None:
    prefix = save(tmp_path, {"a": np.arange(3), "b": np.arange(3)})
    assert len(set(offsets(prefix).values())) == 2


def test_one_memory_seen_as_two_types_is_not_tied(tmp_path: Path) -> None:
    array = np.arange(3, dtype="<i4")
    prefix = save(tmp_path, {"a": array, "b": array.view("<f4"), "c": array.reshape(3, 1)})
    assert len(set(offsets(prefix).values())) == 3


@pytest.mark.parametrize("seen_as", [lambda array: array, lambda array: array[:], memoryview])
def test_tied_arrays_want_equal_values(tmp_path: Path, seen_as: Any) -> None:
    same = save(tmp_path, {"a": np.arange(3.0), "b": np.arange(3.0)})
    array = np.zeros(3)
    restore(same, {"a": array, "b": seen_as(array)})
    np.testing.assert_array_equal(array, np.arange(3))
    different = save(tmp_path, {"a": np.arange(3.0), "b": np.ones(3)})
    with pytest.raises(InvalidArgumentError, match=r"a and b are one array.*different values"):
        restore(different, {"a": array, "b": seen_as(array)})
    np.testing.assert_array_equal(array, np.arange(3))


def test_an_array_that_overlaps_one_of_another_library(tmp_path: Path) -> None:
    array = np.arange(3.0)
    state = {"a": array, "b": memoryview(array)[1:]}
    with pytest.raises(InvalidArgumentError, match=r"a and b overlap"):
        restore(save(tmp_path, state), state)


def test_read_only_arrays_are_replaced(tmp_path: Path) -> None:
    value = np.arange(6.0).reshape(2, 3).T
    value.flags.writeable = False
    old = np.zeros((3, 2))
    old.flags.writeable = False
    state = {"deep": [{"w": old}]}
    report = restore(save(tmp_path, {"deep": [{"w": value}]}), state)
    new = state["deep"][0]["w"]
    assert new is not old
    assert new is report.values["deep/0/w"]
    assert new.flags.writeable
    np.testing.assert_array_equal(new, value)
    assert not old.any()


def test_memory_mapped_files(tmp_path: Path) -> None:
    written = np.memmap(tmp_path / "m", "<f4", "w+", shape=(3, 4))
    written[...] = ELEMENTS[:3, :4]
    prefix = save(tmp_path, {"w": written})
    written[...] = 0
    restore(prefix, {"w": written})
    written.flush()
    np.testing.assert_array_equal(np.fromfile(tmp_path / "m", "<f4").reshape(3, 4), ELEMENTS[:3, :4])
    state = {"w": np.memmap(tmp_path / "m", "<f4", "r", shape=(3, 4))}
    restore(prefix, state)
    assert type(state["w"]) is np.ndarray


def test_subclasses_of_numpy_arrays(tmp_path: Path) -> None:
    class Mine(np.ndarray[Any, Any]):
        pass

    value = np.arange(4.0).view(Mine)
    state = {"w": value}
    prefix = save(tmp_path, state)
    value[...] = 0
    restore(prefix, state)
    assert state["w"] is value
    np.testing.assert_array_equal(value, np.arange(4))


@pytest.mark.parametrize(
    ("make", "dtype", "values"),
    [
        (lambda: array.array("d", [1.5, 2.5]), DataType.float64, [1.5, 2.5]),
        (lambda: array.array("b", [-1, 2]), DataType.int8, [-1, 2]),
        (lambda: bytearray(b"\1\2\3"), DataType.uint8, [1, 2, 3]),
        (lambda: memoryview(bytearray(b"\1\2\3\4"))[::2], DataType.uint8, [1, 3]),
        (lambda: (ctypes.c_int32 * 3)(4, 5, 6), DataType.int32, [4, 5, 6]),
        (lambda: ctypes.c_double(2.5), DataType.float64, 2.5),
    ],
    ids=["array.array of doubles", "array.array of bytes", "bytearray", "memoryview", "ctypes array", "ctypes number"],
)
def test_buffers(tmp_path: Path, make: Any, dtype: DataType, values: Any) -> None:
    value = make()
    state = {"w": value}
    prefix = save(tmp_path, state)
    assert CheckpointReader(prefix).get_variable_to_dtype_map() == {"w": dtype}
    np.asarray(memoryview(value))[...] = 0
    restore(prefix, state)
    assert state["w"] is value
    np.testing.assert_array_equal(np.asarray(memoryview(value)), values)


def test_anonymous_maps(tmp_path: Path) -> None:
    with mmap.mmap(-1, 4096) as memory:
        memory[:3] = b"abc"
        prefix = save(tmp_path, {"w": memory})
        memory[:3] = b"..."
        restore(prefix, {"w": memory})
        assert memory[:3] == b"abc"


class Color(ctypes.Structure):
    _fields_ = (("red", ctypes.c_uint8),)


REFUSED = {
    "None in an object array": np.array([1, None], object),
    "numbers in an object array": np.array([b"a", 1], object),
    "text and bytes": np.array([b"a", "b"], object),
    "datetime64": np.array(["2020-01-01"], "M8[D]"),
    "timedelta64": np.array([3], "m8[s]"),
    "structured": np.zeros(2, [("x", "<f4")]),
    "record": np.zeros(2, [("x", "<f4")])[0],
    "raw": np.zeros(2, "V8"),
    "long double": np.zeros(2, np.longdouble),
    "scalar datetime64": np.datetime64("2020-01-01"),
    "scalar long double": np.longdouble(1),
    "masked": np.ma.masked_array([1.0, 2.0], [False, True]),
    "structure of ctypes": Color(),
    "characters": array.array("u", "ab"),
    "a class": np.ndarray,
    "a class of arrays": bytearray,
    "complex object": object(),
    "date": datetime.date(2020, 1, 1),
    "Decimal": decimal.Decimal(1),
    "Fraction": fractions.Fraction(1, 3),
    "generator": np.random.default_rng(),
    "function": test_anonymous_maps,
    "dtype": np.dtype("f4"),
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_stored_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^deep/0/x: "):
        gpusaver.Saver({"deep": [{"x": value}], "fine": np.zeros(3)})


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_integers_beyond_int64_are_named(value: int) -> None:
    with pytest.raises(OverflowError, match="deep/x"):
        gpusaver.Saver({"deep": {"x": value}})


def test_an_array_of_text_is_as_wide_as_before_or_wider(tmp_path: Path) -> None:
    """Else what is assigned to it later would be cut off without a word."""
    prefix = save(tmp_path, {"short": np.array(["a"], "U10"), "long": np.array([b"abcdef"]), "none": np.zeros(0, "U4")})
    state = {"short": np.array(["?"], "U10"), "long": np.array([b"?"]), "none": np.zeros(0, "U4")}
    restore(prefix, state)
    assert [state[name].dtype.str for name in ("short", "long", "none")] == ["<U10", "|S6", "<U4"]
    assert (state["short"][0], state["long"][0]) == ("a", b"abcdef")


def test_arrays_of_python_strings(tmp_path: Path) -> None:
    texts = np.array([["a", "\N{SNOWMAN}"], ["", "\udcff"]], object)
    prefix = save(tmp_path, {"texts": texts, "bytes": np.array([b"", b"\xff\0"], object)})
    state = {"texts": np.full((2, 2), "", object), "bytes": np.array([b"", b""], object)}
    restore(prefix, state)
    assert state["texts"].tolist() == texts.tolist()
    assert state["bytes"].tolist() == [b"", b"\xff\0"]


def test_admit_says_what_a_value_is() -> None:
    plain = np.zeros(3)
    assert admit(plain, "w")[:3] == (HOST, plain, TensorSpec(DataType.float64, (3,)))
    assert admit(plain, "w").rebuild is None
    assert admit(np.zeros(3, np.int8), "w", DataType.qint8).spec.dtype is DataType.qint8
    with pytest.raises(TypeError, match="w: declared qint8"):
        admit(np.zeros(3, np.float32), "w", DataType.qint8)
