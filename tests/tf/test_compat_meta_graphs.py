"""TensorFlow's graphs with ops that the front end does not have: kept, restored, exported again as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tensorflow

import gpusaver.compat.v1 as tf
from gpusaver.protos import MetaGraphDef

v1 = tensorflow.compat.v1


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    with tf.Graph().as_default(), tensorflow.Graph().as_default():
        yield
    v1.enable_resource_variables()


def convolutional() -> Any:
    """A network that convolves, with a branch, a loop and a function in its graph."""
    x = v1.placeholder(v1.float32, [None, 8, 8, 1], name="x")
    kernel = v1.get_variable("kernel", [3, 3, 1, 4])
    v1.get_variable("moving", [4], initializer=v1.ones_initializer(), trainable=False)
    y = v1.nn.relu(v1.nn.conv2d(x, kernel, strides=[1, 1, 1, 1], padding="SAME"))
    y = v1.nn.max_pool(y, [1, 2, 2, 1], [1, 2, 2, 1], "SAME")
    dense = v1.get_variable("dense", [64, 3])
    y = v1.matmul(v1.reshape(y, [-1, 64]), dense, name="y")
    y = v1.cond(v1.reduce_sum(y) > 0, lambda: y * 2.0, lambda: y - 1.0)
    y = v1.while_loop(lambda i, z: i < 3, lambda i, z: (i + 1, z * 0.5), [0, y])[1]
    squared = tensorflow.function(lambda z: z * z)(y)
    v1.train.AdamOptimizer().minimize(v1.reduce_mean(squared))
    v1.add_to_collection("ends", y)
    return x


@pytest.mark.parametrize("control_flow", ["v1", "v2"])
@pytest.mark.parametrize("is_resource", [True, False], ids=["resource", "reference"])
def test_exported_as_it_was_imported(is_resource: bool, control_flow: str, tmp_path: Path) -> None:
    (v1.enable_resource_variables if is_resource else v1.disable_resource_variables)()
    (v1.enable_control_flow_v2 if control_flow == "v2" else v1.disable_control_flow_v2)()
    convolutional()
    prefix = str(tmp_path / "net")
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, prefix)
        expected = {variable.op.name: session.run(variable) for variable in v1.global_variables()}
    saver = tf.train.import_meta_graph(prefix + ".meta")
    original = MetaGraphDef.FromString(Path(prefix + ".meta").read_bytes())
    exported = saver.export_meta_graph()
    assert exported == original
    # ... also for TensorFlow, whose message knows fields that ours keeps without knowing them.
    theirs = v1.MetaGraphDef.FromString(exported.SerializeToString())
    assert theirs == v1.MetaGraphDef.FromString(Path(prefix + ".meta").read_bytes())
    with tf.Session() as session:
        saver.restore(session, prefix)
        for variable in tf.global_variables():
            np.testing.assert_array_equal(session.run(variable), expected[variable.op.name])
        with pytest.raises(tf.errors.UnimplementedError, match="'Conv2D' of node 'Conv2D'"):
            session.run("y:0", {"x:0": np.zeros((1, 8, 8, 1), np.float32)})
        again = saver.save(session, str(tmp_path / "again"))
    with tensorflow.Graph().as_default(), v1.Session() as session:
        v1.train.import_meta_graph(again + ".meta").restore(session, again)
        for variable in v1.global_variables():
            np.testing.assert_array_equal(session.run(variable), expected[variable.op.name])


def test_import_scope_keeps_unknown_nodes_together(tmp_path: Path) -> None:
    convolutional()
    meta_graph = v1.train.export_meta_graph(str(tmp_path / "net.meta"))
    tf.train.import_meta_graph(str(tmp_path / "net.meta"), import_scope="in")
    names = {op.name for op in tf.get_default_graph().get_operations()}
    assert {f"in/{node.name}" for node in meta_graph.graph_def.node} <= names
