"""`.meta` files of native saves, and Variables made anew from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from failing_storage import FailingStorage

import gpusaver
from gpusaver import exporting
from gpusaver.errors import DataLossError, Error, InvalidArgumentError
from gpusaver.metagraph.collections import collection_items
from gpusaver.metagraph.reading import read_meta_graph, saved_variables
from gpusaver.protos import MetaGraphDef, SaverDef
from gpusaver.storage.local import LocalStorage

GOLDEN = Path(__file__).parent.parent / "golden"


def state() -> dict[str, Any]:
    whole = np.arange(30, dtype=np.float32).reshape(10, 3)
    return {
        "w": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        "adam": {"m": np.ones(3), "w/Assign": np.zeros((0, 2), np.int8)},
        "global_step": np.array(7),
        "text": "seven",
        "odd name: é\0": np.array([b"a", b"b\xff"], object),
        "p": [
            gpusaver.PartitionedVariable((10, 3), np.s_[0:4, :], whole[:4]),
            gpusaver.PartitionedVariable((10, 3), np.s_[4:10, :], whole[4:]),
        ],
    }


@pytest.fixture(autouse=True)
def own_collection() -> Any:
    with gpusaver.variables():
        yield


def meta_files(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if "meta" in name)


# Beside a checkpoint


@pytest.mark.parametrize("sharded", [False, True])
def test_variables_come_back_as_they_were_saved(tmp_path: Path, sharded: bool) -> None:
    with gpusaver.Saver(state(), sharded=sharded, max_to_keep=3, keep_checkpoint_every_n_hours=0.5) as saver:
        prefix = saver.save(tmp_path / "k", 1)
    expected = gpusaver.load(prefix)
    dtypes = gpusaver.load_checkpoint(prefix).get_variable_to_dtype_map()
    with gpusaver.import_meta_graph(f"{prefix}.meta") as imported:
        report = imported.restore(prefix)
        assert report.restored == sorted(expected)
        assert not report.unexpected
        variables = {variable.name: variable for variable in gpusaver.current_variables()}
        assert {name: variable.dtype for name, variable in variables.items()} == dtypes
        for name, variable in variables.items():
            np.testing.assert_array_equal(variable.value, expected[name])
            assert not variable.trainable
        definition = imported.as_saver_def()
        assert (definition.max_to_keep, definition.keep_checkpoint_every_n_hours) == (3, 0.5)
        assert definition.sharded == sharded
        np.testing.assert_equal(gpusaver.load(imported.save(tmp_path / "again")), expected)


def test_collections_and_devices() -> None:
    gpusaver.Variable(np.zeros(2, np.float32), "w", device="cpu:1")
    gpusaver.Variable(np.int64(3), "global_step", trainable=False)
    with gpusaver.Saver(name="aux", filename="here") as saver:
        meta_graph = saver.export_meta_graph()
        assert sorted(meta_graph.collection_def) == ["global_step", "trainable_variables", "variables"]
        for key, names in {
            "variables": ["global_step:0", "w:0"],
            "trainable_variables": ["w:0"],
            "global_step": ["global_step:0"],
        }.items():
            items = collection_items(key, meta_graph.collection_def[key])
            assert [item.variable_name for item in items] == names
        devices = {node.device for node in meta_graph.graph_def.node if node.name.startswith("w")}
        assert devices == {"/device:CPU:1"}
        assert meta_graph.saver_def.restore_op_name == "aux/restore_all"
        cleared = saver.export_meta_graph(clear_devices=True, collection_list=["variables"])
        assert sorted(cleared.collection_def) == ["variables"]
        assert {node.device for node in cleared.graph_def.node} == {""}
    with gpusaver.variables(), gpusaver.import_meta_graph(meta_graph):
        devices = {variable.name: variable.device for variable in gpusaver.current_variables()}
        assert devices == {"global_step": None, "w": "cpu:1"}
        assert [v.name for v in gpusaver.current_variables() if v.trainable] == ["w"]
    with gpusaver.variables(), gpusaver.import_meta_graph(meta_graph, clear_devices=True):
        assert {variable.device for variable in gpusaver.current_variables()} == {None}


def test_names_that_no_node_can_have(tmp_path: Path) -> None:
    names = [
        "a b",
        "a_b",
        "_",
        "w",
        "w/Assign",
        "w/Assign/Assign",
        "save/Const",
        "zeros/float32",
        "\udcff",
        "x:0",
        "^y",
    ]
    with gpusaver.Saver({name: np.full(2, number) for number, name in enumerate(names)}) as saver:
        prefix = saver.save(tmp_path / "k")
        meta_graph = read_meta_graph(f"{prefix}.meta")
        nodes = [node.name for node in meta_graph.graph_def.node]
        assert len(set(nodes)) == len(nodes)
        assert {key: variable.name for key, variable in saved_variables(meta_graph)}["w"] == "w"
    with gpusaver.import_meta_graph(f"{prefix}.meta") as imported:
        imported.restore(prefix)
        values = {variable.name: variable.value[0] for variable in gpusaver.current_variables()}
        assert values == {name: number for number, name in enumerate(names)}


def test_the_file_is_written_for_each_save_and_encoded_once(tmp_path: Path) -> None:
    arrays = {"w": np.zeros(3)}
    with gpusaver.Saver(arrays, max_to_keep=2) as saver:
        for step in range(4):
            saver.save_async(tmp_path / "k", step)
        saver.save(tmp_path / "k", 4, write_meta_graph=False)
        assert meta_files(tmp_path) == ["k-3.meta"]
        saver.save(tmp_path / "k", 5)
        saver.save(tmp_path / "k", 6)
        assert meta_files(tmp_path) == ["k-5.meta", "k-6.meta"]
        assert (tmp_path / "k-5.meta").read_bytes() == (tmp_path / "k-6.meta").read_bytes()
        arrays["w"] = np.zeros((2, 2), np.int8)
        saver.save(tmp_path / "k", 7)
        (saveable,) = saved_variables(read_meta_graph(tmp_path / "k-7.meta"))
        assert (saveable.variable.shape, saveable.variable.dtype.name) == ((2, 2), "int8")


def identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def test_checkpoints_that_say_the_same_share_one_file(tmp_path: Path) -> None:
    """Another name of the last one costs nothing; retention takes names away, not the file."""
    variables = {"w": np.zeros(3), "step": 1}
    with gpusaver.Saver(variables, max_to_keep=2) as saver:
        for step in range(1, 5):
            saver.save(tmp_path / "k", step)
        assert meta_files(tmp_path) == ["k-3.meta", "k-4.meta"]
        assert identity(tmp_path / "k-3.meta") == identity(tmp_path / "k-4.meta")
        saver.save(tmp_path / "k", 4)  # over itself, and over another name of the same file
        saver.save(tmp_path / "k", 3)
        assert identity(tmp_path / "k-3.meta") == identity(tmp_path / "k-4.meta")
        assert not [name for name in os.listdir(tmp_path) if "tmp" in name]
    assert [saveable.key for saveable in saved_variables(read_meta_graph(tmp_path / "k-4.meta"))] == ["step", "w"]


@pytest.mark.parametrize("change", ["in place", "replaced", "removed", "a link to elsewhere"])
def test_a_file_that_somebody_has_changed_is_not_shared(tmp_path: Path, change: str) -> None:
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:
        saver.save(tmp_path / "k", 1)
        path = tmp_path / "k-1.meta"
        expected = path.read_bytes()
        if change == "in place":
            path.write_bytes(b"?" + expected[1:])
        else:
            path.rename(tmp_path / "other") if change.startswith("a link") else path.unlink()
            if change == "replaced":
                path.write_bytes(b"?")
            elif change.startswith("a link"):
                path.symlink_to(tmp_path / "other")
        saver.save(tmp_path / "k", 2)
        assert (tmp_path / "k-2.meta").read_bytes() == expected
        assert not (tmp_path / "k-2.meta").is_symlink()
        assert (tmp_path / "k-2.meta").stat().st_nlink == 1
        assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:
        for step in (1, 2):
            saver.save(tmp_path / "k", step)
    assert (tmp_path / "k-1.meta").read_bytes() == (tmp_path / "k-2.meta").read_bytes()
    assert identity(tmp_path / "k-1.meta") != identity(tmp_path / "k-2.meta")


def test_another_suffix_goes_with_the_checkpoint(tmp_path: Path) -> None:
    with gpusaver.Saver({"w": np.zeros(3)}, max_to_keep=1) as saver:
        saver.save(tmp_path / "k", 1, meta_graph_suffix="graph")
        assert (tmp_path / "k-1.graph").exists()
        saver.save(tmp_path / "k", 2, meta_graph_suffix="graph")
        assert not (tmp_path / "k-1.graph").exists()
        saver.save(tmp_path / "k", 3, write_state=False)
        assert (tmp_path / "k-3.meta").exists()
        for suffix in ("index", "data-00000-of-00001", "", "a/b", None, 3):
            with pytest.raises(ValueError, match="meta_graph_suffix"):
                saver.save(tmp_path / "k", 4, meta_graph_suffix=suffix)
        assert not list(tmp_path.glob("k-4*"))


def test_trainable_that_changes_is_told(tmp_path: Path) -> None:
    variable = gpusaver.Variable(np.zeros(2), "w")
    with gpusaver.Saver() as saver:
        for trainable in (True, False):
            variable.trainable = trainable
            prefix = saver.save(tmp_path / "k")
            (saveable,) = saved_variables(read_meta_graph(f"{prefix}.meta"))
            assert saveable.variable.trainable == trainable


@pytest.mark.parametrize(("kind", "for_ever"), [("EIO", False), ("ENOSPC", True)])
def test_the_nth_operation_fails(tmp_path: Path, kind: str, for_ever: bool) -> None:
    """No `.meta` without its checkpoint, none half written, and an old one stays until its checkpoint is replaced."""
    n, reached = 0, True
    while reached:
        directory = tmp_path / str(n)
        directory.mkdir()
        storage = FailingStorage()
        arrays = {"w": np.zeros(3)}
        with gpusaver.Saver(arrays, storage=storage) as saver:
            old = Path(saver.save(directory / "k") + ".meta").read_bytes()
            arrays["w"] = np.zeros(4)
            for path, before in ((directory / "k", old), (directory / "j", None)):
                storage.arm(n, kind, for_ever=for_ever)
                try:
                    saver.save(path)
                    has_failed = False
                except Error:
                    has_failed = True
                reached = n < len(storage.log)
                meta = path.with_suffix(".meta")
                found = meta.read_bytes() if meta.exists() else None
                committed = ("replace", f"{path}.index") in storage.log[: storage.fail_at] or not has_failed
                if found == before:
                    assert has_failed
                else:
                    assert committed
                    (saveable,) = saved_variables(read_meta_graph(meta))
                    assert saveable.variable.shape == (4,)
                assert meta_files(directory) == (["j.meta"] if (directory / "j.meta").exists() else []) + ["k.meta"]
                assert not [name for name in os.listdir(directory) if name.endswith("gpusaver-tmp")]
                if gpusaver.latest_checkpoint(directory) == str(path) and path.name == "j":
                    assert meta.exists()  # the state file comes last
        n += 1
        assert n < 100
    assert n > 15


# Without a checkpoint


def test_export_to_a_file_and_back(tmp_path: Path) -> None:
    gpusaver.Variable(np.zeros((2, 3), np.float16), "net/w")
    gpusaver.Variable(np.zeros(1), "netto")
    with gpusaver.Saver() as saver:
        for as_text in (False, True):
            message = saver.export_meta_graph(tmp_path / "x.meta", as_text=as_text)
            assert read_meta_graph(tmp_path / "x.meta") == message
            assert isinstance(message, MetaGraphDef)
        assert (tmp_path / "x.meta").read_text().startswith("graph_def {")
        assert os.listdir(tmp_path) == ["x.meta"]
        part = saver.export_meta_graph(export_scope="net")
        ((key, variable),) = saved_variables(part)
        assert (key, variable.name) == ("net/w", "w")
    with gpusaver.import_meta_graph(part, import_scope="scope"):
        assert [v.name for v in gpusaver.current_variables()] == ["net/w", "netto", "scope/net/w"]


def test_saver_defs(tmp_path: Path) -> None:
    gpusaver.Variable(np.zeros(2), "w")
    with gpusaver.Saver(max_to_keep=None, name="aux") as saver:
        definition = saver.as_saver_def()
        assert definition == saver.export_meta_graph().saver_def == saver.to_proto()
        assert definition == SaverDef(
            filename_tensor_name="aux/Const:0",
            save_tensor_name="aux/control_dependency:0",
            restore_op_name="aux/restore_all",
            keep_checkpoint_every_n_hours=10_000,
            version=SaverDef.V2,
        )
        assert saver.to_proto("aux").restore_op_name == "restore_all"
        assert saver.to_proto("other") is None
    with gpusaver.Saver.from_proto(SaverDef(max_to_keep=2, sharded=True), import_scope="s") as made:
        assert made.as_saver_def().max_to_keep == 2
        assert made.as_saver_def().save_tensor_name == "s/Identity:0"
        assert gpusaver.load(made.save(tmp_path / "k")).keys() == {"w"}
    with pytest.raises(TypeError, match="SaverDef"):
        gpusaver.Saver.from_proto({"max_to_keep": 2})


def test_a_saver_that_is_not_built_or_closed() -> None:
    saver = gpusaver.Saver(defer_build=True)
    for call in (saver.export_meta_graph, saver.as_saver_def):
        with pytest.raises(RuntimeError, match="build"):
            call()
    saver.close()
    with pytest.raises(RuntimeError, match="closed"):
        saver.as_saver_def()


def test_a_saver_of_nothing(tmp_path: Path) -> None:
    with gpusaver.Saver({}, allow_empty=True) as saver:
        prefix = saver.save(tmp_path / "k")
    with pytest.raises(InvalidArgumentError, match="describes no variables"):
        gpusaver.import_meta_graph(f"{prefix}.meta")


# What TensorFlow wrote


@pytest.mark.parametrize(
    "name",
    [
        f"{name}_{release}"
        for name in ("meta_graph", "sharded", "partitioned", "basic_f32", "conv")
        for release in ("tf1", "tf2")
    ],
)
def test_graphs_of_tensorflow(name: str, tmp_path: Path) -> None:
    (index,) = (GOLDEN / name).glob("*.index")
    prefix = str(index).removesuffix(".index")
    expected = gpusaver.load(prefix)
    with gpusaver.import_meta_graph(f"{prefix}.meta", clear_devices=True) as saver:
        report = saver.restore(prefix)
        assert not report.unexpected
        found = {variable.name: variable.value for variable in gpusaver.current_variables()}
        np.testing.assert_equal(found, expected)
        assert gpusaver.load(saver.save(tmp_path / "k")).keys() == expected.keys()


def test_trainable_and_devices_of_a_tensorflow_graph() -> None:
    with gpusaver.import_meta_graph(GOLDEN / "meta_graph_tf1" / "text.meta") as saver:
        variables = gpusaver.current_variables()
        assert sorted(v.name for v in variables if v.trainable) == ["net/b", "net/names", "net/w"]
        assert {v.name for v in variables if v.device == "cpu:0"} == {"net/w", "net/w/Adam", "net/w/Adam_1"}
        assert saver.as_saver_def().max_to_keep == 3
        assert saver.as_saver_def().keep_checkpoint_every_n_hours == 2


# What cannot be imported


def test_names_that_are_taken_leave_nothing_behind() -> None:
    path = GOLDEN / "meta_graph_tf2" / "net-3.meta"
    gpusaver.Variable(np.zeros(1), "net/w")
    with pytest.raises(ValueError, match="At least two variables have the same name: net/w"):
        gpusaver.import_meta_graph(path)
    assert [v.name for v in gpusaver.current_variables()] == ["net/w"]
    with gpusaver.import_meta_graph(path, import_scope="again"):
        assert len(gpusaver.current_variables()) == 12


@pytest.mark.parametrize(
    ("shape", "text"), [(None, "any rank"), ((-1, 2), r"\[-1, 2\]"), ((1 << 40, 1 << 40), "array")]
)
def test_shapes_that_no_array_has(shape: tuple[int, ...] | None, text: str) -> None:
    from gpusaver.metagraph.nodes import as_attr

    gpusaver.Variable(np.zeros((3, 2)), "w")
    gpusaver.Variable(np.zeros(3), "b")
    with gpusaver.Saver() as saver:
        meta_graph = saver.export_meta_graph()
    for node in meta_graph.graph_def.node:
        if node.name == "w":
            node.attr["shape"].CopyFrom(as_attr(shape))
    with gpusaver.variables():
        with pytest.raises(InvalidArgumentError, match=f"w.*{text}"):
            gpusaver.import_meta_graph(meta_graph)
        assert gpusaver.current_variables() == []


def test_a_device_that_is_not_there() -> None:
    gpusaver.Variable(np.zeros(3), "w", device="cpu:1")
    with gpusaver.Saver() as saver:
        meta_graph = saver.export_meta_graph()
    for node in meta_graph.graph_def.node:
        node.device = node.device.replace("CPU:1", "GPU:99")
    with gpusaver.variables():
        with pytest.raises(Exception, match=r"CuPy|CUDA|device") as caught:
            gpusaver.import_meta_graph(meta_graph)
        assert caught.value.__notes__ == [
            "The graph has w on /device:GPU:99; clear_devices=True keeps it in host memory."
        ]
        assert gpusaver.current_variables() == []


def test_what_is_no_meta_graph(tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "k", {"w": np.zeros(3)})
    with pytest.raises(FileNotFoundError, match=r"k does not exist: pass .*k\.meta"):
        gpusaver.import_meta_graph(prefix)
    with pytest.raises(DataLossError, match=r"Cannot parse file .*k\.index.*Pass .*k\.meta"):
        gpusaver.import_meta_graph(f"{prefix}.index")
    with pytest.raises(TypeError, match="MetaGraphDef"):
        gpusaver.import_meta_graph(3)  # type: ignore[arg-type]


def test_a_program_without_variables_is_told_of_import_meta_graph() -> None:
    with pytest.raises(ValueError, match=r"No variables to save.*import_meta_graph\(prefix \+ '\.meta'\)"):
        gpusaver.Saver()


def test_what_a_meta_file_says_is_kept_only_where_it_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without links each save writes it anew; making it takes longer than the rest of a save."""
    made = []
    serialized = exporting.variables_meta_graph

    def counted(*arguments: Any, **options: Any) -> None:
        made.append(1)
        serialized(*arguments, **options)

    monkeypatch.setattr(exporting, "variables_meta_graph", counted)
    with gpusaver.Saver({"w": np.zeros(3)}) as saver:
        for step in range(3):
            saver.save(tmp_path / "linked", step)
        assert len(made) == 1
        monkeypatch.setattr(LocalStorage, "link", lambda *_, **__: None)
        for step in range(3, 7):
            saver.save(tmp_path / "alone", step)
        assert len(made) == 2
    assert len({path.read_bytes() for path in tmp_path.glob("*.meta")}) == 1
