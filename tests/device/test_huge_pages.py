"""What the system says of the pages that memory lies in."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import pytest

from gpusaver.device import huge_pages
from gpusaver.device.host import address, allocate_pages
from gpusaver.device.huge_pages import huge_region

HUGE = 2 << 20
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_small_memory_is_in_no_huge_page() -> None:
    untouched = address(allocate_pages(4096))
    for begin, end in ((untouched, untouched + 4096), (untouched, untouched), (0, 4096)):
        assert huge_region(begin, end) == (begin, begin)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says it in its own way")
def test_what_asked_for_huge_pages_is() -> None:
    """All of it, a part of it, and in a child that has its own."""
    if not SYSTEM.exists() or "[never]" in SYSTEM.read_text():
        pytest.skip("this system has no huge pages")
    memory = allocate_pages(8 * HUGE)
    memory[:] = 1
    begin, end = address(memory), address(memory) + memory.nbytes
    first, last = huge_region(begin, end)
    with open("/proc/self/smaps", encoding="ascii") as lines:
        found = any(line.startswith("AnonHugePages:") and int(line.split()[1]) > 0 for line in lines)
    if not found or first == last:
        pytest.skip("an older kernel, or no huge page was free")
    assert begin <= first < last <= end
    assert huge_region(first + 4097, last - 5000) == (first + 4097, last - 5000)
    child = os.fork()
    if child == 0:  # a child's pages are its own: what it has written since lies elsewhere
        os._exit(0 if huge_region(first, last) == (first, last) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_longest_region_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_: int, __: int, argument: bytearray) -> int:
        assert huge_pages._found.address == int.from_bytes(argument[40:48], "little")
        huge_pages._found.regions[:3, :2] = (0x200000, 0x400000), (0x800000, 0xE00000), (0x1000000, 0x1200000)
        return 3

    monkeypatch.setattr(fcntl, "ioctl", answer)
    monkeypatch.setattr(huge_pages, "_page_map", lambda process: 0)
    assert huge_region(0x200010, 0x1200000) == (0x800000, 0xE00000)
    assert huge_region(0x900010, 0xD00020) == (0x900010, 0xD00020)


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(25, "Inappropriate ioctl for device")

    memory = allocate_pages(4 * HUGE)
    memory[:] = 1
    begin = address(memory)
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert huge_region(begin, begin + HUGE) == (begin, begin)
    monkeypatch.setattr(huge_pages, "_page_map", lambda process: -1)
    assert huge_region(begin, begin + HUGE) == (begin, begin)
