"""Processes that are killed in the middle of a save: what they acknowledged is there, and those after them go on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scenarios import SCENARIOS, Scenario
from size import sized

import gpusaver

ROOT = Path(gpusaver.__file__).parents[1]
#: In batches, which may run side by side.
BATCHES, KILLS_PER_BATCH = sized((2, 150), (20, 250))
TIMEOUT_SECONDS = 900
_SOME = "overwrite", "retention", "manager", "incremental", "recycle"
SOME = [scenario for scenario in SCENARIOS if scenario.name in _SOME]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def kill(directory: Path, *arguments: object) -> tuple[int, int]:
    """Runs killing.py; returns the number of kills, and of those that left an unfinished save."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killing.py"), directory, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    kills, unfinished = map(int, done.stdout.split())
    return kills, unfinished


@pytest.mark.parametrize("batch", range(BATCHES))
def test_killed_at_random_moments(batch: int, memory_path: Path, count_cases: Callable[[int], None]) -> None:
    kills, unfinished = kill(memory_path, "moments", KILLS_PER_BATCH, batch)
    assert kills == KILLS_PER_BATCH
    assert unfinished > kills // 20, "hardly any kill hit a save"
    count_cases(kills)


@pytest.mark.parametrize("scenario", sized(SOME, SCENARIOS), ids=lambda scenario: scenario.name)
def test_killed_at_every_call(scenario: Scenario, memory_path: Path, count_cases: Callable[[int], None]) -> None:
    kills, unfinished = kill(memory_path, "calls", scenario.name)
    assert kills > 25
    assert unfinished > 5
    count_cases(kills)
