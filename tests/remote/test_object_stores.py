"""Saving, restoring and looking at checkpoints whose prefix is a URL."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3_server

import gpusaver
from gpusaver.bundle.layout import LARGE_NBYTES, PHASE
from gpusaver.errors import FailedPreconditionError, NotFoundError, UnknownError
from gpusaver.storage import object_store
from gpusaver.storage.object_store import MAX_PARTS, ObjectStorage, part_size
from gpusaver.storage.routing import RoutedStorage

DEADLINE_SECONDS = 60.0


def state_of(number: int) -> dict[str, Any]:
    """More than one part, and every kind of value."""
    random = np.random.default_rng(number)
    return {
        "big": random.integers(0, 255, 20_000_001, np.uint8),
        "small": random.random(5, np.float32),
        "strided": random.random((20, 30))[:, ::2],
        "step": number,
        "text": f"number {number}",
    }


def assert_holds(prefix: str, number: int) -> None:
    state = state_of(999)
    with gpusaver.Saver(state) as saver:
        saver.restore(prefix)
    np.testing.assert_equal(state, state_of(number))


def names(root: str) -> list[str]:
    return RoutedStorage().list(root)


def test_what_was_saved_is_restored_and_found(root: str) -> None:
    state = state_of(0)
    with gpusaver.Saver(state, max_to_keep=2) as saver:
        for number in range(4):
            state.update(state_of(number))
            prefix = saver.save(f"{root}/run/model.ckpt", number)
            assert prefix == f"{root}/run/model.ckpt-{number}"
        assert saver.last_checkpoints == [f"{root}/run/model.ckpt-2", prefix]
        for number in (2, 3):
            assert_holds(f"{root}/run/model.ckpt-{number}", number)
        report = saver.restore_latest(f"{root}/run")
        assert report is not None
        assert report.prefix == prefix
    kept = [f"model.ckpt-{n}.{end}" for n in (2, 3) for end in ("data-00000-of-00001", "index", "meta")]
    assert names(f"{root}/run") == ["checkpoint", *kept]
    assert gpusaver.latest_checkpoint(f"{root}/run") == prefix
    assert gpusaver.latest_checkpoint(f"{root}/run", verify="checksums") == prefix
    assert list(gpusaver.verify(prefix)) == []
    assert gpusaver.checkpoint_exists(prefix)
    assert gpusaver.get_checkpoint_mtimes([prefix])[0] == pytest.approx(time.time(), abs=600)
    assert ("big", [20_000_001]) in gpusaver.list_variables(f"{root}/run")
    assert gpusaver.load_variable(prefix, "small").tolist() == state_of(3)["small"].tolist()
    assert gpusaver.wait_for_new_checkpoint(f"{root}/run", timeout=0) == prefix
    with gpusaver.variables(), gpusaver.import_meta_graph(f"{prefix}.meta") as other:
        other.restore(prefix)
    gpusaver.remove_checkpoint(f"{root}/run/model.ckpt-2")
    assert not gpusaver.checkpoint_exists(f"{root}/run/model.ckpt-2")
    assert len(names(f"{root}/run")) == 4
    with pytest.raises(NotFoundError, match=f"no checkpoint {root}/run/none"):
        gpusaver.CheckpointReader(f"{root}/run/none")


def test_saves_in_the_background_and_strict(root: str) -> None:
    state = state_of(1)
    with gpusaver.Saver(state, strict=True) as saver:
        pending = saver.save_async(f"{root}/k", 1)
        assert pending is not None
        state["big"] = state_of(2)["big"]
        assert_holds(pending.result(), 1)


def test_the_same_prefix_again(root: str) -> None:
    state = state_of(0)
    with gpusaver.Saver(state) as saver:
        for number in range(3):
            state.update(state_of(number))
            assert_holds(saver.save(f"{root}/k"), number)
    assert len([name for name in names(root) if ".data-" in name]) in (1, 2)
    assert len(names(root)) <= 5


def test_data_files_of_several_devices_go_up_side_by_side(root: str) -> None:
    with gpusaver.variables():
        variables = [
            gpusaver.Variable(np.random.default_rng(n).random(3_000_000), name=f"v{n}", device=f"cpu:{n % 3}")
            for n in range(6)
        ]
    with gpusaver.Saver(variables, sharded=True) as saver:
        prefix = saver.save(f"{root}/k", 1)
    assert len([name for name in names(root) if ".data-" in name]) == 3
    for variable in variables:
        np.testing.assert_array_equal(gpusaver.load_variable(prefix, variable.name), variable.value)


def test_a_checkpoint_manager(root: str) -> None:
    state = {"w": np.zeros(3)}
    with gpusaver.CheckpointManager(state, f"{root}/run", max_to_keep=2) as manager:
        for number in range(4):
            state["w"] += 1
            manager.save(number)
        assert manager.latest_checkpoint == f"{root}/run/ckpt-3"
    with gpusaver.CheckpointManager(state, f"{root}/run", max_to_keep=2) as manager:
        manager.save(4)
    found = gpusaver.get_checkpoint_state(f"{root}/run")
    assert found is not None
    assert list(found.all_model_checkpoint_paths) == [f"{root}/run/ckpt-3", f"{root}/run/ckpt-4"]
    assert gpusaver.load_variable(f"{root}/run", "w").tolist() == [4.0] * 3


def test_of_two_managers_of_one_directory_the_first_learns_of_the_second(root: str) -> None:
    with gpusaver.CheckpointManager({"w": np.zeros(3)}, f"{root}/run") as first:
        first.save(0)
        with gpusaver.CheckpointManager({"w": np.ones(3)}, f"{root}/run") as second:
            second.save(1)
        with pytest.raises(FailedPreconditionError, match=r"checkpoint\.manager\.json"):
            first.save(2)
    assert gpusaver.latest_checkpoint(f"{root}/run") == f"{root}/run/ckpt-1"


class Gate(RoutedStorage):
    """Waits, before it replaces the file of that name, until the others are there as well, or have failed."""

    def __init__(self, name: str, barrier: threading.Barrier) -> None:
        super().__init__()
        self._name = name
        self._barrier = barrier
        self._has_waited = False

    def replace(self, source: str, target: str) -> None:
        if target.endswith(self._name) and not self._has_waited:
            self._has_waited = True
            with contextlib.suppress(threading.BrokenBarrierError):
                self._barrier.wait(DEADLINE_SECONDS)
        super().replace(source, target)


def in_threads(*calls: Any) -> list[Any]:
    """What each returns, or its error."""
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("nbytes", [100, 9_000_000])
def test_two_savers_write_one_prefix_at_the_same_time(root: str, exists: bool, nbytes: int) -> None:
    """One is told that the other was faster, as soon as it claims its data file or when it comes to the index; what is
    there is the other's, whole."""
    if exists:
        gpusaver.save(f"{root}/k", {"w": np.zeros(nbytes, np.uint8)})
    barrier = threading.Barrier(2)

    def save(number: int) -> str:
        with gpusaver.Saver({"w": np.full(nbytes, number, np.uint8)}, storage=Gate(".index", barrier)) as saver:
            try:
                return saver.save(f"{root}/k", write_state=False)
            except FailedPreconditionError:
                barrier.abort()
                raise

    results = in_threads(lambda: save(1), lambda: save(2))
    (winner,) = [number for number in (1, 2) if results[number - 1] == f"{root}/k"]
    assert isinstance(results[2 - winner], FailedPreconditionError)
    assert f"{root}/k" in str(results[2 - winner])
    assert (gpusaver.load_variable(f"{root}/k", "w") == winner).all()
    assert list(gpusaver.verify(f"{root}/k")) == []
    before = PHASE if nbytes >= LARGE_NBYTES else 0
    assert sum(object_size(f"{root}/{name}") for name in names(root) if ".data-" in name) == before + nbytes


def test_two_savers_replace_one_state_file_at_the_same_time(root: str) -> None:
    """The one that comes second keeps what the first has listed."""
    barrier = threading.Barrier(2)

    def save(number: int) -> str:
        with gpusaver.Saver({"w": np.full(3, number)}, storage=Gate("/checkpoint", barrier)) as saver:
            return saver.save(f"{root}/k{number}", 7)

    prefixes = in_threads(lambda: save(1), lambda: save(2))
    found = gpusaver.get_checkpoint_state(root)
    assert found is not None
    assert set(found.all_model_checkpoint_paths) == set(prefixes) == {f"{root}/k1-7", f"{root}/k2-7"}
    assert found.model_checkpoint_path in prefixes


def test_parts_of_an_upload() -> None:
    assert part_size(1) == part_size(80 << 30 >> 4) == 8 << 20
    for nbytes in (MAX_PARTS * (8 << 20) + 1, 5 << 40):
        size = part_size(nbytes)
        assert size % (1 << 20) == 0
        assert (nbytes - 1) // size < MAX_PARTS
        assert (nbytes - 1) // (size - (1 << 20)) >= MAX_PARTS


def test_an_object_that_is_replaced_while_it_is_read(root: str) -> None:
    prefix = gpusaver.save(f"{root}/k", {"w": np.zeros(9)})
    storage = RoutedStorage()
    file = storage.open(f"{prefix}.index")
    storage.remove(f"{prefix}.index")
    gpusaver.save(f"{root}/k", {"w": np.ones(19)})
    with pytest.raises(UnknownError, match="was replaced while it was being read"):
        file.read_into(0, [memoryview(bytearray(9))])


def test_uploads_end_without_a_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while the interpreter shuts down."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    storage = RoutedStorage()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        file = storage.create("memory://threads/f", 17_000_000)
        for offset in range(0, 17_000_000, 1_000_000):
            file.write_at(offset, [memoryview(bytes([offset // 1_000_000]) * 1_000_000)])
        file.sync()
    found = bytearray(17_000_000)
    storage.open("memory://threads/f").read_into(0, [memoryview(found)])
    assert found == b"".join(bytes([n]) * 1_000_000 for n in range(17))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_is_told(root: str) -> None:
    gpusaver.save(f"{root}/k", {"w": np.zeros(9)})
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            gpusaver.load(f"{root}/k")
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    assert told.startswith("FailedPreconditionError")
    assert "forked child" in told


KILLED_SCRIPT = """
import sys, numpy as np, gpusaver
from gpusaver.storage import object_store, upload

def slow(self, part, add=upload.Upload.add):
    add(self, part)
    if part[:1] == b"\\2":
        print("under way", flush=True)
        sys.stdin.read()  # killed here

upload.Upload.add = slow
w = np.full(60_000_000, 1, np.uint8)
with gpusaver.Saver({"w": w}) as saver:
    saver.save(sys.argv[1], 1)
    print("saved", flush=True)
    w[:] = 2
    saver.save(sys.argv[1], 2)
"""


def test_killed_in_the_middle_of_an_upload(s3: str, tmp_path: Path) -> None:
    root = "s3://bucket/killed"
    script = tmp_path / "script.py"
    script.write_text(KILLED_SCRIPT)
    process = subprocess.Popen([sys.executable, script, f"{root}/k"], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    assert [process.stdout.readline() for _ in range(2)] == ["saved\n", "under way\n"]
    process.kill()
    process.wait()
    process.stdout.close()
    process.stdin.close()
    assert gpusaver.latest_checkpoint(root, verify="checksums") == f"{root}/k-1"
    assert not gpusaver.checkpoint_exists(f"{root}/k-2")
    state = {"w": np.zeros(60_000_000, np.uint8)}
    with gpusaver.Saver(state) as saver:
        report = saver.restore_latest(root)
        assert report is not None
        assert report.prefix == f"{root}/k-1"
        assert (state["w"] == 1).all()
        saver.save(f"{root}/k", 2)
        saver.save(f"{root}/k", 2)
    assert list(gpusaver.verify(f"{root}/k-2")) == []
    # What is left of the claim went with the save of the same prefix; the upload is the bucket's rule's to remove.
    sizes = {name: object_size(f"{root}/{name}") for name in names(root) if name.startswith("k-2.data-")}
    assert sum(sizes.values()) == PHASE + 60_000_000
    left = [key for key in s3_server.uploads(s3) if key.startswith("killed/")]
    assert left == ["killed/k-2.data-00000-of-00001"]


def object_size(path: str) -> int:
    return RoutedStorage().open(path).size


def test_an_answer_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ObjectStorage("memory://short")
    file = storage.create("memory://short/f", 10)
    file.sync()
    found = storage.open("memory://short/f")

    class Short:
        def bytes(self) -> bytes:
            return b"123"

    monkeypatch.setattr(object_store.obstore, "get", lambda *_, **__: Short())
    with pytest.raises(gpusaver.OutOfRangeError, match="expected 9 bytes at offset 1, found 3"):
        found.read_into(1, [memoryview(bytearray(9))])
