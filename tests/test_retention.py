"""The rule of which checkpoints are listed and deleted, without files."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import retention_rows
from tables.scenario import Row

from gpusaver.retention import Retention

HOUR = 3600.0

paths = st.sampled_from([f"d/k-{step}" for step in range(8)])
saves = st.lists(st.tuples(paths, st.floats(0, 2 * HOUR)), max_size=40)


def run(retention: Retention, history: list[tuple[str, float]]) -> tuple[set[str], list[str]]:
    """The paths left on disk after these (path, seconds since the save before), and the last state file."""
    now, disk, listed = 0.0, set(retention.last_checkpoints), []
    for path, pause in history:
        now += pause
        decision = retention.added(path, now)
        disk.add(path)
        disk -= set(decision.delete)
        listed = decision.listed
        assert listed[-1] == path
        assert set(listed) <= disk
    return disk, listed


@given(saves, st.integers(1, 9))
def test_at_most_max_to_keep_stay(history: list[tuple[str, float]], keep: int) -> None:
    retention = Retention(keep, None, 0.0)
    disk, listed = run(retention, history)
    newest_first = list(dict.fromkeys(path for path, _ in reversed(history)))
    assert listed == retention.last_checkpoints == newest_first[:keep][::-1]
    assert disk == set(listed)


@given(saves, st.sampled_from([None, 0]))
def test_without_limit_all_stay_and_none_is_listed(history: list[tuple[str, float]], keep: int | None) -> None:
    retention = Retention(keep, 1.0, 0.0)
    disk, listed = run(retention, history)
    assert disk == {path for path, _ in history}
    assert listed == [path for path, _ in history[-1:]]
    assert retention.last_checkpoints == []


@given(st.lists(st.floats(1, 2 * HOUR), max_size=60), st.integers(1, 3), st.floats(0.2, 3))
def test_at_most_one_is_kept_per_period(pauses: list[float], keep: int, hours: float) -> None:
    history = [(f"d/k-{step}", pause) for step, pause in enumerate(pauses)]
    disk, listed = run(Retention(keep, hours, 0.0), history)
    assert len(disk) - len(listed) <= sum(pauses) / (hours * HOUR)


@given(saves, st.integers(1, 4), st.one_of(st.none(), st.floats(0.2, 3)))
def test_one_save_at_a_time_changes_nothing_when_the_list_grew_by_saves(
    history: list[tuple[str, float]], keep: int, hours: float | None
) -> None:
    like_tensorflow = Retention(keep, 10_000.0 if hours is None else hours, 0.0, like_tensorflow=True)
    assert run(Retention(keep, hours, 0.0), history) == run(like_tensorflow, history)


SAVES_ALONE = [
    row
    for row in retention_rows.RETENTION
    if {step.operation for step in row.steps} <= {"saver", "saves", "on_disk", "last"} and len(row.steps) > 1
]


@pytest.mark.parametrize("row", SAVES_ALONE, ids=str)
def test_like_tensorflow(row: Row) -> None:
    """The rows made of nothing but saves, in TensorFlow's column."""
    options = {"max_to_keep": 5, "keep_checkpoint_every_n_hours": 10_000.0} | row.steps[0].kwargs
    retention = Retention(start_time=0.0, like_tensorflow=True, **options)
    disk: set[str] = set()
    for step in row.steps[1:]:
        if step.operation == "saves":
            for minute in step.args[1]:
                disk.add(f"{step.args[0]}-{minute}")
                disk -= set(retention.added(f"{step.args[0]}-{minute}", minute * 60.0).delete)
        elif step.operation == "on_disk":
            assert disk == {f"d/{name}" for name in step.tensorflow if name != "checkpoint"}
        else:
            assert retention.last_checkpoints == step.tensorflow


def test_like_tensorflow_one_goes_per_save() -> None:
    retention = Retention(2, 10_000.0, 0.0, like_tensorflow=True)
    retention.set_last_checkpoints_with_time([("a", 0.0), ("b", 0.0), ("c", 0.0)])
    assert retention.added("d", 1.0).delete == ["a"]
    assert retention.last_checkpoints == ["b", "c", "d"]


def test_like_tensorflow_negative_limit_deletes_at_once() -> None:
    decision = Retention(-1, 10_000.0, 0.0, like_tensorflow=True).added("a", 1.0)
    assert decision.listed == ["a"]
    assert decision.delete == ["a"]


def test_surplus_goes_down_to_the_limit_in_one_save() -> None:
    retention = Retention(2, None, 0.0)
    retention.set_last_checkpoints_with_time([("a", 0.0), ("b", 0.0), ("c", 0.0)])
    decision = retention.added("d", 1.0)
    assert decision.delete == ["a", "b"]
    assert decision.listed == retention.last_checkpoints == ["c", "d"]


@pytest.mark.parametrize("hours", [None, 1.0, math.inf])
def test_without_time_they_are_never_deleted(hours: float | None) -> None:
    retention = Retention(1, hours, 0.0)
    retention.set_last_checkpoints(["a", "b"])
    assert retention.last_checkpoints == ["a", "b"]
    assert retention.added("c", 1.0).delete == []
    assert retention.last_checkpoints == ["c"]


def test_one_file_has_one_entry_however_it_is_spelt() -> None:
    retention = Retention(1, None, 0.0)
    retention.added("d/k", 0.0)
    decision = retention.added("./d//k", 1.0)
    assert decision.delete == []
    assert decision.listed == ["./d//k"]


def test_the_list_is_a_copy_both_ways() -> None:
    retention = Retention(3, None, 0.0)
    given = [("a", 0.0)]
    retention.set_last_checkpoints_with_time(given)
    decision = retention.added("b", 1.0)
    decision.listed.append("x")
    retention.last_checkpoints.append("y")
    assert given == [("a", 0.0)]
    assert retention.last_checkpoints == ["a", "b"]


@pytest.mark.parametrize(
    ("keep", "hours", "error", "text"),
    [
        (-1, None, ValueError, "max_to_keep: expected None or 0"),
        (2**31, None, ValueError, "max_to_keep"),
        (1.0, None, TypeError, "float"),
        ("1", None, TypeError, "str"),
        (True, None, TypeError, "max_to_keep"),
        (1, 0, ValueError, "keep_checkpoint_every_n_hours: expected more than 0, or None"),
        (1, -1.0, ValueError, "keep_checkpoint_every_n_hours"),
        (1, math.nan, ValueError, "keep_checkpoint_every_n_hours"),
        (1, "1", TypeError, "keep_checkpoint_every_n_hours"),
    ],
)
def test_bad_options(keep: object, hours: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        Retention(keep, hours, 0.0)  # type: ignore[arg-type]
