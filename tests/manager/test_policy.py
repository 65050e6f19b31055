"""The rule of which checkpoints a manager keeps, without files."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.manager.policy import Checkpoint, Managed, Policy

MINUTE = 60.0

Row = tuple[Policy, list[tuple[int, float | None]], set[int], list[int]]


def run(
    policy: Policy, saves: list[tuple[int, float | None]], *, pin: set[int] = frozenset()
) -> tuple[set[str], Managed]:  # type: ignore[assignment]
    """The names on disk after saves at these minutes, with these metrics; and what the manager then knows."""
    managed, disk = Managed(), set()
    for minute, metric in saves:
        name = str(minute)
        managed = policy.sweep(managed.saved(Checkpoint(name, minute * MINUTE, metric, minute in pin)))
        disk = (disk | {name}) - set(managed.doomed)
        managed = replace(managed, doomed=())
        assert {c.name for c in managed.checkpoints} <= disk
    return disk, managed


def every_20(last: int, metric: float | None = None) -> list[tuple[int, float | None]]:
    return [(minute, metric) for minute in range(20, last + 1, 20)]


METRICS = [0.9, 0.5, 0.7, math.nan, 0.3, 0.6, None, 0.8, 0.5]
MEASURED = [(20 * (number + 1), metric) for number, metric in enumerate(METRICS)]

#: Policy, saves, minutes on disk, minutes listed.
ROWS: dict[str, Row] = {
    "the newest": (Policy(2), every_20(120), {100, 120}, [100, 120]),
    "all": (Policy(None), every_20(80), {20, 40, 60, 80}, [20, 40, 60, 80]),
    "one": (Policy(1), every_20(60), {60}, [60]),
    "one an hour, as TensorFlow's": (Policy(2, 1.0), every_20(260), {60, 120, 180, 240, 260}, [240, 260]),
    "the same path again": (Policy(2), [(20, None), (40, None), (20, None)], {20, 40}, [40, 20]),
    "best by min": (Policy(1, best_to_keep=2), MEASURED, {100, 180}, [180]),
    "best by max": (Policy(1, best_to_keep=2, best_mode="max"), MEASURED, {20, 160, 180}, [180]),
    "best among the newest counts once": (Policy(2, best_to_keep=1), MEASURED[:5], {80, 100}, [80, 100]),
    "of equal ones the newer": (Policy(1, best_to_keep=1), [(1, 0.5), (2, 0.5), (3, None)], {2, 3}, [3]),
    "best, and one an hour": (Policy(1, 1.0, 1), [(60, 0.1), (70, 0.2), (80, 0.3)], {60, 70, 80}, [80]),
}


@pytest.mark.parametrize(("policy", "saves", "disk", "listed"), ROWS.values(), ids=ROWS)
def test_rows(policy: Policy, saves: Any, disk: set[int], listed: list[int]) -> None:
    found, managed = run(policy, saves)
    assert found == {str(minute) for minute in disk}
    assert [c.name for c in policy.newest(managed.checkpoints)] == [str(minute) for minute in listed]


def test_pinned() -> None:
    policy = Policy(1)
    disk, managed = run(policy, every_20(100), pin={40})
    assert disk == {"40", "100"}
    released = policy.sweep(managed.pinned("40", False))
    assert released.doomed == ("40",)


def test_no_longer_best() -> None:
    policy = Policy(1, best_to_keep=1)
    disk, _ = run(policy, [(1, 0.3), (2, 0.9), (3, 0.1), (4, 0.5)])
    assert disk == {"3", "4"}


saves = st.lists(
    st.tuples(st.integers(1, 300), st.one_of(st.none(), st.floats(allow_nan=True))),
    max_size=40,
    unique_by=lambda s: s[0],
).map(sorted)


@given(
    saves,
    st.one_of(st.none(), st.integers(1, 4)),
    st.one_of(st.none(), st.floats(0.2, 3)),
    st.integers(0, 3),
    st.sampled_from(["min", "max"]),
    st.sets(st.integers(1, 300), max_size=4),
)
def test_what_is_promised_stays(
    saves: Any, keep: int | None, hours: float | None, best: int, mode: Any, pin: set[int]
) -> None:
    policy = Policy(keep, hours, best, mode)
    disk, managed = run(policy, saves, pin=pin)
    names = [str(minute) for minute, _ in saves]
    newest = names if keep is None else names[-keep:]
    measured = [metric for _, metric in saves if metric is not None and math.isfinite(metric)]
    assert set(newest) <= disk
    assert [c.name for c in policy.newest(managed.checkpoints)] == newest
    assert {str(minute) for minute in pin} & set(names) <= disk
    kept_metrics = [c.metric for c in policy.best(managed.checkpoints)]
    assert kept_metrics == sorted(measured, reverse=mode == "max")[:best]
    if hours is None and keep is not None:
        assert len(disk) <= keep + best + len(pin)


def test_what_goes_to_make_room() -> None:
    policy = Policy(5, best_to_keep=1)
    _, managed = run(policy, [(1, 0.1), (2, 0.5), (3, 0.6), (4, 0.7)], pin={2})
    order = []
    while (victim := policy.next_to_go(managed)) is not None:
        order.append(victim.name)
        managed = managed.given_up(victim.name)
    assert order == ["3"]
    assert policy.next_to_go(Managed()) is None


def test_copies_to_come() -> None:
    _, managed = run(Policy(5), every_20(60))
    assert Policy(5, best_to_keep=2).copies_to_come(managed) == 5
    assert Policy(2).copies_to_come(managed) == 1
    assert Policy(None).copies_to_come(managed) == 1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_to_keep": 0}, ValueError, "max_to_keep: expected at least 1, or None"),
        ({"max_to_keep": True}, ValueError, "max_to_keep"),
        ({"max_to_keep": 1.5}, TypeError, "float"),
        ({"max_to_keep": 1, "keep_checkpoint_every_n_hours": 0}, ValueError, "keep_checkpoint_every_n_hours"),
        ({"max_to_keep": 1, "keep_checkpoint_every_n_hours": math.nan}, ValueError, "keep_checkpoint_every_n_hours"),
        ({"max_to_keep": 1, "best_to_keep": -1}, ValueError, "best_to_keep"),
        ({"max_to_keep": 1, "best_mode": "most"}, ValueError, "best_mode"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Policy(**options)
