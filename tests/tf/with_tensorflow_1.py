"""The tests of `.meta` files with TensorFlow 1.15.5, which needs a Python of its own:

    python3.7 -m venv /tmp/tf1 && /tmp/tf1/bin/pip install tensorflow==1.15.5 'protobuf<3.21' 'numpy<1.19'
    python tests/tf/with_tensorflow_1.py /tmp/tf1/bin/python > tests/tf/with_tensorflow_1.log

Ends with status 0 and the line "all equal" if every checkpoint came back bit for bit, both ways.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import meta_graph_cases as ours

import gpusaver

SIDE = Path(__file__).with_name("meta_graph_side.py")


def tensorflow_1(python: str, *arguments: str) -> None:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": ""}
    command = [python, "-W", "ignore", str(SIDE), *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    print(ran.stdout, end="")


def main(python: str) -> None:
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"gpusaver {gpusaver.__version__} on Python {sys.version.split()[0]}, TensorFlow on {version}")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for name in ("ours", "again", "theirs"):
            (directory / name).mkdir()
        for case in ours.CASES:
            ours.write(case, directory / "ours" / case)
        tensorflow_1(python, "take", folder)
        for case in ours.CASES:
            again = directory / "again" / case
            ours.check(case, directory / "ours" / case, again, json.loads(again.with_suffix(".json").read_text()))
            print(f"{case}: equal after TensorFlow imported, restored and saved it")
        tensorflow_1(python, "write", folder)
        for meta_graph in sorted((directory / "theirs").glob("*.meta")):
            ours.check_theirs(meta_graph.with_suffix(""))
            print(f"{meta_graph.stem}: equal after gpusaver imported and restored it")
    print("all equal")


if __name__ == "__main__":
    main(sys.argv[1])
