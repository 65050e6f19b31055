"""The simulated CuPy itself: arrays and raw kernels."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sim.errors import CUDARuntimeError, SimulationError
from sim.fixture import every_schedule, simulated_cupy  # noqa: F401
from sim.kernels import Kernel
from sim.tools import late, to_host

# --------------------------------------------------------------------------------------------------------------- arrays


@every_schedule
def test_arrays_compute_as_numpy_does(sim):
    model = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    array = sim.cupy.asarray(model)
    views = [
        lambda a: a[1, :, ::-2],
        lambda a: a.transpose(2, 0, 1).reshape(-1),
        lambda a: a.T[1:].copy(),
        lambda a: a[..., None, 2],
        lambda a: a.view(np.int16)[0, 1:, 3:5],
        lambda a: (a + a * 2 - 1).astype(np.int32),
        lambda a: a.reshape(6, 4)[2:2],
        lambda a: a[1, 2, 3],
    ]
    for view in views:
        mine, theirs = view(array), view(model)
        assert (mine.shape, mine.dtype, mine.flags.c_contiguous) == (
            theirs.shape,
            theirs.dtype,
            theirs.flags.c_contiguous,
        )
        assert mine.get().tolist() == theirs.tolist()
    array[0, ::2] = array[1, ::2]
    array += 1
    model[0, ::2] = model[1, ::2]
    model += 1
    assert array.get().tolist() == model.tolist()
    assert bool((array == sim.cupy.asarray(model)).all())
    brain = sim.cupy.full((2, 2), 1.5, ml_dtypes.bfloat16)
    assert (brain + brain).get().tolist() == [[3, 3], [3, 3]]


@late
def test_what_cupy_does_not_do(sim):
    array = sim.cupy.arange(4, dtype=np.float32)
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array"):
        np.asarray(array)
    with pytest.raises(ValueError, match="non-scalar"):
        array[...] = np.zeros(4, np.float32)
    with pytest.raises(TypeError, match="Unsupported type"):
        array + np.zeros(4, np.float32)
    odd = sim.cupy.zeros((4, 4), np.uint8).view(ml_dtypes.float8_e4m3fn)
    odd[...] = odd.copy()  # contiguous: a copy of bytes
    with pytest.raises(ValueError, match="Unsupported dtype float8_e4m3fn"):
        odd.T.copy()
    with pytest.raises(SimulationError):
        array[sim.cupy.arange(2)]
    sim.violations.clear()


@every_schedule
def test_arrays_are_exchanged_without_a_copy(sim):
    class Foreign:
        def __init__(self, array: Any) -> None:
            self.__cuda_array_interface__ = array.__cuda_array_interface__
            self.alive = array

    class Packed:
        def __init__(self, array: Any) -> None:
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    with sim.cupy.cuda.Device(1):
        stream = sim.cupy.cuda.Stream(non_blocking=True)
        with stream:
            array = sim.cupy.full((2, 3), 4, np.int16)
            assert array.__dlpack_device__() == (2, 1)
            taken = [sim.cupy.asarray(Foreign(array.T)), sim.cupy.from_dlpack(Packed(array.T))]
        for other in taken:
            assert (other.data.ptr, other.shape, other.device.id) == (array.data.ptr, (3, 2), 1)
            assert other.get(stream).tolist() == [[4, 4]] * 3


def test_the_producer_of_a_capsule_makes_the_consumer_wait(sim):
    producer, consumer = sim.cupy.cuda.Stream(non_blocking=True), sim.cupy.cuda.Stream(non_blocking=True)
    with producer:
        array = sim.cupy.full(4, 4, np.int16)
        array.__dlpack__(stream=consumer.ptr)
    host = np.zeros(4, np.int16)
    to_host(sim, array, host, consumer)
    assert host.tolist() == [4] * 4


# -------------------------------------------------------------------------------------------------------------- kernels

XOR = Kernel(
    lambda launch, target, count, value: np.bitwise_xor(
        launch.memory(target, count), np.uint8(value), out=launch.memory(target, count)
    ),
    ("pointer", np.int64, np.int32),
)


@late
def test_kernels_run_in_stream_order(sim):
    sim.has_nvrtc = True  # this kernel is written in Python, and needs no compiler
    sim.kernels["flip"] = XOR
    kernel = sim.cupy.RawModule(code="...", options=("-std=c++17",)).get_function("flip")
    assert sim.compiled == [("...", ("-std=c++17",))]
    array = sim.cupy.full(8, 1, np.uint8)
    kernel((1,), (32,), (array, np.int64(4), np.int32(3)))
    kernel((1,), (32,), (np.uint64(array.data.ptr + 4), np.int64(4), np.int32(5)))
    assert sim.pending() == ["fill", "kernel flip", "kernel flip"]
    assert array.get().tolist() == [2] * 4 + [4] * 4


@late
def test_kernels_take_exactly_their_arguments(sim):
    sim.kernels["flip"] = XOR
    kernel = sim.cupy.RawKernel("...", "flip")
    array = sim.cupy.zeros(8, np.uint8)
    with sim.cupy.cuda.Device(1):
        elsewhere = sim.cupy.zeros(8, np.uint8)
        stream = sim.cupy.cuda.Stream(non_blocking=True)
    for wrong in (
        (array, 4, np.int32(3)),
        (array, np.int32(4), np.int32(3)),
        (array, np.int64(4)),
        (elsewhere, np.int64(4), np.int32(3)),
        (array.get(), np.int64(4), np.int32(3)),
    ):
        with pytest.raises(SimulationError, match="kernel flip"):
            kernel((1,), (32,), wrong)
    sim.violations.clear()
    with pytest.raises(CUDARuntimeError, match="InvalidConfiguration"):
        kernel((1,), (2048,), (array, np.int64(4), np.int32(3)))
    with pytest.raises(CUDARuntimeError, match="InvalidResourceHandle"):
        kernel((1,), (32,), (array, np.int64(4), np.int32(3)), stream=stream)
    kernel((1,), (32,), (array, np.int64(4096), np.int32(3)))
    with pytest.raises(CUDARuntimeError, match="IllegalAddress"):
        sim.cupy.cuda.Device().synchronize()


def test_without_nvrtc(sim):
    sim.kernels["flip"], sim.has_nvrtc = XOR, False
    with pytest.raises(RuntimeError, match="libnvrtc"):
        sim.cupy.RawModule(code="...").get_function("flip")
