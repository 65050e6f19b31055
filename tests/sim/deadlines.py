"""A pytest plugin for runs on mutants: a test that hangs, or leaves a thread that does, ends the run as a failure."""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import Any

SECONDS = 90.0
_status = 0


def pytest_runtest_logstart() -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # with status 1


def pytest_sessionfinish(exitstatus: Any) -> None:
    global _status
    _status = int(exitstatus)


def pytest_unconfigure() -> None:
    sys.stdout.flush()
    os._exit(_status)
