"""What benchmarks/worker.py does between its measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def worker(benchmarks: Path) -> Any:
    import worker

    return worker


def test_files_that_a_killed_run_has_left_do_not_stop_the_next_one(worker: Any, tmp_path: Path) -> None:
    directory, left = tmp_path / "files", tmp_path / "files.next"
    directory.mkdir()
    left.mkdir()
    (left / "old").touch()
    arrays = {"a": np.arange(4, dtype=np.float32)}
    one = worker.Worker(worker.PEERS["np.savez"](arrays, arrays["a"].data.cast("B"), str(directory)))
    assert one.save()["durable"] > 0
    assert one.next()["next"] > 0
    assert not left.exists()
    assert [path.suffix for path in directory.iterdir()] == [".npz"]
