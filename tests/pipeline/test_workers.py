"""Threads that work off jobs: the first error wins, none is left behind, none is started for nothing."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from gpusaver.errors import CancelledError
from gpusaver.pipeline.workers import LazySlot, Slots, work_off


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("gpusaver-worker")]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("jobs", [0, 1, 2, 50])
def test_every_job_once(jobs: int, threads: int) -> None:
    done: list[int] = []
    work_off(range(jobs), lambda job, slot: done.append(job), Slots(10), threads)
    assert sorted(done) == list(range(jobs))
    assert not workers()


@pytest.mark.parametrize(("jobs", "started"), [(0, 0), (1, 0), (2, 1), (3, 2), (9, 3)])
def test_no_more_threads_than_jobs(jobs: int, started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    start = threading.Thread.start

    def counting(thread: threading.Thread) -> None:
        nonlocal count
        count += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", counting)
    work_off(range(jobs), lambda job, slot: None, Slots(10), 4)
    assert count == started


def test_the_first_error_is_raised_and_stops_the_others() -> None:
    second_may_fail = threading.Event()
    done: list[int] = []

    def work(job: int, slot: LazySlot) -> None:
        if job == 0:
            second_may_fail.set()
            raise ValueError("first")
        if job == 1:
            second_may_fail.wait(10)
            time.sleep(0.05)
            raise KeyError("second")
        done.append(job)

    with pytest.raises(ValueError, match="first"):
        work_off(range(10_000), work, Slots(10), 2)
    assert not done
    assert not workers()


def test_an_error_of_the_jobs_themselves() -> None:
    def jobs() -> Iterator[int]:
        yield from range(5)
        raise OSError("no more")

    done: list[int] = []
    with pytest.raises(OSError, match="no more"):
        work_off(jobs(), lambda job, slot: done.append(job), Slots(10), 2)
    assert sorted(done) == list(range(5))


def test_where_no_thread_can_be_started_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    who: list[threading.Thread] = []
    work_off(range(20), lambda job, slot: who.append(threading.current_thread()), Slots(10), 4)
    assert who == [threading.current_thread()] * 20


def test_cancelled_between_jobs() -> None:
    cancelled = threading.Event()
    done: list[int] = []

    def work(job: int, slot: LazySlot) -> None:
        done.append(job)
        if job == 3:
            cancelled.set()

    with pytest.raises(CancelledError):
        work_off(range(100), work, Slots(10), 1, cancelled)
    assert done == [0, 1, 2, 3]


def test_cancelled_after_the_last_job_is_for_the_caller_to_see() -> None:
    cancelled = threading.Event()
    work_off(range(1), lambda job, slot: cancelled.set(), Slots(10), 2, cancelled)


def test_slots_are_made_when_needed_and_reused() -> None:
    slots = Slots(8192)
    seen: set[int] = set()

    def work(job: int, slot: LazySlot) -> None:
        if job % 2:
            memory = slot.get()
            assert memory.nbytes == 8192
            memory[:4] = job.to_bytes(4, "little")
            time.sleep(0.001)
            assert int.from_bytes(memory[:4], "little") == job  # nobody else has it
            seen.add(id(slot.get().obj))

    for _ in range(3):
        work_off(range(20), work, slots, 3)
    assert 1 <= len(seen) <= 3
    first = slots.borrow()
    slots.give_back(first)
    assert slots.borrow() is first
    slots.close()


def test_slots_come_back_after_an_error() -> None:
    slots = Slots(4096)

    def work(job: int, slot: LazySlot) -> None:
        slot.get()
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        work_off(range(3), work, slots, 1)
    first = slots.borrow()
    assert first is not slots.borrow()


@pytest.mark.parametrize("moment", ["while working", "while waiting"])
def test_ctrl_c_waits_for_the_threads(moment: str) -> None:
    """The arrays that they fill belong to the caller again when work_off has raised."""
    helper_works, main_is_done = threading.Event(), threading.Event()
    finished: list[int] = []

    def work(job: int, slot: LazySlot) -> None:
        if threading.current_thread() is threading.main_thread():
            assert helper_works.wait(10)
            if moment == "while working":
                raise KeyboardInterrupt
            main_is_done.set()
            return
        helper_works.set()
        if moment == "while waiting":
            assert main_is_done.wait(10)
            time.sleep(0.05)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)
        finished.append(job)

    with pytest.raises(KeyboardInterrupt):
        work_off(range(2), work, Slots(10), 2)
    assert len(finished) == 1
    assert not workers()
