"""The n-th system call of a save or a restore fails, for every n, every error, once and from then on.

The same over the storage interface, which every backend has: tests/saver/test_failures.py.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import check_recovery
from scenarios import Scenario, version_of
from size import deadline, join_savers, sized
from system_calls import Call, intercepted

import gpusaver
from gpusaver.errors import Error

CountCases = Callable[[int], None]

ERRORS = ["EIO", "ENOSPC", "EINTR", "EDQUOT", "EROFS"]
#: In turn: another error for every call.
MODES = list(itertools.product(sized(["in turn"], ERRORS), [False, True]))

_MOVING = {"pwritev": os.pwritev, "preadv": os.preadv}  # the real ones

SAVES = [
    Scenario("new", (1, 2), folder="run"),
    Scenario("overwrite", (1, 2), is_one_prefix=True),
    Scenario("retention", (1, 2, 3), max_to_keep=1),
    Scenario("sharded_overwrite", (1, 2), is_one_prefix=True, is_sharded=True),
    Scenario("direct_io", (1, 2), direct_io=True),
    Scenario("manager", (1, 2, 3), max_to_keep=1, has_manager=True),
    Scenario("incremental", (1, 2, 3), max_to_keep=1, is_incremental=True),
    Scenario("incremental_overwrite", (1, 2), is_one_prefix=True, is_incremental=True),
    Scenario("recycle", (1, 2, 3), max_to_keep=1, recycles=True),
    Scenario("recycle_overwrite", (1, 2, 3), is_one_prefix=True, recycles=True),
]


class Failing:
    """A hook: call number ``fail_at`` fails, or ``is_short`` of its bytes and the next one fails."""

    def __init__(self, fail_at: int, error: str, *, for_ever: bool = False, is_short: bool = False) -> None:
        self.calls: list[Call] = []
        self.error = ERRORS[fail_at % len(ERRORS)] if error == "in turn" else error
        self.for_ever = for_ever
        self._fail_at = fail_at
        self._is_short = is_short
        self._lock = threading.Lock()

    @property
    def is_reached(self) -> bool:
        return len(self.calls) > self._fail_at

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        with self._lock:
            number = len(self.calls)
            self.calls.append(call)
        if number < self._fail_at or (number > self._fail_at and not self.for_ever):
            return perform()
        if self._is_short and number == self._fail_at:
            return shortened(call, 1, perform)
        if call.name == "close":
            perform()  # it is closed all the same
        raise OSError(getattr(errno, self.error), "injected", call.path)


def shortened(call: Call, nbytes: int, perform: Callable[[], Any]) -> Any:
    """Moves no more than ``nbytes``; other calls are carried out as they are."""
    if call.name not in _MOVING:
        return perform()
    descriptor, buffers, offset, *flags = call.args
    return _MOVING[call.name](descriptor, [np.frombuffer(buffers[0], np.uint8)[:nbytes]], offset, *flags)


def mode_name(mode: tuple[str, bool]) -> str:
    return f"{mode[0]}{'-from-then-on' if mode[1] else ''}"


def check_error(error: Error, directory: Path, name: str) -> None:
    assert re.search(rf"cannot [\w ]+ {re.escape(os.fspath(directory))}.*injected \({name}\)", str(error)), error


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def is_committed(prefix: str, version: int) -> bool:
    return gpusaver.checkpoint_exists(prefix) and version_of(gpusaver.load(prefix)) == version


def names_in(folder: Path) -> set[str]:
    """Without locks: a lock file that could not be removed is in nobody's way."""
    return {name for name in os.listdir(folder) if not name.endswith(".gpusaver-lock")}


def check_nothing_is_left(threads: int, descriptors: int) -> None:
    join_savers()
    assert threading.active_count() == threads
    assert open_descriptors() == descriptors


def check_failed_save(scenario: Scenario, directory: Path, failing: Failing) -> None:
    """Runs the scenario; during its last save the calls fail."""
    directory.mkdir()
    *before, last = scenario.versions
    folder = directory / scenario.folder
    with scenario.job(directory) as job:
        for version in before:
            job.save(version)
        names = names_in(folder)
        acknowledged = before[-1]
        join_savers()
        threads, descriptors = threading.active_count(), open_descriptors()
        with intercepted(directory, failing):
            try:
                job.save(last)
                acknowledged = last
            except Error as error:
                check_error(error, directory, failing.error)
        check_nothing_is_left(threads, descriptors)
        found = check_recovery(folder, acknowledged)
        assert found in (acknowledged, last)
        for version in before:
            if scenario.is_kept(version, last):
                assert version_of(gpusaver.load(scenario.prefix(directory, version))) in (version, found)
        if not failing.for_ever:
            temporary = {name for name in os.listdir(folder) if name.endswith("gpusaver-tmp")}
            assert len(temporary) <= scenario.recycles  # the spare
            if not is_committed(scenario.prefix(directory, last), last):
                assert names_in(folder) - temporary == {name for name in names if not name.endswith("gpusaver-tmp")}
        job.save(last + 1)
        assert check_recovery(folder, last + 1) == last + 1
        assert scenario.is_one_prefix is False or not list(folder.glob("*.gpusaver-lock"))


def every_n(check: Callable[[int], bool]) -> int:
    """Calls ``check(n)`` with n = 0, 1, ... as long as call number n is reached; returns how many cases that were."""
    for n in itertools.count():
        with deadline():
            if not check(n):
                return n + 1
    raise AssertionError


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
@pytest.mark.parametrize("scenario", SAVES, ids=lambda scenario: scenario.name)
def test_a_save(scenario: Scenario, mode: tuple[str, bool], memory_path: Path, count_cases: CountCases) -> None:
    def check(n: int) -> bool:
        failing = Failing(n, mode[0], for_ever=mode[1])
        check_failed_save(scenario, memory_path / str(n), failing)
        return failing.is_reached

    count = every_n(check)
    assert count > 25
    count_cases(count)


@pytest.mark.parametrize("scenario", SAVES, ids=lambda scenario: scenario.name)
def test_a_short_write_before_the_disk_is_full(scenario: Scenario, memory_path: Path, count_cases: CountCases) -> None:
    """As a real disk does it: what fits is written, and the next call fails."""

    def check(n: int) -> bool:
        failing = Failing(n, "ENOSPC", for_ever=True, is_short=True)
        check_failed_save(scenario, memory_path / str(n), failing)
        return failing.is_reached

    count_cases(every_n(check))


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
@pytest.mark.parametrize("verify", ["during", "before"])
def test_a_restore(verify: str, mode: tuple[str, bool], memory_path: Path, count_cases: CountCases) -> None:
    scenario = Scenario("restore", (1,))
    scenario.run(memory_path)
    prefix = scenario.prefix(memory_path, 1)

    def check(n: int) -> bool:
        failing = Failing(n, mode[0], for_ever=mode[1])
        threads, descriptors = threading.active_count(), open_descriptors()
        with scenario.job(memory_path) as job:
            job.fill(2)
            with intercepted(memory_path, failing):
                try:
                    assert job.restore(prefix, verify=verify) == 1
                except Error as error:
                    check_error(error, memory_path, failing.error)
                    if verify == "before" and failing.calls[-1].name != "close":
                        assert version_of(job.state) == 2
            check_nothing_is_left(threads, descriptors)
            assert job.restore(prefix) == 1
        return failing.is_reached

    count = every_n(check)
    assert count > 8
    count_cases(count)


@pytest.fixture(params=range(sized(5, 100)))
def draw(request: pytest.FixtureRequest) -> Iterator[random.Random]:
    return random.Random(request.param)


def test_every_write_and_read_is_short(draw: random.Random, memory_path: Path, count_cases: CountCases) -> None:
    def short(call: Call, perform: Callable[[], Any]) -> Any:
        return shortened(call, draw.randint(1, 600), perform)

    with deadline():
        for scenario in SAVES:
            if scenario.direct_io:
                continue  # there a rest has to be aligned, and so are all that the kernel cuts
            directory = memory_path / scenario.name
            directory.mkdir()
            with intercepted(directory, short):
                scenario.run(directory)
                assert check_recovery(directory / scenario.folder, scenario.versions[-1])
    count_cases(len(SAVES) - 1)
