"""Installs the simulated CuPy for one test.  A test module imports the fixture by its function's name::

    from sim.fixture import every_schedule, simulated_cupy  # noqa: F401

    @every_schedule
    def test_something(sim): ...  # sim.cupy, sim.fail_at(3), ...; see sim.engine.Engine

Without a mark the schedule is seed 0; ``pytest.mark.parametrize("sim", [{"schedule": "late"}], indirect=True)`` passes
keywords to the engine.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from kernels.shim import compiler

from sim.cupy_sim import modules
from sim.driver import driver_library
from sim.engine import Engine
from sim.gpusaver_kernels import install
from sim.state import activate, deactivate

SCHEDULES: tuple[str | int, ...] = ("late", "eager", "racing", "dragging", 1, 2, 3)

every_schedule = pytest.mark.parametrize(
    "sim", [{"schedule": schedule} for schedule in SCHEDULES], indirect=True, ids=[str(name) for name in SCHEDULES]
)


class Simulation(Engine):
    """The engine of an installed simulation, and the module that it is behind."""

    cupy: Any


@pytest.fixture(name="sim")
def simulated_cupy(request: pytest.FixtureRequest) -> Iterator[Simulation]:
    with installed(**getattr(request, "param", {})) as simulation:
        yield simulation


@contextlib.contextmanager
def installed(*, kernels: bool = True, **options: Any) -> Iterator[Simulation]:
    """The simulated CuPy in ``sys.modules``, without any ``gpusaver.device.cuda*`` that was imported before.

    gpusaver's kernels run where there is a compiler for them; without, and with ``kernels=False``, there is no NVRTC.
    At the end it raises if something was done that a real device might let pass, if a device failed and nobody was
    told, or if memory is still registered (unless the device refuses whatever it is asked).  For tests that need more
    than one simulation, such as those of Hypothesis.
    """
    simulation = Simulation(**options)
    simulation.has_nvrtc = kernels and compiler() is not None
    if simulation.has_nvrtc:
        install(simulation)
    gc.freeze()  # collecting what the test leaves takes a hundredth of collecting everything
    outer = _forget(lambda name: name.partition(".")[0] in ("cupy", "cupy_backends", "cupyx"))
    outer |= _forget(lambda name: name.startswith("gpusaver.device.cuda"))
    new = modules()
    sys.modules.update(new)
    simulation.cupy = new["cupy"]
    activate(simulation)
    try:
        with driver_library(simulation):
            yield simulation
        gc.collect()
        simulation.drain()
        assert not simulation.violations, simulation.violations
        left = simulation.host.registered
        assert not left or simulation.sticky is not None, f"still registered: {left}"
    finally:
        _forget(lambda name: name in new or name.startswith("gpusaver.device.cuda"))
        gc.collect()
        gc.unfreeze()
        deactivate()
        for name, module in outer.items():
            sys.modules[name] = module
            package, _, attribute = name.rpartition(".")
            if package in sys.modules:
                setattr(sys.modules[package], attribute, module)


def _forget(matches: Any) -> dict[str, Any]:
    """Takes modules out of ``sys.modules`` and out of their packages; returns them."""
    found = {name: module for name, module in sys.modules.items() if matches(name)}
    for name in found:
        del sys.modules[name]
        package, _, attribute = name.rpartition(".")
        if package in sys.modules and hasattr(sys.modules[package], attribute):
            delattr(sys.modules[package], attribute)
    return found
