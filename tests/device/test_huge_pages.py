"""What the system says of the pages that memory lies in."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from gpusaver.device import huge_pages
from gpusaver.device.host import address, allocate_pages
from gpusaver.device.huge_pages import is_in_huge_page

HUGE = 2 << 20
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_small_memory_is_in_no_huge_page() -> None:
    memory = np.ones(100, np.uint8)
    assert isinstance(is_in_huge_page(address(memory)), bool)
    untouched = allocate_pages(4096)
    assert not is_in_huge_page(address(untouched))
    assert not is_in_huge_page(0)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says it in its own way")
def test_what_asked_for_huge_pages_is() -> None:
    if not SYSTEM.exists() or "[never]" in SYSTEM.read_text():
        pytest.skip("this system has no huge pages")
    memory = allocate_pages(4 * HUGE)
    memory[:] = 1
    middle = address(memory) + 2 * HUGE
    with open("/proc/self/smaps", encoding="ascii") as lines:
        found = any(line.startswith("AnonHugePages:") and int(line.split()[1]) > 0 for line in lines)
    if not found or not is_in_huge_page(middle):
        pytest.skip("an older kernel, or no huge page was free")
    child = os.fork()
    if child == 0:  # a child's pages are its own: what it has written since lies elsewhere
        os._exit(0 if is_in_huge_page(middle) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(25, "Inappropriate ioctl for device")

    memory = allocate_pages(4 * HUGE)
    memory[:] = 1
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert not is_in_huge_page(address(memory))
    monkeypatch.setattr(huge_pages, "_page_map", lambda process: -1)
    assert not is_in_huge_page(address(memory))
