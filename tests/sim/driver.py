"""The one function of the driver's library that gpusaver calls past CuPy."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any
from unittest import mock

from sim.engine import Engine


class Driver:
    """``libcuda.so.1``, as ctypes loads it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def cuThreadExchangeStreamCaptureMode(self, reference: Any) -> int:
        mode = reference._obj
        mode.value = self._engine.exchange_capture_mode(mode.value)
        return 0


@contextlib.contextmanager
def driver_library(engine: Engine) -> Iterator[None]:
    """Makes ctypes find the driver's library while the engine has one (``engine.has_driver_library``)."""
    load = ctypes.PyDLL

    def find(name: Any, *arguments: Any, **options: Any) -> Any:
        if name != "libcuda.so.1":
            return load(name, *arguments, **options)
        if not engine.has_driver_library:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return Driver(engine)

    with mock.patch.object(ctypes, "PyDLL", find):
        yield
