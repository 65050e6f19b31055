"""Variables, their collections, and parts of larger tensors."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gpusaver
from gpusaver import DataType, PartitionedVariable, TensorSlice, Variable
from gpusaver.errors import InvalidArgumentError
from gpusaver.variables import current_variables


@pytest.fixture(autouse=True)
def own_collection() -> Iterator[None]:
    with gpusaver.variables():
        yield


def names() -> list[str]:
    return [variable.name for variable in current_variables()]


INITIAL_VALUES = {
    "int": (3, None, DataType.int64, ()),
    "float": (3.0, None, DataType.float64, ()),
    "list": ([1, 2], None, DataType.int64, (2,)),
    "list as float32": ([1, 2], np.float32, DataType.float32, (2,)),
    "name of a type": ([1, 2], "float16", DataType.float16, (2,)),
    "DataType": ([1, 2], DataType.bfloat16, DataType.bfloat16, (2,)),
    "type of ml_dtypes": ([1, 2], ml_dtypes.int4, DataType.int4, (2,)),
    "array": (np.zeros((2, 3), np.int8), None, DataType.int8, (2, 3)),
    "array converted": (np.zeros(3, np.int32), "float64", DataType.float64, (3,)),
    "qint8": (np.zeros(3, np.int8), "qint8", DataType.qint8, (3,)),
    "quint16 of a list": ([1, 2], DataType.quint16, DataType.quint16, (2,)),
    "text": ("abc", None, DataType.string, ()),
    "texts": (["a", "bc"], None, DataType.string, (2,)),
    "bytes as objects": ([b"a\0", b""], DataType.string, DataType.string, (2,)),
}


@pytest.mark.parametrize(("value", "dtype", "expected", "shape"), INITIAL_VALUES.values(), ids=INITIAL_VALUES.keys())
def test_what_a_variable_is(tmp_path: Path, value: Any, dtype: Any, expected: DataType, shape: tuple[int, ...]) -> None:
    variable = Variable(value, name="v", dtype=dtype)
    assert (variable.dtype, variable.shape) == (expected, shape)
    with gpusaver.Saver() as saver:
        prefix = saver.save(tmp_path / "k")
        before = np.array(variable.value)
        variable.assign(np.full_like(before, b"" if before.dtype == object else 0))
        saver.restore(prefix)
    np.testing.assert_array_equal(variable.value, before)
    assert gpusaver.CheckpointReader(prefix).get_variable_to_dtype_map() == {"v": expected}


def test_arrays_are_held_not_copied() -> None:
    array = np.zeros(3)
    variable = Variable(array)
    assert variable.value is array
    other = np.ones(3)
    variable.assign(other)
    assert variable.value is other
    assert variable.trainable


@pytest.mark.parametrize("value", [np.zeros(4), np.zeros((3, 1)), "text", np.zeros(3, np.int32)])
def test_assignments_that_do_not_fit(value: Any) -> None:
    variable = Variable(np.zeros(3), name="v")
    with pytest.raises(InvalidArgumentError, match=r"Variable v: cannot assign .*, expected float64\[3\]"):
        variable.assign(value)
    assert variable.value.tolist() == [0, 0, 0]


def test_a_declared_type_converts_what_is_assigned() -> None:
    variable = Variable([1, 2], dtype="float32")
    variable.assign(np.array([3, 4]))
    assert variable.value.dtype == np.float32


@pytest.mark.parametrize("value", [None, object(), np.zeros(2, "M8[s]"), {"a": 1}])
def test_what_no_variable_can_be(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^v: "):
        Variable(value, name="v")
    assert names() == []


def test_names() -> None:
    for _ in range(3):
        Variable(1)
    assert names() == ["Variable", "Variable_1", "Variable_2"]
    with pytest.raises(ValueError, match=r"Variable_1 .*Variable_1.*give the second another name"):
        Variable(np.zeros(3), name="Variable_1")
    for name, error in (("", ValueError), (b"v", TypeError), (3, TypeError)):
        with pytest.raises(error):
            Variable(1, name=name)  # type: ignore[arg-type]
    assert len(names()) == 3


def test_collections_are_scoped() -> None:
    Variable(1, name="outer")
    with gpusaver.variables():
        assert names() == []
        Variable(2, name="outer")
        Variable(3, name="inner")
        with gpusaver.variables():
            Variable(4, name="inner")
            assert names() == ["inner"]
        assert names() == ["outer", "inner"]
    assert names() == ["outer"]
    gpusaver.reset_default_variables()
    assert names() == []
    Variable(1, name="outer")


def test_the_scope_ends_with_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), gpusaver.variables():
        Variable(1 // 0)
    Variable(1, name="v")
    assert names() == ["v"]


def test_a_scope_is_that_of_its_thread() -> None:
    found: list[list[str]] = []
    Variable(1, name="here")
    thread = threading.Thread(target=lambda: found.append([v for v in names() if v == "here"]))
    thread.start()
    thread.join()
    assert found == [[]]


def test_a_saver_takes_the_variables_there_are(tmp_path: Path) -> None:
    Variable(1, name="a")
    with gpusaver.Saver() as saver:
        Variable(2, name="b")
        assert gpusaver.load(saver.save(tmp_path / "k")) == {"a": 1}
    gpusaver.reset_default_variables()
    with pytest.raises(ValueError, match="No variables"):
        gpusaver.Saver()


def test_one_variable_under_two_names() -> None:
    variable = Variable(1, name="v")
    with pytest.raises(ValueError, match="will be restored with two names: b"):
        gpusaver.Saver({"a": variable, "b": {"c": variable}} | {"b": variable})
    with pytest.raises(ValueError, match="At least two variables have the same name: v"):
        gpusaver.Saver([variable, variable])


def test_lists_of_variables(tmp_path: Path) -> None:
    variables = [Variable(1, name="b"), [Variable(2, name="a")], (Variable(3, name="c"),)]
    prefix = gpusaver.save(tmp_path / "k", variables)
    assert list(gpusaver.load(prefix).items()) == [("a", 2), ("b", 1), ("c", 3)]
    prefix = gpusaver.save(tmp_path / "k", set(current_variables()))
    assert len(gpusaver.load(prefix)) == 3
    for wrong in ([np.zeros(3)], [Variable(1), 3], {"a"}, ["name"]):
        with pytest.raises(TypeError, match=r"has no name; pass a dict"):
            gpusaver.Saver(wrong)


def test_another_name_in_a_dict(tmp_path: Path) -> None:
    variable = Variable(5, name="inside")
    prefix = gpusaver.save(tmp_path / "k", {"scope": {"outside": variable}})
    variable.assign(0)
    with gpusaver.Saver({"scope/outside": variable}) as saver:
        saver.restore(prefix)
    assert variable.value == 5


def test_a_read_only_value_is_replaced(tmp_path: Path) -> None:
    array = np.arange(3)
    array.flags.writeable = False
    variable = Variable(array, name="v")
    with gpusaver.Saver() as saver:
        saver.restore(saver.save(tmp_path / "k"))
    assert variable.value is not array
    assert variable.value.tolist() == [0, 1, 2]


def test_devices(tmp_path: Path) -> None:
    Variable(1, name="a", device="cpu:1")
    Variable(np.zeros(3), name="b", device="cpu")
    Variable(3, name="c", device="cpu:1")
    with gpusaver.Saver(sharded=True) as saver:
        reader = gpusaver.CheckpointReader(saver.save(tmp_path / "k"))
    assert [reader.find(name).entry.shard for name in "abc"] == [1, 0, 1]  # type: ignore[union-attr]
    for wrong in ("cpu:x", "tpu:0", "", "cpu:"):
        with pytest.raises(ValueError, match="device"):
            Variable(1, device=wrong)


WHOLE = np.arange(12.0).reshape(4, 3)


def parts(whole: np.ndarray[Any, Any], *rows: int, name: str | None = None) -> list[PartitionedVariable]:
    """Cut at these rows."""
    borders = [0, *rows, len(whole)]
    return [
        PartitionedVariable(whole.shape, np.s_[start:stop, :], whole[start:stop].copy(), name)
        for start, stop in itertools.pairwise(borders)
    ]


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("cuts", [(1,), (1, 2, 3), ()])
@pytest.mark.parametrize("other_cuts", [(2,), (1, 2), ()])
def test_any_partition_into_any_other(tmp_path: Path, as_dict: bool, cuts: Any, other_cuts: Any) -> None:
    saved = parts(WHOLE, *cuts, name="p")
    prefix = gpusaver.save(tmp_path / "k", {"p": saved} if as_dict else saved)
    np.testing.assert_array_equal(gpusaver.load(prefix)["p"], WHOLE)
    others = parts(np.zeros_like(WHOLE), *other_cuts, name="p")
    with gpusaver.Saver(others) as saver:
        report = saver.restore(prefix)
    np.testing.assert_array_equal(np.concatenate([part.value for part in others]), WHOLE)
    assert (report.restored, report.unexpected) == (["p"], [])


def test_some_parts_only(tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "k", parts(WHOLE, 1, 3, name="p")[:2])
    with pytest.raises(InvalidArgumentError, match="sufficient slices for partitioned tensor p"):
        gpusaver.load(prefix)
    (target,) = parts(np.zeros((4, 3)), 1, name="p")[:1]
    with gpusaver.Saver([target]) as saver:
        saver.restore(prefix)
    np.testing.assert_array_equal(target.value, WHOLE[:1])


def test_one_part_alone_in_a_dict(tmp_path: Path) -> None:
    (part, _) = parts(WHOLE, 2)
    state = {"p": part}
    prefix = gpusaver.save(tmp_path / "k", state)
    part.value[...] = 0
    with gpusaver.Saver(state) as saver:
        saver.restore(prefix)
    np.testing.assert_array_equal(part.value, WHOLE[:2])


def test_a_read_only_part_is_replaced(tmp_path: Path) -> None:
    saved = parts(WHOLE, 2, name="p")
    saved[1].value.flags.writeable = False
    with gpusaver.Saver(saved) as saver:
        prefix = saver.save(tmp_path / "k")
        old = saved[1].value
        saver.restore(prefix)
    assert saved[1].value is not old
    np.testing.assert_array_equal(saved[1].value, WHOLE[2:])


PARTS_REFUSED = {
    "overlap": (
        lambda: [*parts(WHOLE, 2, name="p"), PartitionedVariable((4, 3), np.s_[1:3, :], WHOLE[1:3], "p")],
        InvalidArgumentError,
        "Overlapping slices of tensor p",
    ),
    "twice the whole": (lambda: [*parts(WHOLE, name="p"), *parts(WHOLE, name="p")], ValueError, "duplicate key: p"),
    "two types": (
        lambda: [parts(WHOLE, 2, name="p")[0], parts(WHOLE.astype("f4"), 2, name="p")[1]],
        InvalidArgumentError,
        "Slices of p disagree: float32 and float64",
    ),
    "two shapes": (
        lambda: [parts(WHOLE, 2, name="p")[0], parts(WHOLE.T.copy(), 2, name="p")[1]],
        ValueError,
        "Slices must all be from the same tensor: p",
    ),
    "with a variable": (
        lambda: [*parts(WHOLE, 2, name="p"), Variable(1, name="p")],
        ValueError,
        "Mixing slices and non-slices with the same name: p",
    ),
    "in a list with others": (lambda: {"p": [*parts(WHOLE, 2), 3]}, ValueError, "p: Slices must all be slices"),
    "nameless in a list": (lambda: parts(WHOLE, 2), TypeError, "in a list needs a name"),
}


@pytest.mark.parametrize(("make", "error", "message"), PARTS_REFUSED.values(), ids=PARTS_REFUSED.keys())
def test_parts_that_do_not_go_together(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gpusaver.Saver(make())


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"slice 0,2:- of \[4, 3\] has shape \[2, 3\], the array has \[3, 3\]"
    ):
        PartitionedVariable((4, 3), np.s_[0:2, :], WHOLE[:3])
    with pytest.raises(InvalidArgumentError, match="out of bounds"):
        PartitionedVariable((4, 3), TensorSlice(((3, 2), None)), WHOLE[:2])
    with pytest.raises(InvalidArgumentError, match="step 2"):
        PartitionedVariable((4, 3), np.s_[::2, :], WHOLE[::2])
    with pytest.raises(TypeError, match="cannot be stored"):
        PartitionedVariable((4, 3), np.s_[0:2, :], "text of the shape".split())
    with pytest.raises(TypeError, match="strings stored in slices"):
        PartitionedVariable((4,), np.s_[0:2], np.array([b"a", b"b"]), "p")


def test_one_slice_is_enough_for_one_dimension() -> None:
    part = PartitionedVariable((4,), np.s_[1:3], np.zeros(2))
    assert part.slice == TensorSlice(((1, 2),))
    assert repr(part) == "<gpusaver.PartitionedVariable None [4] 1,2>"


def test_a_part_that_fits_no_longer(tmp_path: Path) -> None:
    saved = parts(WHOLE, 2, name="p")
    with gpusaver.Saver(saved) as saver:
        saved[0].value = WHOLE[:1]
        with pytest.raises(InvalidArgumentError, match=r"p: slice 0,2:- .* has shape \[2, 3\], the array has \[1, 3\]"):
            saver.save(tmp_path / "k")
        saved[0].value = WHOLE[:2] + 1
        np.testing.assert_array_equal(gpusaver.load(saver.save(tmp_path / "k"))["p"][:2], WHOLE[:2] + 1)


def test_another_full_shape_on_restore(tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "k", parts(WHOLE, 2, name="p"))
    with (
        gpusaver.Saver(parts(np.zeros((5, 3)), 2, name="p"), reshape=True) as saver,
        pytest.raises(InvalidArgumentError, match=r"expected shape \[5, 3\] does not equal stored shape \[4, 3\]"),
    ):
        saver.restore(prefix)
