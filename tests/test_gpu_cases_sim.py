"""The tests of ``make test-gpu`` on simulated devices: that they can pass, and that the simulation is fit for them."""

from __future__ import annotations

import os
from typing import Any

import pytest
from gpu import tools
from gpu.test_capture import *  # noqa: F403
from gpu.test_files import *  # noqa: F403
from gpu.test_kernels import test_checksums, test_copies, test_strided_copies  # noqa: F401
from gpu.test_memory import *  # noqa: F403
from sim.fixture import simulated_cupy  # noqa: F401
from sim.gpusaver_kernels import install


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def gpu(sim: Any) -> tools.Gpu:
    return tools.Gpu(sim.cupy, is_simulated=True)


@pytest.fixture
def kernels(sim: Any) -> Any:
    install(sim)
    from gpusaver.device.cuda_kernels import load

    loaded, reason = load(0)
    assert loaded is not None, reason
    return loaded


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    schedules = ("racing", 1)
    options = [{"schedule": schedule, "capacity": 128 << 20} for schedule in schedules]
    metafunc.parametrize("sim", options, indirect=True, ids=map(str, schedules))
