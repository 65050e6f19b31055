"""Fixtures for tests of the command."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from command_tools import GOLDEN, Command, Outcome

from gpusaver.cli.app import run


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Command:
    """``cli("show", prefix)``: no terminal."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the golden checkpoints, all two hours old, as the current directory."""
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN, folder)
    at = time.time() - 2 * 3600 - 60
    for path in folder.rglob("*"):
        os.utime(path, (at, at))
    monkeypatch.chdir(folder)
    return folder
