"""The rows of behaviour that need a graph, against the front end."""

from __future__ import annotations

from pathlib import Path

import pytest
from tables.graph_rows import GRAPH_ROWS, GraphRow

import gpusaver.compat.v1 as tf


@pytest.mark.parametrize("is_resource", [True, False], ids=["resource", "reference"])
@pytest.mark.parametrize("row", GRAPH_ROWS, ids=str)
def test_row(row: GraphRow, is_resource: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tf.enable_resource_variables if is_resource else tf.disable_resource_variables)()
    row.check(tf, row.gpusaver)


def test_the_differences_are_explained() -> None:
    assert all(row.why for row in GRAPH_ROWS if row.tensorflow != row.gpusaver)
