"""``doctor`` and ``bench``: what gpusaver has to work with here, and how fast that is."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata

import click
import numpy as np

import gpusaver
from gpusaver.cli import measuring, screen
from gpusaver.cli.listing import storage_of
from gpusaver.cli.screen import Column, json_option, print_json, print_table, rate, say
from gpusaver.device.inventory import devices, software, why_no_devices
from gpusaver.display import size
from gpusaver.errors import Error, InvalidArgumentError
from gpusaver.pipeline.commit import DIRECT_MIN_NBYTES
from gpusaver.storage.local import DIRECT_FILE_SYSTEMS, file_system

_VERDICTS = {"ok": "green", "note": "yellow", "problem": "bold red"}
_DOCTOR = [Column("what", "what"), Column("found", "found", folds=True), Column("verdict", "", style=_VERDICTS.get)]
_BENCH = [
    Column("what", "what"),
    Column("seconds", "seconds", lambda seconds: f"{seconds:.3f}", right=True),
    Column("rate", "rate", rate, right=True),
    Column("share", "of the ceiling", lambda share: f"{share:.0%}", right=True),
    Column("ceiling", "which is", folds=True),
]
#: As large as a file must be for O_DIRECT to be considered.
_PROBE_NBYTES = DIRECT_MIN_NBYTES


def size_in_bytes(ctx: click.Context, option: click.Parameter, value: str) -> int:
    """Callback of an option that is a size, as 256MB."""
    text = value.strip().lower().removesuffix("b")
    factor = {"k": 10**3, "m": 10**6, "g": 10**9}.get(text[-1:], 1)
    try:
        nbytes = int(float(text[:-1] if factor > 1 else text) * factor)
    except (ValueError, OverflowError):
        nbytes = 0
    if nbytes < 1:
        raise click.BadParameter(f"{value!r}: expected a size such as 256MB or 2GB")
    return nbytes


@click.command()
@click.argument("directory", required=False)
@json_option
def doctor(directory: str | None, as_json: bool) -> int:
    """Say what gpusaver finds here: CuPy, driver, devices, checksums; exit code 1 if something must be repaired.

    With DIRECTORY also how checkpoints will be written there, and why: 64 MB are written twice and removed.
    """
    rows = [*_software(), *_devices(), *_host()]
    if directory is not None:
        rows += _directory(directory)
    if as_json:
        print_json({"checks": rows})
    else:
        print_table(_DOCTOR, rows)
    return 1 if any(row["verdict"] == "problem" for row in rows) else 0


def _check(what: str, found: str, verdict: str = "ok") -> dict[str, str]:
    """``verdict``: "ok"; "note", something that might be better; "problem", something that must be repaired."""
    return {"what": what, "found": found, "verdict": verdict}


def _software() -> Iterator[dict[str, str]]:
    yield _check("gpusaver", f"{gpusaver.__version__}, Python {sys.version.split()[0]}, NumPy {np.__version__}")
    wheels = sorted({d.name for d in metadata.distributions() if d.name and d.name.lower().startswith("cupy")})
    if len(wheels) > 1:
        advice = "break each other: pip uninstall both, then install one"
        yield _check("CuPy wheels", f"{' and '.join(wheels)} {advice}", "problem")
    found = software()
    if found["cupy problem"]:
        reason = f"cannot be imported: {found['cupy problem']}" if wheels else "not installed"
        yield _check("CuPy", f"{reason}; arrays in host memory need none", "problem" if wheels else "note")
    else:
        built, runs = found["cuda"] or "unknown", found["driver"]
        yield _check("CuPy", f"{found['cupy']} for CUDA {built}" + (f"; the driver runs up to {runs}" if runs else ""))
        if found["nvrtc"]:
            yield _check("NVRTC", f"{found['nvrtc']}: small arrays are gathered, checksums computed, by kernels")
        else:
            yield _check("NVRTC", f"none: arrays are copied one by one ({found['nvrtc problem']})", "note")
    if found["nvml"]:
        yield _check("NVML", f"driver {found['nvml']}")
    else:
        yield _check("NVML", "none: the speed of links is not known", "note")


def _devices() -> Iterator[dict[str, str]]:
    found = devices()
    if not found:
        reason = why_no_devices().partition(":")[0] or "CUDA counts none"
        yield _check("devices", f"none ({reason})", "note")
    for info in found:
        link = f"PCIe {info.max_pcie_generation} x{info.pcie_width or info.max_pcie_width}, {rate(info.link_rate)}"
        narrow = 0 < info.pcie_width < info.max_pcie_width
        text = f"{info.model}, {size(info.free_nbytes)} of {size(info.memory_nbytes)} free, "
        text += link if info.link_rate else "link unknown"
        text += f"; {info.max_pcie_width} lanes are possible" if narrow else ""
        yield _check(info.name, text, "note" if narrow else "ok")


def _host() -> Iterator[dict[str, str]]:
    with contextlib.suppress(ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        unlimited = limit == resource.RLIM_INFINITY
        # CUDA pins by itself; the limit counts for mlock, and for some drivers in containers.
        yield _check("pinned memory", "no limit (ulimit -l)" if unlimited else f"{size(limit)} at most (ulimit -l)")
    version = metadata.version("fastcrc")
    yield _check("CRC-32C", f"fastcrc {version}, {rate(measuring.checksum())} in one thread")
    try:
        yield _check("Snappy", f"cramjam {metadata.version('cramjam')}: compressed blocks of others are read")
    except metadata.PackageNotFoundError:
        yield _check("Snappy", "none: indexes with compressed blocks need gpusaver[snappy]", "note")


def _directory(directory: str) -> Iterator[dict[str, str]]:
    storage = storage_of(directory)
    if not storage.is_directory(directory):
        yield _check("directory", f"{directory} does not exist", "problem")
        return
    kind = file_system(os.stat(directory).st_dev) or "unknown"
    free = storage.free_nbytes(directory)
    yield _check("directory", f"{directory}: {kind}, {size(free) if free is not None else 'unknown space'} free")
    try:
        lock = storage.lock(os.path.join(directory, "doctor.gpusaver-lock"), wait_seconds=0.0)
        lock.release()
        text = "work" if lock.is_exclusive else "do not work: one Saver a directory, please"
        yield _check("locks", text, "ok" if lock.is_exclusive else "note")
        if free is not None and free < 2 * _PROBE_NBYTES:
            yield _check("space", f"{size(free)} are left, too little for a measurement", "problem")
            return
        rates = {}
        for name, direct in (("page cache", False), ("O_DIRECT", True)):
            found = measuring.write(storage, directory, _PROBE_NBYTES, direct=direct)
            if found is None:
                yield _check(name, "the file system has none")
                continue
            rates[name] = found
            yield _check(name, f"{rate(found)} until durable, {size(_PROBE_NBYTES)}")
        yield _check("will be used", _why(storage.prefers_direct(directory), kind, "O_DIRECT" in rates))
    except Error as error:
        yield _check("directory", str(error), "problem")


def _why(is_direct: bool, kind: str, works: bool) -> str:
    if is_direct:
        return f"O_DIRECT for files from {size(DIRECT_MIN_NBYTES)} on: {kind} is where it was measured to be no slower"
    if not works:
        return "the page cache: O_DIRECT does not work here"
    reason = "probing it failed" if kind in DIRECT_FILE_SYSTEMS else f"on {kind} O_DIRECT was not found to be faster"
    return f"the page cache: {reason} (Saver(direct_io=True) overrides)"


@click.command()
@click.argument("directory", default=".")
@click.option("--size", "nbytes", callback=size_in_bytes, default="512MB", show_default=True, help="Of what is saved.")
@json_option
def bench(directory: str, nbytes: int, as_json: bool) -> None:
    """Measure a save and a restore in DIRECTORY, beside what this machine can do at most.

    Everything is written into a folder of its own, which is removed.
    """
    storage = storage_of(directory)
    free = storage.free_nbytes(directory)
    if free is not None and free < 3 * nbytes:
        raise InvalidArgumentError(f"{directory} has {size(free)} free, three times {size(nbytes)} are needed")
    folder = tempfile.mkdtemp(prefix="gpusaver-bench-", dir=directory)
    try:
        rows = measuring.bench(storage, folder, nbytes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print_json({"nbytes": nbytes, "rows": rows})
        return
    print_table(_BENCH, rows)
    if screen.console().is_terminal:
        say(f"{size(nbytes)} each; a restore reads from the page cache. Other load on the machine shows.", style="dim")


COMMANDS = [doctor, bench]
