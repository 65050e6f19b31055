"""The CUDA runtime under a simulated CuPy whose devices are as slow and as hasty as they may be."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from sim.errors import CUDARuntimeError
from sim.fixture import every_schedule, simulated_cupy  # noqa: F401
from sim.tools import late, on_device, on_host, schedule, stored, values

from gpusaver.device import Transfer, admit
from gpusaver.device.host import allocate_pages
from gpusaver.errors import FailedPreconditionError, ResourceExhaustedError
from gpusaver.saver import Saver
from gpusaver.tensor import DataType, TensorSpec

KINDS = ("pinned", "pageable")
DTYPES = [np.dtype(name) for name in "bool int8 uint16 int32 float32 float64 complex128".split()]
DTYPES += [np.dtype(dtype) for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4)]
#: Views that take a contiguous array of shape (6, 5, 4) to one of other strides.
VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda array: array,
    "transposed": lambda array: array.T,
    "stepped": lambda array: array[::2, :, 1::2],
    "reversed": lambda array: array[::-1, 1:, ::-1],
    "row": lambda array: array[2, :, 3],
    "flat": lambda array: array.reshape(-1)[7:],
    "scalar": lambda array: array[1, 2, 3],
}


def runtime_of(device: int = 0) -> Any:
    from gpusaver.device.cuda import cuda_runtime

    return cuda_runtime(device)


@contextlib.contextmanager
def slot(sim: Any, nbytes: int, kind: str = "pinned") -> Iterator[memoryview]:
    pages = allocate_pages(nbytes)
    if kind == "pinned":
        sim.cupy.cuda.runtime.hostRegister(pages.ctypes.data, nbytes, 0)
    yield pages.data
    if kind == "pinned":
        sim.cupy.cuda.runtime.hostUnregister(pages.ctypes.data)


def finish(event: Any) -> None:
    if event is not None:
        event.synchronize()


def cut(rng: np.random.Generator, nbytes: int) -> list[tuple[int, int]]:
    """(start, size) of pieces that make up ``nbytes``, cut anywhere, also within elements."""
    borders = sorted({0, nbytes, *rng.integers(0, nbytes + 1, 3).tolist()})
    return [(start, end - start) for start, end in itertools.pairwise(borders)]


# -------------------------------------------------------------------------------------------------------------- copies


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
def test_every_view_reaches_the_slot_and_comes_back(sim, kind):
    runtime, rng = runtime_of(), np.random.default_rng(1)
    with slot(sim, 8192, kind) as memory:
        for name, view in VIEWS.items():
            model = view(values(np.dtype(np.int32)))
            array = view(on_device(sim, values(np.dtype(np.int32))))
            transfers, place = [], 3
            for start, nbytes in cut(rng, model.nbytes):
                transfers.append(Transfer(array, start, place, nbytes))
                place += nbytes + int(rng.integers(0, 9))
            runtime.order_after_caller()
            finish(runtime.to_slot(transfers, memory))
            found = b"".join(bytes(memory[offset : offset + nbytes]) for _, _, offset, nbytes in transfers)
            assert found == stored(model), name
            for _, _, offset, nbytes in transfers:
                memory[offset : offset + nbytes] = bytes(255 - byte for byte in memory[offset : offset + nbytes])
            finish(runtime.from_slot(transfers, memory))
            assert on_host(array) == stored(~model), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_moves_bit_for_bit(sim, dtype, kind):
    runtime = runtime_of()
    with slot(sim, 8192, kind) as memory:
        for name, view in VIEWS.items():
            model, other = view(values(dtype)), view(values(dtype, seed=1))
            array = view(on_device(sim, values(dtype)))
            transfer = Transfer(array, 0, 5, model.nbytes)
            runtime.order_after_caller()
            finish(runtime.to_slot([transfer], memory))
            assert bytes(memory[5 : 5 + model.nbytes]) == stored(model), name
            memory[5 : 5 + model.nbytes] = stored(other)
            finish(runtime.from_slot([transfer], memory))
            assert on_host(array) == stored(other), name


@late
def test_each_device_has_its_own_runtime(sim):
    arrays = []
    for device in (0, 1):
        with sim.cupy.cuda.Device(device):
            arrays.append(sim.cupy.full(8, device + 5, np.uint8))
    with slot(sim, 16) as memory:
        runtimes = [admit(array, "array").runtime for array in arrays]
        assert [runtime.name for runtime in runtimes] == ["cuda:0", "cuda:1"]
        events = []
        for number, (runtime, array) in enumerate(zip(runtimes, arrays, strict=True)):
            runtime.order_after_caller()
            events.append(runtime.to_slot([Transfer(array, 0, 8 * number, 8)], memory))
        for event in events:
            finish(event)
        assert bytes(memory) == bytes([5] * 8 + [6] * 8)
    assert runtime_of(1) is runtimes[1]
    with pytest.raises(FailedPreconditionError, match="cuda:2: CuPy sees 2 CUDA devices"):
        runtime_of(2)


@every_schedule
def test_copies_happen_in_any_thread_and_leave_device_and_stream_as_they_were(sim):
    runtime, array = runtime_of(1), None
    with sim.cupy.cuda.Device(1):
        array = sim.cupy.arange(100, dtype=np.int32)
    stream = sim.cupy.cuda.Stream(non_blocking=True)
    runtime.order_after_caller()
    seen: list[Any] = []

    def copy(memory: memoryview) -> None:
        stream.use()
        finish(runtime.to_slot([Transfer(array, 0, 0, 400)], memory))
        seen.append((sim.cupy.cuda.runtime.getDevice(), sim.cupy.cuda.get_current_stream()))

    with slot(sim, 400) as memory:
        thread = threading.Thread(target=copy, args=(memory,))
        thread.start()
        thread.join()
        assert bytes(memory) == np.arange(100, dtype=np.int32).tobytes()
    assert seen == [(0, stream)]
    assert (sim.cupy.cuda.runtime.getDevice(), sim.cupy.cuda.get_current_stream()) == (0, sim.cupy.cuda.Stream.null)


# ------------------------------------------------------------------------------------------------------------ ordering


@contextlib.contextmanager
def callers_stream(sim: Any, which: str) -> Iterator[None]:
    if which == "default":
        yield
        return
    with sim.cupy.cuda.Stream(non_blocking=which == "non-blocking") as stream:
        yield
        stream.synchronize()


STREAMS = ("default", "blocking", "non-blocking")


@every_schedule
@pytest.mark.parametrize("which", STREAMS)
def test_a_copy_sees_what_the_caller_queued_before_it(sim, which):
    runtime = runtime_of()
    sim.set_speed(0, 0.0)
    with slot(sim, 256) as memory, callers_stream(sim, which):
        array = sim.cupy.zeros(64, np.float32)
        array += 1
        array[:32] = array[32:] * 2
        runtime.order_after_caller()
        event = runtime.to_slot([Transfer(array, 0, 0, 256)], memory)
        finish(event)
        assert np.frombuffer(memory, np.float32).tolist() == [2] * 32 + [1] * 32


@every_schedule
@pytest.mark.parametrize("which", STREAMS)
def test_restored_values_come_after_what_the_caller_had_queued(sim, which):
    runtime = runtime_of()
    with slot(sim, 256) as memory, callers_stream(sim, which):
        memory[:] = np.full(64, 7, np.float32).tobytes()
        array = sim.cupy.zeros(64, np.float32)
        array += 1  # must not come after the restored values
        runtime.order_after_caller()
        finish(runtime.from_slot([Transfer(array, 0, 0, 256)], memory))
        array *= 2
        assert array.get().tolist() == [14] * 64


@every_schedule
@pytest.mark.parametrize("which", STREAMS)
def test_arrays_may_change_as_soon_as_their_snapshot_is_taken(sim, which):
    runtime = runtime_of()
    with slot(sim, 1024) as memory, callers_stream(sim, which):
        held = None
        for round_ in (1, 2):  # the second one reuses the memory
            arrays = [sim.cupy.full(10, round_, np.int64), sim.cupy.full((3, 4), round_, np.int16).T]
            copies, again, _ = runtime.snapshot(arrays, np.array([0, 256]), held)
            for array in arrays:
                array.fill(99)
            del arrays, array
            sim.cupy.full(10, 98, np.int64)  # takes the freed block
            finish(runtime.to_slot([Transfer(copies[0], 0, 0, 80), Transfer(copies[1], 0, 256, 24)], memory))
            assert bytes(memory[:80]) == np.full(10, round_, np.int64).tobytes()
            assert bytes(memory[256:280]) == np.full(12, round_, "i2").tobytes()
            assert held is None or held is again
            held = again


@every_schedule
def test_arrays_may_be_freed_while_they_are_copied(sim):
    runtime = runtime_of()
    with slot(sim, 4096) as memory:
        whole, strided = sim.cupy.full(1024, 3, np.uint8), sim.cupy.full((32, 32), 4, np.uint8)[:, ::2]
        runtime.order_after_caller()
        event = runtime.to_slot([Transfer(whole, 0, 0, 1024), Transfer(strided, 100, 1024, 300)], memory)
        del whole, strided
        for _ in range(3):
            sim.cupy.full(1024, 97, np.uint8)
        finish(event)
        assert bytes(memory[:1324]) == bytes([3] * 1024 + [4] * 300)


@every_schedule
def test_the_slot_may_be_reused_when_the_event_has_happened(sim):
    runtime = runtime_of()
    arrays = [sim.cupy.zeros(256, np.uint8) for _ in range(4)]
    runtime.order_after_caller()
    with slot(sim, 256) as memory:
        for number, array in enumerate(arrays):
            memory[:] = bytes([number + 1]) * 256
            finish(runtime.from_slot([Transfer(array, 0, 0, 256)], memory))
        memory[:] = bytes(256)
    assert [set(array.get().tolist()) for array in arrays] == [{1}, {2}, {3}, {4}]


@late
def test_a_copy_to_pinned_memory_does_not_block(sim):
    runtime, array = runtime_of(), sim.cupy.full(64, 5, np.uint8)
    runtime.order_after_caller()
    with slot(sim, 64) as memory:
        event = runtime.to_slot([Transfer(array, 0, 0, 64)], memory)
        assert bytes(memory) == bytes(64)
        finish(event)
        assert bytes(memory) == bytes([5]) * 64
    sim.assert_quiescent()


# ------------------------------------------------------------------------------------------------------------- refusals


@late
def test_a_capture_is_refused_and_not_disturbed(sim, tmp_path):
    runtime, array = runtime_of(), sim.cupy.zeros(4, np.float32)
    stream = sim.cupy.cuda.Stream(non_blocking=True)
    sim.cupy.cuda.Device().synchronize()
    with Saver({"a": array}) as saver, stream:
        prefix = saver.save(tmp_path / "before")
        stream.begin_capture()
        array += 1
        for call in (
            lambda: runtime.order_after_caller(),
            lambda: runtime.snapshot([array], np.array([0]), None),
            lambda: saver.save(tmp_path / "model"),
            lambda: saver.save_async(tmp_path / "model"),
            lambda: saver.restore(prefix),
        ):
            with pytest.raises(FailedPreconditionError, match="being captured into a CUDA graph"):
                call()
        graph = stream.end_capture()
        assert [what for what, _ in sim.graphs[graph.graph]] == ["arithmetic"]
        graph.launch()
        assert array.get().tolist() == [1] * 4


@schedule("late", capacity=64 * 1024)
def test_no_room_for_a_snapshot(sim):
    runtime, array = runtime_of(), sim.cupy.full(40 * 1024, 1, np.uint8)
    with pytest.raises(ResourceExhaustedError, match="cuda:0: no room for a copy of the variables"):
        runtime.snapshot([array], np.array([0]), None)
    assert array.get().tolist() == [1] * 40 * 1024


def test_without_a_driver(sim):
    sim.has_driver = False
    with pytest.raises(FailedPreconditionError, match="CuPy is installed, but CUDA cannot be used"):
        runtime_of()


@late
def test_an_error_of_the_device_reaches_the_event(sim):
    runtime, array = runtime_of(), sim.cupy.full(64, 5, np.uint8)
    runtime.order_after_caller()
    with slot(sim, 64) as memory:
        event = runtime.to_slot([Transfer(array, 0, 0, 64)], memory)
        sim.fail_at(1, sticky=True)
        with pytest.raises(CUDARuntimeError):
            finish(event)
        sim.drain()
        sim.sticky = None


@late
def test_what_is_admitted(sim):
    class Interface:
        def __init__(self, array: Any) -> None:
            self.array = array

        @property
        def __cuda_array_interface__(self) -> Any:
            return self.array.__cuda_array_interface__

    class Capsules:
        def __init__(self, array: Any) -> None:
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    with sim.cupy.cuda.Device(1):
        array = sim.cupy.asarray(np.arange(6, dtype=np.int16).reshape(2, 3))
    for value in (array, Interface(array), Capsules(array)):
        admitted = admit(value, "weights")
        assert admitted.runtime is runtime_of(1)
        assert admitted.spec == TensorSpec(DataType.int16, (2, 3))
        assert admitted.array.data.ptr == array.data.ptr
        assert admitted.rebuild is None
    assert admit(array, "weights", DataType.qint16).spec.dtype is DataType.qint16
    with pytest.raises(TypeError, match="weights: declared float32"):
        admit(array, "weights", DataType.float32)
    brain = sim.cupy.zeros(3, ml_dtypes.bfloat16)
    assert admit(brain, "weights").spec.dtype is DataType.bfloat16


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e5m2", "int4", "bool"])
def test_new_arrays(sim, name):
    array = runtime_of(1).empty(TensorSpec(DataType[name], (2, 3)))
    assert (array.shape, array.nbytes, array.device.id) == ((2, 3), 6 * DataType[name].itemsize, 1)


@late
def test_two_threads_may_restore_parts_of_one_element(sim, monkeypatch):
    """The border of two chunks lies within an element of a strided array; one thread comes in the other's midst."""
    runtime, model = runtime_of(), np.arange(64, dtype=np.float64) + 0.1
    array = on_device(sim, np.zeros((64, 2)))[:, 0]
    runtime.order_after_caller()

    def restore(start: int, end: int) -> None:
        octets = memoryview(bytearray(model.tobytes()[start:end]))
        finish(runtime.from_slot([Transfer(array, start, 0, end - start)], octets))

    other = threading.Thread(target=restore, args=(252, 512))
    memcpy = sim.cupy.cuda.runtime.memcpyAsync

    def interrupted(*arguments: Any) -> None:
        if other.ident is None:
            other.start()
            other.join(0.1)  # it ends, or waits for this thread
        memcpy(*arguments)

    monkeypatch.setattr(sim.cupy.cuda.runtime, "memcpyAsync", interrupted)
    restore(0, 252)
    other.join()
    assert array.get().tolist() == model.tolist()
