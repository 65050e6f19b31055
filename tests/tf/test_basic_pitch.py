"""A network that somebody published: the variables of the SavedModel inside the PyPI package basic-pitch.

``GPUSAVER_BASIC_PITCH`` is the path of its wheel, which `make test-tf` fetches; nothing of it is in this repository.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_side as tensorflow

import gpusaver
from gpusaver import DataType

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``variables/variables`` of the SavedModel, unpacked."""
    wheel = os.environ.get("GPUSAVER_BASIC_PITCH")
    if wheel is None:
        pytest.fail("GPUSAVER_BASIC_PITCH is not set; `make test-tf` fetches the wheel and sets it")
    folder = tmp_path_factory.mktemp("basic_pitch")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if "/saved_models/icassp_2022/nmp/variables/" in name]
        assert len(members) == 2
        for name in members:
            with archive.open(name) as source, open(folder / Path(name).name, "wb") as target:
                shutil.copyfileobj(source, target)
    return folder / "variables"


@pytest.fixture(scope="module")
def theirs(prefix: Path) -> dict[str, Any]:
    """Every value, by TensorFlow's reader."""
    return tensorflow.read(prefix)


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, bytes):
        return bool(found == expected)
    found, expected = np.asarray(found), np.asarray(expected)
    return (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def test_list(prefix: Path, theirs: dict[str, Any]) -> None:
    listed = gpusaver.list_variables(prefix)
    assert [name for name, _ in listed] == sorted(theirs)
    assert len(listed) > 30
    reader = gpusaver.load_checkpoint(prefix)
    dtypes, shapes = reader.get_variable_to_dtype_map(), reader.get_variable_to_shape_map()
    assert {name: (dtypes[name], tuple(shapes[name])) for name in reader} == tensorflow.specs(prefix)
    assert dtypes[OBJECT_GRAPH] is DataType.string


def test_load(prefix: Path, theirs: dict[str, Any]) -> None:
    ours = gpusaver.load(prefix)
    assert set(ours) == set(theirs)
    assert [name for name in theirs if not same(ours[name], theirs[name])] == []
    for name, value in theirs.items():
        assert same(gpusaver.load_variable(prefix, name), value)


def variables_of(theirs: dict[str, Any]) -> dict[str, Any]:
    """Only the network's numbers, by key."""
    return {name: value for name, value in theirs.items() if name.endswith(SUFFIX)}


def new_name(key: str) -> str:
    """What another program might call the variable that is stored under ``key``."""
    return re.sub(r"\W+", "_", key.removesuffix(SUFFIX))


def test_restore_under_other_names_and_save_again(prefix: Path, theirs: dict[str, Any], tmp_path: Path) -> None:
    values = variables_of(theirs)
    program = {new_name(key): np.zeros_like(value) for key, value in values.items()}
    assert len(program) == len(values) > 30
    report = gpusaver.Saver({key: program[new_name(key)] for key in values}).restore(prefix)
    assert report.restored == sorted(values)
    assert set(report.unexpected) == set(theirs) - set(values)
    with gpusaver.Saver(program) as saver:
        copy = saver.save(tmp_path / "copy.ckpt", 1)
    found = tensorflow.read(copy)
    assert {new_name(key) for key in values} == set(found)
    assert [key for key, value in values.items() if not same(found[new_name(key)], value)] == []


def test_restore_under_readable_names(prefix: Path, theirs: dict[str, Any]) -> None:
    values = {key.removesuffix(SUFFIX): value for key, value in variables_of(theirs).items()}
    state = {name: np.zeros_like(value) for name, value in values.items()}
    gpusaver.Saver(state).restore(prefix)
    assert [name for name, value in values.items() if not same(state[name], value)] == []


def test_a_copy_of_everything(prefix: Path, theirs: dict[str, Any], tmp_path: Path) -> None:
    """Keys, strings and the object graph too: TensorFlow cannot tell the copy from the original."""
    gpusaver.save(tmp_path / "variables", gpusaver.load(prefix))
    found = tensorflow.read(tmp_path / "variables")
    assert set(found) == set(theirs)
    assert [name for name in theirs if not same(found[name], theirs[name])] == []
    assert tensorflow.specs(tmp_path / "variables") == tensorflow.specs(prefix)
