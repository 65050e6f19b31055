"""Saves in the background: PendingSave, when the variables may change, one save at a time."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gated_storage import SECONDS, GatedStorage, held, in_thread, is_blocked, wait_until

import gpusaver
from gpusaver.device.host import HostRuntime
from gpusaver.errors import FailedPreconditionError, ResourceExhaustedError, UnknownError

ERROR = UnknownError("cannot write /disk/k: injected")


# -- what a PendingSave is


def test_it_is_like_a_future(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    pending = held(saver, storage, tmp_path / "k", global_step=3)
    assert pending.prefix == f"{tmp_path}/k-3"
    assert pending.report is None
    assert not pending.cancelled()
    for wait in (pending.result, pending.exception):
        with pytest.raises(TimeoutError):
            wait(0.01)
    storage.let_go()
    assert pending.result(SECONDS) == f"{tmp_path}/k-3"
    assert pending.exception() is None
    assert pending.done()
    assert not pending.cancelled()
    assert not pending.cancel()


def test_report(saver: Any, storage: GatedStorage, state: Any, tmp_path: Path) -> None:
    pending = held(saver, storage, tmp_path / "k", "replace")
    time.sleep(0.02)
    storage.let_go()
    pending.result()
    report = pending.report
    assert (report.prefix, report.tensors, report.nbytes) == (f"{tmp_path}/k", 2, 1_600_008)
    assert (report.capture, report.reason) == ("snapshot", "memory sufficed")
    assert 0 < report.captured_seconds < report.durable_seconds - 0.02


def test_callbacks(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    seen: list[Any] = []
    pending = held(saver, storage, tmp_path / "k")
    pending.add_done_callback(lambda p: seen.append((p, p.done(), p.report is not None, threading.current_thread())))
    assert not seen
    storage.let_go()
    pending.result()
    wait_until(lambda: bool(seen))
    assert seen[0][:3] == (pending, True, True)
    assert seen[0][3] is not threading.current_thread()
    pending.add_done_callback(seen.append)
    assert seen[1] is pending


def test_a_callback_may_save_again_and_wait(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    done = threading.Event()
    found: list[Any] = []

    def again(pending: Any) -> None:
        pending.wait_captured()
        found.append(pending.exception())
        found.append(saver.save(tmp_path / "k", 2))
        done.set()

    pending = held(saver, storage, tmp_path / "k", global_step=1)
    pending.add_done_callback(again)
    storage.let_go(ERROR)
    assert done.wait(SECONDS)
    assert found == [ERROR, f"{tmp_path}/k-2"]


def test_an_error_in_a_callback_harms_nobody(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    pending = held(saver, storage, tmp_path / "k")
    pending.add_done_callback(lambda p: 1 // 0)
    storage.let_go()
    assert pending.result() == f"{tmp_path}/k"
    saver.save(tmp_path / "k")


# -- when the variables may change


def test_a_snapshot_is_taken_before_the_call_returns(
    saver: Any, storage: GatedStorage, state: Any, tmp_path: Path
) -> None:
    pending = held(saver, storage, tmp_path / "k", capture="snapshot")
    assert pending.wait_captured(0)
    pending.fence()
    state["w"][...] = -1
    state["step"] = -1
    storage.let_go()
    found = gpusaver.load(pending.result())
    np.testing.assert_array_equal(found["w"], np.arange(200_000.0))
    assert found["step"] == 1


@pytest.mark.parametrize("when", ["fence", "wait_captured"])
def test_deferred_until_fence(saver: Any, storage: GatedStorage, state: Any, tmp_path: Path, when: str) -> None:
    pending = held(saver, storage, tmp_path / "k", capture="deferred")
    assert pending.capture == "deferred"
    assert not pending.wait_captured(0.01)
    fence = in_thread(getattr(pending, when))
    assert is_blocked(fence)
    storage.hold("replace")
    storage.let_go()
    fence.result(SECONDS)
    state["w"][...] = -1
    np.testing.assert_array_equal(gpusaver.load(pending.result())["w"], np.arange(200_000.0))


def test_blocking_returns_when_all_is_read(saver: Any, storage: GatedStorage, state: Any, tmp_path: Path) -> None:
    storage.hold("replace")
    pending = saver.save_async(tmp_path / "k", capture="blocking")
    assert pending.wait_captured(0)
    state["w"][...] = -1
    assert storage.arrived.wait(SECONDS)
    assert not pending.done()
    storage.let_go()
    np.testing.assert_array_equal(gpusaver.load(pending.result())["w"], np.arange(200_000.0))


def test_a_fence_raises_what_went_wrong(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    pending = held(saver, storage, tmp_path / "k", capture="deferred")
    fence = in_thread(pending.fence)
    storage.let_go(ERROR)
    assert fence.exception(SECONDS) is ERROR
    assert pending.wait_captured(0)
    saver.save(tmp_path / "k")  # the error has been seen


def test_a_restore_waits_until_the_variables_are_read(
    saver: Any, storage: GatedStorage, state: Any, tmp_path: Path
) -> None:
    old = saver.save(tmp_path / "k", 1)
    state["w"] += 1
    pending = held(saver, storage, tmp_path / "k", global_step=2, capture="deferred")
    restore = in_thread(lambda: saver.restore(old))
    assert is_blocked(restore)
    storage.let_go()
    restore.result(SECONDS)
    np.testing.assert_array_equal(gpusaver.load(pending.result())["w"], np.arange(200_000.0) + 1)
    np.testing.assert_array_equal(state["w"], np.arange(200_000.0))


def test_without_memory_for_a_copy(
    saver: Any, storage: GatedStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gpusaver.device.host.memory_available", lambda: 1000)
    caplog.set_level(logging.WARNING, "gpusaver")
    for _ in range(2):
        pending = saver.save_async(tmp_path / "k")
        assert pending.capture == "blocking"
        assert "1000 available" in pending.reason
        pending.result()
    assert len([record for record in caplog.records if "blocks instead" in record.message]) == 1
    with pytest.raises(ResourceExhaustedError, match="1000 available"):
        saver.save_async(tmp_path / "k", capture="snapshot")
    assert saver.save(tmp_path / "k") == f"{tmp_path}/k"


def test_the_copy_is_made_in_the_same_memory_again(saver: Any, tmp_path: Path, monkeypatch: Any) -> None:
    memories: list[Any] = []
    snapshot = HostRuntime.snapshot

    def note(self: HostRuntime, arrays: Any, places: Any, memory: Any) -> Any:
        taken = snapshot(self, arrays, places, memory)
        memories.append(taken[1])
        return taken

    monkeypatch.setattr(HostRuntime, "snapshot", note)
    for _ in range(3):
        saver.save_async(tmp_path / "k").result()
    assert len({id(memory) for memory in memories}) == 1


# -- one at a time


def test_skip(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    pending = held(saver, storage, tmp_path / "k", global_step=1)
    assert saver.save_async(tmp_path / "k", 2, when_busy="skip") is None
    storage.let_go()
    pending.result()
    assert saver.save_async(tmp_path / "k", 3, when_busy="skip").result() == f"{tmp_path}/k-3"
    assert not gpusaver.checkpoint_exists(tmp_path / "k-2")


def test_raise(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    held(saver, storage, tmp_path / "k", global_step=1)
    with pytest.raises(FailedPreconditionError, match="k-1 is still under way"):
        saver.save_async(tmp_path / "k", 2, when_busy="raise")
    storage.let_go()
    saver.save(tmp_path / "k", 3)
    assert saver.last_checkpoints == [f"{tmp_path}/k-1", f"{tmp_path}/k-3"]


@pytest.mark.parametrize("method", ["save", "save_async"])
def test_wait(saver: Any, storage: GatedStorage, state: Any, tmp_path: Path, method: str) -> None:
    held(saver, storage, tmp_path / "k", global_step=1)
    second = in_thread(lambda: getattr(saver, method)(tmp_path / "k", 2))
    assert is_blocked(second)
    state["step"] = 5  # the second save reads the variables when its turn comes
    storage.let_go()
    second.result(SECONDS)
    saver.close()
    assert gpusaver.load(tmp_path)["step"] == 5
    assert saver.last_checkpoints == [f"{tmp_path}/k-1", f"{tmp_path}/k-2"]


def test_others_may_skip_while_one_waits(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    held(saver, storage, tmp_path / "k", global_step=1)
    waiting = in_thread(lambda: saver.save(tmp_path / "k", 2))
    assert is_blocked(waiting)
    skipping = in_thread(lambda: saver.save_async(tmp_path / "k", 3, when_busy="skip"))
    assert skipping.result(SECONDS) is None
    storage.let_go()
    waiting.result(SECONDS)


def test_saves_from_several_threads_come_one_after_the_other(state: Any, tmp_path: Path) -> None:
    running, most = 0, 0
    lock = threading.Lock()

    class Counting(GatedStorage):
        def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
            nonlocal running, most
            if ".data-" in path:
                with lock:
                    running += 1
                    most = max(most, running)
                time.sleep(0.002)
            elif ".index" in path:
                with lock:
                    running -= 1
            return super().create(path, nbytes, direct=direct, target=target)

    with gpusaver.Saver(state, storage=Counting(), max_to_keep=None) as saver:

        def several(thread: int) -> None:
            for number in range(5):
                step = 10 * thread + number
                if number % 2:
                    saver.save_async(tmp_path / "k", step)
                else:
                    saver.save(tmp_path / "k", step)
                assert isinstance(saver.last_checkpoints, list)

        futures = [in_thread(lambda thread=thread: several(thread)) for thread in range(4)]
        for future in futures:
            future.result(SECONDS)
    assert most == 1
    for thread in range(4):
        for number in range(5):
            assert gpusaver.load(tmp_path / f"k-{10 * thread + number}")["step"] == 1


def test_the_list_may_be_replaced_while_a_save_is_under_way(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    saver.save(tmp_path / "k", 1)
    pending = held(saver, storage, tmp_path / "k", global_step=2)
    saver.set_last_checkpoints([])
    storage.let_go()
    pending.result()
    assert saver.last_checkpoints == [f"{tmp_path}/k-2"]
