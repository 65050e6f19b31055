"""The simulated suite fails as soon as one wait, order or reference of the CUDA path is missing (sim/mutations.py).

Three are tried every day, all of them by `make nightly`, or `pytest tests/test_mutations.py -m mutations`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kernels.shim import need_compiler
from sim.mutations import EVERYDAY, MUTATIONS, Mutation

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "gpusaver"
#: Those that notice most come first.
SUITE = [
    TESTS / f"test_{name}_sim.py"
    for name in "references cuda_runtime capture device_failures saver admission cuda_kernels gpu_cases".split()
]
#: Far more than the suite takes.
SECONDS = 1800


def suite_fails(directory: Path, mutation: Mutation | None) -> bool:
    """Runs the suite, up to its first failure, on a copy of the package."""
    suite = SUITE
    shutil.copytree(PACKAGE, directory / "gpusaver", ignore=shutil.ignore_patterns("__pycache__"))
    if mutation is not None:
        path = directory / "gpusaver" / mutation.file
        source = path.read_text("utf-8")
        assert source.count(mutation.old) == 1, f"{mutation.file} has changed: bring {mutation.name} up to date"
        path.write_text(source.replace(mutation.old, mutation.new), "utf-8")
        suite = sorted(SUITE, key=lambda file: file.stem != f"test_{EVERYDAY.get(mutation.name)}_sim")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "sim.deadlines", f"--basetemp={directory / 'tmp'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *map(str, suite)],
        cwd=directory,  # where Python looks for the package first
        env=environment | {"PYTHONPATH": f"{directory}{os.pathsep}{TESTS}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    print(output[-2000:])
    assert process.returncode in (0, 1), output
    return process.returncode == 1


def marked(mutation: Mutation) -> object:
    marks = () if mutation.name in EVERYDAY else pytest.mark.mutations
    return pytest.param(mutation, id=mutation.name, marks=marks)


@pytest.mark.parametrize("mutation", [marked(mutation) for mutation in MUTATIONS])
def test_a_mutant_is_noticed(tmp_path: Path, mutation: Mutation) -> None:
    need_compiler()
    assert suite_fails(tmp_path, mutation), f"nothing fails without {mutation.name}: {mutation.old!r}"


@pytest.mark.mutations
def test_the_suite_itself_passes(tmp_path: Path) -> None:
    need_compiler()
    assert not suite_fails(tmp_path, None)
