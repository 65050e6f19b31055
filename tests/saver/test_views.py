"""Restores into arrays that are views of others: found apart all at once, or compared one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver import restoring
from gpusaver.errors import InvalidArgumentError

COUNT = 100


def views(flat: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Of neighbouring parts, some without elements."""
    return {f"v{n:03d}": flat[10 * n : 10 * n + n % 10].reshape(-1, 1) for n in range(COUNT)}


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return gpusaver.Saver(views(np.arange(10.0 * COUNT))).save(tmp_path / "k")


def test_views_apart_take_the_way_of_plain_arrays(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = np.zeros(10 * COUNT)
    monkeypatch.setattr(restoring, "_plan", None)  # of what goes one by one
    gpusaver.Saver(views(flat) | {"v000": np.zeros((0, 1))}).restore(prefix)
    for n in range(COUNT):
        assert flat[10 * n : 10 * n + 10].tolist() == [10.0 * n + i if i < n % 10 else 0.0 for i in range(10)]


@pytest.mark.parametrize("shift", [0, 1])
def test_views_that_overlap_are_seen(prefix: str, shift: int) -> None:
    flat = np.zeros(10 * COUNT + 1)
    state = views(flat)
    state["v018"] = flat[190 + shift : 198 + shift].reshape(-1, 1)  # where v019 lies
    with pytest.raises(InvalidArgumentError, match=r"v01[89] and v01[89] overlap"):
        gpusaver.Saver(state).restore(prefix)
    assert not flat.any()


def test_a_view_of_an_array_that_is_there_too_is_seen(tmp_path: Path) -> None:
    whole = np.arange(200.0)
    others = {f"o{n:03d}": np.zeros(3) for n in range(COUNT)}
    prefix = gpusaver.Saver({"whole": whole, "part": whole[:5].copy(), **others}).save(tmp_path / "k")
    target = np.zeros(200)
    with pytest.raises(InvalidArgumentError, match="overlap"):
        gpusaver.Saver({"whole": target, "part": target[:5], **others}).restore(prefix)
    assert not target.any()


def test_views_with_gaps_come_back(tmp_path: Path) -> None:
    flat = np.arange(10.0 * COUNT)
    prefix = gpusaver.Saver({f"v{n:03d}": flat[n::COUNT] for n in range(COUNT)}).save(tmp_path / "k")
    target = np.zeros(10 * COUNT)
    gpusaver.Saver({f"v{n:03d}": target[n::COUNT] for n in range(COUNT)}).restore(prefix)
    assert target.tolist() == flat.tolist()
