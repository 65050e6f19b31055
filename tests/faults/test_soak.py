"""Hundreds of saves and restores in one process: memory, descriptors, threads and files on disk stay what they were."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from scenarios import Scenario
from size import join_savers, sized

ROUNDS = sized(100, 2000)
#: After these, whatever is allocated once has been.
WARM_UP_ROUNDS = 30
#: What the allocator may keep beyond it.  One state, index or slot lost per round would be more.
SLACK_NBYTES = sized(2 << 20, 4 << 20)


def resident_nbytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("mode", ["save", "save_async"])
def test_nothing_grows(mode: str, memory_path: Path, count_cases: Callable[[int], None]) -> None:
    scenario = Scenario("soak", max_to_keep=3)

    def observed() -> tuple[int, int, int]:
        return len(os.listdir("/dev/fd")), threading.active_count(), len(os.listdir(memory_path))

    with scenario.job(memory_path) as job:

        def one_round(version: int) -> None:
            if mode == "save":
                prefix = job.save(version)
            else:
                job.fill(version)
                pending = job.saver.save_async(scenario.prefix(memory_path, 0)[:-2], version)
                assert pending is not None
                prefix = pending.result()
            job.fill(0)
            assert job.restore(prefix) == version

        for version in range(1, WARM_UP_ROUNDS + 1):
            one_round(version)
        gc.collect()
        join_savers()
        before, memory = observed(), resident_nbytes()
        for version in range(WARM_UP_ROUNDS + 1, WARM_UP_ROUNDS + ROUNDS + 1):
            one_round(version)
        gc.collect()
        join_savers()
        assert observed() == before
        assert resident_nbytes() < memory + SLACK_NBYTES
    count_cases(ROUNDS)
