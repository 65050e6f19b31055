"""What saves and restores cost in calls, which noise cannot shake: of the system, and of Python functions a tensor.

A number here may go down; if one must go up, docs/performance.md says what it bought.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver.pipeline import plan

sys.path.append(str(Path(__file__).parent.parent / "faults"))
from system_calls import Call, intercepted


def state_of(count: int) -> dict[str, Any]:
    return {f"w{number:05d}": np.full(100 + number % 7, number, np.float32) for number in range(count)}


def system_calls(directory: Path, run: Callable[[], object]) -> Counter[str]:
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def hook(call: Call, perform: Callable[[], Any]) -> Any:
        with lock:
            counts[f"{call.name} directory" if call.is_directory else call.name] += 1
        return perform()

    with intercepted(directory, hook):
        run()
    return counts


def python_calls(run: Callable[[], object]) -> int:
    """Of Python functions and of C functions called from Python, in all threads."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return count


@pytest.mark.parametrize("count", [10, 1000])
def test_system_calls_do_not_grow_with_the_tensors(tmp_path: Path, count: int) -> None:
    with gpusaver.Saver(state_of(count), direct_io=False, max_to_keep=2) as saver:
        for step in range(3):
            saver.save(tmp_path / "k", step)
        saved = system_calls(tmp_path, lambda: saver.save(tmp_path / "k", 3))
        restored = system_calls(tmp_path, lambda: saver.restore(tmp_path / "k-3"))
    assert saved["pwritev"] == 3, saved  # data, index, state file; the `.meta` file is a link
    assert saved["fsync"] == 3, saved
    assert saved["fsync directory"] == 3, saved  # data renamed; index renamed; state file renamed
    assert saved["replace"] == 4, saved
    assert sum(saved.values()) <= 64, saved
    assert restored["preadv"] <= 3, restored
    assert sum(restored.values()) <= 14, restored


def test_a_few_of_many_take_a_read_each_and_no_more(tmp_path: Path) -> None:
    """And little of Python: neither the whole index is decoded nor is there an object for each read."""
    state = {f"w{number:05d}": np.full(20_000, number, np.float32) for number in range(1000)}
    some = dict(list(state.items())[::10])
    with gpusaver.Saver(state) as saver:
        prefix = saver.save(tmp_path / "k")
    with gpusaver.Saver(some) as saver:
        for array in some.values():
            array[:] = -1
        counts = system_calls(tmp_path, lambda: saver.restore(prefix))
        assert all((state[name] == int(name[1:])).all() for name in some)
        assert len(some) < counts["preadv"] <= len(some) + 10, counts
        assert python_calls(lambda: saver.restore(prefix)) <= 1500


def test_calls_of_python_to_make_a_saver() -> None:
    """All leaves are looked at, but as columns."""
    gpusaver.Saver(state_of(10))
    few, many = (python_calls(functools.partial(gpusaver.Saver, state_of(count))) for count in (1000, 3000))
    assert 0 < (many - few) / 2000 <= 2, (few, many)


@pytest.mark.parametrize(("is_incremental", "saves"), [(False, 3), (True, 1)])
def test_the_first_save_takes_the_plan_that_the_saver_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_incremental: bool, saves: int
) -> None:
    """Later ones, too, unless they are incremental and find that something does not change."""
    made = []
    make = plan._make_plan
    monkeypatch.setattr(plan, "_make_plan", lambda *args: made.append(args) or make(*args))
    with gpusaver.variables():
        fixed = gpusaver.Variable(np.ones(5), "fixed", trainable=False)
    with gpusaver.Saver({"text": "a", "fixed": fixed, **state_of(100)}, incremental=is_incremental) as saver:
        for step in range(saves):
            saver.save(tmp_path / "k", step)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("direct_io", "saves", "restores"), [(False, 16, 10), (True, 9, 10)], ids=["page cache", "O_DIRECT"]
)
def test_calls_of_python_for_each_tensor(tmp_path: Path, direct_io: bool, saves: int, restores: int) -> None:
    """From the second save on: the plan is there, and most is done by columns."""
    found = []
    for count in (1000, 3000):
        with gpusaver.Saver(state_of(count), direct_io=direct_io) as saver:
            for _ in range(2):
                saver.save(os.path.join(tmp_path, str(count)))
            found.append(
                (
                    python_calls(lambda s=saver, n=count: s.save(os.path.join(tmp_path, str(n)))),
                    python_calls(lambda s=saver, n=count: s.restore(os.path.join(tmp_path, str(n)))),
                )
            )
    per_tensor = [(after - before) / 2000 for before, after in zip(*found, strict=True)]
    assert per_tensor[0] <= saves, per_tensor
    assert per_tensor[1] <= restores, per_tensor
