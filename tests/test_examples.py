"""The examples, killed and run again.

Elsewhere: train_digits.py in test_demo.py, tf1/ in compat/test_scripts.py, published_network.py in tf/test_command.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gpusaver

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
TIMEOUT_SECONDS = 120


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def run(script: str, *arguments: object) -> str:
    with start(script, *arguments) as process:
        printed = process.communicate(timeout=TIMEOUT_SECONDS)[0]
    assert process.returncode == 0
    return printed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_simulation_goes_on_where_it_was(number: signal.Signals, tmp_path: Path) -> None:
    with start("heat.py", tmp_path / "rough", "--steps", 10**9) as process:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while gpusaver.latest_checkpoint(tmp_path / "rough") is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == (-number if number == signal.SIGKILL else 0)
    prefix = gpusaver.latest_checkpoint(tmp_path / "rough")
    steps = int(gpusaver.load_variable(prefix, "step")) + 150
    calm = run("heat.py", tmp_path / "calm", "--steps", steps)
    assert run("heat.py", tmp_path / "rough", "--steps", steps) == f"resumed {prefix}\n{calm}"
    plate = gpusaver.load(tmp_path / "rough")["temperature"]
    assert np.all(plate[0] == 1)
    assert 0 < plate[1:].max() < 1


def test_pytorch_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with start("pytorch.py", tmp_path / "rough", "--epochs", 10**6) as process:
        assert process.stdout is not None
        while process.stdout.readline() and gpusaver.latest_checkpoint(tmp_path / "rough") is None:
            pass
        process.kill()
    prefix = gpusaver.latest_checkpoint(tmp_path / "rough")
    done = int(gpusaver.load_variable(prefix, "epoch"))
    calm = run("pytorch.py", tmp_path / "calm", "--epochs", done + 2).splitlines()
    assert run("pytorch.py", tmp_path / "rough", "--epochs", done + 2).splitlines() == [f"resumed {prefix}", *calm[-2:]]
