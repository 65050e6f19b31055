"""The code in README.md and docs/ runs, and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: A block of Python, and the block of output right below it if there is one.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(page.read_text())]


def run_page(text: str, name: str) -> None:
    """Runs the Python blocks of a page one after the other, in one namespace; line numbers in errors are the page's."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block[1], name, "exec"), namespace)
        if block[2] is not None:
            assert printed.getvalue() == block[2], f"{name}, line {line}: prints something else than the page says"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(), page.name)


def test_the_pages_with_code_are_found() -> None:
    assert {"README.md", "tutorial.md"} <= {page.name for page in PAGES}


def test_a_page_that_is_wrong_is_noticed() -> None:
    run_page("```python\nprint(1 + 1)\n```\n```text\n2\n```\n", "right")
    with pytest.raises(AssertionError, match="line 1: prints something else"):
        run_page("```python\nprint(1 + 1)\n```\n```text\n3\n```\n", "wrong")
    with pytest.raises(ZeroDivisionError):
        run_page("```python\n1 / 0\n```\n", "broken")


def test_the_readme_begins_with_what_a_bare_machine_lacks() -> None:
    first = (ROOT / "README.md").read_text().splitlines()[0]
    assert all(word in first for word in ("make", "python3-venv", "3.11", "Debian", "Ubuntu", "macOS"))


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
