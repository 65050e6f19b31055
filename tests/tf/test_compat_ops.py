"""Each op of the front end, and each gradient, against TensorFlow.

All cases are built in one graph of either library, because a session of TensorFlow's takes its time to start.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tensorflow

import gpusaver.compat.v1 as tf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compat"))
from cases import CASES, Case

v1 = tensorflow.compat.v1


class Built(NamedTuple):
    """One case in a graph.  The gradients are those of a weighted sum, None where the value does not depend on one."""

    inputs: list[Any]
    output: Any
    gradients: list[Any]


def built(library: Any, case: Case, number: int) -> Built:
    inputs = [
        library.placeholder(array.dtype, array.shape, name=f"x{number}_{place}")
        for place, array in enumerate(case.arrays)
    ]
    output = library.identity(case.build(library, *inputs), name=f"y{number}")
    if not case.differentiable:
        return Built(inputs, output, [])
    flat = library.reshape(output, [-1])
    weights = library.cos(library.cast(library.range(library.size(flat)), output.dtype))
    found = library.gradients(library.reduce_sum(flat * weights), inputs)
    return Built(inputs, output, [None if g is None else library.convert_to_tensor(g) for g in found])


def computed(library: Any) -> tuple[Any, list[Built], list[Any]]:
    """The graph, what is in it, and for each case the value and the gradients that there are."""
    graph = library.Graph()
    with graph.as_default(), library.Session() as session:
        cases = [built(library, case, number) for number, case in enumerate(CASES)]
        return graph, cases, session.run([fetches(case) for case in cases], feeds([case.inputs for case in cases]))


def fetches(case: Built) -> list[Any]:
    return [case.output, *(gradient for gradient in case.gradients if gradient is not None)]


def feeds(inputs: list[list[Any]]) -> dict[Any, Any]:
    return {
        key: array
        for keys, case in zip(inputs, CASES, strict=True)
        for key, array in zip(keys, case.arrays, strict=True)
    }


@pytest.fixture(scope="module")
def ours() -> tuple[Any, list[Built], list[Any]]:
    return computed(tf)


@pytest.fixture(scope="module")
def theirs() -> tuple[Any, list[Built], list[Any]]:
    return computed(v1)


@pytest.fixture(scope="module")
def ours_run_by_tensorflow(ours: tuple[Any, list[Built], list[Any]]) -> list[Any]:
    graph, cases, _ = ours
    graph_def = v1.GraphDef.FromString(graph.as_graph_def().SerializeToString())
    with tensorflow.Graph().as_default(), v1.Session() as session:
        v1.import_graph_def(graph_def, name="")
        names = [[tensor.name for tensor in fetches(case)] for case in cases]
        found: list[Any] = session.run(names, feeds([[x.name for x in case.inputs] for case in cases]))
        return found


NUMBERS = pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])


@NUMBERS
def test_values_and_gradients_are_tensorflows(number: int, ours: Any, theirs: Any) -> None:
    (_, our_cases, our_values), (_, their_cases, their_values) = ours, theirs
    assert [g is None for g in our_cases[number].gradients] == [g is None for g in their_cases[number].gradients]
    for found, expected in zip(our_values[number], their_values[number], strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(our_values[number][0], their_values[number][0], rtol=2e-6, atol=1e-6)
    for gradient, expected in zip(our_values[number][1:], their_values[number][1:], strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@NUMBERS
def test_tensorflow_runs_the_nodes(number: int, ours: Any, ours_run_by_tensorflow: list[Any]) -> None:
    """The GraphDef of all cases and gradients, loaded by TensorFlow, gives the same values there."""
    for found, expected in zip(ours_run_by_tensorflow[number], ours[2][number], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
