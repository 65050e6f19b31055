"""The launcher of the kernels under a simulated CuPy, whose devices run the compiled kernels themselves."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sim.errors import CUDARuntimeError
from sim.fixture import every_schedule, simulated_cupy  # noqa: F401
from sim.gpusaver_kernels import install
from sim.tools import late, on_device, on_host, stored, values

from gpusaver.bundle.crc import crc32c
from gpusaver.device.base import Transfer
from gpusaver.device.launch_plan import column

#: Views that take an array of shape (6, 5, 4) to one of other strides.
VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda array: array,
    "offset": lambda array: array.reshape(-1)[7:],
    "transposed": lambda array: array.T,
    "stepped": lambda array: array[::2, :, 1::2],
    "reversed": lambda array: array[::-1, 1:, ::-1],
    "row": lambda array: array[2, :, 3],
    "scalar": lambda array: array[1, 2, 3],
    "empty": lambda array: array[:, 5:],
}
DTYPES = [np.dtype(name) for name in ("uint8", "int16", "float32", "float64", "complex128")]


def kernels_of(sim: Any, device: int = 0) -> Any:
    install(sim)
    from gpusaver.device.cuda_kernels import load

    kernels, reason = load(device)
    assert not reason
    return kernels


def new_held() -> Any:
    from gpusaver.device.cuda_memory import Held

    return Held()


def cut(rng: np.random.Generator, nbytes: int) -> list[tuple[int, int]]:
    """(start, size) of pieces that make up ``nbytes``, cut anywhere, also within elements."""
    borders = sorted({0, nbytes, *rng.integers(0, nbytes + 1, 3).tolist()})
    return [(start, end - start) for start, end in itertools.pairwise(borders)]


def transfers_of(arrays: list[Any], first_offset: int) -> tuple[list[Transfer], int]:
    rng, transfers, place = np.random.default_rng(1), [], first_offset
    for array in arrays:
        for start, nbytes in cut(rng, array.nbytes):
            transfers.append(Transfer(array, start, place, nbytes))
            place += nbytes + int(rng.integers(0, 20))
    return transfers, place


@every_schedule
@pytest.mark.parametrize("misalignment", [0, 3])
def test_every_view_is_gathered_and_scattered(sim, misalignment):
    kernels, stream = kernels_of(sim), sim.cupy.cuda.Stream(non_blocking=True)
    models = [view(values(dtype)) for view in VIEWS.values() for dtype in DTYPES]
    arrays = [view(on_device(sim, values(dtype))) for view in VIEWS.values() for dtype in DTYPES]
    targets = [view(on_device(sim, values(dtype, seed=1))) for view in VIEWS.values() for dtype in DTYPES]
    transfers, nbytes = transfers_of(arrays, misalignment)
    image = sim.cupy.full(nbytes + misalignment, 0xA5, np.uint8)
    expected = np.full(nbytes, 0xA5, np.uint8)
    for transfer, model in zip(transfers, models_of(transfers, arrays, models), strict=True):
        part = stored(model)[transfer.start : transfer.start + transfer.nbytes]
        expected[transfer.offset : transfer.offset + transfer.nbytes] = np.frombuffer(part, np.uint8)
    sim.cupy.cuda.Device().synchronize()

    held = new_held()
    address = image.data.ptr + misalignment
    kernels.gather(transfers, address, stream, held)
    back = [Transfer(targets[index_of(t.array, arrays)], *t[1:]) for t in transfers]
    kernels.scatter(back, address, stream, held)
    stream.synchronize()
    assert image.get()[misalignment:].tobytes() == expected.tobytes()
    for model, target in zip(models, targets, strict=True):
        assert on_host(target) == stored(model)
    kept = {id(array) for some in held._kept for array in some}
    assert kept >= {id(array) for array in (*arrays, *targets) if array.size}


def index_of(array: Any, arrays: list[Any]) -> int:
    return next(number for number, one in enumerate(arrays) if one is array)


def models_of(transfers: list[Transfer], arrays: list[Any], models: list[Any]) -> list[Any]:
    return [models[index_of(transfer.array, arrays)] for transfer in transfers]


@late
def test_more_dimensions_than_the_kernels_take(sim):
    kernels, stream = kernels_of(sim), sim.cupy.cuda.Stream(non_blocking=True)
    model = np.arange(3**10, dtype=np.uint16).reshape([3] * 10).transpose(9, 0, 8, 1, 7, 2, 6, 3, 5, 4)
    array = on_device(sim, np.arange(3**10, dtype=np.uint16).reshape([3] * 10)).transpose(9, 0, 8, 1, 7, 2, 6, 3, 5, 4)
    start, nbytes = 1001, model.nbytes // 2
    image = sim.cupy.zeros(nbytes, np.uint8)
    sim.cupy.cuda.Device().synchronize()
    kernels.gather([Transfer(array, start, 0, nbytes)], image.data.ptr, stream, new_held())
    stream.synchronize()
    assert image.get().tobytes() == stored(model)[start : start + nbytes]
    array.fill(0)
    sim.cupy.cuda.Device().synchronize()
    kernels.scatter([Transfer(array, start, 0, nbytes)], image.data.ptr, stream, new_held())
    stream.synchronize()
    expected = np.zeros(model.nbytes, np.uint8)
    expected[start : start + nbytes] = np.frombuffer(stored(model), np.uint8)[start : start + nbytes]
    assert on_host(array) == expected.tobytes()


@every_schedule
def test_checksums_are_the_hosts(sim):
    kernels, stream = kernels_of(sim), sim.cupy.cuda.Stream(non_blocking=True)
    octets = np.random.default_rng(2).integers(0, 256, 300_000, np.uint8)
    array = on_device(sim, octets)
    sim.cupy.cuda.Device().synchronize()
    ranges = [(0, 0), (1, 1), (5, 3), (17, 4), (100, 6400), (7001, 70_003), (3, 299_997), (64, 0)]
    held = new_held()
    starts, sizes = column(ranges).T
    found = kernels.crc32c(array.data.ptr + starts, sizes, held)(stream)
    assert found.dtype == np.uint32
    stream.synchronize()
    assert found.tolist() == [crc32c(octets[start : start + nbytes]) for start, nbytes in ranges]
    none = kernels.crc32c(column([]), column([]), held)(stream)
    assert none.tolist() == []


@late
def test_results_outlive_their_table(sim):
    kernels, stream = kernels_of(sim), sim.cupy.cuda.Stream(non_blocking=True)
    array = on_device(sim, np.arange(100, dtype=np.uint8))
    sim.cupy.cuda.Device().synchronize()
    first, second = new_held(), new_held()
    first.results = kernels.crc32c(column([array.data.ptr]), column([100]), first)(stream)
    stream.synchronize()
    first.release()
    second.results = kernels.crc32c(column([array.data.ptr]), column([99]), second)(stream)
    stream.synchronize()
    assert len(sim.host.allocated) == 1  # the same one
    assert first.results.tolist() == [crc32c(bytes(range(100)))]
    assert second.results.tolist() == [crc32c(bytes(range(99)))]


@every_schedule
def test_a_table_is_lent_again_only_when_its_launch_is_over(sim):
    kernels, stream = kernels_of(sim), sim.cupy.cuda.Stream(non_blocking=True)
    array = on_device(sim, np.arange(200, dtype=np.uint8))
    image = sim.cupy.zeros(400, np.uint8)
    sim.cupy.cuda.Device().synchronize()
    for round_ in range(3):
        held = new_held()
        for half in (0, 1):
            transfer = Transfer(array, 100 * half, 200 * half + round_, 100)
            kernels.gather([transfer], image.data.ptr, stream, held)
        stream.synchronize()
        held.release()
        assert image.get()[round_ : round_ + 100].tolist() == list(range(100))
        assert image.get()[200 + round_ : 300 + round_].tolist() == list(range(100, 200))
    assert len(sim.host.allocated) == 2


@late
def test_more_launches_than_buffers(sim):
    kernels, stream = kernels_of(sim), sim.cupy.cuda.Stream(non_blocking=True)
    array = on_device(sim, np.arange(50, dtype=np.uint8))
    image = sim.cupy.zeros(50, np.uint8)
    sim.cupy.cuda.Device().synchronize()
    held = new_held()
    for start in range(0, 50, 10):
        kernels.gather([Transfer(array, start, start, 10)], image.data.ptr, stream, held)
    stream.synchronize()
    assert image.get().tolist() == list(range(50))


@late
def test_a_larger_table_gets_a_larger_buffer(sim):
    kernels, stream = kernels_of(sim), sim.cupy.cuda.Stream(non_blocking=True)
    array = on_device(sim, np.arange(250, dtype=np.uint8))
    image = sim.cupy.zeros(12_000, np.uint8)
    sim.cupy.cuda.Device().synchronize()
    for count in (1, 12_000, 11_000):
        held = new_held()
        kernels.gather([Transfer(array, n % 250, n, 1) for n in range(count)], image.data.ptr, stream, held)
        stream.synchronize()
        held.release()
    assert image.get().tolist() == [n % 250 for n in range(12_000)]
    assert sorted(len(pages) for pages in sim.host.allocated.values()) == [1 << 18, 1 << 19]


@late
def test_launches_leave_device_and_stream_of_the_thread_as_they_were(sim):
    kernels = kernels_of(sim, device=1)
    with sim.cupy.cuda.Device(1):
        array, image = sim.cupy.full(10, 7, np.uint8), sim.cupy.zeros(10, np.uint8)
        stream = sim.cupy.cuda.Stream(non_blocking=True)
        sim.cupy.cuda.Device(1).synchronize()
    seen: list[Any] = []

    def gather() -> None:
        held = new_held()
        kernels.gather([Transfer(array, 0, 0, 10)], image.data.ptr, stream, held)
        stream.synchronize()
        seen.append((sim.cupy.cuda.runtime.getDevice(), sim.cupy.cuda.get_current_stream()))

    thread = threading.Thread(target=gather)
    thread.start()
    thread.join()
    assert seen == [(0, sim.cupy.cuda.Stream.null)]
    with sim.cupy.cuda.Device(1):
        assert image.get().tolist() == [7] * 10


@late
def test_compiled_once_per_device(sim):
    assert kernels_of(sim) is kernels_of(sim)
    assert len(sim.compiled) == 2
    assert all("#include" not in source and options == ("-std=c++17",) for source, options in sim.compiled)
    assert kernels_of(sim, device=1) is not kernels_of(sim)
    assert len(sim.compiled) == 4


@late
def test_without_nvrtc_there_are_none_and_the_reason_is_told(sim):
    from gpusaver.device.cuda_kernels import load

    sim.has_nvrtc = False
    kernels, reason = load(0)
    assert kernels is None
    assert "cuda:0: no kernels: RuntimeError: " in reason
    assert "libnvrtc" in reason


@late
def test_a_device_that_fails_is_not_taken_for_a_missing_compiler(sim):
    from gpusaver.device.cuda_kernels import load

    sim.has_driver = False
    with pytest.raises(CUDARuntimeError, match="InsufficientDriver"):
        load(0)
    sim.has_driver = True


@late
def test_nothing_is_left_when_the_tables_are_trimmed(sim):
    kernels, stream = kernels_of(sim), sim.cupy.cuda.Stream(non_blocking=True)
    array, held = sim.cupy.zeros(100, np.uint8), new_held()
    kernels.crc32c(column([array.data.ptr]), column([100]), held)(stream)
    kernels.tables.trim()  # leaves what is lent
    stream.synchronize()
    held.release()
    kernels.tables.trim()
    del array
    sim.cupy.get_default_memory_pool().free_all_blocks()
    sim.assert_quiescent(streams=1)
    assert sim.memory[0].used == 0
