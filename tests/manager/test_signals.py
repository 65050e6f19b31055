"""Preemption: a signal comes in the middle of a step; the checkpoint of that step is there when the process ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver.errors import FailedPreconditionError
from gpusaver.manager.signals import SignalFlag

SCRIPT = Path(__file__).with_name("loop_script.py")
ROOT = Path(gpusaver.__file__).parents[1]
SECONDS = 60


def run(directory: Path, mode: str, *numbers: signal.Signals) -> tuple[int, str]:
    """The exit status and the output of the loop, which is sent the signals one after the other, each in a new step."""
    directory.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, directory, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.fspath(ROOT)},
    )
    assert process.stdout is not None
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    output = ""
    try:
        for number in numbers:
            while True:
                line = process.stdout.readline()
                output += line
                assert line, output
                if line.startswith("step "):
                    break
            process.send_signal(number)
        output += process.stdout.read()
        return process.wait(), output
    finally:
        watchdog.cancel()
        watchdog.join()
        process.stdout.close()


def last_step(output: str) -> int:
    return int(re.findall(r"^step (\d+)", output, re.MULTILINE)[-1])


def assert_saved(directory: Path, step: int) -> None:
    assert gpusaver.latest_checkpoint(directory, verify="checksums") == f"{directory}/ckpt-{step}"
    found = gpusaver.load(directory)
    assert found["step"] == step
    assert (found["w"] == step).all()
    assert not [name for name in os.listdir(directory) if name.endswith(("-tmp", "-lock"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_step_is_finished_and_saved(tmp_path: Path, number: signal.Signals) -> None:
    status, output = run(tmp_path / "run", "plain", number)
    assert status == 0, output
    assert_saved(tmp_path / "run", last_step(output))
    assert "handler now: <Handlers.SIG_DFL: 0>" in output
    first = last_step(output)
    status, output = run(tmp_path / "run", "plain", number)  # and the next process goes on from there
    assert status == 0, output
    assert output.startswith(f"step {first + 1}\n")
    assert_saved(tmp_path / "run", last_step(output))


def test_two_signals_are_one(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    status, output = run(directory, "plain", signal.SIGTERM)
    assert status == 0, output
    status, output = run(directory, "ignoring", signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert len(list(directory.glob("ckpt-*.index"))) == 2  # of the first process, and of the first signal


def test_a_handler_that_was_there_before(tmp_path: Path) -> None:
    status, output = run(tmp_path / "run", "chained", signal.SIGTERM)
    assert status == 0, output
    assert output.count("previous handler of SIGTERM") == 1
    assert "handler now: <function note" in output
    assert_saved(tmp_path / "run", last_step(output))


def test_a_handler_that_ends_the_process(tmp_path: Path) -> None:
    """It comes first, in the middle of a step: what the variables hold then is nothing to be saved."""
    status, output = run(tmp_path / "run", "raising", signal.SIGTERM)
    assert status == 7, output
    assert not list((tmp_path / "run").glob("*.index"))


def test_closed_managers_swallow_no_signal(tmp_path: Path) -> None:
    status, output = run(tmp_path / "run", "closed", signal.SIGTERM)
    assert status == -signal.SIGTERM, output


def test_killed_between_two_saves(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    status, _ = run(directory, "plain", signal.SIGTERM)
    assert status == 0
    status, output = run(directory, "plain", signal.SIGKILL)
    assert status == -signal.SIGKILL
    status, output = run(directory, "plain", signal.SIGTERM)  # the lock of the dead process is no obstacle
    assert status == 0, output
    assert_saved(directory, last_step(output))


def test_in_this_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {"w": np.zeros(3)}
    before = signal.getsignal(signal.SIGUSR1)
    with gpusaver.CheckpointManager(state, tmp_path, preemption_signals=[signal.SIGUSR1]) as manager:
        assert manager.step(1) is None
        assert not manager.preempted
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not manager.preempted  # nothing is saved yet
        assert manager.step(2, metric=0.5) is None
        assert manager.preempted
        assert manager.latest_checkpoint == f"{tmp_path}/ckpt-2"
        assert "SIGUSR1 came: saving at step 2" in caplog.text
        assert f"SIGUSR1: saved {tmp_path}/ckpt-2" in caplog.text
        assert manager.step(3) is None
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_step_that_is_being_saved_is_not_saved_twice(tmp_path: Path) -> None:
    with gpusaver.CheckpointManager(
        {"w": np.zeros(3)}, tmp_path, preemption_signals=[signal.SIGUSR1], save_every_n_steps=1
    ) as manager:
        pending = manager.step(1)
        assert pending is not None
        modified = os.stat(f"{pending.result()}.index").st_mtime_ns
        os.kill(os.getpid(), signal.SIGUSR1)
        assert manager.step(1) is None
        assert manager.preempted
        assert os.stat(tmp_path / "ckpt-1.index").st_mtime_ns == modified


def test_another_handler_put_in_its_place_stays() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        flag = SignalFlag([signal.SIGUSR1])
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        flag.close()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_waits_for_the_step() -> None:
    """If it is among the signals: Python's own handler, which would interrupt, is not called."""
    flag = SignalFlag([signal.SIGINT])
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.received is signal.SIGINT
    finally:
        flag.close()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_only_the_main_thread_handles_signals(tmp_path: Path) -> None:
    errors: list[Any] = []

    def make() -> None:
        try:
            gpusaver.CheckpointManager({"w": np.zeros(3)}, tmp_path, preemption_signals=[signal.SIGUSR1])
        except FailedPreconditionError as error:
            errors.append(error)
        gpusaver.CheckpointManager({"w": np.zeros(3)}, tmp_path).close()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
