"""Each op of the front end, and each gradient, against TensorFlow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tensorflow

import gpusaver.compat.v1 as tf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compat"))
from cases import CASES, Case

v1 = tensorflow.compat.v1


def computed(library: Any, case: Case) -> tuple[Any, list[Any]]:
    """The value, and the gradients with respect to the inputs (None: it does not depend on one)."""
    with library.Graph().as_default(), library.Session() as session:
        inputs = [library.placeholder(array.dtype, array.shape) for array in case.arrays]
        output = case.build(library, *inputs)
        feed = dict(zip(inputs, case.arrays, strict=True))
        value = session.run(output, feed)
        if not case.differentiable:
            return value, []
        total = library.reduce_sum(library.reshape(output, [-1]) * np.cos(np.arange(value.size)).astype(np.float32))
        gradients = library.gradients(total, inputs)
        found = [None if g is None else library.convert_to_tensor(g) for g in gradients]
        return value, [None if g is None else session.run(g, feed) for g in found]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_tensorflows(case: Case) -> None:
    expected, expected_gradients = computed(v1, case)
    found, found_gradients = computed(tf, case)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    assert [g is None for g in found_gradients] == [g is None for g in expected_gradients]
    for gradient, wanted in zip(found_gradients, expected_gradients, strict=True):
        if wanted is not None:
            np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tensorflow_runs_the_nodes(case: Case) -> None:
    """The GraphDef of a case and its gradients, loaded by TensorFlow, gives the same values there."""
    with tf.Graph().as_default() as graph:
        inputs = [tf.placeholder(array.dtype, array.shape, name=f"x{n}") for n, array in enumerate(case.arrays)]
        output = tf.identity(case.build(tf, *inputs), name="y")
        gradients = tf.gradients(output, inputs) if case.differentiable else []
        fetches = [output, *(g for g in gradients if g is not None)]
        with tf.Session() as session:
            expected = session.run(fetches, dict(zip(inputs, case.arrays, strict=True)))
    graph_def = v1.GraphDef.FromString(graph.as_graph_def().SerializeToString())
    with tensorflow.Graph().as_default(), v1.Session() as session:
        v1.import_graph_def(graph_def, name="")
        feed = {f"x{n}:0": array for n, array in enumerate(case.arrays)}
        found = session.run([tensor.name for tensor in fetches], feed)
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)
