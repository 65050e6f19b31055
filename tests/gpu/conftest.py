"""The device that the tests of ``make test-gpu`` run on, and what is left out where it cannot run.

Every test here has the marker ``gpu``.  Without a device they are skipped, with the reason; GPUSAVER_REQUIRE_GPU=1,
which ``make test-gpu`` sets, turns every skip into a failure.  Tests of a library or tool that is not installed
(``needs_module``, ``needs_program``) are deselected, and the head of the report says which.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from gpu.tools import Gpu
from gpusaver.device.inventory import devices, why_no_devices

IS_REQUIRED = os.environ.get("GPUSAVER_REQUIRE_GPU") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, help="at most so many repetitions of a test's loop; default: its own")


def is_missing(mark: pytest.Mark) -> bool:
    name = mark.args[0]
    return importlib.util.find_spec(name) is None if mark.name == "needs_module" else shutil.which(name) is None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    missing: dict[str, list[pytest.Item]] = {}
    for item in items:
        if os.path.dirname(item.path) != here:
            continue
        item.add_marker(pytest.mark.gpu)
        for name in ("needs_module", "needs_program"):
            for mark in item.iter_markers(name):
                if is_missing(mark):
                    missing.setdefault(mark.args[0], []).append(item)
    gone = {item for some in missing.values() for item in some}
    if gone:
        config.hook.pytest_deselected(items=sorted(gone, key=lambda item: item.nodeid))
        items[:] = [item for item in items if item not in gone]
        print("\nnot run: " + ", ".join(f"{len(some)} tests that need {name}" for name, some in missing.items()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if IS_REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, though GPUSAVER_REQUIRE_GPU=1: {report.longrepr[2]}"
    return report


@pytest.fixture(scope="session")
def real_gpu(pytestconfig: pytest.Config) -> Gpu:
    if reason := why_no_devices():
        pytest.skip(reason)
    import cupy

    print("\n" + "\n".join(map(str, devices())))
    return Gpu(cupy, is_simulated=False, most_rounds=pytestconfig.getoption("rounds", None))


@pytest.fixture
def gpu(real_gpu: Gpu) -> Iterator[Gpu]:
    """Leaves the device idle and CuPy's pool empty, so that tests can look at its free memory."""
    yield real_gpu
    real_gpu.synchronize()
    real_gpu.cupy.get_default_memory_pool().free_all_blocks()
