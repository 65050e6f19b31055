"""What notebooks show of a reader: a table that no name can break out of."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

import gpusaver

GOLDEN = Path(__file__).resolve().parent / "golden"


def cells(prefix: object) -> list[list[str]]:
    """Well-formed XML, of which a name is text alone."""
    table = ET.fromstring(gpusaver.load_checkpoint(str(prefix))._repr_html_())
    assert {element.tag for element in table.iter()} <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    return [[cell.text or "" for cell in row] for row in table.iter("tr")]


def test_html_of_a_reader(tmp_path: Path) -> None:
    assert cells(GOLDEN / "sharded_tf2" / "model-5")[:2] == [
        ["name", "dtype", "shape", "size"],
        ["dev0/v0", "float32", "[1, 2]", "8 B"],
    ]
    assert len(cells(GOLDEN / "strings" / "str")) == 8
    assert len(cells(GOLDEN / "v1_tf1" / "legacy.ckpt")) == 13


def test_names_made_to_hurt(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "a&b", '"><td onclick="x">', "\x1b[31m", "\u202eabc", "\udcff"]
    prefix = gpusaver.save(tmp_path / "<b>", {name: np.ones(1) for name in names})
    found = [row[0] for row in cells(prefix)[1:]]
    assert sorted(found) == sorted([*names[:3], r"\x1b[31m", r"\u202eabc", r"\xff"])


def test_many_tensors() -> None:
    assert len(cells(GOLDEN / "big_index" / "big")) == 201
    html = gpusaver.load_checkpoint(GOLDEN / "big_index" / "big")._repr_html_()
    assert "3,600 tensors" in html
    assert "the first 200 shown" in html
