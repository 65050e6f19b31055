"""The scripts of examples/tf1 run on the front end (tests/tf compares them with TensorFlow)."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import SCRIPTS, masked, outcome, run

LIBRARY = "gpusaver.compat.v1"
PRINTED = {
    "linear.py": [
        "before ...\nsaved linear.ckpt\nchanged [[1.5 0.5]]\nrestored, as before: True\nb [ 0.5 -0.5]",
    ],
    "counter.py": [
        "total 0.5\nsaved counter-1\ntotal 1.5\nsaved counter-2\ntotal 3.0\nsaved counter-3\ntrained: ['total:0']",
        "restored counter-3 at step 3\ntotal 5.0\nsaved counter-4\ntotal 7.5\nsaved counter-5\ntotal 10.5\n"
        "saved counter-6\ntrained: ['total:0']",
    ],
    "keep_two.py": [
        "".join(f"saved model-{n} calls {n + 1}\n" for n in range(5))
        + "kept ['model-3', 'model-4']\nnewest model-4\nolder kernel is half: True calls 4",
    ],
}


def test_every_script_is_here() -> None:
    assert sorted(PRINTED) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, tmp_path: Path) -> None:
    for expected in PRINTED[name]:
        assert masked(run(name, tmp_path / "out", LIBRARY)) == expected
    found = outcome(tmp_path / "out")
    for prefix in found["checkpoints"]:
        assert {f"{prefix}.{end}" for end in ("data-00000-of-00001", "index", "meta")} <= set(found["files"])
