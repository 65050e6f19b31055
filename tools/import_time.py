"""Prints how long `import gpusaver` takes, and NumPy's part of it: the median of some fresh interpreters."""

from __future__ import annotations

import statistics
import subprocess
import sys

RUNS = 11


def milliseconds(module: str) -> float:
    """The time of the statement alone; the interpreter's own start is not in it."""
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(RUNS + 1)  # the first fills the page cache
    ]
    return 1000 * statistics.median(times[1:])


if __name__ == "__main__":
    print(f"import gpusaver: {milliseconds('gpusaver'):.0f} ms, of which NumPy {milliseconds('numpy'):.0f} ms")
