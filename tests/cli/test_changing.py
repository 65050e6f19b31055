"""convert, rename, prune: the files they make, and those they leave alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_tools import GOLDEN, Command
from failing_storage import FailingStorage

import gpusaver
from gpusaver import CheckpointManager, InvalidArgumentError, UnimplementedError
from gpusaver.renaming import rename_tensors

PREFIXES = sorted(str(path).removesuffix(".index") for path in GOLDEN.glob("*/*.index"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(first: Any, second: Any) -> bool:
    return bool(np.array_equal(first, second) or np.asarray(first).tobytes() == np.asarray(second).tobytes())


def test_convert(golden: Path, cli: Command) -> None:
    code, out, err = cli("convert", "object_based_tf2", "a.safetensors", "--exclude", "SLOT", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "destination": "a.safetensors",
        "tensors": 14,
        "nbytes": 112,
        "left_out": ["_CHECKPOINTABLE_OBJECT_GRAPH, TensorFlow's graph of objects"],
    }
    assert cli("convert", "a.safetensors", "b", "--include", "model/w").out == "b: 1 tensor, 24 B\n"
    code, _, err = cli("convert", "a.safetensors", "b")
    assert (code, err.split(";")[0]) == (3, "gpusaver: b exists")
    assert cli("convert", "a.safetensors", "b", "--overwrite").code == 0
    assert cli("convert", "a.safetensors", "none/b").code == 3
    assert cli("convert", "none.npz", "c").code == 3


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix.removeprefix(f"{GOLDEN}/"))
def test_rename_of_every_kind(prefix: str, tmp_path: Path) -> None:
    """Also slices, whose keys hold the name, and names that are not UTF-8.  On another file system: copies."""
    source = tmp_path / "a"
    for path in Path(prefix).parent.iterdir():
        if path.name.startswith(f"{Path(prefix).name}."):
            shutil.copy(path, f"{source}{path.name.removeprefix(Path(prefix).name)}")
    done = rename_tensors(source, tmp_path / "b", lambda name: f"new/{name}")
    reader, other = gpusaver.load_checkpoint(source), gpusaver.load_checkpoint(tmp_path / "b")
    names = [name for name in reader if name != "_CHECKPOINTABLE_OBJECT_GRAPH"]
    assert done.names == [(name, f"new/{name}") for name in names]
    assert sorted(other) == sorted(f"new/{name}" for name in names)
    readable = [name for name, dtype in reader.get_variable_to_dtype_map().items() if dtype.name != "variant"]
    assert all(same(reader[name], other[f"new/{name}"]) for name in readable if name in names)
    assert list(gpusaver.verify(tmp_path / "b")) == []
    data = [path for path in tmp_path.iterdir() if path.name.startswith("b.data")]
    assert done.linked == len(data)
    assert all(path.samefile(str(path).replace("/b.data", "/a.data")) for path in data)
    assert not (tmp_path / "b.meta").exists()


def test_rename_into_another_folder(golden: Path, cli: Command) -> None:
    """One level is made, as a save does; more would turn a mistyped path into a tree."""
    assert cli("rename", "conv_tf2/conv-2", "fresh/c", "-e", "conv", "c").code == 0
    assert gpusaver.checkpoint_exists(golden / "fresh" / "c")
    outcome = cli("rename", "conv_tf2/conv-2", "far/away/c", "-e", "conv", "c")
    assert outcome.code != 0
    assert "Parent directory of far/away/c doesn't exist" in outcome.err
    assert not (golden / "far").exists()


def test_rename_copies_where_links_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "not here")

    prefix = gpusaver.save(tmp_path / "a", {"w": np.arange(9.0)})
    monkeypatch.setattr(os, "link", refuse)
    found = json.loads(cli("rename", prefix, tmp_path / "b", "-e", "w", "v", "--json").out)
    assert (found["linked"], found["copied"]) == (0, 1)
    gpusaver.remove_checkpoint(prefix)
    assert gpusaver.load(tmp_path / "b")["v"].tolist() == list(range(9))


def test_rename_by_rules(golden: Path, cli: Command) -> None:
    rules = ["-e", "^dev(.)/", r"\1/", "-e", "v", "u"]
    assert cli("rewrite", "sharded_tf2", "b", *rules, "--dry-run").code == 0
    assert not Path("b.index").exists()
    code, out, _ = cli("rename", "sharded_tf2", "b", *rules)
    assert (code, out.splitlines()[:2]) == (0, ["old\tnew", "dev0/v0\t0/u0"])
    assert sorted(gpusaver.load_checkpoint("b")) == ["0/u0", "0/u1", "1/u0", "1/u1", "2/u0", "2/u1", "shared/table"]


@pytest.mark.parametrize(
    ("rule", "code", "words"),
    [
        (("/v[01]", "/v"), 3, "dev0/v0 and dev0/v1 would both be called dev0/v"),
        (("^.*$", ""), 3, "the empty name"),
        (("(", "x"), 2, "--replace"),
        (("v", r"\7"), 2, "--replace"),
    ],
)
def test_rules_that_cannot_be(rule: tuple[str, str], code: int, words: str, golden: Path, cli: Command) -> None:
    before = files(golden / "sharded_tf2")
    found, _, err = cli("rename", "sharded_tf2", "sharded_tf2/new", "-e", *rule)
    assert found == code
    assert words in err
    assert files(golden / "sharded_tf2") == before


def test_rename_refuses(golden: Path) -> None:
    with pytest.raises(UnimplementedError, match="V1"):
        rename_tensors("v1_tf1/legacy.ckpt", "b", str)
    with pytest.raises(InvalidArgumentError, match="exists"):
        rename_tensors("dtypes/all", "strings/str", str)


def test_a_failure_of_any_step_leaves_nothing(tmp_path: Path) -> None:
    """The n-th operation of the storage fails, for every n."""
    prefix = gpusaver.save(tmp_path / "a", {"w": np.arange(9.0)}, write_meta_graph=False)
    before = set(files(tmp_path))
    storage = FailingStorage()
    for step in range(100):
        storage.arm(step)
        try:
            rename_tensors(prefix, tmp_path / "b", str.upper, storage=storage)
            break
        except gpusaver.UnknownError:
            left = set(files(tmp_path)) - before
            assert left in (set(), {"b.index", "b.data-00000-of-00001"})  # the second: after the commit
            if left:
                assert list(gpusaver.verify(tmp_path / "b")) == []
                gpusaver.remove_checkpoint(tmp_path / "b")
    assert 5 < step < 99


def steps(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.index"))


def run(folder: Path, count: int, **options: Any) -> None:
    state = {"w": np.arange(3.0), "step": 0}
    with CheckpointManager(state, folder, max_to_keep=None, **options) as manager:
        for number in range(1, count + 1):
            manager.save(number, **({"metric": float(number)} if options.get("best_to_keep") else {}))


def test_prune(golden: Path, cli: Command) -> None:
    before = steps(golden / "state_dir")
    found = json.loads(cli("prune", "state_dir", "--keep", "1", "--dry-run", "--json").out)
    assert steps(golden / "state_dir") == before
    deleted = [row["name"] for row in found["checkpoints"] if row["action"] == "delete"]
    assert deleted == ["model.ckpt-30", "model.ckpt-40"]
    assert cli("prune", "state_dir", "--keep", "1").code == 0
    assert steps(golden / "state_dir") == ["model.ckpt-50", "padded-00000007"]
    state = gpusaver.get_checkpoint_state("state_dir")
    assert state is not None
    assert list(state.all_model_checkpoint_paths) == ["state_dir/model.ckpt-50"]
    assert {path.name.partition(".data")[0] for path in (golden / "state_dir").glob("*.data*")} == {
        "model.ckpt-50",
        "padded-00000007",
    }


def test_prune_never_takes_the_latest_or_what_is_damaged(golden: Path, cli: Command) -> None:
    gpusaver.update_checkpoint_state("state_dir", "state_dir/model.ckpt-30", save_relative_paths=True)
    os.remove("state_dir/model.ckpt-40.data-00000-of-00001")
    assert cli("prune", "state_dir", "--keep", "1").code == 0
    assert [name for name in steps(golden / "state_dir") if "model" in name] == [
        "model.ckpt-30",
        "model.ckpt-40",
        "model.ckpt-50",
    ]
    assert gpusaver.latest_checkpoint("state_dir") == "state_dir/model.ckpt-30"


def test_prune_keeps_what_a_manager_pinned_and_asks_about_the_best(tmp_path: Path, cli: Command) -> None:
    folder = tmp_path / "run"
    run(folder, 6, best_to_keep=1)
    with CheckpointManager({"w": np.zeros(3), "step": 0}, folder, max_to_keep=None) as manager:
        manager.pin(2)
    code, _, err = cli("prune", folder, "--keep", "2")
    assert code == 3
    assert "--best N" in err
    assert cli("prune", folder, "--keep", "2", "--best", "1").code == 0
    assert steps(folder) == ["ckpt-1", "ckpt-2", "ckpt-5", "ckpt-6"]


def test_prune_waits_for_no_manager(tmp_path: Path, cli: Command) -> None:
    folder = tmp_path / "run"
    run(folder, 3)
    with CheckpointManager({"w": np.zeros(3), "step": 0}, folder, max_to_keep=None) as manager:
        manager.save(4)
        code, _, err = cli("prune", folder, "--keep", "1")
        assert code == 3
        assert str(os.getpid()) in err
        assert len(steps(folder)) == 4
    assert cli("prune", folder, "--keep", "1").code == 0
    assert steps(folder) == ["ckpt-4"]


def test_prune_keeps_one_every_so_often(tmp_path: Path, cli: Command) -> None:
    for hour in range(6):
        prefix = gpusaver.save(tmp_path / f"k-{hour}", {"w": np.ones(1)})
        os.utime(f"{prefix}.index", (1_700_000_000 + 3600 * hour,) * 2)
    assert cli("prune", tmp_path, "--keep", "1", "--keep-every-hours", "2").code == 0
    assert steps(tmp_path) == ["k-2", "k-4", "k-5"]
    assert cli("prune", tmp_path, "--keep", "1", "--keep-every-hours", "0").code == 2
    assert cli("prune", tmp_path / "none", "--keep", "1").code == 3
