"""Readable names of object-based checkpoints."""

from __future__ import annotations

import base64
import json

import pytest
from bundle_tools import GOLDEN, expected_tensors, only_our_errors
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle.object_graph import OBJECT_GRAPH_KEY, readable_names, variable_name
from gpusaver.errors import DataLossError
from gpusaver.protos.trackable_object_graph_pb2 import TrackableObjectGraph


@pytest.mark.parametrize("folder", ["object_based_tf1", "object_based_tf2"])
def test_names_of_the_golden_graphs(folder: str) -> None:
    tensors = expected_tensors(GOLDEN / folder / "expected-ckpt-3.json")
    graph = base64.b64decode(tensors[OBJECT_GRAPH_KEY]["strings_b64"][0])
    nodes = json.loads((GOLDEN / folder / "expected-object-graph.json").read_text())["nodes"]
    expected = {full_name: key for node in nodes for _, full_name, key in node["attributes"]}
    assert readable_names(graph) == expected
    assert expected["w/Adam"] == "model/w/.OPTIMIZER_SLOT/opt/m/.ATTRIBUTES/VARIABLE_VALUE"
    assert {key.encode() for key in expected.values()} <= set(tensors)


def test_later_nodes_win_and_nameless_values_have_none() -> None:
    graph = TrackableObjectGraph()
    for full_name, key in [("v", "a"), ("v", "b"), ("", "c")]:
        graph.nodes.add().attributes.add(name="VARIABLE_VALUE", full_name=full_name, checkpoint_key=key)
    assert readable_names(graph.SerializeToString()) == {"v": "b"}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("step/.ATTRIBUTES/VARIABLE_VALUE", "step"),
        ("model/table/a.Sb/.ATTRIBUTES/VARIABLE_VALUE", "model/table/a/b"),
        ("model/table/k..x/.ATTRIBUTES/VARIABLE_VALUE", "model/table/k.x"),
        ("a...Sb/.ATTRIBUTES/VARIABLE_VALUE", "a./b"),
        ("a..Sb/.ATTRIBUTES/VARIABLE_VALUE", "a.Sb"),
        ("model/w/.OPTIMIZER_SLOT/opt/m/.ATTRIBUTES/VARIABLE_VALUE", "model/w/.OPTIMIZER_SLOT/opt/m"),
        ("variables/12/.ATTRIBUTES/VARIABLE_VALUE", "variables/12"),
        ("layer/.ATTRIBUTES/OBJECT_CONFIG_JSON", None),
        ("_CHECKPOINTABLE_OBJECT_GRAPH", None),
        ("dense/kernel", None),
        ("/.ATTRIBUTES/VARIABLE_VALUE", None),
    ],
)
def test_variable_name(key: str, name: str | None) -> None:
    assert variable_name(key) == name


@given(st.lists(st.text("ab./S", min_size=1), min_size=1, max_size=4))
def test_escaping_is_undone(edges: list[str]) -> None:
    path = "/".join(edge.replace(".", "..").replace("/", ".S") for edge in edges)
    assert variable_name(f"{path}/.ATTRIBUTES/VARIABLE_VALUE") == "/".join(edges)


def test_damaged_graph() -> None:
    with pytest.raises(DataLossError, match="object graph"):
        readable_names(b"\xff")


@given(st.binary(max_size=60))
def test_arbitrary_bytes(graph: bytes) -> None:
    only_our_errors(lambda: readable_names(graph))
