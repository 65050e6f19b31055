"""Several processes save and read in one directory at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from oracle import check_recovery, recover
from scenarios import version_of
from size import sized

import gpusaver

ROOT = Path(gpusaver.__file__).parents[1]
SAVES = sized(150, 2000)
TIMEOUT_SECONDS = 600

CountCases = Callable[[int], None]


def start(directory: Path, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    script = Path(__file__).with_name("sharing.py")
    return subprocess.Popen(
        [sys.executable, script, directory, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def results(processes: list[subprocess.Popen[str]]) -> list[tuple[int, int]]:
    """What each has printed.  All end, whatever happens."""
    found = []
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
            assert process.returncode == 0, stderr
            first, second = map(int, stdout.split())
            found.append((first, second))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return found


def test_pollers_never_see_half_a_checkpoint(memory_path: Path, count_cases: CountCases) -> None:
    pollers = [start(memory_path, "poll", "k", SAVES) for _ in range(2)]
    saver = start(memory_path, "save", "k", SAVES, "checkpoint")
    *polled, _ = results([*pollers, saver])
    assert all(read > 1 for read, _ in polled)
    assert check_recovery(memory_path, SAVES) == SAVES
    count_cases(sum(map(sum, polled)))


def test_savers_with_names_of_their_own(memory_path: Path, count_cases: CountCases) -> None:
    """Nobody deletes what is not his."""
    names = ["a", "b", "k"]
    assert results([start(memory_path, "save", name, SAVES, f"{name}.state") for name in names]) == [(SAVES, 0)] * 3
    for name in names:
        state = gpusaver.get_checkpoint_state(memory_path, f"{name}.state")
        assert state is not None
        paths = list(state.all_model_checkpoint_paths)
        assert paths == [f"{memory_path}/{name}-{SAVES - 1}", f"{memory_path}/{name}-{SAVES}"]
        assert [version_of(gpusaver.load(path)) for path in paths] == [SAVES - 1, SAVES]
    assert len(os.listdir(memory_path)) == 3 * (2 * 3 + 1)
    count_cases(3 * SAVES)


def test_savers_of_one_prefix(memory_path: Path, count_cases: CountCases) -> None:
    """Each save is all or nothing, however many try: what is there afterwards is one of them, whole."""
    outcomes = results([start(memory_path, "race", "k", SAVES) for _ in range(3)])
    assert sum(saved for saved, _ in outcomes) > 0
    assert recover(memory_path)
    count_cases(sum(map(sum, outcomes)))
