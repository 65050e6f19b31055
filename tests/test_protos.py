"""The generated messages against files written by TensorFlow, and the machinery around them."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message

import gpusaver.protos
from gpusaver import tensor
from gpusaver.protos import (
    CheckpointState,
    MetaGraphDef,
    SaverDef,
    checkpoint_state_pb2,
    graph_pb2,
    meta_graph_pb2,
    saved_tensor_slice_pb2,
    saver_pb2,
    tensor_bundle_pb2,
    trackable_object_graph_pb2,
    types_pb2,
)
from gpusaver.protos.convert import adopt

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODULES = [
    checkpoint_state_pb2,
    graph_pb2,
    meta_graph_pb2,
    saved_tensor_slice_pb2,
    saver_pb2,
    tensor_bundle_pb2,
    trackable_object_graph_pb2,
    types_pb2,
]
INDEXES = [
    "basic_f32_tf2/model.ckpt-1000",
    "meta_graph_tf1/net-3",
    "meta_graph_tf2/net-3",
    "object_based_tf2/ckpt-3",
    "v1_tf1/legacy.ckpt",
]
META_GRAPHS = ["meta_graph_tf1", "meta_graph_tf2"]


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def table(data: bytes) -> dict[bytes, bytes]:
    """The pairs of an uncompressed table, read here by hand so that only the messages are under test."""

    def block(offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        content = data[offset : offset + size]
        end = size - 4 * (1 + struct.unpack("<I", content[-4:])[0])
        key, at = b"", 0
        while at < end:
            shared, at = varint(content, at)
            unshared, at = varint(content, at)
            length, at = varint(content, at)
            key = key[:shared] + content[at : at + unshared]
            at += unshared
            yield key, content[at : at + length]
            at += length

    _, at = varint(data, len(data) - 48)
    _, at = varint(data, at)
    offset, at = varint(data, at)
    size, at = varint(data, at)
    pairs: dict[bytes, bytes] = {}
    for _, handle in block(offset, size):
        first, at = varint(handle, 0)
        pairs.update(block(first, varint(handle, at)[0]))
    return pairs


def index_of(prefix: str) -> dict[bytes, bytes]:
    path = GOLDEN / prefix
    return table((path if prefix.startswith("v1") else path.with_name(path.name + ".index")).read_bytes())


def expected_tensors(prefix: str) -> dict[str, Any]:
    path = GOLDEN / prefix
    return {t["name"]: t for t in json.loads((path.parent / f"expected-{path.name}.json").read_text())["tensors"]}


def has_unknown_fields(message: Message) -> bool:
    return text_format.MessageToString(message, print_unknown_fields=True) != text_format.MessageToString(message)


def meta_graph(folder: str) -> MetaGraphDef:
    return MetaGraphDef.FromString((GOLDEN / folder / "net-3.meta").read_bytes())


def text_meta_graph(folder: str) -> MetaGraphDef:
    return text_format.Parse((GOLDEN / folder / "text.meta").read_text("utf-8"), MetaGraphDef())


# What TensorFlow wrote, read and written back


@pytest.mark.parametrize("prefix", INDEXES[:-1])
def test_index_values_parse_and_reserialise_to_the_same_bytes(prefix: str) -> None:
    values = index_of(prefix)
    header = tensor_bundle_pb2.BundleHeaderProto.FromString(values.pop(b""))
    assert (header.num_shards, header.endianness, header.version.producer) == (1, header.LITTLE, 1)
    assert header.SerializeToString() == bytes.fromhex("08011a020801")

    expected = expected_tensors(prefix)
    assert sorted(values) == sorted(name.encode() for name in expected)
    for name, value in values.items():
        entry = tensor_bundle_pb2.BundleEntryProto.FromString(value)
        want = expected[name.decode()]
        assert not has_unknown_fields(entry)
        assert entry.SerializeToString() == value
        assert tensor.DataType(entry.dtype).name == want["dtype"]
        assert [dim.size for dim in entry.shape.dim] == want["shape"]
        if "data_b64" in want:
            assert entry.size == len(base64.b64decode(want["data_b64"]))


def test_v1_values_parse_and_reserialise_to_the_same_bytes() -> None:
    values = index_of("v1_tf1/legacy.ckpt")
    expected = expected_tensors("v1_tf1/legacy.ckpt")
    meta = saved_tensor_slice_pb2.SavedTensorSlices.FromString(values.pop(b"")).meta
    assert meta.versions.producer == 1
    assert {t.name: [d.size for d in t.shape.dim] for t in meta.tensor} == {n: t["shape"] for n, t in expected.items()}
    assert {t.name: tensor.DataType(t.type).name for t in meta.tensor} == {n: t["dtype"] for n, t in expected.items()}

    stored = 0
    for value in values.values():
        slices = saved_tensor_slice_pb2.SavedTensorSlices.FromString(value)
        assert not has_unknown_fields(slices)
        assert slices.SerializeToString() == value
        stored += sum(len(items) for _, items in slices.data.data.ListFields())
        if slices.data.name == "t/float64":
            assert struct.pack("<6d", *slices.data.data.double_val) == base64.b64decode(
                expected["t/float64"]["data_b64"]
            )
    assert stored == sum(math.prod(t["shape"]) for t in expected.values())


@pytest.mark.parametrize("release", ["tf1", "tf2"])
def test_object_graph(release: str) -> None:
    folder = f"object_based_{release}"
    entry = tensor_bundle_pb2.BundleEntryProto.FromString(index_of(f"{folder}/ckpt-3")[b"_CHECKPOINTABLE_OBJECT_GRAPH"])
    data = (GOLDEN / folder / "ckpt-3.data-00000-of-00001").read_bytes()[entry.offset : entry.offset + entry.size]
    length, at = varint(data, 0)
    serialized = data[at + 4 :]  # the lengths' checksum stands between
    assert len(serialized) == length

    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(serialized)
    assert not has_unknown_fields(graph)
    assert graph.SerializeToString() == serialized
    expected = json.loads((GOLDEN / folder / "expected-object-graph.json").read_text())["nodes"]
    assert [
        {
            "children": [[c.node_id, c.local_name] for c in node.children],
            "attributes": [[a.name, a.full_name, a.checkpoint_key] for a in node.attributes],
            "slot_variables": [
                [s.original_variable_node_id, s.slot_name, s.slot_variable_node_id] for s in node.slot_variables
            ],
        }
        for node in graph.nodes
    ] == expected


def test_checkpoint_state_text() -> None:
    text = (GOLDEN / "object_based_tf2" / "checkpoint").read_text("utf-8")
    state = text_format.Parse(text, CheckpointState())
    expected = json.loads((GOLDEN / "object_based_tf2" / "expected-object-graph.json").read_text())["state"]
    assert state.model_checkpoint_path == expected["model_checkpoint_path"]
    assert list(state.all_model_checkpoint_paths) == ["ckpt-2", "ckpt-3"]
    assert list(state.all_model_checkpoint_timestamps) == expected["timestamps"]
    assert state.last_preserved_timestamp == expected["last_preserved_timestamp"]
    assert text_format.MessageToString(state) == text


@pytest.mark.parametrize("folder", META_GRAPHS)
def test_binary_meta_graph(folder: str) -> None:
    stored = (GOLDEN / folder / "net-3.meta").read_bytes()
    graph = meta_graph(folder)
    assert not has_unknown_fields(graph)
    again = graph.SerializeToString()
    assert len(again) == len(stored)  # equal but for the order of map entries, which is free
    assert MetaGraphDef.FromString(again) == graph

    expected = json.loads((GOLDEN / folder / "expected-meta.json").read_text())
    assert [
        {"name": n.name, "op": n.op, "device": n.device, "input": list(n.input), "attrs": sorted(n.attr)}
        for n in graph.graph_def.node
    ] == expected["nodes"]
    assert graph.graph_def.versions.producer == expected["graph_versions"]["producer"]
    assert graph.meta_info_def.tensorflow_version == expected["meta_info"]["tensorflow_version"]
    for field, value in expected["saver_def"].items():
        assert getattr(graph.saver_def, field) == value
    assert graph.collection_def.keys() == expected["collections"].keys()
    for name, collection in expected["collections"].items():
        found = graph.collection_def[name]
        assert found.WhichOneof("kind") == collection["kind"]
        values = getattr(found, collection["kind"]).value
        if "value_b64" in collection:
            assert list(values) == [base64.b64decode(v) for v in collection["value_b64"]]
        elif "value" in collection:
            assert list(values) == collection["value"]
        else:
            assert [variable_fields(v) for v in values] == [
                {field: value for field, value in v.items() if field != "save_slice"} for v in collection["variables"]
            ]


def variable_fields(serialized: bytes) -> dict[str, Any]:
    variable = meta_graph_pb2.VariableDef.FromString(serialized)
    assert variable.SerializeToString() == serialized
    assert not variable.HasField("save_slice_info_def")
    names = ["variable_name", "initializer_name", "snapshot_name", "is_resource", "initial_value_name", "trainable"]
    return {name: getattr(variable, name) for name in names}


@pytest.mark.parametrize("folder", META_GRAPHS)
def test_text_meta_graph_agrees_with_the_binary_one(folder: str) -> None:
    """Both were exported from one graph: the text without default attributes, the binary with the Saver `aux` added."""
    text, binary = text_meta_graph(folder), meta_graph(folder)
    assert text.meta_info_def.stripped_default_attrs
    assert text.saver_def == binary.saver_def
    assert text.graph_def.versions == binary.graph_def.versions
    assert {name: text.collection_def[name] for name in text.collection_def} == {
        name: binary.collection_def[name] for name in binary.collection_def
    }
    assert list(text.meta_info_def.stripped_op_list.op) == list(binary.meta_info_def.stripped_op_list.op)

    defaults = {
        (op.name, attr.name): attr.default_value for op in binary.meta_info_def.stripped_op_list.op for attr in op.attr
    }
    nodes = {node.name: node for node in binary.graph_def.node if not node.name.startswith("aux/")}
    assert [node.name for node in text.graph_def.node] == list(nodes)
    for node in text.graph_def.node:
        for name, value in nodes[node.name].attr.items():
            if name not in node.attr:
                assert value == defaults[node.op, name]
                node.attr[name].CopyFrom(value)
        assert node == nodes[node.name]


@pytest.mark.parametrize("folder", META_GRAPHS)
def test_text_meta_graph_survives_printing(folder: str) -> None:
    graph = text_meta_graph(folder)
    assert text_format.Parse(text_format.MessageToString(graph), MetaGraphDef()) == graph


# Details of the definitions


def test_nothing_is_registered_under_a_name_of_tensorflow() -> None:
    for module in MODULES:
        name = module.__name__.rpartition(".")[2].removesuffix("_pb2")
        assert module.DESCRIPTOR.name == f"gpusaver/protos/{name}.proto"
        assert module.DESCRIPTOR.package == "gpusaver"
    assert len(MODULES) == len(list((ROOT / "proto/gpusaver/protos").glob("*.proto")))


def test_data_types_are_numbered_as_in_the_library() -> None:
    numbers = types_pb2.DataType.values()
    assert [n for n in numbers if n < 100] == [dtype.value for dtype in tensor.DataType]
    assert [n for n in numbers if n > 100] == [dtype.value + 100 for dtype in tensor.DataType if dtype.value]
    aliases = {"float32": "float", "float64": "double", "float16": "half"}
    for dtype in tensor.DataType:
        assert types_pb2.DataType.Name(dtype) == "DT_" + aliases.get(dtype.name, dtype.name).upper()


def test_a_slice_tells_no_length_from_zero_length() -> None:
    whole = types_pb2.TensorSliceProto.Extent()
    nothing = types_pb2.TensorSliceProto.Extent(length=0)
    assert not whole.HasField("length")
    assert nothing.HasField("length")
    assert (whole.SerializeToString(), nothing.SerializeToString()) == (b"", b"\x10\x00")


def test_number_lists_are_packed_and_read_unpacked_too() -> None:
    version = types_pb2.VersionDef(bad_consumers=[1, 300])
    assert version.SerializeToString() == bytes.fromhex("1a0301ac02")
    assert types_pb2.VersionDef.FromString(bytes.fromhex("180118ac02")) == version


def test_fields_left_out_are_kept() -> None:
    object_graph_def = b"\x3a\x03abc"  # MetaGraphDef, field 7
    assert MetaGraphDef.FromString(object_graph_def).SerializeToString() == object_graph_def


# The public module


def test_public_names() -> None:
    assert gpusaver.protos.__all__ == ["CheckpointState", "MetaGraphDef", "SaverDef"]
    assert set(gpusaver.protos.__all__) <= set(dir(gpusaver.protos))
    assert gpusaver.protos.SaverDef is saver_pb2.SaverDef
    with pytest.raises(AttributeError, match=r"gpusaver\.protos.*NodeDef"):
        _ = gpusaver.protos.NodeDef


def test_protobuf_is_imported_on_first_use() -> None:
    program = (
        "import sys, types\n"
        "package = types.ModuleType('gpusaver')\n"  # in its place, since the real one may import more
        "package.__path__ = ['gpusaver']\n"
        "sys.modules['gpusaver'] = package\n"
        "import gpusaver.protos as protos\n"
        "assert 'google.protobuf' not in sys.modules\n"
        "protos.SaverDef()\n"
        "assert 'google.protobuf' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def foreign_class(descriptor: Any, package: str, **changed_types: int) -> Any:
    """A class for the same message in another package, with one more field, as if another library had defined it."""
    file = descriptor_pb2.FileDescriptorProto()
    descriptor.file.CopyToProto(file)
    file.name, file.package = f"{package}/{file.name}", package
    message = next(m for m in file.message_type if m.name == descriptor.name)
    for field in message.field:
        if field.type_name:
            field.type_name = field.type_name.replace(".gpusaver.", f".{package}.")
        field.type = changed_types.get(field.name, field.type)
    extra = message.field.add(name="added_later", number=900)
    extra.type, extra.label = extra.TYPE_STRING, extra.LABEL_OPTIONAL
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{descriptor.name}"))


def test_adopt_returns_our_own_message_itself() -> None:
    ours = SaverDef(max_to_keep=3)
    assert adopt(ours, SaverDef) is ours


@pytest.mark.parametrize(
    "ours",
    [
        SaverDef(restore_op_name="save/restore_all", keep_checkpoint_every_n_hours=0.5, version=SaverDef.V2),
        CheckpointState(model_checkpoint_path="a", all_model_checkpoint_paths=["b", "a"]),
    ],
    ids=["saver", "state"],
)
def test_adopt_converts_a_foreign_message(ours: Any) -> None:
    theirs = foreign_class(ours.DESCRIPTOR, "tensorflow").FromString(ours.SerializeToString())
    assert theirs.DESCRIPTOR.full_name == f"tensorflow.{ours.DESCRIPTOR.name}"
    adopted = adopt(theirs, type(ours))
    assert type(adopted) is type(ours)
    assert adopted == ours

    theirs.added_later = "kept"
    assert b"kept" in adopt(theirs, type(ours)).SerializeToString()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, "found builtins.NoneType"),
        ({"max_to_keep": 3}, "found builtins.dict"),
        (SaverDef, "found google"),
        (CheckpointState(), "found gpusaver.CheckpointState"),
        (
            foreign_class(SaverDef.DESCRIPTOR, "elsewhere", restore_op_name=12)(restore_op_name=b"\xff"),
            "found elsewhere.SaverDef, whose bytes do not parse as gpusaver.SaverDef",
        ),
    ],
    ids=["none", "dict", "class", "other-message", "other-format"],
)
def test_adopt_refuses_anything_else(given: object, found: str) -> None:
    with pytest.raises(TypeError, match=rf"expected gpusaver\.SaverDef .*{found}"):
        adopt(given, SaverDef)


# The generator


@pytest.fixture
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The part of the repository that the generator reads and writes."""
    for folder in ["proto", "gpusaver/protos"]:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def needs_generator(generate: ModuleType) -> None:
    if generate.generator_version() != generate.GENERATOR_VERSION:
        pytest.skip("the generator is not installed")


def test_committed_modules_are_up_to_date(generate: ModuleType) -> None:
    fresh, sentence = generate.check(ROOT, generate.generator_version())
    assert fresh, sentence


def test_check_without_the_generator_compares_hashes(generate: ModuleType, copy: Path) -> None:
    assert generate.check(copy, None) == (True, "Up to date by hash, as grpcio-tools==1.62.3 is not installed here.")


@pytest.mark.parametrize(
    "path", ["proto/gpusaver/protos/saver.proto", "gpusaver/protos/saver_pb2.py", "gpusaver/protos/saver_pb2.pyi"]
)
def test_check_finds_an_edited_file_by_hash(generate: ModuleType, copy: Path, path: str) -> None:
    with (copy / path).open("a") as file:
        file.write("\n")
    fresh, sentence = generate.check(copy, None)
    assert not fresh
    assert "make protos" in sentence


def test_check_finds_a_missing_or_added_file_by_hash(generate: ModuleType, copy: Path) -> None:
    module = copy / "gpusaver/protos/saver_pb2.py"
    module.rename(module.with_name("other_pb2.py"))
    assert not generate.check(copy, None)[0]
    module.with_name("other_pb2.py").rename(module)
    assert generate.check(copy, None)[0]
    (copy / "proto/generated.sha256").unlink()
    assert not generate.check(copy, None)[0]


def test_check_with_the_generator_is_not_fooled_by_hashes(generate: ModuleType, copy: Path) -> None:
    needs_generator(generate)
    with (copy / "gpusaver/protos/saver_pb2.pyi").open("a") as file:
        file.write("\n")
    (copy / "proto/generated.sha256").write_text(generate.hash_lines(copy))
    fresh, sentence = generate.check(copy, generate.GENERATOR_VERSION)
    assert not fresh
    assert "saver_pb2.pyi differ" in sentence


def test_generate_restores_what_is_committed(generate: ModuleType, copy: Path) -> None:
    needs_generator(generate)
    (copy / "gpusaver/protos/saver_pb2.py").write_text("")
    (copy / "gpusaver/protos/left_over_pb2.py").write_text("")
    generate.generate(copy)
    for path in [*generate.generated(ROOT), ROOT / generate.HASHES]:
        assert (copy / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert not (copy / "gpusaver/protos/left_over_pb2.py").exists()


def test_check_exit_status(
    generate: ModuleType, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    monkeypatch.setattr(generate, "ROOT", copy)
    monkeypatch.setattr(generate, "generator_version", lambda: None)
    assert generate.main() == 0
    (copy / "gpusaver/protos/saver_pb2.py").unlink()
    assert generate.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["Up", "Stale:"]


def test_generating_with_another_generator_is_refused(
    generate: ModuleType, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    monkeypatch.setattr(generate, "ROOT", copy)
    monkeypatch.setattr(generate, "generator_version", lambda: "1.99.0")
    assert generate.main() == 1
    assert "needs grpcio-tools==1.62.3, found 1.99.0" in capsys.readouterr().out
    assert generate.check(copy, None)[0]
