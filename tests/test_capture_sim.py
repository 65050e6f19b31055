"""How device arrays are captured: modes, fences, memory, and CUDA graphs that must not be disturbed."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from sim.errors import CUDARuntimeError
from sim.fixture import every_schedule, simulated_cupy  # noqa: F401
from sim.tools import chunks_of_kilobytes, late, on_device, on_host, schedule  # noqa: F401

import gpusaver
from gpusaver.errors import CancelledError, FailedPreconditionError, ResourceExhaustedError
from gpusaver.saver import Saver
from gpusaver.storage.local import LocalStorage

SECONDS = 15.0
WITH_AND_WITHOUT_KERNELS = pytest.mark.parametrize(
    "sim", [{"schedule": "late"}, {"schedule": "late", "kernels": False}], indirect=True, ids=["kernels", "no-kernels"]
)


class SlowStorage(LocalStorage):
    """Writes wait until ``opened`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        self.arrived = threading.Event()

    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
        file = super().create(path, nbytes, direct=direct, target=target)
        write_at = file.write_at

        def slow(offset: int, buffers: Any) -> None:
            self.arrived.set()
            assert self.opened.wait(SECONDS)
            write_at(offset, buffers)

        file.write_at = slow  # type: ignore[method-assign]
        return file


@contextlib.contextmanager
def slow_saver(variables: dict[str, Any], **options: Any) -> Iterator[tuple[Saver, SlowStorage]]:
    storage = SlowStorage()
    with Saver(variables, storage=storage, **options) as saver:
        try:
            yield saver, storage
        finally:
            storage.opened.set()


def in_thread(call: Callable[[], Any]) -> Any:
    """What it returns, or the error that it raises."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(SECONDS)
    assert found, "it still runs"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def arrays(sim: Any, count: int = 3, nbytes: int = 9000, device: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    with sim.cupy.cuda.Device(device):
        return {f"v{n}": on_device(sim, rng.integers(0, 200, nbytes + n, np.uint8)) for n in range(count)}


def contents(variables: dict[str, Any]) -> dict[str, bytes]:
    return {name: on_host(array) for name, array in variables.items()}


def stored(prefix: str) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in gpusaver.load(prefix).items()}


# --------------------------------------------------------------------------------------------------- which mode is used


@schedule("late", capacity=100_000, kernels=False)
def test_auto_leaves_half_of_the_free_memory(sim, tmp_path, caplog):
    fits, too_large = arrays(sim, 1, 30_000), arrays(sim, 1, 24_000)  # of 45,000 bytes that are then free
    with Saver(fits) as saver:
        pending = saver.save_async(tmp_path / "a", capture="auto")
        assert (pending.capture, pending.reason) == ("blocking", pending.reason)
        assert "30000 bytes are more than half of the" in pending.reason
        assert saver.save_async(tmp_path / "b", capture="snapshot").capture == "snapshot"
        pending = saver.save_async(tmp_path / "c", capture="auto")  # the memory is there now
        assert pending.capture == "snapshot"
        pending.result()
    del too_large, pending
    with Saver(arrays(sim, 1, 12_000)) as saver:
        assert saver.save_async(tmp_path / "d").capture == "snapshot"
    assert caplog.text.count("save_async copies nothing and blocks instead") == 1


@WITH_AND_WITHOUT_KERNELS
def test_auto_blocks_until_the_arrays_are_copied(sim, tmp_path, small_chunks):
    sim.memory[0].capacity = sim.memory[0].used + 45_000
    variables = arrays(sim)
    expected = contents(variables)
    with Saver(variables) as saver:
        pending = saver.save_async(tmp_path / "model")
        assert pending.capture == "blocking"
        for array in variables.values():
            array.fill(1)
        assert stored(pending.result()) == expected


@late
def test_a_deferred_save_runs_ahead_of_the_disk_as_far_as_its_staging_memory(sim, tmp_path, small_chunks):
    variables = arrays(sim, 2)  # three chunks, and a ring of four takes them all
    expected = contents(variables)
    with slow_saver(variables) as (saver, storage):
        pending = saver.save_async(tmp_path / "model", capture="deferred")
        in_thread(pending.fence)
        for array in variables.values():
            array.fill(1)
        assert not pending.done()
        storage.opened.set()
        assert stored(pending.result()) == expected
    more = arrays(sim, 8)  # twelve chunks
    for staging_bytes, is_captured in ((8192 * 5, False), (8192 * 12, True)):
        with slow_saver(more, staging_bytes=staging_bytes) as (saver, storage):
            pending = saver.save_async(tmp_path / "model", capture="deferred")
            assert pending.wait_captured(SECONDS if is_captured else 0.2) == is_captured
            storage.opened.set()
            pending.result()


# --------------------------------------------------------------------------------------------------------------- fences


@every_schedule
@pytest.mark.parametrize("how", ["current", "named", "protocol", "torch"])
def test_a_fence_holds_a_stream_back(sim, tmp_path, small_chunks, how):
    variables = arrays(sim)
    expected = contents(variables)
    stream = sim.cupy.cuda.Stream(non_blocking=True)

    class Foreign:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, stream.ptr

    given = {
        "current": None,
        "named": stream,
        "protocol": Foreign(),
        "torch": types.SimpleNamespace(cuda_stream=stream.ptr),
    }[how]
    with Saver(variables) as saver:
        pending = saver.save_async(tmp_path / "model", capture="deferred")
        with stream if how == "current" else contextlib.nullcontext():
            pending.fence(given)
        with stream:
            for array in variables.values():
                array.fill(1)
        assert stored(pending.result()) == expected
    stream.synchronize()


@every_schedule
@pytest.mark.parametrize("with_host_arrays", [False, True])
def test_after_a_snapshot_nothing_waits_for_the_disk(sim, tmp_path, small_chunks, with_host_arrays):
    variables = arrays(sim, 8)  # more chunks than slots
    expected = contents(variables)
    if with_host_arrays:
        variables["on the host"] = np.arange(5000)
        expected["on the host"] = variables["on the host"].tobytes()
    other = sim.cupy.cuda.Stream(non_blocking=True)
    with slow_saver(variables) as (saver, storage):
        pending = saver.save_async(tmp_path / "model", capture="snapshot")
        in_thread(lambda: pending.fence(other))
        with other:
            for array in variables.values():
                array.fill(1)
        assert in_thread(lambda: pending.wait_captured(SECONDS))
        assert storage.arrived.wait(SECONDS)
        assert not pending.done()
        in_thread(pending.fence)
        storage.opened.set()
        assert stored(pending.result()) == expected
        assert pending.report.captured_seconds < pending.report.durable_seconds
    other.synchronize()


@every_schedule
def test_torchs_current_stream_is_a_callers_stream(sim, tmp_path, small_chunks, monkeypatch):
    """The variables are PyTorch's: it works in a stream of its own that CuPy does not know."""
    stream = sim.cupy.cuda.Stream(non_blocking=True)
    cuda = types.SimpleNamespace(
        is_initialized=lambda: True, current_stream=lambda device: types.SimpleNamespace(cuda_stream=stream.ptr)
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    for capture in ("snapshot", "deferred"):
        variables = arrays(sim)
        sim.cupy.cuda.Device().synchronize()
        with stream:
            for array in variables.values():
                array += 1
        with Saver(variables) as saver:
            pending = saver.save_async(tmp_path / "model", capture=capture)
            if capture == "deferred":
                pending.fence()
            with stream:
                for array in variables.values():
                    array.fill(0)
            assert stored(pending.result()) == {
                name: (np.frombuffer(octets, np.uint8) + 1).tobytes() for name, octets in contents(arrays(sim)).items()
            }
        stream.synchronize()


@late
def test_what_a_fence_takes(sim, tmp_path):
    with Saver(arrays(sim)) as saver:
        pending = saver.save_async(tmp_path / "model", capture="deferred")
        with pytest.raises(TypeError, match="expected a stream with __cuda_stream__, found 7"):
            pending.fence(7)
        assert pending.wait_captured(0)  # nothing reads the arrays when it raises
        pending.result()


@late
def test_a_fence_after_a_failure_and_after_a_cancel(sim, tmp_path, small_chunks):
    variables = arrays(sim, 8)
    with slow_saver(variables) as (saver, storage):
        pending = saver.save_async(tmp_path / "model", capture="deferred")
        assert storage.arrived.wait(SECONDS)
        assert pending.cancel()
        storage.opened.set()
        with pytest.raises(CancelledError):
            pending.fence()
        assert sim.pending() == []
        sim.fail_at(len(variables))

        def save() -> None:
            pending = saver.save_async(tmp_path / "model", capture="deferred")
            pending.fence()
            pending.result()

        with pytest.raises(CUDARuntimeError):
            save()
        assert sim.pending() == []


@pytest.mark.parametrize("capture", ["deferred", "snapshot"])
@every_schedule
def test_changes_before_the_fence_are_found(sim, tmp_path, small_chunks, capture):
    variables = arrays(sim) | {"host": np.arange(10), "tied": None}
    variables["tied"] = variables["v1"]
    with Saver(variables, check_captures=True) as saver:
        good = saver.save_async(tmp_path / "good", capture=capture)
        good.fence()
        variables["v1"].fill(3)
        good.fence()  # only the first one is before the changes
        good.result()
        if capture == "snapshot":
            return
        pending = saver.save_async(tmp_path / "bad", capture=capture)
        variables["v1"][5:6] = 9
        variables["host"][3] = -1
        with pytest.raises(FailedPreconditionError, match=r"3 variables changed .*: host, tied, v1; the") as caught:
            pending.fence()
        assert (pending.exception() is None) == ("remove it" in str(caught.value))


# --------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("capture", ["snapshot", "deferred", "blocking"])
@late
def test_another_threads_capture_is_not_disturbed(sim, tmp_path, capture):
    """Everything is allocated while a graph is captured in the mode that forbids it to all threads."""
    variables, other = arrays(sim), sim.cupy.zeros(4, np.uint8)
    expected = contents(variables)
    stream = sim.cupy.cuda.Stream(non_blocking=True)

    def save_and_restore() -> str:
        with Saver(variables) as saver:
            prefix = saver.save_async(tmp_path / "model", capture=capture).result()
            saver.restore(prefix)
        assert getattr(sim.local, "capture_mode", 0) == 0  # as it was
        return prefix

    with stream:
        stream.begin_capture(sim.cupy.cuda.runtime.streamCaptureModeGlobal)
        other += 1
        prefix = in_thread(save_and_restore)
        other += 1
        graph = stream.end_capture()
        graph.launch()
        assert other.get().tolist() == [2] * 4
    assert stored(prefix) == contents(variables) == expected


@late
def test_without_the_drivers_library_all_else_works(sim, tmp_path):
    sim.has_driver_library = False
    variables = arrays(sim)
    with Saver(variables) as saver:
        assert stored(saver.save(tmp_path / "model")) == contents(variables)


@late
def test_a_driver_that_cannot_exchange_the_mode(sim, tmp_path, monkeypatch):
    from sim.driver import Driver

    calls: list[int] = []
    monkeypatch.setattr(Driver, "cuThreadExchangeStreamCaptureMode", lambda self, mode: calls.append(1) or 3)
    variables = arrays(sim)
    with Saver(variables) as saver:
        assert stored(saver.save(tmp_path / "model")) == contents(variables)
    assert calls


@late
def test_a_capture_of_a_stream_that_the_default_one_synchronises_with(sim, tmp_path):
    """An event recorded in the legacy default stream would end the capture, which is then another stream's."""
    variables, blocking = arrays(sim), sim.cupy.cuda.Stream()
    sim.cupy.cuda.Device().synchronize()
    with Saver(variables) as saver:
        prefix = saver.save(tmp_path / "model")
        pending = saver.save_async(tmp_path / "other", capture="deferred")
        pending.wait_captured()
        blocking.begin_capture()
        for call in (
            pending.fence,
            lambda: pending.fence(blocking),
            lambda: saver.save(tmp_path / "model"),
            lambda: saver.save_async(tmp_path / "model", capture="snapshot"),
            lambda: saver.restore(prefix),
        ):
            with pytest.raises(FailedPreconditionError, match="being captured into a CUDA graph"):
                call()
        blocking.end_capture()
        pending.result()
        saver.save(tmp_path / "model")


@late
def test_other_errors_of_the_query_are_raised(sim, monkeypatch):
    def fail(stream: int) -> bool:
        raise CUDARuntimeError(719)

    monkeypatch.setattr(sim.cupy.cuda.runtime, "streamIsCapturing", fail)
    from gpusaver.device.cuda import cuda_runtime

    with pytest.raises(CUDARuntimeError, match="LaunchFailure"):
        cuda_runtime(0).order_after_caller()


# --------------------------------------------------------------------------------------------------------------- memory


@WITH_AND_WITHOUT_KERNELS
def test_after_a_warmup_nothing_is_allocated_or_compiled(sim, tmp_path, small_chunks):
    variables = arrays(sim)
    with Saver(variables) as saver:
        saver.warmup(tmp_path / "model")
        saver.warmup()
        compiled, calls = len(sim.compiled), len(sim.calls)
        prefix = saver.save(tmp_path / "model")
        saver.restore(prefix)
        assert len(sim.compiled) == compiled
        assert not {"malloc", "hostAlloc", "hostRegister"} & set(sim.calls[calls:])
    sim.assert_quiescent()


class Pinned:
    """The most that was page-locked at any time, in bytes."""

    def __init__(self, sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slots = self.tables = 0
        host = sim.host
        register, allocate = host.register, host.allocate

        def seen(original: Any) -> Any:
            def call(*arguments: Any) -> Any:
                result = original(*arguments)
                self.slots = max(self.slots, sum(host.registered.values()))
                self.tables = max(self.tables, sum(map(len, host.allocated.values())))
                return result

            return call

        monkeypatch.setattr(host, "register", seen(register))
        monkeypatch.setattr(host, "allocate", seen(allocate))


@pytest.mark.parametrize("sim", [{"schedule": "late", "devices": 7}, {"schedule": 1, "devices": 2}], indirect=True)
def test_more_devices_than_slots(sim, tmp_path, small_chunks):
    """Copiers that keep what they have queued while they wait for another slot could have all of the ring."""
    devices = range(len(sim.memory))
    variables = {f"{n}/{name}": v for n in devices for name, v in arrays(sim, device=n).items()}
    expected = contents(variables)
    saver = Saver(variables)
    assert stored(in_thread(lambda: saver.save(tmp_path / "model"))) == expected
    saver.close()


@every_schedule
@pytest.mark.parametrize("capture", ["snapshot", "deferred", "blocking"])
def test_staging_bytes_are_never_exceeded(sim, tmp_path, small_chunks, monkeypatch, capture):
    pinned = Pinned(sim, monkeypatch)
    variables = arrays(sim, 9) | {f"w{n}": array for n, array in enumerate(arrays(sim, 9, device=1).values())}
    for staging_bytes, most in ((0, 4 * 8192), (8192 * 6 + 8191, 6 * 8192)):
        pinned.slots = 0
        with slow_saver(variables, staging_bytes=staging_bytes) as (saver, storage):
            pending = saver.save_async(tmp_path / "model", capture=capture if capture != "blocking" else "deferred")
            assert storage.arrived.wait(SECONDS)
            storage.opened.set()
            pending.result()
            saver.restore(tmp_path / "model")
        assert 0 < pinned.slots <= most
        assert pinned.tables <= 2 * 4 * 4096
    sim.assert_quiescent()


@WITH_AND_WITHOUT_KERNELS
@pytest.mark.parametrize("capture", ["snapshot", "deferred", "blocking"])
def test_the_users_memory_pool_is_left_alone(sim, tmp_path, small_chunks, capture):
    pool = sim.cupy.get_default_memory_pool()
    variables = arrays(sim) | {"turned": on_device(sim, np.arange(60, dtype=np.int16).reshape(6, 10)).T}
    cached = sim.cupy.zeros(3000, np.uint8)
    del cached
    before = pool.used_bytes(), pool.total_bytes()
    with Saver(variables) as saver:
        saver.restore(saver.save_async(tmp_path / "model", capture=capture).result())
        assert (pool.used_bytes(), pool.total_bytes()) == before
    assert (pool.used_bytes(), pool.total_bytes()) == before


@pytest.mark.parametrize("sim", [{"schedule": "late"}, {"schedule": 2}], indirect=True, ids=str)
def test_however_little_memory_the_device_has_left(sim, tmp_path, small_chunks):
    """Room for an image or not, for a buffer to gather in or not, for the tables of kernels or not."""
    variables = {f"v{n}": on_device(sim, np.full((7, 10), n, np.int16)).T for n in range(20)}
    expected, runtime = contents(variables), sim.cupy.cuda.runtime
    for free in (0, 2048, 4096, 8192, 12288, 16384, 24576):
        taken = runtime.malloc(runtime.memGetInfo()[0] - free)
        with Saver(variables) as saver:
            for capture in ("snapshot", "deferred"):
                if free < 4096 and capture == "snapshot":
                    with pytest.raises(ResourceExhaustedError, match="cuda:0: no room for a copy of the variables"):
                        saver.save_async(tmp_path / "model", capture=capture)
                    continue
                prefix = saver.save_async(tmp_path / "model", capture=capture).result()
                for array in variables.values():
                    array.fill(99)
                saver.restore(prefix)
                assert contents(variables) == expected
        runtime.free(taken)
    sim.assert_quiescent()
