"""The other tests of this folder once more with the sanitizers watching: an access outside of the pieces' own 32-bit
words, or at an address that its size does not divide, ends the process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kernels.shim import HERE, ROOT, need_compiler

FAULTS = {
    "AddressSanitizer: heap-buffer-overflow": """
        array, image = Memory(63), Memory(128)
        tiles = cut_tiles(column([array.address]), column([0]), column([65]), column([image.address]))
        launch("gather", 1, (256,), tiles.ctypes.data, image.address)
    """,
    "AddressSanitizer: use-after-poison": """
        array, image = Memory(64, 12), Memory(128)
        tiles = cut_tiles(column([array.address - 5]), column([0]), column([20]), column([image.address]))
        launch("scatter", 1, (256,), tiles.ctypes.data, image.address)
    """,
    "misaligned address": """
        array, flat = Memory(16, 2), Memory(16)
        launch("gather_strided", 1, (256,), array.address, flat.address, 0, 4, 4, 1, 4, *[1] * 7, 4, *[0] * 7)
    """,
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python with the sanitizers' library loaded before any other, as it must be."""
    find = [need_compiler(), "-print-file-name=libasan.so"]
    library = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.fail("g++ is here without libasan, which usually comes with it (Debian, Ubuntu: libasan8 or newer)")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "GPUSAVER_SANITIZE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_no_access_outside_or_misaligned():
    files = [str(HERE / name) for name in ("test_copy.py", "test_crc32c.py")]
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault):
    imports = "from gpusaver.device.launch_plan import column, cut_tiles\nfrom kernels.shim import Memory, launch\n"
    result = run("-c", imports + textwrap.dedent(FAULTS[fault]))
    assert result.returncode != 0
    assert fault in result.stderr
