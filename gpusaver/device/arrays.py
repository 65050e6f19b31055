"""The array library that fits the machine: CuPy where it finds a GPU, NumPy otherwise."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np


def array_module(device: str | None = None) -> Any:
    """The module ``cupy`` or ``numpy``.

    ``device``: None takes CuPy where it is installed and finds a GPU, "cpu" NumPy, "cuda" CuPy, with
    FailedPreconditionError where that cannot be.
    """
    if device == "cpu" or (device is None and importlib.util.find_spec("cupy") is None):
        return np
    from gpusaver.device import cuda

    if device is None and not cuda.is_available():
        return np
    return cuda.array_module()
