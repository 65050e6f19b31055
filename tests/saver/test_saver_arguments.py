"""What the Saver takes, and what it says to the rest."""

from __future__ import annotations

import os
import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver.errors import Error, InvalidArgumentError, NotFoundError
from gpusaver.protos import SaverDef


class Session:
    """Stands for TensorFlow's."""


@pytest.fixture
def saver() -> Any:
    with gpusaver.Saver({"w": np.zeros(3, np.float32)}) as saver:
        yield saver


SESSION_CALLS = {
    "save(sess, path)": lambda saver, path: saver.save(Session(), path),
    "save(sess, path, 5)": lambda saver, path: saver.save(Session(), path, 5),
    "save(sess, path, global_step=5)": lambda saver, path: saver.save(Session(), path, global_step=5),
    "save(sess=sess, save_path=path)": lambda saver, path: saver.save(sess=Session(), save_path=path),
    "save(None, path)": lambda saver, path: saver.save(None, path),
    "save(None, path, 5)": lambda saver, path: saver.save(None, path, 5),
    "save(3, path)": lambda saver, path: saver.save(3, path),
    "save(None)": lambda saver, path: saver.save(None),
    "save_async(sess, path, 5)": lambda saver, path: saver.save_async(Session(), path, 5),
    "restore(sess, path)": lambda saver, path: saver.restore(Session(), path),
    "restore(None, path)": lambda saver, path: saver.restore(None, path),
    "restore(sess=sess, save_path=path)": lambda saver, path: saver.restore(sess=Session(), save_path=path),
    "restore(3)": lambda saver, path: saver.restore(3),
    "a step of text": lambda saver, path: saver.save(path, "5"),
    "a step of bytes": lambda saver, path: saver.save(path, b"5"),
    "a float step": lambda saver, path: saver.save(path, 5.0),
    "a NumPy float step": lambda saver, path: saver.save(path, np.float32(5)),
    "an array step": lambda saver, path: saver.save(path, np.array([5])),
    "a tuple step": lambda saver, path: saver.save(path, (5,)),
}


@pytest.mark.parametrize("call", SESSION_CALLS.values(), ids=SESSION_CALLS.keys())
def test_calls_written_for_sessions_are_told_where_to_go(saver: Any, call: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"takes no session.*gpusaver\.compat\.v1"):
        call(saver, f"{tmp_path}/k")
    assert os.listdir(tmp_path) == []


def test_everything_else_is_keyword_only(saver: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"save: expected all further arguments by keyword, found 'latest'"):
        saver.save(tmp_path / "k", 5, "latest")
    with pytest.raises(TypeError, match="restore: expected all further arguments by keyword, found True"):
        saver.restore(f"{tmp_path}/k", True)
    with pytest.raises(TypeError, match="positional argument"):
        gpusaver.Saver({}, True)  # type: ignore[misc]


def test_the_documentation_shows_the_true_signature() -> None:
    import inspect

    assert list(inspect.signature(gpusaver.Saver.restore).parameters) == ["self", "save_path", "partial", "verify"]


STEPS = {
    "int": (7, "k-7"),
    "bool": (True, "k-1"),
    "NumPy bool": (np.bool_(True), "k-1"),
    "int8": (np.int8(-7), "k--7"),
    "uint64": (np.uint64(2**63), "k-9223372036854775808"),
    "beyond 64 bits": (2**70, "k-1180591620717411303424"),
    "array of rank 0": (np.array(7, ">i2"), "k-7"),
}


@pytest.mark.parametrize(("step", "name"), STEPS.values(), ids=STEPS.keys())
def test_steps(saver: Any, step: Any, name: str, tmp_path: Path) -> None:
    assert saver.save(tmp_path / "k", step) == f"{tmp_path}/{name}"


@pytest.mark.parametrize("value", [7, np.int32(7), np.array(7)])
def test_a_step_in_a_variable(value: Any, tmp_path: Path) -> None:
    with gpusaver.variables():
        step = gpusaver.Variable(value, name="step")
        with gpusaver.Saver() as saver:
            assert saver.save(tmp_path / "k", step) == f"{tmp_path}/k-7"
            step.assign(np.add(step.value, 1, dtype=step.value.dtype))
            assert saver.save(tmp_path / "k", step) == f"{tmp_path}/k-8"
            with pytest.raises(TypeError, match="global_step"):
                saver.save(tmp_path / "k", gpusaver.Variable(1.0))


@pytest.mark.parametrize("kind", [str, os.fsencode, pathlib.Path])
def test_kinds_of_paths(saver: Any, kind: Any, tmp_path: Path) -> None:
    path = kind(f"{tmp_path}/k")
    assert saver.save(path) == f"{tmp_path}/k"
    saver.restore(path)
    assert saver.last_checkpoints == [f"{tmp_path}/k"]


@pytest.mark.parametrize("option", [{"capture": "lazy"}, {"when_busy": "sleep"}, {"capture": None}])
def test_unknown_options_of_save_async(saver: Any, option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        saver.save_async(tmp_path / "k", **option)


def test_unknown_options_of_restore(saver: Any, tmp_path: Path) -> None:
    prefix = saver.save(tmp_path / "k")
    with pytest.raises(ValueError, match="verify"):
        saver.restore(prefix, verify="after")
    with pytest.raises(ValueError, match="partial"):
        saver.restore(prefix, partial="names")


def test_no_variables() -> None:
    for nothing in ({}, [], (), {"a": {}, "b": []}):
        with pytest.raises(ValueError, match=r"No variables to save.*gpusaver\.load"):
            gpusaver.Saver(nothing)
    with gpusaver.variables(), pytest.raises(ValueError, match="No variables to save"):
        gpusaver.Saver()


def test_allow_empty(tmp_path: Path) -> None:
    with gpusaver.Saver({}, allow_empty=True) as saver:
        prefix = saver.save(tmp_path / "k", 1)
        assert saver.restore(prefix).restored == []
        assert gpusaver.list_variables(prefix) == []
        assert saver.save_async(tmp_path / "k", 2, capture="snapshot").result() == f"{tmp_path}/k-2"


@pytest.mark.parametrize("var_list", [np.zeros(3), "w", 3, (name for name in "ab"), b"w", object()])
def test_what_is_no_container(var_list: Any) -> None:
    with pytest.raises(TypeError, match="should be passed in a dict or a list"):
        gpusaver.Saver(var_list)


def test_defer_build(tmp_path: Path) -> None:
    with gpusaver.variables():
        saver = gpusaver.Saver(defer_build=True)
        for call in (lambda: saver.save(tmp_path / "k"), lambda: saver.restore(tmp_path / "k")):
            with pytest.raises(RuntimeError, match=r"build\(\)` should be called before"):
                call()
        gpusaver.Variable(3, name="v")
        saver.build()
        saver.build()
        assert gpusaver.list_variables(saver.save(tmp_path / "k")) == [("v", [])]
        saver.close()
    with pytest.raises(ValueError, match="build cannot be deferred"):
        gpusaver.Saver({"w": np.zeros(3)}, defer_build=True)


def test_build_can_be_tried_again(tmp_path: Path) -> None:
    saver = gpusaver.Saver(defer_build=True)
    with pytest.raises(TypeError):
        saver.build({"w": None})
    saver.build({"w": np.zeros(3)})
    assert gpusaver.list_variables(saver.save(tmp_path / "k")) == [("w", [3])]
    saver.close()


def tensorflows_saver_def(ours: Any) -> Any:
    """A message of another class and package with the same wire format, as tensorflow.SaverDef is."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto()
    ours.DESCRIPTOR.file.CopyToProto(file)
    file.name, file.package = "elsewhere/saver.proto", "elsewhere"
    for field in file.message_type[0].field:
        if field.type_name:
            field.type_name = ".elsewhere" + field.type_name.removeprefix("." + ours.DESCRIPTOR.file.package)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file) if hasattr(pool, "Add") else pool.AddSerializedFile(file.SerializeToString())
    foreign = message_factory.GetMessageClass(pool.FindMessageTypeByName("elsewhere.SaverDef"))
    return foreign.FromString(ours.SerializeToString())


@pytest.mark.parametrize("convert", [lambda message: message, tensorflows_saver_def], ids=["ours", "theirs"])
def test_saver_def(tmp_path: Path, convert: Any) -> None:
    message = convert(SaverDef(max_to_keep=2, sharded=True, keep_checkpoint_every_n_hours=10000.0))
    state = [gpusaver.Variable(1, name="a", device="cpu:0"), gpusaver.Variable(2, name="b", device="cpu:1")]
    with gpusaver.Saver(state, saver_def=message) as saver:
        for step in range(3):
            prefix = saver.save(tmp_path / "k", step)
        assert saver.last_checkpoints == [f"{tmp_path}/k-1", f"{tmp_path}/k-2"]
    gpusaver.reset_default_variables()
    assert {path.name[-8:] for path in tmp_path.glob("k-2.data-*")} == {"of-00002"}
    assert gpusaver.load(prefix) == {"a": 1, "b": 2}


@pytest.mark.parametrize("message", [3, "text", {"max_to_keep": 2}, gpusaver.get_checkpoint_state])
def test_what_is_no_saver_def(message: Any) -> None:
    with pytest.raises(TypeError, match="SaverDef"):
        gpusaver.Saver({"w": np.zeros(3)}, saver_def=message)


def test_attributes() -> None:
    with gpusaver.Saver({"w": np.zeros(3)}, name="n", filename="f", restore_sequentially=True) as saver:
        assert (saver.name, saver.filename, saver.last_checkpoints) == ("n", "f", [])


@pytest.mark.parametrize(
    ("prefix", "options", "step"),
    [
        ("checkpoint", {}, None),
        ("{cwd}/checkpoint", {}, None),
        ("checkpoint", {"sharded": True}, None),
        ("{cwd}/checkpoint", {"sharded": True, "save_relative_paths": False}, None),
    ],
)
def test_a_prefix_in_the_place_of_the_state_file_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, options: dict[str, Any], step: Any
) -> None:
    """Before anything is written, also in the cases that TensorFlow finds at the end only."""
    monkeypatch.chdir(tmp_path)
    with (
        gpusaver.Saver({"w": np.zeros(3)}, **options) as saver,
        pytest.raises(ValueError, match="collides with 'save_path'"),
    ):
        saver.save(prefix.replace("{cwd}", str(tmp_path)), step)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "a/b", "/", "d/"])
def test_names_that_no_state_file_can_have(saver: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latest_filename"):
        saver.save(tmp_path / "k", 1, latest_filename=name)
    assert os.listdir(tmp_path) == []


def wrong_paths(prefix: str, directory: Path) -> dict[str, tuple[str, str]]:
    return {
        "index": (f"{prefix}.index", f"pass its prefix, {prefix}$"),
        "data": (f"{prefix}.data-00000-of-00001", f"pass its prefix, {prefix}$"),
        "meta": (f"{prefix}.meta", f"pass its prefix, {prefix}$"),
        "directory": (f"{directory}", f"is a directory.*latest checkpoint is {prefix}"),
        "directory without": (f"{directory}/empty", "is a directory.*no checkpoint state file"),
        "state file": (f"{directory}/checkpoint", rf"is a state file; the latest checkpoint it names is {prefix}"),
        "misspelt": (f"{directory}/l-7", "not a valid checkpoint: no checkpoint .*has k-7"),
        "no directory": (f"{directory}/missing/k", "not a valid checkpoint"),
        "nothing": ("", "not a valid checkpoint"),
    }


@pytest.mark.parametrize("case", [*wrong_paths("", Path())])
def test_wrong_paths_are_recognised(saver: Any, case: str, tmp_path: Path) -> None:
    prefix = saver.save(tmp_path / "k", 7)
    (tmp_path / "empty").mkdir()
    (tmp_path / "k-7.meta").write_bytes(b"")
    path, message = wrong_paths(prefix, tmp_path)[case]
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        saver.restore(path)
    assert isinstance(caught.value, ValueError)


def test_no_path_to_restore_from(saver: Any) -> None:
    with pytest.raises(ValueError, match="Can't load save_path when it is None"):
        saver.restore(None)


def test_a_data_file_that_is_missing(saver: Any, tmp_path: Path) -> None:
    prefix = saver.save(tmp_path / "k")
    os.unlink(f"{prefix}.data-00000-of-00001")
    with pytest.raises(NotFoundError, match=r"k\.data-00000-of-00001"):
        saver.restore(prefix)


def test_every_error_is_of_the_tree_and_a_builtin() -> None:
    for name in gpusaver.__all__:
        kind = getattr(gpusaver, name)
        if isinstance(kind, type) and issubclass(kind, Error) and kind is not Error:
            assert len(kind.__mro__) > len(Error.__mro__) + 1
            assert kind("text").message == str(kind("text")) == "text"
