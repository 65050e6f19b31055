"""What a measurement was made on, and of which commit."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def describe_machine(directory: str) -> dict[str, Any]:
    """``directory``: where the files go, for the file system's type."""
    return {
        "cpu": _first_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory": _first_field("/proc/meminfo", "MemTotal"),
        "system": platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "file_system": _file_system(directory),
        "load_before": list(os.getloadavg()),
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_kind() -> str:
    """For file names: "linux-x86_64-2core"."""
    return f"{platform.system().lower()}-{platform.machine()}-{cores()}core"


def commit() -> str:
    """The commit's first 12 digits, with "+" if tracked files differ from it; "" outside a repository.

    GPUSAVER_COMMIT says it where the history has not come along.
    """
    if told := os.environ.get("GPUSAVER_COMMIT"):
        return told
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def _first_field(path: str, key: str) -> str:
    try:
        with open(path, encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
    except OSError:
        return ""


def _file_system(directory: str) -> str:
    """Its type as Linux names it; "" elsewhere."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            rows = [line.split() for line in lines]
    except OSError:
        return ""
    return next((fields[fields.index("-") + 1] for fields in rows if fields[2] == wanted), "")
