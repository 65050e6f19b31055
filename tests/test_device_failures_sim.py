"""Whichever call of the CUDA runtime fails: older checkpoints stay good, nothing is lost, and the next save works."""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim.errors import CUDARuntimeError
from sim.fixture import simulated_cupy  # noqa: F401
from sim.tools import chunks_of_kilobytes, on_device, on_host  # noqa: F401

from gpusaver.saver import Saver

EVERY_WAY = pytest.mark.parametrize(
    "sim",
    [{"schedule": "late"}, {"schedule": "dragging", "kernels": False}, {"schedule": 5}],
    indirect=True,
    ids=["late", "without-kernels", "random"],
)


def state(sim: Any) -> dict[str, Any]:
    """A few chunks: a large array, small ones, strided ones, on two devices."""
    rng = np.random.default_rng(1)
    variables = {"large": on_device(sim, rng.integers(0, 9, 10_001, np.uint8))}
    variables["turned"] = on_device(sim, rng.integers(0, 9, (12, 7)).astype(np.int16)).T
    variables |= {f"v{n}": on_device(sim, rng.integers(0, 9, 30 + n, np.uint8)) for n in range(9)}
    with sim.cupy.cuda.Device(1):
        variables["other"] = on_device(sim, rng.integers(0, 9, 80).astype(np.int32))[::2]
    return variables


def fill(variables: dict[str, Any], value: int) -> None:
    for array in variables.values():
        with array.device:
            try:
                array.fill(value)
            except CUDARuntimeError:  # the call that was to fail
                array.fill(value)


def contents(variables: dict[str, Any]) -> dict[str, bytes]:
    return {name: on_host(array) for name, array in variables.items()}


def end(sim: Any, variables: dict[str, Any]) -> None:
    """Nothing is left of gpusaver's own memory and work."""
    variables.clear()
    gc.collect()
    for device in (0, 1):
        with sim.cupy.cuda.Device(device):
            sim.cupy.get_default_memory_pool().free_all_blocks()
    sim.assert_quiescent()
    assert [memory.used for memory in sim.memory] == [0, 0]


@EVERY_WAY
@pytest.mark.parametrize("capture", ["snapshot", "deferred"])
def test_a_save(sim, tmp_path: Path, small_chunks, capture: str):
    variables = state(sim)
    expected = contents(variables)
    with Saver(variables) as saver:
        good = saver.save(tmp_path / "good")
        number, failures, was_reached = 0, 0, True
        while was_reached:
            number += 1
            pending = None
            sim.fail_at(number)
            try:
                pending = saver.save_async(tmp_path / "bad", capture=capture, write_state=False)
                pending.fence()
            except CUDARuntimeError:
                failures += 1
            fill(variables, 3)
            has_failed = pending is None or pending.exception() is not None
            was_reached = sim.has_failed
            sim.fail_at(10**6)
            if has_failed:
                assert not list(tmp_path.glob("bad*"))
            else:
                saver.restore(tmp_path / "bad")
                assert contents(variables) == expected
                for path in tmp_path.glob("bad*"):
                    path.unlink()
            saver.restore(good)
            assert contents(variables) == expected
    assert number > 30
    assert failures > 5
    del saver, pending
    end(sim, variables)


@EVERY_WAY
def test_a_restore(sim, tmp_path: Path, small_chunks):
    variables = state(sim)
    expected = contents(variables)
    with Saver(variables) as saver:
        good = saver.save(tmp_path / "good")
        number, was_reached = 0, True
        while was_reached:
            number += 1
            fill(variables, 3)
            sim.fail_at(number)
            try:
                saver.restore(good)
                assert contents(variables) == expected
            except CUDARuntimeError:
                pass
            was_reached = sim.has_failed
            sim.fail_at(10**6)
            fill(variables, 4)
            saver.restore(good)
            assert contents(variables) == expected
    assert number > 15
    del saver
    end(sim, variables)


@EVERY_WAY
@pytest.mark.parametrize("capture", ["snapshot", "deferred"])
def test_a_device_that_fails_for_good(sim, tmp_path: Path, small_chunks, capture: str):
    """Every call fails from then on: the save's error is raised, and nothing hangs or crashes on the way out."""
    number, was_reached = 0, True
    while was_reached:
        number += 1
        variables = state(sim)
        with Saver(variables) as saver:
            sim.fail_at(number, sticky=True)
            try:
                saver.save_async(tmp_path / f"bad{number}", capture=capture, write_state=False).result()
            except CUDARuntimeError:
                assert not list(tmp_path.glob(f"bad{number}*"))
            was_reached = sim.has_failed
        del saver
        restart(sim)
    assert number > 20


def restart(sim: Any) -> None:
    """As a new process would find the device."""
    sim.fail_at(10**6)
    gc.collect()
    with contextlib.suppress(CUDARuntimeError):
        sim.drain()
    for name in [name for name in sys.modules if name.startswith("gpusaver.device.cuda")]:
        del sys.modules[name]
    gc.collect()
    sim.sticky = None
    sim.host.registered.clear()
    sim.host.allocated.clear()
