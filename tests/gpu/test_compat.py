"""The TensorFlow-1 front end on CuPy: each op as on NumPy, and a classifier that is trained, saved and restored."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver.compat.v1 as tf
from gpu.tools import Gpu
from gpusaver.compat.v1 import session as session_module
from gpusaver.device.arrays import array_module

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compat"))
import classifier
from cases import CASES, Case


def computed(case: Case, module: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The value and the gradients, in a session whose arrays are of ``module``."""
    monkeypatch.setattr(session_module, "array_module", lambda: module)
    with tf.Graph().as_default(), tf.Session() as session:
        inputs = [tf.placeholder(array.dtype, array.shape) for array in case.arrays]
        output = case.build(tf, *inputs)
        gradients = tf.gradients(output, inputs) if case.differentiable else []
        fetches = [output, *(gradient for gradient in gradients if gradient is not None)]
        return list(session.run(fetches, dict(zip(inputs, case.arrays, strict=True))))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_numpy(case: Case, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = computed(case, np, monkeypatch)
    found = computed(case, array_module("cuda"), monkeypatch)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype
        np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sharded", [False, True], ids=["one-shard", "sharded"])
@pytest.mark.parametrize("is_resource", [True, False], ids=["resource", "reference"])
def test_training_goes_on_from_a_checkpoint(is_resource: bool, sharded: bool, gpu: Gpu, tmp_path: Path) -> None:
    cupy = array_module("cuda")
    (tf.enable_resource_variables if is_resource else tf.disable_resource_variables)()
    try:
        random = np.random.RandomState(1)
        labels = np.eye(10, dtype=np.float32)
        count = classifier.FIRST + classifier.FURTHER
        data = [
            (random.random_sample((64, 64)).astype(np.float32), labels[random.randint(0, 10, 64)]) for _ in range(count)
        ]
        prefix = str(tmp_path / "model")
        expected = classifier.train_and_save(tf, prefix, data, sharded)
        for (loss, logits), (wanted, wanted_logits) in zip(classifier.go_on(tf, prefix, data), expected, strict=True):
            np.testing.assert_allclose(loss, wanted, atol=1e-5)
            np.testing.assert_allclose(logits, wanted_logits, atol=1e-4)
        with tf.Graph().as_default(), tf.Session() as session:
            tf.train.import_meta_graph(prefix + ".meta").restore(session, prefix)
            assert all(isinstance(array, cupy.ndarray) for array in session.variables.values())
    finally:
        tf.enable_resource_variables()
