"""The table of ops: the set that the evidence fixes, gradients by finite differences, kernels that never write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, Case, variables

import gpusaver.compat.v1 as tf
from gpusaver.compat.v1.table import TABLE

EVIDENCE = json.loads((Path(__file__).parent / "ops.json").read_text())


def test_the_table_has_exactly_the_ops_that_tensorflow_emits() -> None:
    emitted = {op for ops in EVIDENCE.values() for op in ops}
    assert sorted(TABLE) == sorted(emitted)


def test_the_table_knows_the_attributes_that_tensorflow_writes() -> None:
    """Of those that TensorFlow 1.15 has: newer ones would keep it from reading our graphs."""
    written: dict[str, set[str]] = {}
    for column, ops in EVIDENCE.items():
        if "1.15" in column:
            for op, entry in ops.items():
                written.setdefault(op, set()).update(entry["attrs"])
    assert {op: sorted(TABLE[op].attrs) for op in written} == {op: sorted(attrs) for op, attrs in written.items()}


def built(case: Case) -> tuple[list[Any], Any, dict[Any, Any]]:
    inputs = [tf.placeholder(array.dtype, array.shape) for array in case.arrays]
    return inputs, case.build(tf, *inputs), dict(zip(inputs, case.arrays, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_static_shape_is_that_of_the_value(case: Case) -> None:
    _, output, feed = built(case)
    with tf.Session() as session:
        value = session.run(output, feed)
    assert output.shape.is_compatible_with(value.shape)
    assert output.dtype == value.dtype


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_do_not_write_into_their_inputs(case: Case) -> None:
    inputs, output, feed = built(case)
    gradients = tf.gradients(output, inputs) if case.differentiable else []
    with tf.Session() as session:
        frozen = {tensor: array.copy() for tensor, array in feed.items()}
        convert = session._converted

        def read_only(tensor: Any, value: Any) -> Any:
            array = convert(tensor, value)
            array.flags.writeable = False
            return array

        session._converted = read_only  # type: ignore[method-assign]
        session.run([output, *(g for g in gradients if g is not None)], frozen)


STEP = 1e-6


@pytest.mark.parametrize("unknown", [False, True], ids=["known-shapes", "unknown-shapes"])
@pytest.mark.parametrize("case", [case for case in CASES if case.differentiable], ids=lambda case: case.name)
def test_gradients_are_those_of_finite_differences(case: Case, unknown: bool) -> None:
    arrays = [array.astype(np.float64) for array in case.arrays]
    inputs = [tf.placeholder(tf.float64, [None] * a.ndim if unknown else a.shape) for a in arrays]
    try:
        output = case.build(tf, *inputs)
    except ValueError:
        assert unknown  # a size is needed, as unstack does
        return
    with tf.Session() as session:
        count = session.run(output, dict(zip(inputs, arrays, strict=True))).size
        # Another weight for each element, so that a gradient that is mixed up is seen.
        total = tf.reduce_sum(tf.reshape(output, [-1]) * np.cos(np.arange(count)))

        def loss(values: list[Any]) -> float:
            return float(session.run(total, dict(zip(inputs, values, strict=True))))

        gradients = tf.gradients(total, inputs)
        assert any(gradient is not None for gradient in gradients)
        for number, gradient in enumerate(gradients):
            expected = np.zeros_like(arrays[number])
            for index in np.ndindex(expected.shape):
                values = []
                for sign in (+1, -1):
                    moved = [array.copy() for array in arrays]
                    moved[number][index] += sign * STEP
                    values.append(loss(moved))
                expected[index] = (values[0] - values[1]) / (2 * STEP)
            if gradient is None:
                assert not expected.any()
            else:
                found = session.run(gradient, dict(zip(inputs, arrays, strict=True)))
                assert found.shape == expected.shape
                np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("is_resource", [True, False], ids=["resource", "reference"])
def test_variables_run(is_resource: bool) -> None:
    (tf.enable_resource_variables if is_resource else tf.disable_resource_variables)()
    found = {}
    fetches = variables(tf)
    with tf.Session() as session:
        for name, fetch in fetches:
            found[name] = session.run(fetch)
    assert sorted(found["report"].tolist()) == sorted(
        b"plain counter drawn normal integers text flag second parts/p/part_0 parts/p/part_1 local".split()
    )
    assert found["is_initialized"]
    assert found["assign"].tolist() == [3, 4]
    assert found["assign_add"].tolist() == [4, 5]
    assert found["assign_sub"].tolist() == [3.5, 4.75]
    assert found["count"] == 1
    assert found["read"].tolist() == [5.5, 8.75]
    assert found["parts"].tolist() == [[2, 2]] * 5
    assert found["default"].tolist() == [4]
