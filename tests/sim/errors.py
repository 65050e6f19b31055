"""What the simulated driver answers, and what it refuses outright."""

from __future__ import annotations

_TEXTS = {
    1: ("InvalidValue", "invalid argument"),
    2: ("MemoryAllocation", "out of memory"),
    9: ("InvalidConfiguration", "invalid configuration argument"),
    12: ("InvalidPitchValue", "invalid pitch argument"),
    35: ("InsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"),
    100: ("NoDevice", "no CUDA-capable device is detected"),
    101: ("InvalidDevice", "invalid device ordinal"),
    400: ("InvalidResourceHandle", "invalid resource handle"),
    600: ("NotReady", "device not ready"),
    700: ("IllegalAddress", "an illegal memory access was encountered"),
    712: ("HostMemoryAlreadyRegistered", "part or all of the requested memory range is already mapped"),
    713: ("HostMemoryNotRegistered", "pointer does not correspond to a registered memory region"),
    719: ("LaunchFailure", "unspecified launch failure"),
    900: ("StreamCaptureUnsupported", "operation not permitted when stream is capturing"),
    901: ("StreamCaptureInvalidated", "operation failed due to a previous error during capture"),
    902: ("StreamCaptureMerge", "operation would result in a merge of separate capture sequences"),
    904: ("StreamCaptureUnjoined", "capturing stream has unjoined work"),
    905: ("StreamCaptureIsolation", "dependency created on uncaptured work in another stream"),
    906: ("StreamCaptureImplicit", "operation would make the legacy stream depend on a capturing blocking stream"),
    907: ("CapturedEvent", "operation not permitted on an event last recorded in a capturing stream"),
}


class CUDARuntimeError(RuntimeError):
    """``status`` is CUDA's number for it."""

    def __init__(self, status: int) -> None:
        self.status = status
        name, text = _TEXTS.get(status, ("Unknown", "unrecognized error code"))
        super().__init__(f"cudaError{name}: {text}")


class OutOfMemoryError(MemoryError):
    """What CuPy's memory pools make of a failed allocation."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        text = f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes"
        super().__init__(f"{text}, limit set to: {limit:,} bytes)." if limit else f"{text}).")


class SimulationError(AssertionError):
    """Something that a real driver may let pass, or crash on, and that the code under test must never do."""
