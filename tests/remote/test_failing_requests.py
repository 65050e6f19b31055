"""Requests that fail: what was there before is there afterwards, and nothing half done is committed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import obstore
import pytest
import s3_server
from proxy import Fault, Proxy
from size import sized

import gpusaver
from gpusaver.errors import Error, UnknownError
from gpusaver.storage import object_store
from gpusaver.storage.object_store import ObjectStorage

CountCases = Callable[[int], None]

#: Goes up in two parts.
LARGE_NBYTES = 9_000_000
_numbers = itertools.count()


def fill(state: dict[str, Any], number: int) -> None:
    state["big"][...] = number
    state["small"][...] = number


def new_state(number: int, nbytes: int = LARGE_NBYTES) -> dict[str, Any]:
    state = {"big": np.zeros(nbytes, np.uint8), "small": np.zeros(5, np.float32)}
    fill(state, number)
    return state


def assert_whole(prefix: str, number: int, storage: Any) -> None:
    """Bit by bit; and every checksum is right."""
    assert list(gpusaver.verify(prefix, storage=storage)) == []
    reader = gpusaver.CheckpointReader(prefix, storage=storage)
    assert (reader["big"] == number).all()
    assert (reader["small"] == number).all()


def check_after(root: str, storage: Any, error: Error | None) -> None:
    """After ``k-1`` was saved, and ``k-2`` was or was not."""
    assert_whole(f"{root}/k-1", 1, storage)
    is_there = gpusaver.checkpoint_exists(f"{root}/k-2", storage=storage)
    if is_there:
        assert_whole(f"{root}/k-2", 2, storage)
    if error is None:
        assert is_there
    else:
        assert root in str(error)
    latest = gpusaver.latest_checkpoint(root, storage=storage)
    assert latest in ((f"{root}/k-1", f"{root}/k-2") if is_there else (f"{root}/k-1",))
    assert error is not None or latest == f"{root}/k-2"


def spoilt_at(n: int, fault: Fault, *, for_ever: bool) -> Callable[[int, str, str], Fault | None]:
    return lambda number, method, path: fault if number == n or (for_ever and number > n) else None


@pytest.fixture
def through_proxy(proxy: Proxy) -> ObjectStorage:
    """Repeats a request once, and soon."""
    return ObjectStorage("s3://bucket", store_at(proxy.endpoint))


@pytest.fixture
def direct(s3_endpoint: str) -> ObjectStorage:
    return ObjectStorage("s3://bucket", store_at(s3_endpoint))


def store_at(endpoint: str, timeout_seconds: float = 10.0) -> Any:
    return obstore.store.S3Store(
        "bucket",
        endpoint=endpoint,
        region="us-east-1",
        access_key_id="the-access-key",
        secret_access_key="the-secret-key",
        client_options={"allow_http": True, "timeout": timedelta(seconds=timeout_seconds)},
        retry_config={"max_retries": 1, "backoff": {"init_backoff": timedelta(milliseconds=5)}},
    )


@pytest.fixture(autouse=True)
def no_long_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_ATTEMPTS", 2)
    monkeypatch.setattr(object_store, "_FIRST_DELAY_SECONDS", 0.005)


@pytest.mark.parametrize(
    ("fault", "for_ever"),
    sized(
        [("error", True), ("lost", False)],
        [("error", False), ("error", True), ("drop", False), ("drop", True), ("lost", False), ("lost", True)],
    ),
)
def test_any_request_of_a_save(
    through_proxy: ObjectStorage,
    direct: ObjectStorage,
    proxy: Proxy,
    s3_endpoint: str,
    fault: Fault,
    for_ever: bool,
    count_cases: CountCases,
) -> None:
    """The n-th, or all from the n-th on."""
    failed = 0
    for n in itertools.count():
        root = f"s3://bucket/requests/{next(_numbers)}"
        state = new_state(1)
        proxy.arm()
        with gpusaver.Saver(state, storage=through_proxy) as saver:
            saver.save(f"{root}/k", 1)
            fill(state, 2)
            proxy.arm(spoilt_at(n, fault, for_ever=for_ever))
            error: Error | None = None
            try:
                saver.save(f"{root}/k", 2)
            except Error as caught:
                error = caught
                failed += 1
            is_reached = n < len(proxy.log)
            proxy.arm()
            check_after(root, direct, error)
            if not for_ever:
                left = [key for key in s3_server.uploads(s3_endpoint) if root.endswith(key.rpartition("/")[0])]
                # obstore aborts what it could not end, but does not know of an upload whose beginning was not answered.
                assert len(left) <= (fault == "lost")
                assert error is None  # each request is made again
            fill(state, 3)
            assert_whole(saver.save(f"{root}/k", 3), 3, direct)
        if not is_reached:
            break
        assert n < 60
    assert n > 10
    assert for_ever == bool(failed)
    count_cases(n)


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_server_that_does_not_answer(direct: ObjectStorage, proxy: Proxy, method: str) -> None:
    impatient = ObjectStorage("s3://bucket", store_at(proxy.endpoint, 1.0))
    root = f"s3://bucket/requests/{next(_numbers)}"
    state = new_state(1)
    with gpusaver.Saver(state, storage=impatient) as saver:
        saver.save(f"{root}/k", 1)
        fill(state, 2)
        proxy.arm(lambda number, asked, path: "stall" if asked == method and ".data-" in path else None)
        with pytest.raises(UnknownError, match=f"cannot write {root}/k-2") as caught:
            saver.save(f"{root}/k", 2)
        proxy.arm()
        check_after(root, direct, caught.value)
        fill(state, 3)
        assert_whole(saver.save(f"{root}/k", 3), 3, direct)


@pytest.mark.parametrize("fault", sized(["error"], ["error", "drop", "lost"]))
def test_any_request_of_a_restore(
    through_proxy: ObjectStorage, direct: ObjectStorage, proxy: Proxy, fault: Fault, count_cases: CountCases
) -> None:
    """Once: nothing is to be seen of it.  From then on: an error, and a state that says what was touched."""
    root = f"s3://bucket/requests/{next(_numbers)}"
    prefix = gpusaver.Saver(new_state(1), storage=direct).save(f"{root}/k")
    for n, for_ever in ((n, for_ever) for n in itertools.count() for for_ever in (False, True)):
        assert n < 60
        state = new_state(2)
        with gpusaver.Saver(state, storage=through_proxy) as saver:
            proxy.arm(spoilt_at(n, fault, for_ever=for_ever))
            try:
                saver.restore(prefix, verify="before")
            except Error as error:
                told = str(error)
            else:
                assert (state["big"] == 1).all()
                told = ""
        if not for_ever and n >= len(proxy.log):
            break
        assert for_ever == (root in told)
    assert n > 3
    count_cases(2 * n)


class Failing:
    """Stands for the functions of obstore: the n-th call fails, before or after it is done."""

    NAMES = ("put", "get", "head", "delete", "list", "list_with_delimiter", "copy")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fail_at: int | None = None
        self.for_ever = False
        self.is_done = False
        for name in self.NAMES:
            monkeypatch.setattr(object_store.obstore, name, functools.partial(self._call, getattr(obstore, name)))

    def arm(self, fail_at: int | None, *, for_ever: bool = False, is_done: bool = False) -> None:
        self.count, self.fail_at, self.for_ever, self.is_done = 0, fail_at, for_ever, is_done

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        number = self.count
        self.count += 1
        fails = self.fail_at is not None and (number == self.fail_at or (self.for_ever and number > self.fail_at))
        if not fails:
            return function(*args, **kwargs)
        if self.is_done:
            function(*args, **kwargs)
        elif function is obstore.put and isinstance(args[2], Iterator):
            next(args[2])  # it fails when some of it is there
        raise obstore.exceptions.GenericError("injected")


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_any_call_of_obstore(
    monkeypatch: pytest.MonkeyPatch, again: bool, for_ever: bool, is_done: bool, count_cases: CountCases
) -> None:
    """With ``again`` the save that fails replaces one of the same prefix, else it is a new one that deletes another."""
    failing = Failing(monkeypatch)
    failed = 0
    for n in itertools.count():
        root = f"memory://calls/{next(_numbers)}"
        storage = ObjectStorage("memory://calls", obstore.store.MemoryStore())
        state = new_state(0, 9_000_000)
        failing.arm(None)
        with gpusaver.Saver(state, storage=storage, max_to_keep=2) as saver:
            for number in (0, 1):
                fill(state, number)
                saver.save(f"{root}/k", number)
            fill(state, 2)
            failing.arm(n, for_ever=for_ever, is_done=is_done)
            error: Error | None = None
            try:
                saver.save(f"{root}/k", 1 if again else 2)
            except Error as caught:
                error = caught
                failed += 1
            is_reached = n < failing.count
            failing.arm(None)
            if again:
                found = int(gpusaver.CheckpointReader(f"{root}/k-1", storage=storage)["small"][0])
                assert found in (1, 2)
                assert error is not None or found == 2
                assert_whole(f"{root}/k-1", found, storage)
                assert_whole(f"{root}/k-0", 0, storage)
            else:
                check_after(root, storage, error)
            fill(state, 3)
            assert_whole(saver.save(f"{root}/k", 3), 3, storage)
            found_state = gpusaver.get_checkpoint_state(root, storage=storage)
            assert found_state is not None
            for path in found_state.all_model_checkpoint_paths:
                assert list(gpusaver.verify(path, storage=storage)) == []
        if not is_reached:
            break
        assert n < 100
    assert n > 10
    assert failed
    count_cases(n)


def test_a_lost_answer_is_not_taken_for_another_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The put was done; its repetition is refused by the store, because it was done."""
    storage = ObjectStorage("memory://answers")
    put = obstore.put
    lost: list[Any] = []

    def lose(*args: Any, **kwargs: Any) -> Any:
        answer = put(*args, **kwargs)
        if kwargs.get("mode") is not None and len(lost) < 3:
            lost.append(kwargs["mode"])
            put(*args, **kwargs)  # raises, as a repetition inside obstore would
        return answer

    monkeypatch.setattr(object_store.obstore, "put", lose)
    state = new_state(1)
    with gpusaver.Saver(state, storage=storage) as saver:
        saver.save("memory://answers/k")
        lost.clear()
        fill(state, 2)
        saver.save("memory://answers/k")
        assert len(lost) == 3
    assert_whole("memory://answers/k", 2, storage)
