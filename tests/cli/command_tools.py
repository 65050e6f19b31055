"""Runs the command: within this process, or on a pseudo-terminal of fixed width."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
ROOT = GOLDEN.parent.parent
SECONDS = 60.0


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    fixed = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    return {**kept, **fixed, **more}


def on_terminal(arguments: Sequence[object], *, interrupt_at: bytes | None = None, **more: str) -> tuple[int, bytes]:
    """The exit code, and every byte that a terminal was sent; SIGINT once ``interrupt_at`` is among them."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gpusaver", *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**more), start_new_session=True
    ) as process:
        os.close(theirs)
        sent, deadline = b"", time.monotonic() + SECONDS
        try:
            while True:
                if not select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    process.kill()
                    pytest.fail(f"{command} has not ended after {SECONDS} seconds: {sent[-500:]!r}")
                try:
                    data = os.read(ours, 1 << 16)
                except OSError:  # the other end is closed
                    break
                if not data:
                    break
                sent += data
                if interrupt_at is not None and interrupt_at in sent:
                    process.send_signal(signal.SIGINT)
                    interrupt_at = None
            return process.wait(SECONDS), sent
        finally:
            os.close(ours)


_SEQUENCE = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])")


def screen_of(sent: bytes) -> str:
    """What is on the screen at the end.  Fails for anything that a terminal does beyond colours, and lines of a bar."""
    lines, row, column = [""], 0, 0
    text, at = sent.decode(), 0
    while at < len(text):
        sequence = _SEQUENCE.match(text, at)
        if sequence is not None:
            at = sequence.end()
            if sequence.groups() == ("2", "K"):
                lines[row] = ""
            elif sequence[2] == "A":
                row -= int(sequence[1])
            elif sequence[2] != "m" and sequence[1] != "?25":
                pytest.fail(f"a terminal was sent {sequence[0]!r}")
            continue
        character = text[at]
        at += 1
        if character == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif character == "\r":
            column = 0
        elif character.isprintable():
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
        else:
            pytest.fail(f"a terminal was sent {character!r} after {text[max(0, at - 40) : at]!r}")
    return "\n".join(line.rstrip() for line in lines).rstrip("\n") + "\n"
