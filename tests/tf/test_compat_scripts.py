"""The scripts of examples/tf1 do the same on TensorFlow, with only the import line changed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compat"))
from scripts import SCRIPTS, masked, outcome, run


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, tmp_path: Path) -> None:
    found = []
    for library in ("gpusaver.compat.v1", "tensorflow.compat.v1"):
        directory = tmp_path / library
        printed = [masked(run(name, directory, library)) for _ in range(2 if name == "counter.py" else 1)]
        found.append((printed, outcome(directory)))
    assert found[0] == found[1]
