"""Whose work comes after whose: the caller's streams, ours, and CUDA graphs that must not be disturbed.

Streams are handles here, as CUDA's runtime takes them: a default stream's handle means that of the current device, and
in a build with per-thread default streams that of the calling thread, so it is never kept or passed to another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cupy

from gpusaver.errors import FailedPreconditionError

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
#: Of the legacy default stream while a stream that synchronises with it is being captured.
_CAPTURE_IMPLICIT = 906


@contextlib.contextmanager
def on_device(device: int) -> Iterator[None]:
    """Makes the device current, and this thread harmless to captures that are under way in others.

    While any thread captures in CUDA's global mode, a cudaMalloc of ours would fail and end that capture.
    """
    exchange = _exchange_capture_mode()
    mode = ctypes.c_int(_RELAXED)
    is_relaxed = exchange is not None and exchange(ctypes.byref(mode)) == 0
    try:
        with cupy.cuda.Device(device):
            yield
    finally:
        if exchange is not None and is_relaxed:
            exchange(ctypes.byref(mode))


@functools.cache
def _exchange_capture_mode() -> Callable[[Any], int] | None:
    """cuThreadExchangeStreamCaptureMode, which CuPy does not bind; None where the driver's library is not found."""
    try:
        library = ctypes.PyDLL("libcuda.so.1")
    except OSError:
        return None
    exchange: Callable[[Any], int] = library.cuThreadExchangeStreamCaptureMode
    return exchange


def callers_streams(device: int) -> list[int]:
    """The calling thread's streams of the current device: CuPy's, and PyTorch's where that is another one.

    Raises FailedPreconditionError while one is being captured: an event recorded there would draw our stream into the
    graph, and break both.
    """
    handles = [int(cupy.cuda.get_current_stream().ptr)]
    torch = getattr(sys.modules.get("torch"), "cuda", None)
    if torch is not None and torch.is_initialized():
        handles.append(int(torch.current_stream(device).cuda_stream))
    return [_not_captured(handle) for handle in dict.fromkeys(handles)]


def handle_of(stream: Any) -> int:
    """Of a stream that a caller names: CuPy's, PyTorch's, or any with ``__cuda_stream__``.

    Raises TypeError for anything else, FailedPreconditionError while it is being captured.
    """
    if hasattr(stream, "__cuda_stream__"):
        _, handle = stream.__cuda_stream__()
    elif hasattr(stream, "cuda_stream"):  # PyTorch, before it knew the protocol
        handle = stream.cuda_stream
    else:
        raise TypeError(f"expected a stream with __cuda_stream__, found {stream!r:.60} ({type(stream).__name__})")
    return _not_captured(int(handle))


def _not_captured(handle: int) -> int:
    try:
        is_capturing = cupy.cuda.runtime.streamIsCapturing(handle)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status != _CAPTURE_IMPLICIT:
            raise
        is_capturing = True
    if is_capturing:
        raise FailedPreconditionError(
            "the current stream is being captured into a CUDA graph; save, restore and fence before or after that"
        )
    return handle


def record(handle: int) -> Any:
    """An event of the current device, recorded in the stream.  The default kind of event spins on a core."""
    event = cupy.cuda.Event(block=True, disable_timing=True)
    cupy.cuda.runtime.eventRecord(event.ptr, handle)
    return event


def wait_for(handle: int, event: Any) -> None:
    """Work queued in the stream from now on starts when the event has happened."""
    cupy.cuda.runtime.streamWaitEvent(handle, event.ptr)
