"""README.md and docs/: the code runs and prints what the page says, links lead somewhere, all names are there."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpusaver

ROOT = Path(__file__).resolve().parent.parent
#: A block of Python or bash, what it needs beyond `gpusaver[test]` (with the reason), and the output right below it:
#:     <!-- needs torch: PyTorch is no dependency -->
BLOCK = re.compile(
    r"(?:^<!-- needs (?P<need>\w+): [^\n]+ -->\n)?"
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```\n(?:```text\n(?P<printed>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
MARKDOWN = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
PAGES = [page for page in MARKDOWN if page.parent != ROOT / ".github" and BLOCK.search(page.read_text())]
#: What is run where: None is what needs nothing.
CASES = [
    pytest.param(page, need, id=f"{page.name}-{need}" if need else page.name)
    for page in PAGES
    for need in sorted({block["need"] for block in BLOCK.finditer(page.read_text())}, key=str)
    if page.name != "CONTRIBUTING.md"  # its block is what runs this test
]


#: The command of this checkout, wherever it is installed.
COMMAND = f'gpusaver() {{ PYTHONPATH="{ROOT}:$PYTHONPATH" {sys.executable} -m gpusaver "$@" >/dev/null; }}\n'


def skip_without(need: str) -> None:
    if need == "docker":
        if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
            pytest.skip("no Docker engine runs here; make docker-test does without")
        return
    module = pytest.importorskip(need)
    if need == "cupy" and not module.cuda.is_available():
        pytest.skip("no GPU")


def run_page(text: str, name: str, need: str | None = None) -> None:
    """Runs a page's blocks that need nothing or ``need`` one after the other; line numbers in errors are the page's."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in BLOCK.finditer(text):
        if block["need"] not in (None, need):
            continue
        line = text.count("\n", 0, block.start("code"))
        if block["language"] == "bash":
            code = COMMAND + block["code"]
            subprocess.run(["bash", "-e", "-c", code], cwd=ROOT if need == "docker" else None, check=True, timeout=600)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block["code"], name, "exec"), namespace)
        if block["printed"] is not None:
            assert printed.getvalue() == block["printed"], (
                f"{name}, line {line}: prints something else than the page says"
            )


@pytest.mark.parametrize(("page", "need"), CASES)
def test_the_code_on_a_page_runs(page: Path, need: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if need is not None:
        skip_without(need)
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(), page.name, need)


def test_the_pages_with_code_are_found() -> None:
    assert {"README.md", "tutorial.md", "guides.md", "file-format.md"} <= {page.name for page in PAGES}


def test_no_code_hides_in_a_block_that_is_not_run() -> None:
    """Blocks of "console" are run by tests/cli/test_command_page.py."""
    for page in MARKDOWN:
        fences = [fence.split()[0] for fence in re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)[::2]]
        known = {"python", "bash", "console", "text", "{eval-rst}", "{include}", "{toctree}"}
        assert set(fences) <= known, f"{page.name}: blocks of {set(fences) - known} would never be run"


def test_a_page_that_is_wrong_is_noticed() -> None:
    run_page("```python\nprint(1 + 1)\n```\n```text\n2\n```\n", "right")
    run_page("<!-- needs time: why -->\n```python\n1 / 0\n```\n", "elsewhere")
    with pytest.raises(ZeroDivisionError):
        run_page("<!-- needs time: why -->\n```python\n```\n```python\n1 / 0\n```\n<!-- needs time: -->\n", "between")
    with pytest.raises(AssertionError, match="line 1: prints something else"):
        run_page("```python\nprint(1 + 1)\n```\n```text\n3\n```\n", "wrong")
    with pytest.raises(ZeroDivisionError):
        run_page("```python\n1 / 0\n```\n", "broken")
    with pytest.raises(ZeroDivisionError):
        run_page("<!-- needs time: why -->\n```python\n1 / 0\n```\n", "here", "time")
    with pytest.raises(subprocess.CalledProcessError):
        run_page("```bash\nfalse\n```\n", "broken")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/tutorial.md"])
def test_a_page_can_be_pasted_into_an_interpreter(page: str) -> None:
    command = [sys.executable, ROOT / "tools" / "paste.py", ROOT / page]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_readme_begins_with_what_a_bare_machine_lacks() -> None:
    first = (ROOT / "README.md").read_text().splitlines()[0]
    assert all(word in first for word in ("make", "python3-venv", "3.11", "Debian", "Ubuntu", "macOS"))


def test_make_alone_lists_the_verbs_and_the_readme_has_them() -> None:
    if not shutil.which("make"):
        pytest.skip("there is no make")
    # Of a make that runs the tests it would say that it enters the directory.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60)
    listed = done.stdout
    verbs = {line.split()[0] for line in listed.splitlines()}
    assert {"demo", "test", "check", "docker-test"} <= verbs
    assert verbs <= {"help", *re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text())}


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in MARKDOWN:
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", page.read_text()):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^\.\. auto(?:class|function|exception):: (\S+)$", text, re.MULTILINE)
    listed = [name for name in listed if "." not in name]
    assert sorted(listed) == sorted(gpusaver.__all__)
    assert all(getattr(gpusaver, name).__doc__ for name in listed)


def test_what_the_source_guide_names_is_there() -> None:
    """Of each `name` (`file.py`), or (`file.py`, `name`)."""
    text = (ROOT / "docs" / "reading.md").read_text()
    pairs = re.findall(r"`([\w.]+)`\s+\(`([\w/]+)\.py`\)", text)
    pairs += [(name, file) for file, name in re.findall(r"\(`([\w/]+)\.py`,\s+`([\w.]+)`\)", text)]
    assert len(pairs) >= 6
    for name, file in pairs:
        found = importlib.import_module(f"gpusaver.{file.replace('/', '.')}")
        for part in name.split("."):
            found = getattr(found, part)
