"""TensorFlow reads what incremental saves have linked: its reader, and its Saver in a graph."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import gpusaver

pytest.importorskip("xxhash")
v1 = tf.compat.v1


def test_tensorflow_reads_a_linked_checkpoint(tmp_path: Path) -> None:
    frozen = np.random.default_rng(0).random(100_000, np.float32)
    with gpusaver.variables():
        variables = [
            gpusaver.Variable(frozen.copy(), name="frozen", trainable=False),
            gpusaver.Variable(np.zeros(10, np.float32), name="w"),
        ]
    with gpusaver.Saver(variables, incremental=True, max_to_keep=2) as saver:
        for step in range(4):
            variables[1].value[...] = step
            prefix = saver.save(tmp_path / "k", step)
    assert os.stat(f"{prefix}.data-00001-of-00002").st_nlink == 2
    for step in (2, 3):
        reader = tf.train.load_checkpoint(f"{tmp_path}/k-{step}")
        np.testing.assert_array_equal(reader.get_tensor("frozen"), frozen)
        np.testing.assert_array_equal(reader.get_tensor("w"), np.full(10, step, np.float32))
    with tf.Graph().as_default(), v1.Session() as session:
        restored = v1.train.import_meta_graph(f"{prefix}.meta")
        restored.restore(session, tf.train.latest_checkpoint(str(tmp_path)))
        found = {variable.op.name: session.run(variable) for variable in v1.global_variables()}
    np.testing.assert_array_equal(found["frozen"], frozen)
    np.testing.assert_array_equal(found["w"], np.full(10, 3, np.float32))
