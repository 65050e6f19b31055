"""Reading `.meta` files: round trips, the variables that a graph names, and hostile bytes."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from google.protobuf.any_pb2 import Any as AnyMessage
from hypothesis import given
from hypothesis import strategies as st
from meta_graph_octets import octets_of

from gpusaver.errors import DataLossError, Error, InvalidArgumentError
from gpusaver.metagraph import reading
from gpusaver.metagraph.collections import NodeName, collection_def, collection_items, variable_defs
from gpusaver.metagraph.nodes import by_name, node, node_name
from gpusaver.metagraph.reading import read_meta_graph, saved_variables
from gpusaver.metagraph.rewriting import with_scope, without_scope, write_meta_graph
from gpusaver.metagraph.saver_nodes import Saveable
from gpusaver.metagraph.tensors import zeros_proto
from gpusaver.metagraph.variables import GraphVariable, Part
from gpusaver.protos import MetaGraphDef, SaverDef
from gpusaver.protos.meta_graph_pb2 import CollectionDef, VariableDef
from gpusaver.tensor import DataType, TensorSlice

GOLDEN = Path(__file__).parent.parent / "golden"
FILES = sorted(GOLDEN.glob("*/*.meta"))
STORABLE = [dtype for dtype in DataType if dtype.is_fixed_size or dtype is DataType.string]


def of_file(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@st.composite
def saveables(draw: st.DrawFn) -> list[Saveable]:
    """As a program may have them: any names, some variables in parts, some on devices."""
    is_resource, found = draw(st.booleans()), []
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), unique=True, max_size=5))
    for number, key in enumerate(sorted(names, key=str.encode)):
        dtype, trainable = draw(st.sampled_from(STORABLE)), draw(st.booleans())
        device = draw(st.sampled_from(["", "/device:GPU:1", "/job:worker/task:1/device:CPU:0"]))
        shape = draw(st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple))
        name = f"{node_name(key)}{number}"
        if not shape or shape[0] < 2 or draw(st.booleans()):
            found.append(Saveable(key, GraphVariable(name, dtype, shape, trainable, is_resource, device)))
            continue
        half = shape[0] // 2
        for start, length in ((0, half), (half, shape[0] - half)):
            box = TensorSlice(((start, length), *[(0, size) for size in shape[1:]]))
            part = Part(key, shape, box)
            full = GraphVariable(
                f"{name}/part_{start and 1}", dtype, (length, *shape[1:]), trainable, is_resource, device, part
            )
            found.append(Saveable(key, full))
    return found


# Round trips


@given(saveables(), st.booleans(), st.booleans())
def test_what_was_described_is_found(described: list[Saveable], sharded: bool, reshape: bool) -> None:
    meta_graph = MetaGraphDef.FromString(octets_of(described, sharded=sharded, reshape=reshape))
    assert saved_variables(meta_graph) == described
    meta_graph.ClearField("saver_def")  # then the collection says it, but for names that no node can have
    assert [variable for _, variable in saved_variables(meta_graph)] == sorted(
        [variable for _, variable in described], key=lambda v: (v.part.full_name if v.part else v.name).encode()
    )


@pytest.mark.parametrize("path", FILES, ids=of_file)
def test_nothing_is_lost_between_reading_and_writing(path: Path, tmp_path: Path) -> None:
    """Unknown ops, collections, op definitions and fields: all of it."""
    meta_graph = read_meta_graph(path)
    for as_text in (False, True):
        write_meta_graph(meta_graph, str(tmp_path / "again.meta"), as_text=as_text)
        assert read_meta_graph(tmp_path / "again.meta") == meta_graph
    if path.name != "text.meta":
        write_meta_graph(meta_graph, str(tmp_path / "again.meta"))
        assert MetaGraphDef.FromString(path.read_bytes()) == meta_graph
        assert len((tmp_path / "again.meta").read_bytes()) == len(path.read_bytes())


@pytest.mark.parametrize("release", ["tf1", "tf2"])
def test_binary_and_text_say_the_same(release: str) -> None:
    folder = GOLDEN / f"meta_graph_{release}"
    assert saved_variables(read_meta_graph(folder / "net-3.meta")) == saved_variables(
        read_meta_graph(folder / "text.meta")
    )


@pytest.mark.parametrize(
    ("items", "kind"),
    [
        (["a", b"\xff"], "bytes_list"),
        ([NodeName("y:0"), NodeName("train")], "node_list"),
        ([3, -(1 << 62)], "int64_list"),
        ([0.5, 2.0], "float_list"),
        ([AnyMessage(type_url="t", value=b"v")], "any_list"),
    ],
)
def test_collections_of_every_kind(items: list[Any], kind: str) -> None:
    definition = CollectionDef.FromString(collection_def(items).SerializeToString())
    assert definition.WhichOneof("kind") == kind
    found = collection_items("mine", definition)
    assert found == [item.encode() if isinstance(item, str) and kind == "bytes_list" else item for item in items]
    assert {type(item) for item in found} == {bytes} if kind == "bytes_list" else {type(item) for item in items}


def test_collections_of_messages() -> None:
    definition = collection_def([VariableDef(variable_name="w:0")])
    assert collection_items("variables", definition) == [VariableDef(variable_name="w:0")]
    assert collection_items("mine", definition) == [VariableDef(variable_name="w:0").SerializeToString()]
    assert collection_items("savers", collection_def([SaverDef(max_to_keep=2)])) == [SaverDef(max_to_keep=2)]
    assert collection_items("variables", collection_def([NodeName("w:0")])) == ["w:0"]  # a list of tensors, once
    assert collection_items("variables", CollectionDef()) == []
    with pytest.raises(DataLossError, match="variables"):
        collection_items("variables", collection_def([b"\xff"]))


@pytest.mark.parametrize("items", [[object()], ["a", 1], [1, "a"], [1, 1 << 70], [None]])
def test_collections_that_cannot_be(items: list[Any]) -> None:
    with pytest.raises(TypeError, match="collection"):
        collection_def(items)


def test_scopes_of_a_saver_def() -> None:
    inner = SaverDef(filename_tensor_name="save/Const:0", save_tensor_name="save/c:0", restore_op_name="save/r")
    outer = with_scope(inner, "s/")
    assert outer.restore_op_name == "s/save/r"
    assert without_scope(outer, "s") == inner == without_scope(inner, None) == with_scope(inner, None)
    assert without_scope(inner, "sav") is None


# Graphs of other shapes


def graph(*nodes: Any, restore: str = "restore") -> MetaGraphDef:
    meta_graph = MetaGraphDef(saver_def=SaverDef(restore_op_name=restore))
    meta_graph.graph_def.node.extend(nodes)
    return meta_graph


def one_variable() -> MetaGraphDef:
    octets = octets_of([Saveable("w", GraphVariable("w", DataType.float32, (2,)))])
    return MetaGraphDef.FromString(bytes(octets))


def test_circles_do_not_matter() -> None:
    meta_graph = one_variable()
    nodes = by_name(meta_graph.graph_def.node)
    nodes["save/restore_all"].input.append("^save/restore_all")
    nodes["save/Identity"].input.append("^save/restore_all")
    assert [key for key, _ in saved_variables(meta_graph)] == ["w"]
    nodes["save/Identity"].input[0] = "save/Identity"
    assert saved_variables(meta_graph) == []


def test_an_assignment_of_something_else_is_no_restore() -> None:
    meta_graph = one_variable()
    meta_graph.graph_def.node.append(node("Assign", "other", ["w", "w"]))
    by_name(meta_graph.graph_def.node)["save/restore_all"].input.append("^other")
    assert [key for key, _ in saved_variables(meta_graph)] == ["w"]


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("save/restore_all", {"input": ["^gone"]}, "save/restore_all names the node 'gone'"),
        ("save/AssignVariableOp", {"input": ["w"]}, "1 inputs"),
        ("save/AssignVariableOp", {"input": ["gone", "save/Identity"]}, "'gone'"),
        ("save/Identity", {"input": ["save/RestoreV2:7"]}, "no tensor 7"),
        ("save/RestoreV2", {"input": ["save/Const"]}, "no tensor 0"),
        ("save/RestoreV2", {"input": ["save/Const", "gone", "gone"]}, "'gone'"),
        ("save/RestoreV2/tensor_names", {"value": zeros_proto(DataType.int64, (1 << 40,))}, r"by (np.int64\()?0"),
        ("save/RestoreV2/tensor_names", {"value": zeros_proto(DataType.resource, ())}, "no tensor 0"),
        ("save/RestoreV2/shape_and_slices", {"value": "3 x"}, "cannot parse slice"),
        ("save/RestoreV2/shape_and_slices", {"value": "three 0,1"}, "no slice"),
        ("save/RestoreV2/shape_and_slices", {"value": "3 0,4"}, "out of bounds"),
    ],
)
def test_a_damaged_graph(name: str, change: dict[str, Any], text: str) -> None:
    from gpusaver.metagraph.tensors import tensor_proto

    meta_graph = one_variable()
    damaged = by_name(meta_graph.graph_def.node)[name]
    if "input" in change:
        del damaged.input[:]
        damaged.input.extend(change["input"])
    else:
        value = change["value"]
        damaged.attr["value"].tensor.CopyFrom(tensor_proto([value]) if isinstance(value, str) else value)
    with pytest.raises(DataLossError, match=text):
        saved_variables(meta_graph)


def test_a_saver_def_that_leads_nowhere() -> None:
    with pytest.raises(DataLossError, match="SaverDef names the node 'restore'"):
        saved_variables(graph(node("NoOp", "other")))
    assert saved_variables(graph(node("NoOp", "restore"))) == []
    assert saved_variables(MetaGraphDef()) == []


# Hostile bytes


def read(tmp_path: Path, data: bytes) -> MetaGraphDef:
    path = tmp_path / "x.meta"
    path.write_bytes(data)
    return read_meta_graph(path)


def survives(data: bytes, directory: Path) -> None:
    """What is read is read, what is not is one of our errors; so is what is then looked for in it."""
    try:
        meta_graph = read(directory, data)
        saved_variables(meta_graph)
        for key in meta_graph.collection_def:
            collection_items(key, meta_graph.collection_def[key])
            variable_defs(meta_graph, key)
    except Error as error:
        assert len(str(error)) < 1000  # noqa: PT017  # any of ours will do, but it must be readable


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@given(st.binary(max_size=200))
def test_any_bytes(scratch: Path, data: bytes) -> None:
    survives(data, scratch)


@given(st.text(max_size=100))
def test_any_text(scratch: Path, text: str) -> None:
    survives(text.encode("utf-8", "surrogatepass"), scratch)


@given(
    st.sampled_from(FILES),
    st.randoms(use_true_random=False),
    st.lists(st.sampled_from(["flip", "cut", "drop", "insert", "double"]), min_size=1, max_size=4),
)
def test_damaged_files(scratch: Path, path: Path, chance: random.Random, damages: list[str]) -> None:
    data = bytearray(path.read_bytes())
    for damage in damages:
        at = chance.randrange(len(data) or 1)
        if damage == "flip" and data:
            data[at] ^= 1 << chance.randrange(8)
        elif damage == "cut":
            del data[at:]
        elif damage == "drop":
            del data[at : at + chance.randrange(1, 20)]
        elif damage == "insert":
            data[at:at] = chance.randbytes(chance.randrange(1, 20))
        else:
            data[at:at] = data[at : at + 200]
    survives(bytes(data), scratch)


@given(saveables(), st.randoms(use_true_random=False))
def test_graphs_whose_references_are_mixed_up(described: list[Saveable], chance: random.Random) -> None:
    meta_graph = MetaGraphDef.FromString(octets_of(described))
    nodes = list(meta_graph.graph_def.node)
    for item in nodes:
        for number in range(len(item.input)):
            if chance.random() < 0.2:
                item.input[number] = chance.choice(nodes).name + chance.choice(["", ":1", ":99999999999", ":x"])
    with contextlib.suppress(Error):
        saved_variables(meta_graph)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "it is empty"),
        (b"\x0a", "it says nothing"),
        (b"\x88\x88\x88", "as a binary message it does not parse, and it is no text"),
        (b"hello", "hello"),
        (b'model_checkpoint_path: "k"', "model_checkpoint_path"),
        (b"graph_def { node { name: 'x' op: 'y' }", "x.meta"),
        (b"graph_def { node { attr { key: 'a' value { func { attr { key: 'b' value { func { " * 500, "x.meta"),
        (b"graph_def { node { name: '" + b"\\" * 40_000 + b"' } }", "too many backslashes"),
        (b"\x12\x02\x0a\x00", "node 0 has the name ''"),
        (b"\x12\x82\x01" * 300, "no text"),
    ],
    ids=["empty", "cut", "binary", "text", "state", "open", "deep", "backslashes", "nameless", "nested"],
)
def test_what_is_no_meta_graph(tmp_path: Path, data: bytes, text: str) -> None:
    with pytest.raises(DataLossError, match=text) as caught:
        read(tmp_path, data)
    assert str(tmp_path / "x.meta") in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_format.MessageToString(one_variable()).encode()
    monkeypatch.setattr(reading, "TEXT_LIMIT_BYTES", len(text))
    assert read(tmp_path, text) == one_variable()
    with pytest.raises(DataLossError, match=f"{len(text) + 1} bytes, expected at most {len(text)} of text"):
        read(tmp_path, text + b" ")
    monkeypatch.setattr(reading, "BINARY_LIMIT_BYTES", 10)
    with pytest.raises(InvalidArgumentError, match="expected at most 10"):
        read(tmp_path, one_variable().SerializeToString())


def test_messages_are_taken_as_they_are() -> None:
    meta_graph = one_variable()
    assert read_meta_graph(meta_graph) is meta_graph
    with pytest.raises(TypeError, match="MetaGraphDef"):
        read_meta_graph(meta_graph.graph_def)
    with pytest.raises(TypeError, match="path"):
        read_meta_graph(None)
