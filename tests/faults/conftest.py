"""What the fault tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A directory in memory where there is one: the tests that use it make thousands of files."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="gpusaver-faults-", dir=parent)).resolve()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)
