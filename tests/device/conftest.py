"""What the tests of admission share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced, and in which order, is tested with the storage."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
