"""What the tests of the Saver share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gated_storage import GatedStorage

import gpusaver


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced, and in which order, is tested with the storage."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def storage() -> Iterator[GatedStorage]:
    storage = GatedStorage()
    yield storage
    storage.let_go()


@pytest.fixture
def state() -> dict[str, Any]:
    return {"w": np.arange(200_000.0), "step": 1}


@pytest.fixture
def saver(storage: GatedStorage, state: dict[str, Any]) -> Iterator[gpusaver.Saver]:
    saver = gpusaver.Saver(state, storage=storage)
    yield saver
    storage.let_go()
    saver.close()
