"""The simulated CuPy as modules for ``sys.modules``: the part of CuPy 14's surface that gpusaver and its tests use."""

from __future__ import annotations

import importlib.machinery
import types
from typing import Any

import numpy as np

from sim import arrays, kernels, pools, runtime, streams
from sim.errors import OutOfMemoryError

_FUNCTIONS = (
    "arange array asarray ascontiguousarray asnumpy copyto empty empty_like from_dlpack full ndarray ones zeros"
).split()
_SCALARS = (
    "bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 dtype"
).split()


def modules() -> dict[str, types.ModuleType]:
    """Fresh modules by name."""
    own_runtime = _module("cupy.cuda.runtime", **{k: v for k, v in vars(runtime).items() if not k.startswith("_")})
    stream = _module("cupy.cuda.stream", **_public(streams, "Event ExternalStream Stream get_current_stream"))
    device = _module("cupy.cuda.device", Device=streams.Device)
    memory_names = "BaseMemory Memory MemoryPointer MemoryPool UnownedMemory alloc get_allocator set_allocator"
    memory = _module("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError, **_public(pools, memory_names))
    pinned = _public(pools, "PinnedMemory PinnedMemoryPointer alloc_pinned_memory")
    pinned_memory = _module("cupy.cuda.pinned_memory", **pinned)
    nvtx = _module("cupy.cuda.nvtx", available=True, RangePush=kernels.push_range, RangePop=kernels.pop_range)
    cuda = _module(
        "cupy.cuda",
        runtime=own_runtime,
        stream=stream,
        device=device,
        memory=memory,
        pinned_memory=pinned_memory,
        nvtx=nvtx,
        is_available=_is_available,
        **_public(streams, "Device Event ExternalStream Graph Stream get_current_stream get_elapsed_time"),
        **_public(pools, memory_names + " using_allocator"),
        **pinned,
    )
    cupy = _module(
        "cupy",
        __version__="14.2.0",
        cuda=cuda,
        get_default_memory_pool=pools.default_pool,
        RawKernel=kernels.RawKernel,
        RawModule=kernels.RawModule,
        **_public(arrays, " ".join(_FUNCTIONS)),
        **_public(np, " ".join(_SCALARS)),
    )
    for package in (cupy, cuda):
        package.__path__ = []
    every = (cupy, cuda, own_runtime, stream, device, memory, pinned_memory, nvtx)
    return {module.__name__: module for module in every}


def _is_available() -> bool:
    try:
        return runtime.getDeviceCount() > 0
    except runtime.CUDARuntimeError:
        return False


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # find_spec looks for it
    vars(module).update(members)
    return module


def _public(source: Any, names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names.split()}
