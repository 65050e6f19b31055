"""Checks what is in the wheel and the source distribution of a folder: `python tools/check_package.py dist`."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: What has been forgotten in packages before: files that no Python file imports.
NEEDED = {"gpusaver/py.typed", "gpusaver/protos/tensor_bundle_pb2.pyi", "gpusaver/device/kernels/copy.cu"}
#: What a source distribution is for: building, testing and reading, without a clone.
SOURCES = set("LICENSE README.md Makefile pyproject.toml docs/conf.py proto/generate.py tests/conftest.py".split())


def names_here() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gpusaver").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def wheel_problems(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        metadata = BytesParser().parsebytes(wheel.read(f"{info}/METADATA"))
    package = {name for name in names if not name.startswith(f"{info}/")}
    problems = [f"lacks {name}" for name in sorted((names_here() | NEEDED) - package)]
    problems += [f"has {name}" for name in sorted(package - names_here())]
    if metadata["License-Expression"] != "Apache-2.0" or f"{info}/licenses/LICENSE" not in names:
        problems.append("does not carry the licence")
    return [f"{path.name} {problem}" for problem in problems]


def sdist_problems(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    golden = {str(file.relative_to(ROOT)) for file in (ROOT / "tests/golden").rglob("*") if file.is_file()}
    return [f"{path.name} lacks {name}" for name in sorted((SOURCES | names_here() | golden) - names)]


def main(folder: Path) -> int:
    wheels, sdists = list(folder.glob("*.whl")), list(folder.glob("*.tar.gz"))
    problems = [problem for path in wheels for problem in wheel_problems(path)]
    problems += [problem for path in sdists for problem in sdist_problems(path)]
    if len(wheels) != 1 or len(sdists) != 1:
        problems.append(f"{folder} should hold one wheel and one source distribution; make clean removes old ones")
    print(*problems or [f"{wheels[0].name}, {sdists[0].name}: complete, and nothing else"], sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
