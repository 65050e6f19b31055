"""Nested dicts and lists as variables: their names, and where restored values go."""

from __future__ import annotations

import collections
import importlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpusaver
from gpusaver.errors import InvalidArgumentError
from gpusaver.variables import NameOrder, flatten


def names(var_list: Any) -> list[str]:
    return [leaf.name for leaf in flatten(var_list)]


def test_names_are_paths() -> None:
    state = {"b": {"y": [1, [2, 3]], "x": {"z": 4}}, "a": 5, "c": [], "d": {}}
    assert names(state) == ["a", "b/x/z", "b/y/0", "b/y/1/0", "b/y/1/1"]


def test_names_are_sorted_as_bytes() -> None:
    assert names({"a-b": 1, "a": {"b": 1}, "a0": 1, "Z": 1, "\u00e9": 1, "\U0001f600": 1, "\uffff": 1}) == [
        *("Z", "a-b", "a/b", "a0", "\u00e9", "\uffff", "\U0001f600")
    ]


def test_a_saver_sorts_names_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times: list[list[str]] = []
    module = importlib.import_module("gpusaver.variables")  # its name is also that of a function
    sort = module._sorting
    monkeypatch.setattr(module, "_sorting", lambda names: times.append(names) or sort(names))
    state = {name: np.array([number]) for number, name in enumerate("cbad")}
    with gpusaver.Saver(state) as saver:
        prefixes = [saver.save(tmp_path / "k", global_step=step) for step in range(2)]
        state["c"], state["a"] = state["a"], state["c"]
        for prefix in prefixes:
            saver.restore(prefix)
    assert times == [["c", "b", "a", "d"]]
    assert [state[name].item() for name in "cbad"] == [0, 1, 2, 3]


@given(st.data())
def test_a_dict_may_change_its_order(data: st.DataObject) -> None:
    named = data.draw(st.dictionaries(st.text("aA/\u00e9\U0001f600\uffff", min_size=1), st.integers()))
    order = NameOrder()
    for _ in range(4):
        state = dict(data.draw(st.permutations(list(named.items()))))
        state.update({name: data.draw(st.integers()) for name in state})
        leaves = flatten(state, order)
        assert leaves.names == sorted(state, key=str.encode)
        assert leaves.keys == leaves.names
        assert leaves.values == [state[name] for name in leaves.names]


def test_slices_that_were_replaced_by_whole_tensors_of_one_name(tmp_path: Path) -> None:
    var_list: list[Any] = [
        gpusaver.PartitionedVariable([4], part, np.zeros(2), "w") for part in (np.s_[0:2], np.s_[2:4])
    ]
    saver = gpusaver.Saver(var_list)
    for number in range(2):
        with gpusaver.variables():
            var_list[number] = gpusaver.Variable(np.zeros(4), name="w")
    with saver, pytest.raises(ValueError, match="At least two variables have the same name: w"):
        saver.save(tmp_path / "k")


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, collections.UserDict, collections.ChainMap])
def test_kinds_of_mappings(tmp_path: Path, kind: Any) -> None:
    state = kind({"w": np.arange(3), "n": kind({"x": 1})})
    prefix = gpusaver.save(tmp_path / "k", state)
    state["n"]["x"] = 0
    with gpusaver.Saver(state) as saver:
        saver.restore(prefix)
    assert state["n"]["x"] == 1


def test_defaultdicts_get_nothing_new() -> None:
    state = collections.defaultdict(list, {"a": [1]})
    assert names(state) == ["a/0"]
    assert list(state) == ["a"]


REFUSED = {
    "tuple": ({"a": [(1, 2)]}, TypeError, "^a/0: a tuple cannot take restored values"),
    "tuple of arrays": ({"a": (np.zeros(3),)}, TypeError, "^a: a tuple"),
    "named tuple": ({"a": collections.namedtuple("P", "x")(1)}, TypeError, "^a: a P cannot take"),
    "set": ({"a": {1, 2}}, TypeError, "^a: a set"),
    "None": ({"a": {"b": None}}, TypeError, "^a/b: None cannot be stored"),
    "read-only mapping": ({"a": types.MappingProxyType({"b": 1})}, TypeError, "^a: mappingproxy"),
    "number as key": ({"a": {1: 2}}, TypeError, "Name is not a string: key 1 under 'a/'"),
    "bytes as key": ({b"a": 1}, TypeError, "Name is not a string: key b'a' at the top"),
    "tuple as key": ({("a", "b"): 1}, TypeError, "Name is not a string"),
    "empty name": ({"": 1}, ValueError, "the empty name is reserved"),
    "lone surrogate": ({"\ud800": 1, "b": 2}, ValueError, r"'\\ud800' cannot be stored as UTF-8"),
    "one name by two paths": ({"a/b": 1, "a": {"b": 2}}, ValueError, "two variables have the same name: a/b"),
    "list and dict": ({"a": [1], "a/0": 2}, ValueError, "two variables have the same name: a/0"),
}


@pytest.mark.parametrize(("state", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_container_must_not_hold(state: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gpusaver.Saver(state)


def test_cycles() -> None:
    state: dict[str, Any] = {"a": {"b": []}}
    state["a"]["b"].append(state["a"])
    with pytest.raises(ValueError, match=r"^a/b/0: a container that holds itself"):
        gpusaver.Saver(state)
    by_the_top: dict[str, Any] = {"w": 1}
    by_the_top["self"] = {"again": by_the_top}
    with pytest.raises(ValueError, match="holds itself"):
        gpusaver.Saver(by_the_top)


def test_one_container_under_two_names_is_no_cycle(tmp_path: Path) -> None:
    shared = {"w": np.arange(3.0), "n": 7}
    state = {"x": shared, "y": shared}
    with gpusaver.Saver(state) as saver:
        prefix = saver.save(tmp_path / "k")
        shared["w"][...] = 0
        shared["n"] = 0
        saver.restore(prefix)
    assert shared["n"] == 7
    np.testing.assert_array_equal(shared["w"], np.arange(3))


def test_one_place_does_not_take_two_values(tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "k", {"x": {"n": 1}, "y": {"n": 2}})
    shared = {"n": 0}
    with gpusaver.Saver({"x": shared, "y": shared}) as saver, pytest.raises(InvalidArgumentError, match="x/n and y/n"):
        saver.restore(prefix)
    assert shared == {"n": 0}


LEAVES = {
    "int": (7, -8),
    "large int": (2**63 - 1, -(2**63)),
    "bool": (True, False),
    "float": (2.5, float("-inf")),
    "complex": (1 + 2j, 0j),
    "str": ("caf\u00e9 \udcff\0", ""),
    "bytes": (b"\xff\0", b""),
    "NumPy float": (np.float32(2.5), np.float32(0)),
    "NumPy double": (np.float64(2.5), np.float64(0)),
    "NumPy complex": (np.complex128(2j), np.complex128(0)),
    "NumPy bool": (np.bool_(True), np.bool_(False)),
    "NumPy int": (np.uint8(255), np.uint8(0)),
    "NumPy str": (np.array(["a", "bc"]), np.array(["", "z"])),
    "NumPy bytes": (np.array([b"a", b"bc"]), np.array([b"", b"z"])),
    "objects": (np.array([[b"x", b""]], object), np.array([[b"", b"?"]], object)),
    "no strings": (np.zeros((0, 2), object), np.zeros((0, 2), object)),
}


@pytest.mark.parametrize(("value", "other"), LEAVES.values(), ids=LEAVES.keys())
def test_values_are_replaced_in_their_container(tmp_path: Path, value: Any, other: Any) -> None:
    prefix = gpusaver.save(tmp_path / "k", {"d": {"x": value}, "l": [[0, value]]})
    inner, outer = [1, other], {"x": other}
    state = {"d": outer, "l": [inner]}
    with gpusaver.Saver(state) as saver:
        report = saver.restore(prefix)
    assert state["d"] is outer
    assert state["l"][0] is inner
    for found in (outer["x"], inner[1], report.values["d/x"], report.values["l/0/1"]):
        np.testing.assert_array_equal(found, value)
        assert type(found) is type(value)
    assert report.values.keys() == {"d/x", "l/0/0", "l/0/1"}
    assert report.restored == ["d/x", "l/0/0", "l/0/1"]


def test_kinds_that_share_a_value_stay_apart(tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "k", {"x": True})
    with gpusaver.Saver({"x": 0}) as saver, pytest.raises(InvalidArgumentError, match=r"expected dtype int64.*bool"):
        saver.restore(prefix)


def test_str_and_bytes_are_told_apart_by_the_variable(tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "k", {"x": "caf\u00e9"})
    state = {"x": b""}
    with gpusaver.Saver(state) as saver:
        saver.restore(prefix)
    assert state["x"] == "caf\u00e9".encode()


def test_containers_are_looked_through_anew(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": np.zeros(3), "l": [1, {"x": 2}]}
    with gpusaver.Saver(state) as saver:
        first = saver.save(tmp_path / "k", 1)
        state["w"] = state["w"] + 5
        state["l"] = [10, {"x": 20}]
        second = saver.save(tmp_path / "k", 2)
        assert gpusaver.load(second)["w"].tolist() == [5, 5, 5]
        new = state["w"] = np.ones((3,))
        saver.restore(first)
    assert state["w"] is new
    assert new.tolist() == [0, 0, 0]
    assert state["l"] == [1, {"x": 2}]


@pytest.mark.parametrize(
    "value", [np.zeros((2, 2)), np.zeros(3, np.int8), 5, "text", np.zeros(3)[::-1], np.zeros(6)[::2], b"x" * 300_000]
)
def test_a_value_of_another_kind_is_saved_as_what_it_is(tmp_path: Path, value: Any) -> None:
    """Only the names are fixed; a plan of an earlier save must not be used for it."""
    state: dict[str, Any] = {"a": np.zeros(3), "w": np.zeros(3), "z": np.arange(3)}
    with gpusaver.Saver(state) as saver:
        for round_ in range(3):
            state["w"] = value if round_ % 2 else np.ones(3)
            found = gpusaver.load(saver.save(tmp_path / "k"))
            expected = state["w"].encode() if isinstance(state["w"], str) else state["w"]
            np.testing.assert_array_equal(found["w"], expected)
            np.testing.assert_array_equal(found["z"], np.arange(3))


@pytest.mark.parametrize("value", ["text", 1.5, np.float64(1.5), b""])
def test_a_number_in_the_place_of_a_scalar_of_another_type(tmp_path: Path, value: Any) -> None:
    """To NumPy, None and the type float64 are equal."""
    state: dict[str, Any] = {"w": value}
    with gpusaver.Saver(state) as saver:
        saver.save(tmp_path / "k")
        state["w"] = np.array(2.5)
        assert gpusaver.load(saver.save(tmp_path / "k")) == {"w": 2.5}


def test_arrays_that_become_tied_and_part_again(tmp_path: Path) -> None:
    state = {"a": np.arange(3.0), "b": np.arange(3.0) + 1}
    with gpusaver.Saver(state) as saver:
        saver.save(tmp_path / "k")
        own = state["b"]
        state["b"] = state["a"]
        assert gpusaver.load(saver.save(tmp_path / "k"))["b"].tolist() == [0, 1, 2]
        state["b"] = own
        assert gpusaver.load(saver.save(tmp_path / "k"))["b"].tolist() == [1, 2, 3]


def test_a_variable_in_the_place_of_an_array(tmp_path: Path) -> None:
    """Same name, same NumPy type, same shape, and still not the same to store."""
    state: dict[str, Any] = {"w": np.zeros(2, np.int8), "x": np.zeros((2, 3))}
    with gpusaver.variables(), gpusaver.Saver(state) as saver:
        saver.save(tmp_path / "k")
        array = state["x"]
        state["w"] = gpusaver.Variable(np.ones(2, np.int8), dtype=gpusaver.DataType.qint8)
        state["x"] = gpusaver.PartitionedVariable((4, 3), np.s_[0:2, :], array)
        reader = gpusaver.CheckpointReader(saver.save(tmp_path / "k"))
        assert reader.get_variable_to_dtype_map()["w"] is gpusaver.DataType.qint8
        assert reader.get_variable_to_shape_map()["x"] == [4, 3]
        state["w"], state["x"] = np.zeros(2, np.int8), array
        reader = gpusaver.CheckpointReader(saver.save(tmp_path / "k"))
        assert reader.get_variable_to_dtype_map()["w"] is gpusaver.DataType.int8
        assert reader.get_variable_to_shape_map()["x"] == [2, 3]


CHANGES = {
    "new": (lambda state: state.update(new=1), r"new \['new'\], gone \[\]"),
    "gone": (lambda state: state.pop("w"), r"new \[\], gone \['w'\]"),
    "renamed": (lambda state: state.update(v=state.pop("w")), r"new \['v'\], gone \['w'\]"),
    "longer list": (lambda state: state["l"].append(3), r"new \['l/2'\], gone \[\]"),
    "list in the place of a number": (lambda state: state.update(n=[1]), r"new \['n/0'\], gone \['n'\]"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_another_set_of_names_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    state = {"w": np.zeros(3), "l": [1, 2], "n": 4}
    with gpusaver.Saver(state) as saver:
        prefix = saver.save(tmp_path / "k", 1)
        change(state)
        with pytest.raises(ValueError, match=message):
            saver.save(tmp_path / "k", 2)
        with pytest.raises(ValueError, match=message):
            saver.restore(prefix)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["checkpoint", "k-1.data-00000-of-00001", "k-1.index", "k-1.meta"]


def test_an_error_at_the_save_names_the_leaf(tmp_path: Path) -> None:
    state: dict[str, Any] = {"deep": {"w": np.zeros(3)}}
    with gpusaver.Saver(state) as saver:
        state["deep"]["w"] = object()
        with pytest.raises(TypeError, match=r"^deep/w: object"):
            saver.save(tmp_path / "k")
        state["deep"]["w"] = np.ones(3)
        saver.save(tmp_path / "k")


def test_names_with_any_character(tmp_path: Path) -> None:
    state = {"\0": 1, "a\0b": 2, "\udcff": 3, "a b": 4, "x:0": 5, "\u202e": 6, "_CHECKPOINTABLE": 7, "a\n": 8}
    expected = dict(state)
    prefix = gpusaver.save(tmp_path / "k", state)
    assert gpusaver.load(prefix) == expected
    state.update(dict.fromkeys(state, 0))
    with gpusaver.Saver(state) as saver:
        assert saver.restore(prefix).unexpected == []
    assert state == expected


leaves = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    st.binary(max_size=20),
    st.lists(st.integers(0, 255), max_size=5).map(lambda values: np.array(values, np.uint8)),
)
keys = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/"), min_size=1, max_size=4)
trees = st.dictionaries(
    keys,
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)),
    min_size=1,
    max_size=4,
)


def blank(tree: Any) -> Any:
    """The same containers with empty values."""
    if isinstance(tree, dict):
        return {key: blank(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [blank(value) for value in tree]
    return np.zeros_like(tree) if isinstance(tree, np.ndarray) else type(tree)()


@given(trees)
def test_any_tree_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    prefix = tmp_path_factory.mktemp("tree") / "k"
    with gpusaver.Saver(tree, allow_empty=True) as saver:
        saver.save(prefix, write_state=False)
    found = blank(tree)
    with gpusaver.Saver(found, allow_empty=True) as saver:
        saver.restore(prefix)
    np.testing.assert_equal(found, tree)
