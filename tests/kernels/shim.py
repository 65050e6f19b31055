"""Builds the kernels for the CPU (shim.cpp says how they run there) and calls them.

``GPUSAVER_SANITIZE=1`` builds them with AddressSanitizer and UndefinedBehaviorSanitizer, which test_sanitized.py sets.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "gpusaver" / "device" / "kernels"
SANITIZED = os.environ.get("GPUSAVER_SANITIZE") == "1"
if SANITIZED:  # what they see does not take as many examples, and each takes four times as long
    settings.register_profile("sanitized", settings(max_examples=25))
    settings.load_profile("sanitized")

_OPTIONS = "-std=c++17 -shared -fPIC -fno-strict-aliasing -Wall -Wextra -Werror -Wno-unknown-pragmas".split()
_SANITIZERS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined".split()
_STRIDED = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_uint32] * 2 + [ctypes.c_int64] * 16
#: The C types of each kernel's arguments.
KERNELS: dict[str, list[Any]] = {
    "gather": [ctypes.c_void_p] * 2,
    "scatter": [ctypes.c_void_p] * 2,
    "gather_strided": _STRIDED,
    "scatter_strided": _STRIDED,
    "crc32c": [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p],
}


def compiler() -> str | None:
    return shutil.which("g++")


def need_compiler() -> str:
    """Skips the test where there is no g++, except on CI, which has one."""
    found = compiler()
    if found is None:
        message = "the kernels are not run: there is no g++ to compile them for the CPU (Debian: apt install g++)"
        if "CI" in os.environ:
            pytest.fail(message)
        pytest.skip(message)
    return found


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled at most once per state of the sources, into ``build/kernels``."""
    command = [need_compiler(), *_OPTIONS, *(_SANITIZERS if SANITIZED else ["-O2"]), f"-I{HERE}", f"-I{SOURCES}"]
    files = sorted([*SOURCES.glob("*.cu"), HERE / "shim.h", HERE / "shim.cpp"])
    digest = hashlib.sha256("\n".join(command).encode())
    for file in files:
        digest.update(file.read_bytes())
    target = ROOT / "build" / "kernels" / f"{digest.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(unfinished), str(HERE / "shim.cpp")], check=True)
        unfinished.replace(target)
    loaded = ctypes.CDLL(str(target))
    for name, types in KERNELS.items():
        getattr(loaded, f"launch_{name}").argtypes = [ctypes.c_void_p, *types]
    loaded.allocate.argtypes, loaded.allocate.restype = [ctypes.c_size_t] * 2, ctypes.c_void_p
    loaded.release_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return loaded


def launch(name: str, grid: int, block: tuple[int, ...], *arguments: Any) -> None:
    """Runs a kernel to its end.  Pointers are addresses on the host."""
    shape = np.array([grid, 1, 1, *block, 1, 1][:6], np.uint32)
    getattr(library(), f"launch_{name}")(shape.ctypes.data, *arguments)


class Memory:
    """``nbytes`` at an address that is ``misalignment`` (0 to 15) modulo 16; see ``allocate`` in shim.cpp."""

    def __init__(self, nbytes: int, misalignment: int = 0) -> None:
        self._misalignment = misalignment
        self.address: int = library().allocate(misalignment, nbytes)
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))

    def __del__(self) -> None:
        library().release_memory(self.address, self._misalignment)
