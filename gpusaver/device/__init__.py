"""Where arrays live and how their bytes are reached: the host, or a CUDA device through CuPy."""

from gpusaver.device.admission import (
    HOST,
    Admitted,
    admit,
    array_types,
    cuda_module,
    plain_types,
    runtimes_of,
    specs_of,
)
from gpusaver.device.base import (
    Checking,
    Event,
    HostBuffer,
    Runtime,
    Transfer,
    Transfers,
    are_contiguous,
    are_different,
)

__all__ = [
    "HOST",
    "Admitted",
    "Checking",
    "Event",
    "HostBuffer",
    "Runtime",
    "Transfer",
    "Transfers",
    "admit",
    "are_contiguous",
    "are_different",
    "array_types",
    "cuda_module",
    "plain_types",
    "runtimes_of",
    "specs_of",
]
