"""TensorFlow's graphs with ops that the front end does not run, sharded and partitioned ones: nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gpusaver
import gpusaver.compat.v1 as tf
from gpusaver.metagraph.reading import read_meta_graph

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PREFIXES = [
    f"{name}_{release}/{prefix}"
    for name, prefix in (("conv", "conv-2"), ("sharded", "model-5"), ("partitioned", "part"))
    for release in ("tf1", "tf2")
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_imported_restored_and_exported_as_it_was(prefix: str, tmp_path: Path) -> None:
    path = str(GOLDEN / prefix)
    original = read_meta_graph(f"{path}.meta")
    saver = tf.train.import_meta_graph(f"{path}.meta")
    with tf.Session() as session:
        saver.restore(session, path)
        again = saver.save(session, str(tmp_path / "again"))
    np.testing.assert_equal(gpusaver.load(again), gpusaver.load(path))
    assert saver.export_meta_graph() == original
    assert read_meta_graph(f"{again}.meta") == original


@pytest.mark.parametrize("release", ["tf1", "tf2"])
def test_an_op_that_is_not_run_is_named(release: str) -> None:
    path = str(GOLDEN / f"conv_{release}" / "conv-2")
    saver = tf.train.import_meta_graph(f"{path}.meta")
    with tf.Session() as session:
        saver.restore(session, path)
        images = np.zeros((1, 8, 8, 1), np.float32)
        with pytest.raises(tf.errors.UnimplementedError, match=r"'Conv2D' of node 'conv/y'"):
            session.run(tf.get_collection("outputs")[0], {"images:0": images})
