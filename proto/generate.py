"""Generates the Python modules of the messages in `proto/`, and checks that the committed ones are up to date.

    python proto/generate.py            writes gpusaver/protos/*_pb2.py, *_pb2.pyi and proto/generated.sha256
    python proto/generate.py --check    writes nothing; exit status 1 when the committed files are stale

The generator is protoc 25.1 of `grpcio-tools==1.62.3`: what newer ones write refuses to run on older protobuf runtimes.
It has no wheel for Python 3.13 and later, so there the check compares hashes only. The hash file has two lines, one
over the sources and one over the generated files; a source edited without generating anew, or a generated file edited
by hand, changes one of them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from importlib import metadata, resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = "grpcio-tools"
GENERATOR_VERSION = "1.62.3"
PACKAGE = Path("gpusaver", "protos")  # under proto/ for the sources, under the root for the generated modules
HASHES = Path("proto", "generated.sha256")


def sources(root: Path) -> list[Path]:
    return sorted((root / "proto" / PACKAGE).glob("*.proto"))


def generated(root: Path) -> list[Path]:
    return sorted(path for pattern in ("*_pb2.py", "*_pb2.pyi") for path in (root / PACKAGE).glob(pattern))


def digest(paths: list[Path]) -> str:
    """SHA-256 over the names and contents of `paths`, in the order given."""
    whole = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        whole.update(f"{path.name}\0{len(content)}\0".encode())
        whole.update(content)
    return whole.hexdigest()


def hash_lines(root: Path) -> str:
    return f"{digest(sources(root))}  sources\n{digest(generated(root))}  generated\n"


def compile_into(target: Path, root: Path) -> None:
    """Runs the generator. Sources are named relative to proto/, so they register as gpusaver/protos/<name>.proto."""
    include = resources.files("grpc_tools") / "_proto"  # google/protobuf/*.proto
    names = [path.relative_to(root / "proto").as_posix() for path in sources(root)]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{root / 'proto'}", f"-I{include}"]
    subprocess.run([*command, f"--python_out={target}", f"--pyi_out={target}", *names], check=True)


def generator_version() -> str | None:
    """The installed version of the generator, None without one."""
    if importlib.util.find_spec("grpc_tools") is None:
        return None
    return metadata.version(GENERATOR)


def check(root: Path, version: str | None) -> tuple[bool, str]:
    """Whether the generated files of `root` belong to its sources, and a sentence that says so.

    `version` is the installed generator's version. Without the pinned one, only hashes are compared.
    """
    remedy = f"run `make protos` with {GENERATOR}=={GENERATOR_VERSION} and commit the result"
    committed = root / HASHES
    if not committed.is_file() or committed.read_text("ascii") != hash_lines(root):
        return False, f"Stale: sources or generated modules are not those that {HASHES} was made from; {remedy}."
    if version != GENERATOR_VERSION:
        return True, f"Up to date by hash, as {GENERATOR}=={GENERATOR_VERSION} is not installed here."
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        compile_into(fresh, root)
        expected = {path.name: path.read_bytes() for path in generated(fresh)}
    found = {path.name: path.read_bytes() for path in generated(root)}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        return False, f"Stale: {', '.join(differing)} differ from what the generator writes; {remedy}."
    return True, f"Up to date: the {len(found)} generated files equal what the generator writes."


def generate(root: Path) -> str:
    """Writes the modules and the hash file anew; modules whose source is gone are removed."""
    for path in generated(root):
        path.unlink()
    compile_into(root, root)
    (root / HASHES).write_text(hash_lines(root), "ascii")
    return f"Generated {len(generated(root))} files in {PACKAGE} from {len(sources(root))} sources."


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate the Python modules of the messages in proto/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when stale")
    version = generator_version()
    if parser.parse_args().check:
        fresh, sentence = check(ROOT, version)
        print(sentence)
        return 0 if fresh else 1
    if version != GENERATOR_VERSION:
        print(f"Generating needs {GENERATOR}=={GENERATOR_VERSION}, found {version}; use Python 3.12 or older.")
        return 1
    print(generate(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
