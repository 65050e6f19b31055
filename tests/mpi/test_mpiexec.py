"""Real ranks: saved by four, three or two, restored by others, by one process, and by more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpiexec import mpiexec, needs_mpiexec
from rank_states import tensors

import gpusaver

SCRIPT = Path(__file__).with_name("rank_script.py")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Where the ranks save; any prefix that all of them reach."""
    return f"{tmp_path}/run/model.ckpt"


@needs_mpiexec
def test_two_three_and_four_save_and_one_to_four_restore(prefix: str) -> None:
    prefixes = [f"{prefix}-{count}" for count in (1, 2, 3, 4)]
    Path(prefix).parent.mkdir()
    gpusaver.save(prefixes[0], dict(tensors(2)))
    for count in (2, 3, 4):
        mpiexec(count, SCRIPT, "save", prefixes[count - 1])
    for written in prefixes:
        np.testing.assert_equal(gpusaver.load(written), tensors(2))
        assert not list(gpusaver.verify(written))
    mpiexec(4, SCRIPT, "restore", *prefixes)
