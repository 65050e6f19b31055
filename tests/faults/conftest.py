"""What the fault tests share: a fast directory, and the number of cases, for docs/guarantees.md."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A directory in memory where there is one: the tests that use it make thousands of files."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="gpusaver-faults-", dir=parent)).resolve()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def count_cases(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Says how many cases the test went through; the summary adds them up by test."""
    return lambda number: record_property("cases", number)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    totals: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        if report.when == "call":
            cases = [number for name, number in report.user_properties if name == "cases"]
            totals[report.nodeid.split("[")[0]] += sum(cases) if cases else 1
    terminalreporter.section("cases")
    for test, number in sorted(totals.items()):
        terminalreporter.line(f"{number:>10,}  {test}")
