"""`.meta` files both ways, with this TensorFlow: imported, restored, run, saved again.

`with_tensorflow_1.py` does the same with TensorFlow 1.15.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import meta_graph_cases as ours
import meta_graph_side as theirs
import numpy as np
import pytest
import tensorflow as tf
from meta_graph_side import v1

import gpusaver
from gpusaver.metagraph import building
from gpusaver.metagraph.reading import read_meta_graph

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("case", ours.CASES)
def test_tensorflow_takes_a_save(tmp_path: Path, case: str) -> None:
    prefix, again = tmp_path / "ours", tmp_path / "again"
    ours.write(case, prefix)
    ours.check(case, prefix, again, theirs.take(str(prefix), str(again)))


def test_tensorflow_takes_a_graph_in_several_fields(tmp_path: Path) -> None:
    """As a large one is written, piece by piece."""
    prefix = gpusaver.Saver({f"w{n:04d}": np.array([n]) for n in range(1500)}).save(tmp_path / "ours")
    assert Path(f"{prefix}.meta").stat().st_size > 2 * building._PIECE_NBYTES
    found = theirs.take(prefix, str(tmp_path / "again"))
    assert len(found["variables"]) == 1500
    np.testing.assert_equal(gpusaver.load(tmp_path / "again"), gpusaver.load(prefix))


@pytest.mark.parametrize("case", ["plain", "sharded"])
def test_tensorflow_takes_it_below_a_scope(tmp_path: Path, case: str) -> None:
    prefix, again = tmp_path / "ours", tmp_path / "again"
    ours.write(case, prefix)
    found = theirs.take(str(prefix), str(again), scope="outer")
    found["variables"] = {name.removeprefix("outer/"): value for name, value in found["variables"].items()}
    ours.check(case, prefix, again, found)


@pytest.mark.parametrize("case", theirs.WRITERS)
def test_gpusaver_takes_a_save(tmp_path: Path, case: str) -> None:
    theirs.write(case, str(tmp_path / case))
    ours.check_theirs(tmp_path / case)


@pytest.mark.parametrize("as_text", [False, True])
def test_tensorflow_takes_an_export(tmp_path: Path, as_text: bool) -> None:
    with gpusaver.variables():
        gpusaver.Variable(np.arange(3.0), "net/w")
        gpusaver.Variable(np.arange(4.0), "net/b")
        with gpusaver.Saver() as saver:
            prefix = saver.save(tmp_path / "k", write_meta_graph=False)
            exported = saver.export_meta_graph(tmp_path / "k.meta", as_text=as_text, export_scope="net")
    found = theirs.take(prefix, str(tmp_path / "again"))
    assert sorted(found["variables"]) == ["b", "w"]
    assert found["trainable"] == ["b", "w"]
    np.testing.assert_equal(gpusaver.load(tmp_path / "again"), gpusaver.load(prefix))
    with tf.Graph().as_default():  # the message of one library is the other's too
        message = v1.MetaGraphDef.FromString(exported.SerializeToString())
        v1.train.import_meta_graph(message)
        with gpusaver.variables(), gpusaver.import_meta_graph(v1.train.export_meta_graph()):
            assert sorted(v.name for v in gpusaver.current_variables()) == ["b", "w"]


@pytest.mark.parametrize("name", ["conv_tf1/conv-2", "conv_tf2/conv-2", "meta_graph_tf1/net-3", "sharded_tf2/model-5"])
def test_what_was_read_and_written_anew_still_runs(tmp_path: Path, name: str) -> None:
    """Ops that gpusaver does not know go through it unharmed."""
    from gpusaver.metagraph.rewriting import write_meta_graph

    write_meta_graph(read_meta_graph(GOLDEN / f"{name}.meta"), str(tmp_path / "x.meta"))
    original, copy = v1.MetaGraphDef(), v1.MetaGraphDef()
    original.ParseFromString((GOLDEN / f"{name}.meta").read_bytes())
    copy.ParseFromString((tmp_path / "x.meta").read_bytes())
    assert original == copy
    with tf.Graph().as_default() as graph, theirs.session() as running:
        v1.train.import_meta_graph(str(tmp_path / "x.meta"), clear_devices=True).restore(running, str(GOLDEN / name))
        if name.startswith("conv"):
            network = (GOLDEN / name).with_name("network.json")
            images, expected = tensors_of(network)
            logits = graph.get_tensor_by_name("logits:0")
            np.testing.assert_allclose(running.run(logits, {"images:0": images}), expected, atol=1e-5)


def tensors_of(network: Path) -> tuple[Any, Any]:
    import base64
    import json

    described = json.loads(network.read_text())
    images = np.frombuffer(base64.b64decode(described["images_b64"]), np.float32).reshape(4, 8, 8, 1)
    return images, np.frombuffer(base64.b64decode(described["logits_b64"]), np.float32).reshape(4, 3)
