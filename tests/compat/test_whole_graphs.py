"""Whole graphs of TensorFlow's: imported, run as far as the table goes, and exported again as they were."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

import gpusaver.compat.v1 as tf
from gpusaver.metagraph.reading import read_meta_graph
from gpusaver.protos.graph_pb2 import GraphDef, NodeDef

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FOLDERS = ["meta_graph_tf1", "meta_graph_tf2"]
FILES = [(folder, path.name) for folder in FOLDERS for path in sorted((GOLDEN / folder).glob("*.meta"))]


@pytest.mark.parametrize(("folder", "name"), FILES)
def test_exported_as_it_was_imported(folder: str, name: str) -> None:
    path = GOLDEN / folder / name
    original = read_meta_graph(path)
    saver = tf.train.import_meta_graph(str(path))
    exported = saver.export_meta_graph()
    assert list(exported.graph_def.node) == list(original.graph_def.node)
    assert exported == original


@pytest.mark.parametrize("folder", FOLDERS)
def test_restored_and_run(folder: str) -> None:
    expected = json.loads((GOLDEN / folder / "expected-net-3.json").read_text())
    prefix = str(GOLDEN / folder / "net-3")
    saver = tf.train.import_meta_graph(prefix + ".meta")
    with tf.Session() as session:
        saver.restore(session, prefix)
        by_name = {tensor["name"]: tensor for tensor in expected["tensors"]}
        for variable in tf.global_variables():
            stored = by_name[variable.op.name]
            if "data_b64" in stored:
                assert session.run(variable).tobytes() == base64.b64decode(stored["data_b64"])
        x = np.frombuffer(base64.b64decode(expected["feed_x_b64"]), np.float32).reshape(5, 3)
        y = np.frombuffer(base64.b64decode(expected["out_y_b64"]), np.float32).reshape(5, 4)
        placeholders = [op for op in tf.get_default_graph().get_operations() if op.type == "Placeholder"]
        feed = {op.outputs[0]: x for op in placeholders}
        found = session.run(tf.get_collection("outputs")[0], feed)
        np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)
        step = session.run(tf.train.get_global_step())
        session.run(tf.get_collection("train_op")[0], feed)
        assert session.run(tf.train.get_global_step()) == step + 1


def graph_def(*nodes: NodeDef) -> GraphDef:
    return GraphDef(node=nodes)


def node(name: str, op: str, *inputs: str) -> NodeDef:
    made = NodeDef(name=name, op=op, input=inputs)
    if op != "Mystery":
        made.attr["T"].type = 1
    return made


def const(name: str) -> NodeDef:
    made = NodeDef(name=name, op="Const")
    made.attr["dtype"].type = 1
    made.attr["value"].tensor.dtype = 1
    made.attr["value"].tensor.float_val.append(2.0)
    return made


def test_an_unknown_op_is_kept_and_raises_when_it_is_run() -> None:
    mystery = node("m", "Mystery", "a", "^a")
    mystery.attr["color"].s = b"blue"
    tf.import_graph_def(graph_def(const("a"), mystery, node("n", "Neg", "m:1"), node("p", "Neg", "a")), name="")
    exported = tf.get_default_graph().as_graph_def()
    assert [made.name for made in exported.node] == ["a", "m", "n", "p"]
    assert exported.node[1] == mystery
    with tf.Session() as session:
        assert session.run("p:0") == -2
        with pytest.raises(tf.errors.UnimplementedError, match="'Mystery' of node 'm'"):
            session.run("n:0")
        with pytest.raises(LookupError, match="No gradient defined for operation 'm'"):
            tf.gradients(
                tf.get_default_graph().get_tensor_by_name("n:0"), tf.get_default_graph().get_tensor_by_name("a:0")
            )


def test_nodes_come_in_any_order() -> None:
    tf.import_graph_def(graph_def(node("n", "Neg", "a"), const("a")), name="")
    with tf.Session() as session:
        assert session.run("n:0") == -2


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ([node("x", "Neg", "y"), node("y", "Neg", "x")], "cycle at node 'x'"),
        ([node("x", "Neg", "x")], "cycle at node 'x'"),
        ([node("x", "Neg", "gone")], "Node 'x': Unknown input node 'gone'"),
        ([node("x", "Neg", "^gone")], "Node 'x': Unknown input node '\\^gone'"),
        ([const("a"), node("x", "Neg", "a:1")], "Node 'x': Connecting to invalid output 1 of source node a"),
        ([const("a"), node("x", "Neg", "a", "a")], "Node 'x': 2 inputs specified, the op Neg takes 1"),
        ([const("a"), const("a")], "Node name 'a' already exists"),
        ([NodeDef(name="c", op="Const")], "Node 'c': NodeDef missing attr"),
        ([NodeDef(name="-", op="NoOp")], "Node '-': not a valid node name"),
    ],
    ids=["cycle", "itself", "input", "control", "output", "inputs", "twice", "attribute", "name"],
)
def test_a_damaged_graph_is_refused_by_the_name_of_the_node(nodes: list[NodeDef], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        tf.import_graph_def(graph_def(*nodes), name="")
    assert tf.get_default_graph().get_operations() == []


def test_a_name_that_is_taken() -> None:
    tf.constant(1.0, name="a")
    with pytest.raises(ValueError, match="Node name 'a' already exists"):
        tf.import_graph_def(graph_def(const("a")), name="")
    tf.import_graph_def(graph_def(const("a")))
    assert [op.name for op in tf.get_default_graph().get_operations()] == ["a", "import/a"]


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"not a graph", b"checkpoint"], ids=repr)
def test_a_file_that_is_no_meta_graph(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "k.meta").write_bytes(content)
    with pytest.raises(OSError, match=r"k\.meta"):
        tf.train.import_meta_graph(str(tmp_path / "k.meta"))


def test_a_graph_without_the_variables_says_how_to_get_them() -> None:
    with pytest.raises(ValueError, match=r"No variables to save.*import_meta_graph"):
        tf.train.Saver()
    with tf.Session() as session:
        tf.constant(1.0)
        with pytest.raises(ValueError, match="import_meta_graph"):
            session.run("w:0")


def test_a_loop_is_kept() -> None:
    """Loops are no part of the table; the edge that closes one may point backwards."""
    nodes = [
        const("a"),
        node("enter", "Enter", "a"),
        node("merge", "Merge", "enter", "next"),
        node("next", "NextIteration", "merge"),
    ]
    nodes[2].attr["N"].i = 2
    tf.import_graph_def(graph_def(*nodes), name="")
    assert list(tf.get_default_graph().as_graph_def().node) == nodes
