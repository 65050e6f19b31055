"""The kernels on the device, bit for bit as the host computes, and under compute-sanitizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu import kernel_checks
from gpu.tools import Gpu


@pytest.fixture
def kernels(gpu: Gpu) -> Any:
    from gpusaver.device.cuda_kernels import load

    loaded, reason = load(0)
    assert loaded is not None, reason
    return loaded


def test_copies(gpu: Gpu, kernels: Any):
    kernel_checks.check_copies(gpu.cupy, kernels)


def test_strided_copies(gpu: Gpu, kernels: Any):
    kernel_checks.check_strided(gpu.cupy, kernels)


def test_checksums(gpu: Gpu, kernels: Any):
    kernel_checks.check_checksums(gpu.cupy, kernels, 100_000 if gpu.is_simulated else 1 << 30)


@pytest.mark.needs_program("compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(real_gpu: Gpu, tool: str):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    done = subprocess.run(
        [*command, sys.executable, str(Path(kernel_checks.__file__))], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "kernels agree with the host" in done.stdout
