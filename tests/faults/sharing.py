"""Runs as a process of its own: one of several that use a directory of checkpoints at the same time.

::

    sharing.py DIRECTORY save NAME COUNT STATE    saves COUNT versions of NAME, keeping two, with the state file STATE
    sharing.py DIRECTORY poll NAME COUNT          follows checkpoints_iterator up to version COUNT, reads what it yields
    sharing.py DIRECTORY race NAME COUNT          saves the one prefix NAME COUNT times, as others do

Prints how many checkpoints were read or saved, and how often somebody else was in the way: deleted first, or locked.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from scenarios import fill, state_of, version_of

import gpusaver
from gpusaver.errors import Error, NotFoundError

DEADLINE_SECONDS = 300


def save(directory: str, name: str, count: int, state_file: str) -> tuple[int, int]:
    state = state_of(0)
    with gpusaver.Saver(state, max_to_keep=2) as saver:
        for version in range(1, count + 1):
            fill(state, version)
            saver.save(f"{directory}/{name}", version, latest_filename=state_file)
    return count, 0


def poll(directory: str, name: str, last: int) -> tuple[int, int]:
    """What is yielded can be read as a whole, or has been deleted meanwhile; never half of it."""
    read = gone = before = 0
    for prefix in gpusaver.checkpoints_iterator(directory, sleep=lambda seconds: time.sleep(0)):  # as often as it can
        assert prefix.startswith(f"{directory}/{name}-")
        version = int(prefix.rpartition("-")[2])
        assert version > before, "it went backwards"
        before = version
        try:
            assert version_of(gpusaver.load(prefix)) == version
            read += 1
        except NotFoundError:  # the index or a data file: retention was faster
            gone += 1
        if version == last:
            break
    return read, gone


def race(directory: str, name: str, count: int) -> tuple[int, int]:
    """Whoever saves a prefix at the same time as others: a save that returns is whole, whoever's it is."""
    state = state_of(0)
    saved = refused = 0
    with gpusaver.Saver(state) as saver:
        for number in range(count):
            fill(state, os.getpid() * 1000 + number)
            try:
                saver.save(f"{directory}/{name}", write_state=False)
                saved += 1
            except Error:
                refused += 1
    return saved, refused


def main() -> None:
    directory, action, name, count, *rest = sys.argv[1:]
    signal.alarm(DEADLINE_SECONDS)  # ends the process
    print(*{"save": save, "poll": poll, "race": race}[action](directory, name, int(count), *rest))


if __name__ == "__main__":
    main()
