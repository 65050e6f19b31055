"""The newest checkpoint that is whole: verify, latest_checkpoint(verify=...), restore_latest, and strict saves."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver import finding
from gpusaver.bundle import crc
from gpusaver.bundle.index import Entry, encode_index
from gpusaver.bundle.layout import PHASE
from gpusaver.errors import DataLossError, InvalidArgumentError, NotFoundError, UnknownError
from gpusaver.storage.local import LocalStorage
from gpusaver.tensor import DataType, TensorSpec

GOLDEN = Path(__file__).parent / "golden"

State = dict[str, Any]


def state_of(number: int) -> State:
    return {
        "big": np.full(50_000, number, np.int64),
        "small": np.arange(5.0) + number,
        "text": f"number {number}",
        "empty": np.zeros((0, 3)),
    }


def save_all(directory: Path, *numbers: int, **options: Any) -> None:
    state = state_of(0)
    with gpusaver.Saver(state, max_to_keep=20, **options) as saver:
        for number in numbers:
            state.update(state_of(number))
            saver.save(directory / "k", number)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, int], object]] = {
    "index cut off": lambda d, n: os.truncate(d / f"k-{n}.index", 60),
    "index empty": lambda d, n: os.truncate(d / f"k-{n}.index", 0),
    "index changed": lambda d, n: flip(d / f"k-{n}.index", 20),
    "data missing": lambda d, n: (d / f"k-{n}.data-00000-of-00001").unlink(),
    "data cut off": lambda d, n: os.truncate(d / f"k-{n}.data-00000-of-00001", 399_000),
    "data empty": lambda d, n: os.truncate(d / f"k-{n}.data-00000-of-00001", 0),
}
CHANGES: dict[str, Callable[[Path, int], object]] = {
    "tensor changed": lambda d, n: flip(d / f"k-{n}.data-00000-of-00001", 70_000),
    "string changed": lambda d, n: flip(d / f"k-{n}.data-00000-of-00001", -1),
}


@pytest.mark.parametrize("damage", [*DAMAGES, *CHANGES])
def test_the_next_older_one(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save_all(tmp_path, 1, 2, 3)
    {**DAMAGES, **CHANGES}[damage](tmp_path, 3)
    state = state_of(7)
    with gpusaver.Saver(state) as saver:
        report = saver.restore_latest(tmp_path)
    assert report is not None
    assert report.prefix == f"{tmp_path}/k-2"
    np.testing.assert_equal(state, state_of(2))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{tmp_path}/k-3 is damaged, the next older one is tried" in caplog.text
    assert gpusaver.latest_checkpoint(tmp_path, verify="checksums") == f"{tmp_path}/k-2"
    assert gpusaver.latest_checkpoint(tmp_path, verify="structure") == f"{tmp_path}/k-{2 if damage in DAMAGES else 3}"
    problems = list(gpusaver.verify(tmp_path / "k-3"))
    assert problems
    assert all(f"{tmp_path}/k-3." in problem for problem in problems)
    assert bool(list(gpusaver.verify(tmp_path / "k-3", checksums=False))) == (damage in DAMAGES)


def test_nothing_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_all(tmp_path, 1, 2)
    for level in ("none", "structure", "checksums"):
        assert gpusaver.latest_checkpoint(tmp_path, verify=level) == f"{tmp_path}/k-2"
    assert list(gpusaver.verify(tmp_path / "k-1")) == []
    assert not caplog.records
    with pytest.raises(ValueError, match="verify: expected none, structure or checksums"):
        gpusaver.latest_checkpoint(tmp_path, verify="all")  # type: ignore[arg-type]


def test_golden_checkpoints_are_whole() -> None:
    for index in GOLDEN.rglob("*.index"):
        assert list(gpusaver.verify(index.with_suffix(""))) == [], index
    assert list(gpusaver.verify(GOLDEN / "v1_tf1" / "legacy.ckpt")) == []


def test_a_damaged_v1_checkpoint(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "v1_tf1" / "legacy.ckpt", tmp_path / "v1")
    flip(tmp_path / "v1", 100)
    assert f"{tmp_path}/v1" in " ".join(gpusaver.verify(tmp_path / "v1"))


@pytest.mark.parametrize("path", ["missing", "k-1.index", "checkpoint", "."])
def test_what_is_no_checkpoint_is_not_whole(tmp_path: Path, path: str) -> None:
    save_all(tmp_path, 1)
    assert len(list(gpusaver.verify(tmp_path / path))) == 1


def test_none_is_whole(tmp_path: Path) -> None:
    """A caller who was given None would begin anew, over what may still be saved by hand."""
    save_all(tmp_path, 1, 2)
    DAMAGES["data missing"](tmp_path, 1)
    DAMAGES["index empty"](tmp_path, 2)
    state = state_of(7)
    with gpusaver.Saver(state) as saver, pytest.raises(DataLossError, match=r"(?s)is whole.*k-2: .*k-1: ") as caught:
        saver.restore_latest(tmp_path)
    assert caught.value.modified == ()
    np.testing.assert_equal(state, state_of(7))
    with pytest.raises(DataLossError, match="is whole"):
        gpusaver.latest_checkpoint(tmp_path, verify="structure")


def test_there_is_none(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        assert gpusaver.latest_checkpoint(directory, verify="structure") is None
        with gpusaver.Saver(state_of(1)) as saver:
            assert saver.restore_latest(directory) is None


def test_variables_that_do_not_fit_are_no_damage(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)
    with gpusaver.Saver({"other": np.zeros(3)}) as saver, pytest.raises(NotFoundError, match="Key other not found"):
        saver.restore_latest(tmp_path)
    with gpusaver.Saver({"small": np.zeros(3)}) as saver, pytest.raises(InvalidArgumentError, match="shape"):
        saver.restore_latest(tmp_path)
    state = {"small": np.zeros(5), "other": np.ones(3)}
    with gpusaver.Saver(state) as saver:
        report = saver.restore_latest(tmp_path, partial=True)
    assert report is not None
    assert report.missing == ["other"]
    np.testing.assert_array_equal(state["small"], state_of(2)["small"])


# The state file may say anything

STATES = {
    "missing": (None, "k-100"),
    "empty": ("", "k-100"),
    "damaged": ("\x00\xff{", "k-100"),
    "of another machine": ('model_checkpoint_path: "/mnt/elsewhere/k-90"\n', "k-90"),
    "of Windows": ('model_checkpoint_path: "C:\\\\runs\\\\k-90"\n', "k-90"),
    "leads outside": ('model_checkpoint_path: "../secret"\n', "k-100"),
    "stale, names what is gone": (
        'model_checkpoint_path: "k-95"\nall_model_checkpoint_paths: "k-95"\nall_model_checkpoint_paths: "k-80"\n',
        "k-90",
    ),
    "set back by hand": ('model_checkpoint_path: "k-80"\nall_model_checkpoint_paths: "k-100"\n', "k-80"),
}


@pytest.mark.parametrize(("text", "expected"), STATES.values(), ids=STATES)
def test_any_state_file(tmp_path: Path, text: str | None, expected: str) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    save_all(directory, 80, 90, 100)
    (directory / "checkpoint").unlink()
    if text is not None:
        (directory / "checkpoint").write_text(text)
    for path in directory.iterdir():  # as after a copy
        os.utime(path, (1_000_000, 1_000_000))
    assert gpusaver.latest_checkpoint(directory, verify="structure") == f"{directory}/{expected}"
    state = state_of(0)
    with gpusaver.Saver(state) as saver:
        saver.restore_latest(directory)
    np.testing.assert_equal(state, state_of(int(expected[2:])))


def test_after_one_that_was_set_back_to_come_older_ones(tmp_path: Path) -> None:
    save_all(tmp_path, 70, 80, 90, 100)
    gpusaver.update_checkpoint_state(tmp_path, tmp_path / "k-80")
    DAMAGES["data missing"](tmp_path, 80)
    assert gpusaver.latest_checkpoint(tmp_path, verify="structure") == f"{tmp_path}/k-70"
    DAMAGES["data missing"](tmp_path, 70)
    assert gpusaver.latest_checkpoint(tmp_path, verify="structure") == f"{tmp_path}/k-90"


def test_between_names_the_time_decides(tmp_path: Path) -> None:
    for time, name in enumerate(["a-9", "b-1", "b-2", "c", "a-10"]):
        gpusaver.save(tmp_path / name, state_of(time))
        os.utime(tmp_path / f"{name}.index", (time + 1, time + 1))
    order = finding.candidates(str(tmp_path), None, allow_outside=False, storage=LocalStorage())
    assert [os.path.basename(prefix) for prefix in order] == ["a-10", "a-9", "c", "b-2", "b-1"]


def test_another_name_of_the_state_file(tmp_path: Path) -> None:
    save_all(tmp_path, 1)
    with gpusaver.Saver(state_of(2)) as saver:
        saver.save(tmp_path / "a", 1, latest_filename="other")
        report = saver.restore_latest(tmp_path, latest_filename="other")
        assert report is not None
        assert report.prefix == f"{tmp_path}/a-1"


def test_deleted_while_it_is_looked_at(tmp_path: Path) -> None:
    """By the retention of the process that writes."""
    save_all(tmp_path, 1, 2)

    class Deleting(LocalStorage):
        def open(self, path: str, *, uncached: bool = False) -> Any:
            if path == f"{tmp_path}/k-2.data-00000-of-00001":
                gpusaver.remove_checkpoint(tmp_path / "k-2")
            return super().open(path, uncached=uncached)

    state = state_of(7)
    with gpusaver.Saver(state, storage=Deleting()) as saver:
        report = saver.restore_latest(tmp_path)
    assert report is not None
    assert report.prefix == f"{tmp_path}/k-1"
    np.testing.assert_equal(state, state_of(1))


def test_a_disk_that_cannot_be_read(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)

    class Failing(LocalStorage):
        def open(self, path: str, *, uncached: bool = False) -> Any:
            if "k-2.data" in path:
                raise UnknownError(f"cannot open {path}: injected")
            return super().open(path, uncached=uncached)

    state = state_of(7)
    with gpusaver.Saver(state, storage=Failing()) as saver:
        saver.restore_latest(tmp_path)
    np.testing.assert_equal(state, state_of(1))
    assert "injected" in " ".join(gpusaver.verify(tmp_path / "k-2", storage=Failing()))


def write_bundle(prefix: Path, data: bytes, entries: list[tuple[bytes, Entry]]) -> None:
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
    Path(f"{prefix}.index").write_bytes(encode_index(1, sorted(entries)))


def test_tied_tensors_are_whole_and_read_once(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    entry = Entry(TensorSpec(DataType.uint8, (len(data),)), 0, 0, len(data), crc.mask(crc.crc32c(data)))
    write_bundle(tmp_path / "k", data, [(b"%05d" % number, entry) for number in range(500)])
    counted = Counting()
    assert list(gpusaver.verify(tmp_path / "k", storage=counted)) == []
    assert counted.nbytes < 2 * len(data)


def test_an_index_of_lies_does_not_have_the_file_read_for_each_line(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    spec = TensorSpec(DataType.uint8, (len(data),))
    write_bundle(tmp_path / "k", data, [(b"%05d" % n, Entry(spec, 0, 0, len(data), n + 1)) for n in range(500)])
    counted = Counting()
    problems = list(gpusaver.verify(tmp_path / "k", storage=counted))
    assert "claim the same bytes again and again" in problems[-1]
    assert counted.nbytes < 4 * len(data)


class Counting(LocalStorage):
    nbytes = 0

    def open(self, path: str, *, uncached: bool = False) -> Any:
        file = super().open(path, uncached=uncached)
        read_into = file.read_into

        def counted(offset: int, buffers: Any) -> None:
            self.nbytes += sum(buffer.nbytes for buffer in buffers)
            read_into(offset, buffers)

        file.read_into = counted  # type: ignore[method-assign]
        return file


# Strict saves


class Lying(LocalStorage):
    """Takes writes of one kind of file, and has something else on the disk once they are synced."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.uncached: list[str] = []

    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
        file = super().create(path, nbytes, direct=direct, target=target)
        sync = file.sync

        def sync_and_change() -> None:
            sync()
            if nbytes:
                flip(Path(path), PHASE)

        if self.kind and self.kind in path:
            file.sync = sync_and_change  # type: ignore[method-assign]
        return file

    def open(self, path: str, *, uncached: bool = False) -> Any:
        if uncached:
            self.uncached.append(path)
        return super().open(path, uncached=uncached)


@pytest.mark.parametrize("kind", [".data-", ".index"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_strict_save_that_cannot_be_read_again(tmp_path: Path, kind: str, direct: bool) -> None:
    save_all(tmp_path, 1)
    before = sorted(os.listdir(tmp_path))
    with gpusaver.Saver(state_of(2), strict=True, storage=Lying(kind), direct_io=direct) as saver:
        for path, step in ((tmp_path / "k", 2), (tmp_path / "k-1", None)):  # a new one, and over an existing one
            with pytest.raises(
                DataLossError, match=rf"(?s)cannot save {tmp_path}/k.*read again.*{kind}.*save elsewhere"
            ):
                saver.save(path, step)
    assert sorted(os.listdir(tmp_path)) == before
    assert gpusaver.latest_checkpoint(tmp_path, verify="checksums") == f"{tmp_path}/k-1"
    np.testing.assert_array_equal(gpusaver.load(tmp_path / "k-1")["big"], state_of(1)["big"])


def test_a_strict_save_reads_every_file_from_the_disk(tmp_path: Path) -> None:
    storage = Lying("")
    save_all(tmp_path, 1, strict=True, storage=storage)
    assert {path.partition(str(tmp_path))[2][:8] for path in storage.uncached} == {"/k-1.ind", "/k-1.dat"}
    assert list(gpusaver.verify(tmp_path / "k-1")) == []


def test_without_strict_a_lie_goes_unnoticed_until_the_restore(tmp_path: Path) -> None:
    save_all(tmp_path, 1)
    save_all(tmp_path, 2, storage=Lying(".data-"))
    assert gpusaver.latest_checkpoint(tmp_path, verify="checksums") == f"{tmp_path}/k-1"
