"""The demonstration: it finds a killed and resumed run equal, and says so when it is not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import gpusaver

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_digits.py"
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_digits"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Where a short demonstration wrote, and what it printed."""
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(SCRIPT), "--output", str(output), "--epochs", "2", "--kill", "2", "2"]
    return output, subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)


def test_a_killed_run_ends_like_one_that_was_not(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, result = finished
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\nOK: " in result.stdout
    assert "21 tensors: all bit for bit those of the run that was never killed." in result.stdout
    assert "with NumPy" in result.stdout.splitlines()[0]
    left = [line for line in result.stdout.splitlines() if line.endswith(".gpusaver-tmp  <- half-made")]
    assert len(left) == 1
    assert "digits.ckpt-2.data-00000-of-00001." in left[0]
    assert f"resumes from {output}/killed/digits.ckpt-1, at step 13." in result.stdout
    assert not [path for path in (output / "killed").iterdir() if path.name.endswith(("-tmp", "-lock"))]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_resumed_run_forgets_makes_a_difference(
    demo: ModuleType,
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    calm = finished[0] / "never-killed"
    copy = tmp_path / "copy"
    shutil.copytree(calm, copy)
    gpusaver.update_checkpoint_state(copy, copy / "digits.ckpt-1")
    resumed = demo.run(copy, 2, "--forget-shuffle")
    assert resumed.said["resumed"] == str(copy / "digits.ckpt-1")
    different = demo.differences(resumed, (resumed,), gpusaver.load(calm), gpusaver.load(copy))
    assert "weights/w0" in different
    assert "random/shuffle" in different
    assert "step" not in different


def test_the_verdict_can_be_failure(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [demo.Run(0, {1: 0.5, 2: 0.25}, {"device": "paper", "accuracy": "1"}), demo.Run(-9, {1: 0.5}, {})]
    runs.append(demo.Run(0, {2: 0.24}, {"resumed": "somewhere"}))
    waiting = iter(runs)

    def train_on_paper(directory: Path, epochs: int, *more: str) -> object:
        gpusaver.Saver({"w": np.zeros(3)}).save(directory / "digits.ckpt", epochs)
        return next(waiting)

    monkeypatch.setattr(demo, "run", train_on_paper)
    assert demo.demonstrate(tmp_path, 2, 1, 1) == 1
    assert "FAILED: 2 losses and 1 tensors: 1 differ" in capsys.readouterr().out
    assert (tmp_path / "loss.png").exists()
    waiting = iter([runs[0], runs[0]])
    with pytest.raises(SystemExit, match="nothing was killed"):
        demo.demonstrate(tmp_path, 2, 1, 1)


def test_differences_names_every_loss_and_tensor(demo: ModuleType) -> None:
    whole = demo.Run(0, {1: 0.5, 2: 0.25, 3: 0.125}, {})
    killed, resumed = demo.Run(-9, {1: 0.5, 2: 0.25}, {}), demo.Run(0, {2: 0.25, 3: 0.125}, {})
    tensors = {"w": np.zeros(2, np.float32), "text": b"Philox"}
    assert demo.differences(whole, (killed, resumed), tensors, dict(tensors)) == []
    for other in (np.array([0.0, -0.0], np.float32), np.zeros(2), np.zeros((1, 2), np.float32)):
        assert demo.differences(whole, (killed, resumed), tensors, {**tensors, "w": other}) == ["w"]
    assert demo.differences(whole, (killed, resumed), tensors, {"text": b"Philox"}) == ["w"]
    assert demo.differences(whole, (killed,), tensors, tensors) == ["loss of step 3"]
    off = demo.Run(0, {2: 0.25000003, 3: 0.125}, {})
    assert demo.differences(whole, (killed, off), tensors, tensors) == ["loss of step 2"]
