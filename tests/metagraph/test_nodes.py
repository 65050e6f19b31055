"""Nodes, their names, and the nodes of variables and Savers, in the forms that TensorFlow writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from meta_graph_octets import octets_of

from gpusaver.metagraph.nodes import Names, as_attr, by_name, is_node_name, node, node_name, node_of, output_of
from gpusaver.metagraph.saver_nodes import Saveable, on_host, saver_nodes
from gpusaver.metagraph.tensors import tensor_array
from gpusaver.metagraph.variables import GraphVariable, Part, part_of, slice_info, slice_spec
from gpusaver.protos import MetaGraphDef, SaverDef
from gpusaver.protos.graph_pb2 import AttrValue, NodeDef
from gpusaver.protos.meta_graph_pb2 import VariableDef
from gpusaver.tensor import DataType, TensorSlice

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(prefix: str) -> MetaGraphDef:
    return MetaGraphDef.FromString((GOLDEN / f"{prefix}.meta").read_bytes())


def variables_of(meta_graph: MetaGraphDef) -> list[GraphVariable]:
    """Straight from the messages that TensorFlow wrote."""
    nodes = by_name(meta_graph.graph_def.node)
    found = []
    for value in meta_graph.collection_def["variables"].bytes_list.value:
        item = VariableDef.FromString(value)
        handle = nodes[node_of(item.variable_name)]
        part = part_of(item.save_slice_info_def) if item.HasField("save_slice_info_def") else None
        shape = tuple(dim.size for dim in handle.attr["shape"].shape.dim)
        dtype = DataType(handle.attr["dtype"].type)
        found.append(GraphVariable(handle.name, dtype, shape, item.trainable, item.is_resource, handle.device, part))
    return found


def saveables_of(meta_graph: MetaGraphDef) -> list[Saveable]:
    variables = variables_of(meta_graph)
    return sorted(Saveable(v.part.full_name if v.part else v.name, v) for v in variables)


def essence(item: NodeDef, ignored: tuple[str, ...]) -> tuple[object, ...]:
    attributes = {key: value for key, value in item.attr.items() if key not in ignored}
    return item.op, list(item.input), {key: value.SerializeToString() for key, value in attributes.items()}


#: What newer releases add to a node, shapes that follow from the rest, and where a variable was put beside another one.
ADDED = (
    "_class",
    "_output_shapes",
    "_has_manual_control_dependencies",
    "validate_shape",
    "allowed_devices",
    "debug_name",
)


# Nodes and names


def test_attributes_of_every_kind() -> None:
    values = {
        "b": (True, AttrValue(b=True)),
        "i": (-3, AttrValue(i=-3)),
        "f": (0.5, AttrValue(f=0.5)),
        "s": ("é", AttrValue(s="é".encode())),
        "bytes": (b"\xff", AttrValue(s=b"\xff")),
        "type": (DataType.int64, AttrValue(type="DT_INT64")),
        "types": ([DataType.int64, DataType.bool], AttrValue(list=AttrValue.ListValue(type=["DT_INT64", "DT_BOOL"]))),
        "ready": (AttrValue(placeholder="x"), AttrValue(placeholder="x")),
    }
    made = node("Op", "n", ["a", "^b"], "/cpu:0", **{key: value for key, (value, _) in values.items()})
    assert dict(made.attr) == {key: expected for key, (_, expected) in values.items()}
    assert (made.op, made.name, list(made.input), made.device) == ("Op", "n", ["a", "^b"], "/cpu:0")


def test_shapes_scalar_unknown_and_empty_list() -> None:
    assert as_attr(()).HasField("shape")
    assert not as_attr(()).shape.unknown_rank
    assert as_attr(None).shape.unknown_rank
    assert [dim.size for dim in as_attr((2, -1)).shape.dim] == [2, -1]
    assert as_attr([]).HasField("list")


def test_an_attribute_that_cannot_be() -> None:
    with pytest.raises(TypeError, match="object"):
        as_attr(object())


def test_references() -> None:
    assert [node_of(text) for text in ("w", "w:1", "^w", "a/b:0")] == ["w", "w", "w", "a/b"]
    assert [output_of(text) for text in ("w", "w:1", "w:12", "^w", "w:x", "w:" + "9" * 50)] == [0, 1, 12, 0, 0, 0]


@given(st.text(max_size=6))
def test_any_text_becomes_a_node_name(text: str) -> None:
    assert is_node_name(node_name(text))
    if is_node_name(text):
        assert node_name(text) == text


def test_names_are_numbered_as_in_tensorflow() -> None:
    names = Names(["a_1"])
    assert [names.unique("a") for _ in range(3)] == ["a", "a_2", "a_3"]
    assert "a_3" in names


@pytest.mark.parametrize(
    ("device", "host"),
    [
        ("", "/device:CPU:0"),
        ("/device:GPU:1", "/device:CPU:0"),
        ("/cpu:0", "/device:CPU:0"),
        ("/job:worker/task:1/device:GPU:0", "/job:worker/task:1/device:CPU:0"),
        ("/job:ps/task:0", "/job:ps/task:0/device:CPU:0"),
    ],
)
def test_the_cpu_of_the_same_machine(device: str, host: str) -> None:
    assert on_host(device) == host


def test_slices_are_spelt_as_tensorflow_does() -> None:
    part = Part("p", (10, 3), TensorSlice(((4, 3), None)))
    assert slice_spec(part) == "10 3 4,3:0,3"
    assert slice_spec(None) == ""
    assert part_of(slice_info(part)) == Part("p", (10, 3), TensorSlice(((4, 3), (0, 3))))


def nodes_of_saver(saveables: Sequence[Saveable], **options: Any) -> tuple[list[NodeDef], SaverDef]:
    nodes: list[NodeDef] = []
    return nodes, saver_nodes(saveables, **options, emit=lambda octets: nodes.append(NodeDef.FromString(octets)))


def meta_graph_of(saveables: Sequence[Saveable], **options: Any) -> MetaGraphDef:
    octets = octets_of(saveables, **options)
    meta_graph = MetaGraphDef.FromString(octets)
    assert meta_graph.ByteSize() == len(octets)  # nothing is unknown, said twice, or longer than it need be
    return meta_graph


# Against the graphs that TensorFlow wrote


@pytest.mark.parametrize("prefix", ["meta_graph_tf1/net-3", "meta_graph_tf2/net-3", "partitioned_tf1/part"])
def test_a_saver_as_tensorflow_adds_it(prefix: str) -> None:
    meta_graph = golden(prefix)
    theirs = by_name(meta_graph.graph_def.node)
    nodes, saver_def = nodes_of_saver(saveables_of(meta_graph))
    assert nodes
    for made in nodes:
        expected = theirs[made.name]
        if made.name != "save/restore_all":  # theirs groups by device first
            assert essence(made, ADDED) == essence(expected, ADDED)
    assert saver_def.save_tensor_name == meta_graph.saver_def.save_tensor_name
    assert saver_def.filename_tensor_name == meta_graph.saver_def.filename_tensor_name
    assert saver_def.restore_op_name == meta_graph.saver_def.restore_op_name
    assert saver_def.version == meta_graph.saver_def.version


@pytest.mark.parametrize("prefix", ["sharded_tf1/model-5", "sharded_tf2/model-5"])
def test_a_sharded_saver_names_what_tensorflow_does(prefix: str) -> None:
    meta_graph = golden(prefix)
    theirs = by_name(meta_graph.graph_def.node)
    nodes, saver_def = nodes_of_saver(saveables_of(meta_graph), sharded=True)
    mine = by_name(nodes)
    for name in ("tensor_names", "shape_and_slices"):
        for op in ("SaveV2", "SaveV2_1", "SaveV2_2", "RestoreV2", "RestoreV2_1", "RestoreV2_2"):
            constant = f"save/{op}/{name}"
            assert tensor_array(mine[constant].attr["value"].tensor).tolist() == (
                tensor_array(theirs[constant].attr["value"].tensor).tolist()
            )
    for name in ("save/ShardedFilename_1", "save/MergeV2Checkpoints/checkpoint_prefixes", "save/MergeV2Checkpoints"):
        assert essence(mine[name], ADDED)[:2] == essence(theirs[name], ADDED)[:2]
    assert saver_def.sharded
    assert saver_def.restore_op_name == meta_graph.saver_def.restore_op_name
    assert mine[node_of(saver_def.save_tensor_name)].op == "Identity"


@pytest.mark.parametrize("prefix", ["meta_graph_tf1/net-3", "meta_graph_tf2/net-3", "partitioned_tf1/part"])
def test_variables_and_their_collections_as_tensorflow_writes_them(prefix: str) -> None:
    meta_graph = golden(prefix)
    theirs = by_name(meta_graph.graph_def.node)
    made = meta_graph_of(saveables_of(meta_graph))
    mine = by_name(made.graph_def.node)
    for variable in variables_of(meta_graph):
        for name in (variable.name, f"{variable.name}/Assign", variable.read):
            ours, expected = mine[name], theirs[name]
            assert (ours.op, ours.input[:1]) == (expected.op, expected.input[:1])
            assert set(ours.attr) - set(ADDED) == set(expected.attr) - set(ADDED)
    for key in ("variables", "trainable_variables", "global_step"):
        if key not in meta_graph.collection_def:
            continue
        listed = [
            sorted(str(without_initial(value)) for value in message.collection_def[key].bytes_list.value)
            for message in (made, meta_graph)
        ]
        assert listed[0] == listed[1]


def without_initial(value: bytes) -> VariableDef:
    item = VariableDef.FromString(value)
    item.initial_value_name = ""
    item.aggregation = 0  # TensorFlow 2's global step: over replicas, which it alone has
    return item


# What only our own use asks for


def test_reshape_and_unknown_shapes() -> None:
    known = Saveable("a", GraphVariable("a", DataType.float32, (2, 3), is_resource=False))
    unknown = Saveable("b", GraphVariable("b", DataType.float32, None, is_resource=False))
    mine = by_name(nodes_of_saver([known, unknown], reshape=True)[0])
    assert list(mine["save/Assign"].input) == ["a", "save/Reshape"]
    assert tensor_array(mine["save/Reshape/shape"].attr["value"].tensor).tolist() == [2, 3]
    assert list(mine["save/Assign_1"].input) == ["b", "save/RestoreV2:1"]
    assert [mine[name].attr["validate_shape"].b for name in ("save/Assign", "save/Assign_1")] == [True, False]


def test_the_scope_of_the_saver_is_free() -> None:
    saveables = [Saveable(name, GraphVariable(name, DataType.float32, ())) for name in ("save/Const", "save_1")]
    meta_graph = meta_graph_of(saveables)
    names = [item.name for item in meta_graph.graph_def.node]
    assert len(set(names)) == len(names)
    assert meta_graph.saver_def.restore_op_name == "save_2/restore_all"


def test_every_input_names_a_node_that_is_there() -> None:
    saveables = [
        Saveable(
            "p",
            GraphVariable(
                f"p/part_{i}",
                DataType.int8,
                (2,),
                device=f"/device:CPU:{i}",
                part=Part("p", (6,), TensorSlice(((2 * i, 2),))),
            ),
        )
        for i in range(3)
    ]
    for sharded in (False, True):
        meta_graph = meta_graph_of(saveables, sharded=sharded, reshape=True)
        made = set()
        for item in meta_graph.graph_def.node:  # TensorFlow wants no order, yet a reader by eye does
            assert {node_of(text) for text in item.input} <= made
            assert is_node_name(item.name)
            assert all(re.fullmatch(r"\^?[^:^]+(:\d+)?", text) for text in item.input)
            made.add(item.name)
    assert np.array_equal(
        tensor_array(by_name(meta_graph.graph_def.node)["save/num_shards"].attr["value"].tensor), np.int32(3)
    )
