"""docs/command.md: its commands run, print what stands below them, and none is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from command_tools import ROOT, environment

from gpusaver.cli.app import command

PAGE = (ROOT / "docs" / "command.md").read_text()
#: Not those of Python that need something: tests/test_readme.py runs them.
BLOCK = re.compile(r"(?<!-->\n)^```(python|console)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "gpusaver"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gpusaver "$@"\n')
    shim.chmod(0o755)
    env = environment(PATH=f"{shim.parent}{os.pathsep}{os.environ['PATH']}")
    ran = set()
    for kind, text in BLOCK.findall(PAGE):
        if kind == "python":
            exec(text, {})
            continue
        for line, expected in re.findall(r"^\$ (.*)\n((?:[^$\n].*\n)*)", text, re.MULTILINE):
            done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60)
            code = re.search(r"# exit code (\d)", line)
            assert done.returncode == int(code[1] if code else 0), (line, done.stderr)
            assert done.stderr == "", line
            if expected:
                assert done.stdout == expected, line
            ran.add(line.split()[1])
    assert set(command.commands) - {"rewrite"} <= ran


def test_the_page_names_every_command_and_option() -> None:
    for name, found in command.commands.items():
        assert f"`{name}" in PAGE
        for parameter in found.params:
            if isinstance(parameter, click.Option):
                assert max(parameter.opts, key=len) in PAGE, f"{name} {parameter.opts}"


def test_the_pictures_of_the_page_are_there() -> None:
    pictures = re.findall(r"\]\((pictures/[^)]+)\)", PAGE)
    assert len(pictures) == 4
    for name in pictures:
        content = (ROOT / "docs" / name).read_bytes()
        assert content.startswith((b"<svg", b"\x89PNG"))
        assert b"@font-face" not in content
