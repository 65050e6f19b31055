"""After a crash at any moment, whatever of the un-synced operations got to the disk, the newest checkpoint is there.

The saves of every scenario are recorded below the storage interface; :mod:`crash_model` says what may be on the disk
after a crash; each such state is made a directory and recovered.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_model import SYNCS, Content, CrashPoint, Operation, Recorder, materialise, without_sync
from oracle import check_older, check_recovery
from scenarios import SCENARIOS, Scenario
from size import LONG, deadline

EXHAUSTIVE_LIMIT = 1 << 14
SAMPLES = 2000
#: What the check of the checker may need: it stops at the first state that is wrong.
MUTANT_SAMPLES = 20_000

CountCases = Callable[[int], None]


class Checker:
    """Recovers from crash states, each different one once."""

    def __init__(self, memory_path: Path) -> None:
        self._directories = (memory_path / str(number) for number in range(10**9))
        self._seen: set[tuple[object, ...]] = set()

    def check(self, scenario: Scenario, content: Content, acknowledged: int | None) -> None:
        key = (acknowledged, scenario, *content.items())
        if key in self._seen:
            return
        self._seen.add(key)
        directory = next(self._directories)
        directory.mkdir()
        try:
            materialise(content, directory)
            found = check_recovery(directory / scenario.folder, acknowledged)
            check_older(scenario, directory, acknowledged)
            if len(self._seen) % 10 == 0:
                self._go_on(scenario, directory, (found or 0) + 10)
        finally:
            for path in sorted(directory.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            directory.rmdir()

    def _go_on(self, scenario: Scenario, directory: Path, version: int) -> None:
        """What is left behind is not in the way of the next save."""
        with scenario.job(directory) as job:
            assert job.restore(job.save(version)) == version
        assert check_recovery(directory / scenario.folder, version) == version


@pytest.fixture
def checker(memory_path: Path) -> Checker:
    return Checker(memory_path / "states")


@pytest.fixture
def record_of(memory_path: Path) -> Callable[[Scenario], list[Operation]]:
    (memory_path / "states").mkdir()

    def record_of(scenario: Scenario) -> list[Operation]:
        directory = memory_path / scenario.name
        directory.mkdir()
        return Recorder(directory, lambda acknowledged: scenario.run(directory, acknowledged)).record

    return record_of


def drawn_states(record: list[Operation], count: int, seed: int) -> Iterator[tuple[CrashPoint, Content]]:
    """States of crash points all over the record."""
    draw = random.Random(seed)
    points = [CrashPoint(record, n) for n in range(len(record) + 1)]
    for number in range(count):
        point = points[number % len(points)]
        yield point, point.drawn(draw)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_crash_loses_no_checkpoint(
    scenario: Scenario, record_of: Callable[..., list[Operation]], checker: Checker, count_cases: CountCases
) -> None:
    record = record_of(scenario)
    assert sum(operation.name == "acknowledged" for operation in record) == len(scenario.versions)
    count = 0
    for n in range(len(record) + 1):
        point = CrashPoint(record, n)
        if LONG:
            states = point.states(EXHAUSTIVE_LIMIT, random.Random(n))
        else:
            draw = random.Random(n)
            per_point = -(-SAMPLES // len(SCENARIOS) // (len(record) + 1))
            states = (point.drawn(draw) for _ in range(per_point))
        with deadline(3600):
            for content in states:
                checker.check(scenario, content, point.acknowledged)
                count += 1
    assert LONG or count >= SAMPLES // len(SCENARIOS)
    count_cases(count)


@pytest.mark.parametrize("sync", SYNCS)
def test_the_checker_misses_no_sync(
    sync: str, record_of: Callable[..., list[Operation]], checker: Checker, count_cases: CountCases
) -> None:
    """Without any one sync of the protocol there is a state from which the newest checkpoint cannot be recovered."""
    count = 0
    for scenario in SCENARIOS:
        whole = record_of(scenario)
        record = without_sync(whole, sync)
        if len(record) == len(whole):
            continue
        for point, content in drawn_states(record, MUTANT_SAMPLES, seed=1):
            count += 1
            try:
                checker.check(scenario, content, point.acknowledged)
            except AssertionError:
                count_cases(count)
                return
    pytest.fail(f"nobody noticed that the sync of the {sync} was left out")
