"""The command on a network that somebody published, and TensorFlow reading what it makes.

Needs ``GPUSAVER_BASIC_PITCH``, as test_basic_pitch.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_side as tensorflow
from test_basic_pitch import OBJECT_GRAPH, SUFFIX, same
from test_basic_pitch import prefix as prefix
from test_basic_pitch import theirs as theirs

from gpusaver.cli.app import run


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code = run([*map(str, arguments), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    return dict(found)


@pytest.fixture
def saved_model(prefix: Path, tmp_path: Path) -> Path:
    """The folder that `tf.saved_model.load` would take, as far as a checkpoint is concerned."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "variables").symlink_to(prefix.parent)
    return tmp_path / "model"


def test_show_and_verify(saved_model: Path, theirs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = command(capsys, "show", saved_model, "--stats")
    rows = {row["name"]: row for row in found["tensors"]}
    assert set(rows) == set(theirs)
    for name, value in theirs.items():
        array = np.asarray(value)
        if array.dtype.kind == "f" and array.size:
            assert rows[name]["min"] == float(array.min())
            assert rows[name]["max"] == float(array.max())
            assert rows[name]["nan"] == 0
    assert command(capsys, "verify", saved_model)["checkpoints"][0]["problems"] == []


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_convert_there_and_back(
    ending: str, saved_model: Path, theirs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = command(capsys, "convert", saved_model, tmp_path / f"a.{ending}")
    assert done["tensors"] == len(theirs) - 1
    command(capsys, "convert", tmp_path / f"a.{ending}", tmp_path / "back")
    found = tensorflow.read(tmp_path / "back")
    assert set(found) == set(theirs) - {OBJECT_GRAPH}
    assert [name for name in found if not same(found[name], theirs[name])] == []
    assert command(capsys, "diff", saved_model, tmp_path / "back", "--exact", "--filter", SUFFIX)["tensors"] == []


def test_rename_for_tensorflow_1(
    saved_model: Path, theirs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys of tf.train.Checkpoint become names: TensorFlow reads the new index on the linked data."""
    target = tmp_path / "model" / "by-name"
    done = command(capsys, "rename", saved_model, target, "-e", "/\\.ATTRIBUTES/VARIABLE_VALUE$", "")
    assert done["linked"] + done["copied"] == 1
    found = tensorflow.read(target)
    assert set(found) == {name.removesuffix(SUFFIX) for name in theirs} - {OBJECT_GRAPH}
    assert all(same(found[name.removesuffix(SUFFIX)], theirs[name]) for name in theirs if name != OBJECT_GRAPH)


def test_what_tensorflow_saved_in_parts_and_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Renamed slices are found by TensorFlow: their keys hold the name."""
    golden = Path(__file__).resolve().parent.parent / "golden"
    for source in ("partitioned_tf1/part", "partitioned_tf2/part", "sharded_tf1/model-5"):
        target = tmp_path / source.replace("/", "-")
        command(capsys, "rename", golden / source, target, "-e", "^", "all/")
        ours, before = tensorflow.specs(target), tensorflow.specs(golden / source)
        assert ours == {f"all/{name}": spec for name, spec in before.items()}
        values, expected = tensorflow.read(target), tensorflow.read(golden / source)
        assert all(same(values[f"all/{name}"], value) for name, value in expected.items())


def test_the_example(saved_model: Path, theirs: dict[str, Any], tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "published_network.py"
    command = [sys.executable, script, saved_model, tmp_path / "network.safetensors"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert f"{len(theirs) - 1} tensors" in printed.splitlines()[0]
    assert f"left out: {OBJECT_GRAPH}" in printed
    assert (tmp_path / "network.safetensors").stat().st_size > 200_000
