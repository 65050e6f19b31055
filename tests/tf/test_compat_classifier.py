"""A two-layer classifier with Adam, trained and saved in one library, continued in the other from its `.meta` file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tensorflow

import gpusaver.compat.v1 as tf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compat"))
import classifier

v1 = tensorflow.compat.v1
DATA = classifier.batches()


def trained(library: Any, prefix: str, *, is_resource: bool, sharded: bool = False) -> list[tuple[Any, Any]]:
    (library.enable_resource_variables if is_resource else library.disable_resource_variables)()
    return classifier.train_and_save(library, prefix, DATA, sharded)


@pytest.fixture(autouse=True)
def resource_variables() -> Iterator[None]:
    yield
    for library in (tf, v1):
        library.enable_resource_variables()


def assert_same(found: list[tuple[Any, Any]], expected: list[tuple[Any, Any]]) -> None:
    for (loss, logits), (expected_loss, expected_logits) in zip(found, expected, strict=True):
        np.testing.assert_allclose(loss, expected_loss, rtol=0, atol=1e-5)
        np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sharded", [False, True], ids=["one-shard", "sharded"])
@pytest.mark.parametrize("is_resource", [True, False], ids=["resource", "reference"])
@pytest.mark.parametrize(
    ("writer", "reader"), [(tf, v1), (v1, tf), (tf, tf)], ids=["to-tensorflow", "from-tensorflow", "own"]
)
def test_training_goes_on_in_the_other_library(
    writer: Any, reader: Any, is_resource: bool, sharded: bool, tmp_path: Path
) -> None:
    prefix = str(tmp_path / "model")
    expected = trained(writer, prefix, is_resource=is_resource, sharded=sharded)
    assert_same(classifier.go_on(reader, prefix, DATA), expected)


@pytest.mark.parametrize("is_resource", [True, False], ids=["resource", "reference"])
def test_the_same_script_gives_the_same_names(is_resource: bool, tmp_path: Path) -> None:
    """So that a checkpoint fits the graph which the script builds in the other library."""
    found = []
    for library in (tf, v1):
        prefix = str(tmp_path / library.__name__)
        trained(library, prefix, is_resource=is_resource)
        reader = tensorflow.train.load_checkpoint(prefix)
        dtypes = reader.get_variable_to_dtype_map()
        found.append({name: (shape, dtypes[name]) for name, shape in reader.get_variable_to_shape_map().items()})
    assert found[0] == found[1]


def test_saved_again_by_the_other_library(tmp_path: Path) -> None:
    """There and back again: TensorFlow saves what it has imported, and gpusaver goes on from that."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    expected = trained(tf, first, is_resource=True)
    with v1.Graph().as_default(), v1.Session() as session:
        saver = v1.train.import_meta_graph(first + ".meta")
        saver.restore(session, first)
        saver.save(session, second)
    assert_same(classifier.go_on(tf, second, DATA), expected)
