"""The end of the process, signals, and forks, while a save is under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpusaver

SCRIPT = Path(__file__).with_name("slow_script.py")
ROOT = Path(gpusaver.__file__).parents[1]
SECONDS = 60


def start(directory: Path, mode: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [sys.executable, SCRIPT, directory, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run(directory: Path, mode: str, *, send: signal.Signals | None = None) -> subprocess.CompletedProcess[str]:
    """``send``: a signal, as soon as the save is under way."""
    process = start(directory, mode)
    assert process.stdout is not None
    first = ""
    if send is not None:
        first = process.stdout.readline()
        assert first == "under way\n"
        process.send_signal(send)
    try:
        stdout, stderr = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        pytest.fail(f"hangs: {stdout} {stderr}")
    return subprocess.CompletedProcess(process.args, process.returncode, first + stdout, stderr)


def steps(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.index"))


def is_clean(directory: Path) -> bool:
    return not list(directory.glob("*gpusaver-tmp")) and len(list(directory.glob("*.data-*"))) == len(steps(directory))


def assert_holds(prefix: Path, first: int) -> None:
    np.testing.assert_array_equal(gpusaver.load(prefix)["w"], np.arange(100_000) + first)


@pytest.mark.parametrize(("mode", "code"), [("exit_while_saving", 0), ("exit_with_an_error", 3), ("save_at_exit", 0)])
def test_the_interpreter_exits_when_the_save_is_done(tmp_path: Path, mode: str, code: int) -> None:
    done = run(tmp_path, mode)
    assert (done.returncode, done.stderr) == (code, "")
    assert_holds(tmp_path / "k-2", 1)
    assert gpusaver.latest_checkpoint(tmp_path) == f"{tmp_path}/k-2"
    assert is_clean(tmp_path)


@pytest.mark.parametrize("mode", ["interrupted_save", "interrupted_blocking", "interrupted_with"])
def test_ctrl_c(tmp_path: Path, mode: str) -> None:
    done = run(tmp_path, mode, send=signal.SIGINT)
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr
    assert "Error" not in done.stderr
    assert steps(tmp_path) == ["k-1.index"]
    assert_holds(tmp_path / "k-1", 0)
    assert gpusaver.latest_checkpoint(tmp_path) == f"{tmp_path}/k-1"
    assert is_clean(tmp_path)


def test_a_handler_that_saves(tmp_path: Path) -> None:
    done = run(tmp_path, "terminated", send=signal.SIGTERM)
    assert (done.returncode, done.stderr) == (0, "")
    assert_holds(tmp_path / "k-3", 1)
    assert gpusaver.latest_checkpoint(tmp_path) == f"{tmp_path}/k-3"
    assert is_clean(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("mode", ["fork", "fork_while_locked"])
def test_a_forked_child(tmp_path: Path, mode: str) -> None:
    done = run(tmp_path, mode)
    assert done.returncode == 0, done.stderr
    assert "child: 7" in done.stdout, done.stderr
    assert_holds(tmp_path / "k-2", 1 if mode == "fork" else 0)
    assert is_clean(tmp_path)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """What is left behind is not a checkpoint, and does not disturb the next save."""
    run(tmp_path, "interrupted_save", send=signal.SIGKILL)
    assert list(tmp_path.glob("k-2*gpusaver-tmp"))
    assert steps(tmp_path) == ["k-1.index"]
    assert gpusaver.latest_checkpoint(tmp_path) == f"{tmp_path}/k-1"
    assert_holds(tmp_path / "k-1", 0)
    state = {"w": np.arange(100_000) + 5, "step": 2}
    with gpusaver.Saver(state) as saver:
        saver.restore(saver.save(tmp_path / "k", 2))
    assert_holds(tmp_path / "k-2", 5)
