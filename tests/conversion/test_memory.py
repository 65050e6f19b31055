"""The memory of a conversion does not grow with the checkpoint: benchmarks/memory_convert.py shows it for 2 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpusaver

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status tells the peak")
@pytest.mark.parametrize("ending", ["", ".npz", ".safetensors"])
def test_one_large_tensor_takes_a_few_blocks(ending: str, tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "a", {"large": np.zeros(24 << 20, np.float64)}, write_meta_graph=False)
    command = [sys.executable, ROOT / "benchmarks" / "memory_convert.py", "--run"]
    middle, back = str(tmp_path / f"b{ending}"), str(tmp_path / "c")
    for source, destination in ((prefix, middle), (middle, back)):
        child = subprocess.run([*command, source, destination], check=True, capture_output=True, text=True, timeout=120)
        found = json.loads(child.stdout)
        assert found["nbytes"] == 192 << 20
        assert found["extra"] < 64 << 20
