"""tools/check_kernels.py: a kernel that does not compile is told, by every compiler that is here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "check_kernels.py"
GOOD = 'extern "C" __global__ void good(int* p) { p[threadIdx.x] = 1; }\n'
BAD = 'extern "C" __global__ void bad(int* p) { p[threadIdx.x] = missing; }\n'


@pytest.fixture
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("check_kernels", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in (("good.cu", GOOD), ("bad.cu", BAD)):
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(tool, "KERNELS", sorted(tmp_path.glob("*.cu")))


def fake_nvcc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Knows what is wrong with a kernel."""
    script = folder / "nvcc"
    script.write_text('#!/bin/sh\nfor file; do :; done\n! grep "missing" "$file"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_it_sees_the_kernels_of_the_package_and_of_the_benchmark(tool):
    assert {path.name for path in tool.KERNELS} >= {"copy.cu", "crc32c.cu", "gpu_change.cu"}


def test_nvcc_complains(tool, kernels, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    fake_nvcc(tmp_path / "bin", monkeypatch)
    failures = tool.check_nvcc()
    assert [failure.partition(":")[0] for failure in failures] == ["nvcc, sm_80, bad.cu", "nvcc, sm_90, bad.cu"]
    assert all("missing" in failure for failure in failures)
    assert "kernels: 2 of 4 compiled with" in capsys.readouterr().out


def test_without_a_compiler_it_says_so(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tool, "find_nvrtc", lambda: [])
    assert tool.main() == 0
    assert capsys.readouterr().out.count("kernels: not compiled with") == 2


def test_nvrtc_complains(tool, kernels):
    if not tool.find_nvrtc():
        pytest.skip("NVRTC is not installed")
    failures = tool.check_nvrtc()
    assert failures
    assert all("bad.cu" in failure and "missing" in failure for failure in failures)
