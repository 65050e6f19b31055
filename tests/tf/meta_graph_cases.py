"""gpusaver's side of the tests of `.meta` files: what it writes for TensorFlow, and how it takes TensorFlow's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from generated import random_bits, string_array

import gpusaver
from gpusaver import DataType

#: Of which TensorFlow 1.15 has variables, and 2.21 too.
DTYPES = [
    DataType[name]
    for name in (
        "float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8 uint16 bool complex64 complex128".split()
    )
]


def plain() -> dict[str, Any]:
    """Every type, rank 0 to 3, empty ones, names that no node can have."""
    shapes = [(), (3,), (2, 3), (2, 1, 2), (0, 2)]
    state: dict[str, Any] = {}
    for number, dtype in enumerate(DTYPES):
        for shape in (shapes[number % 5], shapes[(number + 1) % 5]):
            state[f"{dtype.name}/{len(shape)}"] = random_bits(dtype, shape, number)
    state["text"] = string_array([b"", b"a\0b", "é".encode()], (3,))
    state["global_step"] = np.int64(41)
    state["odd name: é"] = np.arange(3, dtype=np.int32)
    state["save/Const"] = np.arange(2, dtype=np.int32)
    return state


def partitioned() -> dict[str, Any]:
    rows = np.arange(30, dtype=np.float32).reshape(10, 3)
    return {
        "p/rows": [
            gpusaver.PartitionedVariable((10, 3), np.s_[start : start + 5, :], rows[start : start + 5])
            for start in (0, 5)
        ],
        "p/corner": [
            gpusaver.PartitionedVariable((10, 3), (slice(*row), slice(*column)), rows[slice(*row), slice(*column)])
            for row in ((0, 7), (7, 10))
            for column in ((0, 1), (1, 3))
        ],
        "whole": np.ones(2),
    }


def sharded() -> dict[str, Any]:
    state = partitioned()
    for number in range(3):
        name = f"on{number}"
        state[name] = gpusaver.Variable(np.full(3, number), name, device=f"cpu:{number}")
    return state


def trained() -> dict[str, Any]:
    return {
        "w": gpusaver.Variable(np.arange(6, dtype=np.float32), "w"),
        "step": gpusaver.Variable(np.int64(7), "step", trainable=False),
    }


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (plain, {"max_to_keep": 9}),
    "partitioned": (partitioned, {"reshape": True}),
    "sharded": (sharded, {"sharded": True}),
    "trained": (trained, {"name": "mine"}),
}


def bits(values: dict[str, Any]) -> dict[str, Any]:
    """To be compared: NaNs too."""
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return {
        name: (array.shape, array.dtype, array.tolist() if array.dtype.kind in "OS" else array.tobytes())
        for name, array in arrays.items()
    }


def write(case: str, prefix: Path) -> None:
    make, options = CASES[case]
    with gpusaver.variables(), gpusaver.Saver(make(), **options) as saver:
        saver.save(prefix, write_state=False)


def check(case: str, prefix: Path, again: Path, found: dict[str, Any]) -> None:
    """``found`` is what TensorFlow said of the graph (`meta_graph_side.take`), ``again`` what it saved of it."""
    expected = gpusaver.load(prefix)
    assert bits(gpusaver.load(again)) == bits(expected)
    assert gpusaver.load_checkpoint(again).get_variable_to_dtype_map() == (
        gpusaver.load_checkpoint(prefix).get_variable_to_dtype_map()
    )
    count = len(found["variables"])
    assert found["without_value"] == [count, 0]
    assert found["zeros"]
    assert found["max_to_keep"] == CASES[case][1].get("max_to_keep", 5)
    if case == "trained":
        assert found["variables"] == {"step": ["int64", []], "w": ["float32", [6]]}
        assert found["trainable"] == ["w"]
    if case == "plain":
        assert count == len(expected)
        assert found["global_step"] == 41
        assert found["variables"]["odd_name___"] == ["int32", [3]]
    if case in ("partitioned", "sharded"):
        assert found["variables"]["p/corner/part_3"] == ["float32", [3, 2]]


def check_theirs(prefix: Path) -> None:
    """Variables made from TensorFlow's graph hold, after a restore, what the checkpoint holds."""
    expected = gpusaver.load(prefix)
    with gpusaver.variables(), gpusaver.import_meta_graph(f"{prefix}.meta") as saver:
        report = saver.restore(prefix)
        assert not report.unexpected
        assert bits({v.name: v.value for v in gpusaver.current_variables()}) == bits(expected)
        trainable = {variable.name for variable in gpusaver.current_variables() if variable.trainable}
        assert saver.as_saver_def().sharded == prefix.name.startswith("sharded")
        if prefix.name.startswith("plain"):
            assert trainable == {"plain/float32", "bfloat16", "text", "empty", "image"}
            assert saver.as_saver_def().max_to_keep == 7
