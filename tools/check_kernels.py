"""Compiles the CUDA kernels with every CUDA compiler that is here, as users' machines will, and runs nothing.

    python tools/check_kernels.py

* nvcc, if it is in the PATH: for the architectures below, warnings being errors;
* NVRTC, of every CUDA major that is installed: with the options that a RawModule of CuPy passes. `make install` brings
  that of CUDA 13 on Linux; `pip install nvidia-cuda-nvrtc-cu12` adds that of 12. Neither needs a GPU or a driver.

Prints a line for each, also for what it skips. Exit status 1 if a kernel does not compile.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpusaver.device.launch_plan import COMPILE_OPTIONS  # noqa: E402

KERNELS = sorted([*(ROOT / "gpusaver" / "device" / "kernels").glob("*.cu"), *(ROOT / "benchmarks").glob("*.cu")])
ARCHITECTURES = ("sm_80", "sm_90")
CUPYS_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")


def check_nvcc() -> list[str]:
    """What went wrong."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("kernels: not compiled with nvcc, which is not in the PATH")
        return []
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        for kernel in KERNELS:
            for architecture in ARCHITECTURES:
                target = ["-o", f"{folder}/kernel.cubin", "--cubin", f"-arch={architecture}"]
                command = [nvcc, *COMPILE_OPTIONS, "-Werror", "all-warnings", *target, str(kernel)]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    failures.append(f"nvcc, {architecture}, {kernel.name}:\n{result.stdout}{result.stderr}")
    report(nvcc, len(failures))
    return failures


def find_nvrtc() -> list[Path | str]:
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    found: list[Path | str] = sorted(packages.glob("*/lib/libnvrtc.so.*"))
    system = ctypes.util.find_library("nvrtc")
    return found or ([system] if system else [])


def check_nvrtc() -> list[str]:
    libraries = find_nvrtc()
    if not libraries:
        print("kernels: not compiled with NVRTC, which is not installed (pip install nvidia-cuda-nvrtc)")
    failures: list[str] = []
    for library in libraries:
        nvrtc, before = Nvrtc(library), len(failures)
        for kernel in KERNELS:
            for architecture in ARCHITECTURES:
                log = nvrtc.compile(kernel, (*COMPILE_OPTIONS, *CUPYS_OPTIONS, f"-arch={architecture}"))
                if log is not None:
                    failures.append(f"NVRTC {nvrtc.version}, {architecture}, {kernel.name}:\n{log}")
        report(f"NVRTC {nvrtc.version}", len(failures) - before)
    return failures


def report(compiler: str, failed: int) -> None:
    total = len(KERNELS) * len(ARCHITECTURES)
    architectures = " and ".join(ARCHITECTURES)
    print(f"kernels: {total - failed} of {total} compiled with {compiler} ({len(KERNELS)} files for {architectures})")


class Nvrtc:
    def __init__(self, path: Path | str) -> None:
        if isinstance(path, Path):  # which NVRTC itself looks for only where the system does
            for builtins in path.parent.glob(f"libnvrtc-builtins.so.{path.suffix[1:]}.*"):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, kernel: Path, options: tuple[str, ...]) -> str | None:
        """What the compiler says if it fails, else None."""
        program = ctypes.c_void_p()
        source, name = kernel.read_bytes(), kernel.name.encode()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source, name, 0, None, None)
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = self._library.nvrtcCompileProgram(program, len(options), arguments)
        size = ctypes.c_size_t()
        self._call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self._call("nvrtcGetProgramLog", program, log)
        self._call("nvrtcDestroyProgram", ctypes.byref(program))
        return log.value.decode() if status else None

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with status {status}")


def main() -> int:
    failures = check_nvcc() + check_nvrtc()
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
