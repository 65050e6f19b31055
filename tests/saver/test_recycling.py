"""Data files of checkpoints that are given up, written over by the next save."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver.errors import ResourceExhaustedError
from gpusaver.pipeline import recycling
from gpusaver.storage.local import RECYCLED_FILE_SYSTEMS, LocalStorage, file_system

SECONDS = 60


@pytest.fixture(autouse=True)
def _small_files_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if file_system(tmp_path.stat().st_dev) not in RECYCLED_FILE_SYSTEMS or sys.platform != "linux":
        pytest.skip("nothing is written over on this file system")
    monkeypatch.setattr(recycling, "RECYCLED_MIN_NBYTES", 1000)


@pytest.fixture
def state() -> dict[str, Any]:
    return {"w": np.zeros(70_000), "b": np.zeros(33, np.float32), "n": np.zeros((), np.int64)}


@pytest.fixture
def saver(state: dict[str, Any]) -> Iterator[gpusaver.Saver]:
    with gpusaver.Saver(state, max_to_keep=1, recycle=True) as saver:
        yield saver


def fill(state: dict[str, Any], value: int) -> None:
    for array in state.values():
        array[...] = value


def save(saver: gpusaver.Saver, state: dict[str, Any], directory: Path, step: int) -> None:
    fill(state, step)
    saver.save(directory / "k", step)


def spares(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith("-tmp")]


def data_file(directory: Path, step: int) -> Path:
    return directory / f"k-{step}.data-00000-of-00001"


def test_the_file_of_the_checkpoint_before_the_last(
    tmp_path: Path, saver: gpusaver.Saver, state: dict[str, Any]
) -> None:
    inodes = []
    for step in range(1, 7):
        save(saver, state, tmp_path, step)
        inodes.append(data_file(tmp_path, step).stat().st_ino)
        assert (gpusaver.load(tmp_path / f"k-{step}")["w"] == step).all()
        assert len(spares(tmp_path)) == (step > 1)
    assert inodes[0] == inodes[2] == inodes[4] != inodes[1] == inodes[3] == inodes[5]
    assert gpusaver.checkpoint_exists(tmp_path / "k-6")
    assert not gpusaver.checkpoint_exists(tmp_path / "k-5")
    saver.close()
    assert not spares(tmp_path)


def test_of_a_prefix_that_is_saved_again(tmp_path: Path, saver: gpusaver.Saver, state: dict[str, Any]) -> None:
    inodes = []
    for step in range(4):
        fill(state, step)
        saver.save(tmp_path / "k")
        inodes.extend(path.stat().st_ino for path in tmp_path.glob("k.data-00000-of-0000?"))
        assert (gpusaver.load(tmp_path / "k")["w"] == step).all()
    assert inodes[0] == inodes[2] != inodes[1] == inodes[3]


def test_without_the_option_nothing_stays(tmp_path: Path, state: dict[str, Any]) -> None:
    with gpusaver.Saver(state, max_to_keep=1) as saver:
        for step in range(3):
            save(saver, state, tmp_path, step)
            assert not spares(tmp_path)


def test_small_files_do_not_stay(
    tmp_path: Path, saver: gpusaver.Saver, state: dict[str, Any], monkeypatch: Any
) -> None:
    monkeypatch.undo()
    for step in range(3):
        save(saver, state, tmp_path, step)
        assert not spares(tmp_path)


@pytest.mark.parametrize("direct", [None, False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_files_are_what_new_ones_would_be(tmp_path: Path, direct: bool | None, sharded: bool) -> None:
    """Between tensors, too, where a spare has other bytes."""
    rng = np.random.default_rng(0)
    with gpusaver.variables():
        sizes = (1, 5000, 40_000, 3, 200_000, 131_072)
        arrays = {f"v{number}": rng.integers(1, 255, nbytes, np.uint8) for number, nbytes in enumerate(sizes)}
        variables: dict[str, Any] = dict(arrays)
        for name in ("v1", "v4"):
            variables[name] = gpusaver.Variable(arrays[name], name, device="cpu:1")
    for name in ("new", "over"):
        (tmp_path / name).mkdir()
    with (
        gpusaver.Saver(variables, sharded=sharded, direct_io=direct) as new,
        gpusaver.Saver(variables, sharded=sharded, direct_io=direct, max_to_keep=1, recycle=True) as over,
    ):
        for step in range(4):
            for path in (tmp_path / "over").glob("*-tmp"):
                path.write_bytes(b"\xff" * path.stat().st_size)
            for array in arrays.values():
                array += 1
            for saver, name in ((new, "new"), (over, "over")):
                saver.save(tmp_path / name / "k", step, write_meta_graph=False)
            names = [path.name for path in (tmp_path / "new").glob(f"k-{step}.*")]
            assert len(names) == (3 if sharded else 2)
            for name in names:
                assert (tmp_path / "over" / name).read_bytes() == (tmp_path / "new" / name).read_bytes(), name
            assert len(spares(tmp_path / "over")) == (step > 0) * (2 if sharded else 1)


def test_whoever_reads_a_checkpoint_keeps_it(tmp_path: Path, saver: gpusaver.Saver, state: dict[str, Any]) -> None:
    save(saver, state, tmp_path, 1)
    with data_file(tmp_path, 1).open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    save(saver, state, tmp_path, 2)
    os.link(data_file(tmp_path, 2), tmp_path / "backup")
    for step in (3, 4, 5):
        save(saver, state, tmp_path, step)
    with view:
        assert np.float64(1).tobytes() in view[:5000]
    assert np.float64(2).tobytes() in (tmp_path / "backup").read_bytes()[:5000]


def test_spares_of_another_directory_go(tmp_path: Path, saver: gpusaver.Saver, state: dict[str, Any]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for step in (1, 2):
        save(saver, state, tmp_path / "a", step)
    assert len(spares(tmp_path / "a")) == 1
    for step in (3, 4, 5):
        save(saver, state, tmp_path / "b", step)
    assert not spares(tmp_path / "a")
    assert len(spares(tmp_path / "b")) == 1


def test_no_more_stay_than_a_save_needs(tmp_path: Path, state: dict[str, Any]) -> None:
    with gpusaver.Saver(state, max_to_keep=None) as saver:
        for step in range(5):
            save(saver, state, tmp_path, step)
    with gpusaver.Saver(state, max_to_keep=1, recycle=True) as saver:
        saver.set_last_checkpoints_with_time((str(tmp_path / f"k-{step}"), float(step)) for step in range(5))
        save(saver, state, tmp_path, 5)
        assert len(spares(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.glob("k-*.index")) == ["k-5.index"]


def test_a_spare_that_somebody_has_removed(tmp_path: Path, saver: gpusaver.Saver, state: dict[str, Any]) -> None:
    """As does the first save of another Saver, which takes it for what a killed one has left."""
    save(saver, state, tmp_path, 1)
    save(saver, state, tmp_path, 2)
    with gpusaver.Saver({"other": np.zeros(9)}) as other:
        other.save(tmp_path / "k", 100, write_state=False)
    assert not spares(tmp_path)
    for step in (3, 4):
        save(saver, state, tmp_path, step)
        assert (gpusaver.load(tmp_path / f"k-{step}")["w"] == step).all()
    assert len(spares(tmp_path)) == 1


class _Full(LocalStorage):
    def free_nbytes(self, directory: str) -> int | None:
        return 40_000


def test_a_spare_is_room(tmp_path: Path, state: dict[str, Any]) -> None:
    storage = _Full()
    with gpusaver.Saver(state, max_to_keep=1, recycle=True, storage=storage) as saver:
        with pytest.raises(ResourceExhaustedError, match="40,000 bytes free"):
            save(saver, state, tmp_path, 1)
        storage.free_nbytes = lambda directory: 1 << 30  # type: ignore[method-assign]
        save(saver, state, tmp_path, 1)
        save(saver, state, tmp_path, 2)
        del storage.free_nbytes
        save(saver, state, tmp_path, 3)
    assert (gpusaver.load(tmp_path / "k-3")["w"] == 3).all()


def test_a_managers_checkpoints(tmp_path: Path, state: dict[str, Any]) -> None:
    saver = gpusaver.Saver(state, recycle=True)
    with gpusaver.CheckpointManager(saver, tmp_path, 1, checkpoint_name="k") as manager:
        for step in range(4):
            fill(state, step)
            manager.save(step)
            assert len(spares(tmp_path)) == (step > 0)
        assert (gpusaver.load(tmp_path / "k-3")["w"] == 3).all()
        manager.close()
    saver.close()
    assert not spares(tmp_path)


_SCRIPT = """
import os, sys
import numpy as np
import gpusaver
from gpusaver.pipeline import recycling

recycling.RECYCLED_MIN_NBYTES = 1000
state = {"w": np.zeros(70_000)}
saver = gpusaver.Saver(state, max_to_keep=1, recycle=True)
for step in range(3):
    saver.save(sys.argv[1] + "/k", step)
if sys.argv[2] == "fork" and os.fork() == 0:
    saver.close()
    sys.exit()
if sys.argv[2] == "fork":
    assert os.wait()[1] == 0
if sys.argv[2] != "end":
    os._exit(0)  # as by a signal: nothing is cleaned up
"""


@pytest.mark.parametrize(("how", "left"), [("end", 0), ("killed", 1), ("fork", 1)])
def test_what_is_left_when_the_process_ends(tmp_path: Path, state: dict[str, Any], how: str, left: int) -> None:
    """Without ``close``; a forked child takes nothing away from its parent."""
    subprocess.run([sys.executable, "-c", _SCRIPT, str(tmp_path), how], check=True, timeout=SECONDS)
    assert len(spares(tmp_path)) == left
    with gpusaver.Saver(state) as saver:
        save(saver, state, tmp_path, 9)
    assert not spares(tmp_path)


def test_not_with_ranks(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="recycle: only without comm"):
        gpusaver.Saver(state, recycle=True, comm=object())
