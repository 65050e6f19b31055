"""Real ranks: saved by four, three or two, restored by others, by one process, and by more."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from mpiexec import mpiexec, needs_mpiexec
from rank_states import tensors

import gpusaver

SCRIPT = Path(__file__).with_name("rank_script.py")


@pytest.fixture(params=["disk", "s3"])
def prefix(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Where the ranks save; any prefix that all of them reach."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return "s3://bucket/ranks/model.ckpt"
    (tmp_path / "run").mkdir()
    return f"{tmp_path}/run/model.ckpt"


@needs_mpiexec
def test_two_three_and_four_save_and_one_to_four_restore(prefix: str) -> None:
    prefixes = [f"{prefix}-{count}" for count in (1, 2, 3, 4)]
    gpusaver.save(prefixes[0], dict(tensors(2)))
    for count in (2, 3, 4):
        mpiexec(count, SCRIPT, "save", prefixes[count - 1])
    for written in prefixes:
        np.testing.assert_equal(gpusaver.load(written), tensors(2))
        assert not list(gpusaver.verify(written))
    mpiexec(4, SCRIPT, "restore", *prefixes)


@needs_mpiexec
def test_the_example_ends_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "mpi" / "reshard.py"
    changed = [mpiexec(count, script, tmp_path / "a", "--steps", steps) for count, steps in ((3, "2"), (2, "4"))]
    assert "2 ranks resume at step 2\n" in changed[1]
    unchanged = mpiexec(1, script, tmp_path / "b", "--steps", "4")
    assert changed[1].splitlines()[-1] == unchanged.splitlines()[-1]
    assert unchanged.startswith("step 4, weights ")


@needs_mpiexec
def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    block = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    script = tmp_path / "train.py"
    script.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{block[1]}print(report, prefix)\n")
    assert mpiexec(2, script).count("None run/model.ckpt-1\n") == 2
    assert gpusaver.load(tmp_path / "run")["embedding"].shape == (1000, 64)
