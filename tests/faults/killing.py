"""Runs as a process of its own: forks children that save, kills them with SIGKILL, and recovers what they left.

::

    killing.py DIRECTORY moments COUNT SEED     at random moments, COUNT times
    killing.py DIRECTORY calls SCENARIO         before every system call of a save, and in the middle of every write

It has imported and saved everything once before it forks, so a kill takes milliseconds.  Prints the number of kills,
and how many of them left a save unfinished.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oracle import check_older, check_recovery
from scenarios import SCENARIOS, Scenario
from system_calls import Call, Hook, intercepted, octets

#: Within it a child makes some three saves.
LONGEST_LIFE_SECONDS = 0.02
#: So often a directory is gone on with after a kill.
KILLS_PER_DIRECTORY = 8
#: A child that is still there then hangs.
DEADLINE_SECONDS = 60

Acknowledge = Callable[[int], None]


class Child:
    """Runs ``work(acknowledge)`` in a forked process; its calls arrive here."""

    def __init__(self, work: Callable[[Acknowledge], object]) -> None:
        self._reader, writer = os.pipe()
        self._id = os.fork()
        if self._id == 0:
            signal.alarm(DEADLINE_SECONDS)  # kills it, which shows in how it ended
            try:
                work(lambda version: os.write(writer, version.to_bytes(4, "little")) and None)
                os._exit(0)
            except BaseException as error:
                print(f"the child failed: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
        os.close(writer)

    def kill(self) -> None:
        os.kill(self._id, signal.SIGKILL)

    def wait(self) -> tuple[int | None, int]:
        """The last version that was acknowledged, and how the process ended: 0, or minus the signal."""
        data = b""
        while part := os.read(self._reader, 1 << 16):
            data += part
        os.close(self._reader)
        code = os.waitstatus_to_exitcode(os.waitpid(self._id, 0)[1])
        versions = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
        return (versions[-1] if versions else None), code


def save_on(scenario: Scenario, directory: Path, version: int, acknowledge: Acknowledge) -> None:
    with scenario.job(directory) as job:
        for number in itertools.count(version):
            job.save(number)
            acknowledge(number)


def is_unfinished(directory: Path) -> bool:
    return any(directory.rglob("*.gpusaver-tmp"))


def kill_at_moments(directory: Path, count: int, seed: int) -> tuple[int, int]:
    draw = random.Random(seed)
    unfinished = 0
    place, scenario, acknowledged = directory, SCENARIOS[0], None
    for number in range(count):
        if number % KILLS_PER_DIRECTORY == 0:
            place = directory / str(number)
            place.mkdir()
            scenario, acknowledged = draw.choice(SCENARIOS), None
        version = (acknowledged or 0) + 1
        before = set(place.rglob("*.gpusaver-tmp"))
        child = Child(lambda ack, v=version, s=scenario, p=place: save_on(s, p, v, ack))  # type: ignore[misc]
        time.sleep(draw.uniform(0, LONGEST_LIFE_SECONDS))
        child.kill()
        last, code = child.wait()
        assert code == -signal.SIGKILL, f"the child ended by itself: {code}"
        unfinished += bool(set(place.rglob("*.gpusaver-tmp")) - before)
        acknowledged = check_recovery(place / scenario.folder, last or acknowledged)
    return count, unfinished


def kill_at_calls(directory: Path, scenario: Scenario) -> tuple[int, int]:
    calls: list[str] = []
    place = directory / "whole"
    place.mkdir()
    run_to_last_save(
        scenario, place, lambda call, perform: (calls.append(call.name), perform())[1], lambda version: None
    )
    moments = [(n, False) for n in range(len(calls))] + [(n, True) for n, name in enumerate(calls) if name == "pwritev"]
    unfinished = 0
    for n, is_half in moments:
        place = directory / f"{n}-{is_half}"
        place.mkdir()
        hook = killing_hook(n, is_half)
        last, code = Child(lambda ack, p=place, h=hook: run_to_last_save(scenario, p, h, ack)).wait()  # type: ignore[misc]
        assert code == -signal.SIGKILL, f"the child ended by itself: {code}"
        check_recovery(place / scenario.folder, last)
        check_older(scenario, place, last)
        unfinished += is_unfinished(place)
        with scenario.job(place) as job:  # a process that comes after it goes on
            job.save(scenario.versions[-1] + 1)
        assert check_recovery(place / scenario.folder, scenario.versions[-1] + 1)
        assert not is_unfinished(place), sorted(place.rglob("*.gpusaver-tmp"))
    return len(moments), unfinished


def killing_hook(n: int, is_half: bool) -> Hook:
    """The process ends before call number ``n``; or in its middle, if it is a write."""
    numbers = itertools.count()
    pwritev = os.pwritev

    def hook(call: Call, perform: Callable[[], Any]) -> Any:
        if next(numbers) == n:
            if is_half:
                descriptor, buffers, offset = call.args
                data = octets(buffers)
                pwritev(descriptor, [data[: len(data) // 2]], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return perform()

    return hook


def run_to_last_save(scenario: Scenario, directory: Path, hook: Hook, acknowledge: Acknowledge) -> None:
    """The scenario; the calls of its last save go through the hook."""
    *before, last = scenario.versions
    with scenario.job(directory) as job:
        for version in before:
            job.save(version)
            acknowledge(version)
        with intercepted(directory, hook):
            job.save(last)
            acknowledge(last)


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "warm").mkdir()
    SCENARIOS[0].run(directory / "warm")
    assert check_recovery(directory / "warm", 2) == 2
    if sys.argv[2] == "moments":
        kills, unfinished = kill_at_moments(directory, int(sys.argv[3]), int(sys.argv[4]))
    else:
        scenario = next(scenario for scenario in SCENARIOS if scenario.name == sys.argv[3])
        kills, unfinished = kill_at_calls(directory, scenario)
    print(kills, unfinished)


if __name__ == "__main__":
    main()
