"""Runs the scripts of examples/tf1 with one library or the other, and says what came of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpusaver

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tf1"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
IMPORT = "import gpusaver.compat.v1 as tf\n"
LIMIT_SECONDS = 300
#: Of these the values are drawn at random, or follow from such.
RANDOM = {"w", "layer/kernel"}


def run(name: str, directory: Path, library: str) -> str:
    """What the script prints; only its import line says which library."""
    source = (FOLDER / name).read_text()
    assert source.count(IMPORT) == 1
    script = directory.parent / f"{directory.name}_{name}"
    script.write_text(source.replace(IMPORT, f"import {library} as tf\n"))
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(directory)],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def masked(output: str) -> str:
    """Without the numbers in brackets of those lines that show random ones."""
    lines = re.sub(r"\n +\[", " [", output).splitlines()
    return "\n".join("before ..." if line.startswith("before") else line for line in lines)


def outcome(directory: Path) -> dict[str, Any]:
    """File names, the state file, and of each checkpoint names, dtypes, shapes, and the values that are not random."""
    state = (directory / "checkpoint").read_text().replace(str(directory), "DIRECTORY")
    checkpoints = {}
    for index in sorted(directory.glob("*.index")):
        prefix = str(index)[: -len(".index")]
        reader = gpusaver.load_checkpoint(prefix)
        dtypes = reader.get_variable_to_dtype_map()
        checkpoints[index.stem] = {
            key: (dtypes[key].name, shape, None if key in RANDOM else reader.get_tensor(key).tolist())
            for key, shape in reader.get_variable_to_shape_map().items()
        }
    return {"files": sorted(os.listdir(directory)), "state": state, "checkpoints": checkpoints}
