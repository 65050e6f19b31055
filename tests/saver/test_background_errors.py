"""Saves in the background that fail, are cancelled, or outlive their Saver: errors reach the user, once."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gated_storage import SECONDS, GatedStorage, held, in_thread, is_blocked, wait_until

import gpusaver
from gpusaver.errors import CancelledError, Error, FailedPreconditionError, UnknownError

ERROR = UnknownError("cannot write /disk/k: injected")


def test_at_result(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    pending = held(saver, storage, tmp_path / "k")
    storage.let_go(ERROR)
    for _ in range(2):
        with pytest.raises(UnknownError) as caught:
            pending.result()
        assert caught.value is ERROR
    assert pending.exception() is ERROR
    assert pending.report is None
    saver.save(tmp_path / "k")
    saver.close()


@pytest.mark.parametrize("method", ["save", "save_async"])
def test_at_the_next_save(
    saver: Any, storage: GatedStorage, tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    pending = held(saver, storage, tmp_path / "k", global_step=1)
    storage.let_go(ERROR)
    wait_until(pending.done)
    with pytest.raises(UnknownError) as caught:
        getattr(saver, method)(tmp_path / "k", 2)
    assert caught.value is ERROR
    assert not gpusaver.checkpoint_exists(tmp_path / "k-2")
    assert saver.save(tmp_path / "k", 3) == f"{tmp_path}/k-3"
    assert "k-1 in the background failed: cannot write /disk/k" in caplog.text
    saver.close()


@pytest.mark.parametrize("asked_in_vain", [False, True])
def test_at_close(saver: Any, storage: GatedStorage, tmp_path: Path, asked_in_vain: bool) -> None:
    pending = held(saver, storage, tmp_path / "k")
    if asked_in_vain:
        with pytest.raises(TimeoutError):
            pending.result(0.01)
        pending.cancelled()
    closing = in_thread(saver.close)
    assert is_blocked(closing)
    storage.let_go(ERROR)
    assert closing.exception(SECONDS) is ERROR
    saver.close()
    saver.close()


def test_at_the_end_of_the_with(state: Any, storage: GatedStorage, tmp_path: Path) -> None:
    def block() -> None:
        with gpusaver.Saver(state, storage=storage) as saver:
            held(saver, storage, tmp_path / "k")
            storage.let_go(UnknownError("injected"))

    with pytest.raises(UnknownError, match="injected"):
        block()


def test_another_error_is_not_masked(
    state: Any, storage: GatedStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def block() -> None:
        with gpusaver.Saver(state, storage=storage) as saver:
            held(saver, storage, tmp_path / "k")
            storage.let_go(UnknownError("injected"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert "while another exception was raised, a background save failed: injected" in caplog.text


def test_the_error_of_a_save_belongs_to_its_caller(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    """Another thread's next save must not fail for it, nor a close."""
    storage.hold()
    first = in_thread(lambda: saver.save(tmp_path / "k", 1))
    assert storage.arrived.wait(SECONDS)
    second = in_thread(lambda: saver.save(tmp_path / "k", 2))
    assert is_blocked(second)
    storage.let_go(ERROR)
    assert first.exception(SECONDS) is ERROR
    assert second.result(SECONDS) == f"{tmp_path}/k-2"


def test_an_error_while_capturing_starts_nothing(saver: Any, state: Any, tmp_path: Path) -> None:
    state["w"] = None
    with pytest.raises(TypeError, match=r"^w: None"):
        saver.save_async(tmp_path / "k")
    assert os.listdir(tmp_path) == []
    state["w"] = np.zeros(3)
    saver.save(tmp_path / "k")


@pytest.mark.parametrize("kind", [KeyError, SystemExit, KeyboardInterrupt, MemoryError])
def test_errors_of_any_kind(saver: Any, storage: GatedStorage, tmp_path: Path, kind: type[BaseException]) -> None:
    """Even what no storage should raise ends the save, and is passed on."""
    pending = held(saver, storage, tmp_path / "k", "replace")
    storage.let_go(kind("injected"))
    with pytest.raises(kind, match="injected"):
        pending.result()
    assert os.listdir(tmp_path) == []


def test_a_state_file_that_cannot_be_written_is_told_apart(
    saver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "x").touch()
    with pytest.raises(Error, match=r"checkpoint") as caught:
        saver.save(tmp_path / "k", 1)
    assert caught.value.__notes__ == [f"The checkpoint {tmp_path}/k-1 itself is complete; no state file lists it."]
    assert gpusaver.load(tmp_path / "k-1")["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "k-1.data-00000-of-00001", "k-1.index", "k-1.meta"]


# -- cancel


@pytest.mark.parametrize("capture", ["snapshot", "deferred"])
def test_cancel(saver: Any, storage: GatedStorage, tmp_path: Path, capture: str) -> None:
    first = saver.save(tmp_path / "k", 1)
    before = sorted(os.listdir(tmp_path))
    pending = held(saver, storage, tmp_path / "k", global_step=2, capture=capture)
    assert pending.cancel()
    assert pending.cancel()
    storage.let_go()
    with pytest.raises(CancelledError) as caught:
        pending.result()
    assert isinstance(caught.value, concurrent.futures.CancelledError)
    assert pending.cancelled()
    assert pending.wait_captured(0)
    assert sorted(os.listdir(tmp_path)) == before
    assert saver.last_checkpoints == [first]


def test_a_save_that_was_cancelled_is_no_error_later(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    pending = held(saver, storage, tmp_path / "k", global_step=1)
    assert pending.cancel()
    storage.let_go()
    saver.save(tmp_path / "k", 2)
    pending = held(saver, storage, tmp_path / "k", global_step=3)
    assert pending.cancel()
    storage.let_go()
    saver.close()
    assert not gpusaver.checkpoint_exists(tmp_path / "k-3")


def test_too_late_to_cancel(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    pending = held(saver, storage, tmp_path / "k", "replace")
    assert not pending.cancel()
    assert not pending.cancelled()
    storage.let_go()
    assert pending.result() == f"{tmp_path}/k"
    assert not pending.cancel()


# -- the end


def test_after_close(saver: Any, tmp_path: Path) -> None:
    prefix = saver.save(tmp_path / "k")
    saver.close()
    for call in (lambda: saver.save(prefix), lambda: saver.save_async(prefix), lambda: saver.restore(prefix)):
        with pytest.raises(FailedPreconditionError, match="this Saver is closed"):
            call()
    assert saver.last_checkpoints == [prefix]
    with pytest.raises(FailedPreconditionError), saver:
        saver.save(prefix)


def test_close_waits(saver: Any, storage: GatedStorage, tmp_path: Path) -> None:
    pending = held(saver, storage, tmp_path / "k")
    closing = in_thread(saver.close)
    assert is_blocked(closing)
    storage.let_go()
    closing.result(SECONDS)
    assert pending.done()
    assert gpusaver.checkpoint_exists(tmp_path / "k")


def test_no_thread_is_left(saver: Any, state: Any, tmp_path: Path) -> None:
    state["w"] = np.zeros(3_000_000)
    saver.restore(saver.save_async(tmp_path / "k").result())
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("gpusaver")])


def test_a_saver_nobody_holds_finishes(state: Any, storage: GatedStorage, tmp_path: Path) -> None:
    pending = held(gpusaver.Saver(state, storage=storage), storage, tmp_path / "k")
    storage.let_go()
    assert pending.result() == f"{tmp_path}/k"


def test_without_threads_it_is_done_at_once(state: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with gpusaver.Saver(state) as saver:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        pending = saver.save_async(tmp_path / "k")
        assert pending is not None
        assert pending.done()
        assert saver.restore(pending.result()).restored == ["step", "w"]
