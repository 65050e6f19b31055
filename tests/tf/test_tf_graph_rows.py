"""The rows of behaviour that need a graph, against TensorFlow: they say what it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tensorflow
from tables.graph_rows import GRAPH_ROWS, GraphRow

tf = tensorflow.compat.v1


@pytest.fixture(autouse=True)
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with tf.Graph().as_default():
        yield


@pytest.mark.parametrize("row", GRAPH_ROWS, ids=str)
def test_row(row: GraphRow) -> None:
    row.check(tf, row.tensorflow)
