"""Pastes the Python blocks of a page into an interactive interpreter and compares what it prints with the page.

    python tools/paste.py docs/tutorial.md

The values of bare expressions, which an interpreter shows and a page need not, are left out.  An interpreter before
3.13 takes a pasted block line by line: a `for` or `try` ends with an empty line or is an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def problems(page: Path) -> str:
    blocks = BLOCK.findall(page.read_text())
    expected = "".join(printed for _, printed in blocks)
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(
            [sys.executable, "-q", "-i"],
            input="import sys; sys.displayhook = lambda value: None\n" + "\n".join(code + "\n" for code, _ in blocks),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=folder,
        )
    errors = [line.lstrip("> .") for line in ran.stderr.splitlines() if re.search(r"Error\b|Traceback", line)]
    if errors:
        return "\n".join(errors)
    return "" if ran.stdout == expected else f"printed\n{ran.stdout}where the page says\n{expected}"


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]).resolve())
    print(f"Python {sys.version.split()[0]}: {found or sys.argv[1] + ' pasted: everything is printed as it says'}")
    sys.exit(bool(found))
