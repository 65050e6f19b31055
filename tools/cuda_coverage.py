"""How many branches of ``gpusaver/device/cuda*.py`` the tests run under the simulated CuPy.

    python tools/cuda_coverage.py [PYTEST OPTIONS]

Prints a line for each file and the branches that were not taken.  Exit status 1 if a test fails or if fewer than
``LEAST`` per cent of the branches were taken.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = "admission capture cuda_kernels cuda_runtime device_failures references saver".split()
TESTS = [f"tests/test_{name}_sim.py" for name in NAMES] + ["tests/device/test_inventory.py"]
LEAST = 95.0


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        data = f"--data-file={folder}/data"
        measured = ["run", data, "--branch", f"--include={ROOT}/gpusaver/device/cuda*.py", "-m", "pytest", "-q"]
        tests = subprocess.run([sys.executable, "-m", "coverage", *measured, *sys.argv[1:], *TESTS], cwd=ROOT)
        if tests.returncode:
            return 1
        report = Path(folder, "report.json")
        subprocess.run([sys.executable, "-m", "coverage", "json", data, "-q", "-o", str(report)], cwd=ROOT, check=True)
        found = json.loads(report.read_text("utf-8"))
    for name, file in found["files"].items():
        summary = file["summary"]
        print(f"{name}: {summary['covered_branches']} of {summary['num_branches']} branches", end="")
        missing = ", ".join(f"{start}->{end}" for start, end in file["missing_branches"])
        print(f"; not taken: {missing}" if missing else "")
    totals = found["totals"]
    percent = 100 * totals["covered_branches"] / totals["num_branches"]
    print(f"device/cuda*.py under simulation: {percent:.1f} % of branches (at least {LEAST:g} wanted)")
    return 0 if percent >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
