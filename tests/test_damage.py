"""A damaged checkpoint is never read silently: every single flipped bit, every truncation, missing and swapped files.

The checkpoint is small, so that all of it can be tried: two shards, numbers of every width, strings, a partitioned
tensor, and an index of which every bit is flipped too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from damage_tools import exact, is_refused, outcome

import gpusaver
from gpusaver import DataLossError, Error, InvalidArgumentError, NotFoundError, OutOfRangeError, PartitionedVariable
from gpusaver.bundle.index import BundleIndex
from gpusaver.bundle.layout import PHASE

CountCases = Callable[[int], None]

INDEX = "model.index"
DATA = ("model.data-00000-of-00002", "model.data-00001-of-00002")
#: What the variables hold before a restore; no tensor has this byte.
UNTOUCHED = 0xEE
ON_SECOND_SHARD = ("f32", "u8", "words")


def saved_arrays() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {
        "bf": np.array([1.5, -2, 3], ml_dtypes.bfloat16),
        "bool": np.array([True, False]),
        "c64": np.array([1 + 2j], np.complex64),
        "empty": np.zeros((0, 2), np.float32),
        "f32": rng.integers(-100, 100, (2, 3)).astype(np.float32),
        "int4": np.array([-8, 7, 1], ml_dtypes.int4),
        "scalar": np.array(3.25),
        "table": rng.integers(0, 100, (4, 3)).astype(np.int16),
        "text": np.array(b"one string", object),
        "u8": np.arange(5, dtype=np.uint8),
        "words": np.array([b"", b"abc", b"\0\xff"], object),
    }


def untouched(array: Any) -> Any:
    """What a restore is to overwrite; strings are replaced."""
    if array.dtype == object:
        return np.full(array.shape, b"untouched", object)
    fresh = np.empty_like(array)
    fresh.reshape(-1).view(np.uint8)[:] = UNTOUCHED
    return fresh


def parts_of(table: Any) -> list[PartitionedVariable]:
    grid = (np.s_[0:1, :], np.s_[1:4, 0:2], np.s_[1:4, 2:3])
    return [PartitionedVariable(table.shape, index, table[index]) for index in grid]


class Checkpoint:
    """A checkpoint on disk, to be damaged and mended, and two ways to read it."""

    def __init__(self, directory: Path) -> None:
        self.prefix = directory / "model"
        with gpusaver.variables():
            state: dict[str, Any] = saved_arrays()
            for name in ON_SECOND_SHARD:
                state[name] = gpusaver.Variable(state[name], name, device="cpu:1")
            state["table"] = parts_of(state["table"])
            gpusaver.Saver(state, sharded=True).save(self.prefix, write_state=False, write_meta_graph=False)
        self.files = {name: (directory / name).read_bytes() for name in os.listdir(directory)}
        assert set(self.files) == {INDEX, *DATA}
        self.values = exact(gpusaver.load(self.prefix))
        self.untouched = {name: untouched(array) for name, array in saved_arrays().items()}
        self.arrays = {name: array.copy() for name, array in self.untouched.items()}
        self.state = self.arrays | {"table": parts_of(self.arrays["table"])}
        self.saver = gpusaver.Saver(self.state, restore_sequentially=True)

    def path(self, name: str) -> Path:
        return self.prefix.parent / name

    def load(self) -> dict[str, Any]:
        return exact(gpusaver.load(self.prefix))

    def restore(self, verify: Any = "during") -> dict[str, Any]:
        """What variables hold after a restore.  If it fails, an error that owns up to what it has overwritten."""
        for name, array in self.arrays.items():
            array[...] = self.untouched[name]
            self.state[name] = array if name != "table" else self.state[name]
        error = outcome(lambda: self.saver.restore(self.prefix, verify=verify))
        if not isinstance(error, Error):
            return self.held()
        before, found = exact(self.untouched), self.held()
        changed = {name for name in found if found[name] != before[name]}
        assert changed <= set(getattr(error, "modified", ())), f"{changed} were overwritten: {error}"
        assert not changed or verify == "during"
        raise error

    def held(self) -> dict[str, Any]:
        return exact({name: array if name == "table" else self.state[name] for name, array in self.arrays.items()})

    def tensors_by_byte(self, shard: int) -> dict[int, str]:
        """Offset in a data file -> name of the tensor that the byte belongs to."""
        found = {}
        for key, entry in BundleIndex(self.files[INDEX], INDEX).items():
            name = "table" if key.startswith(b"\0") else key.decode()
            if entry.shard == shard:
                found |= dict.fromkeys(range(entry.offset, entry.offset + entry.nbytes), name)
        return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("damage"))


def test_undamaged(checkpoint: Checkpoint) -> None:
    assert checkpoint.values == exact(saved_arrays())
    assert checkpoint.load() == checkpoint.values
    for verify in ("during", "before"):
        assert checkpoint.restore(verify) == checkpoint.values


def test_every_flipped_bit_of_the_index(checkpoint: Checkpoint, count_cases: CountCases) -> None:
    path, original = checkpoint.path(INDEX), checkpoint.files[INDEX]
    harmless = 0
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(original)):
            at = bit // 8
            os.pwrite(file.fileno(), bytes((original[at] ^ 1 << bit % 8,)), at)
            refused = is_refused(checkpoint.load, checkpoint.values, str(path))
            assert is_refused(checkpoint.restore, checkpoint.values, str(path)) == refused
            harmless += not refused
            os.pwrite(file.fileno(), original[at : at + 1], at)
    # The footer's padding and the metaindex block, which is empty, say nothing.
    assert 0 < harmless < 8 * 64
    count_cases(8 * len(original))


@pytest.mark.parametrize("shard", [0, 1])
def test_every_flipped_bit_of_every_tensor(checkpoint: Checkpoint, shard: int, count_cases: CountCases) -> None:
    path, original = checkpoint.path(DATA[shard]), checkpoint.files[DATA[shard]]
    owners = checkpoint.tensors_by_byte(shard)
    assert len(owners) == len(original), "every byte of a small data file belongs to a tensor"
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(original)):
            at = bit // 8
            os.pwrite(file.fileno(), bytes((original[at] ^ 1 << bit % 8,)), at)
            for read in (checkpoint.load, checkpoint.restore):
                assert is_refused(read, checkpoint.values, str(path), owners[at])
            if bit % 8 == 0:
                assert is_refused(lambda: checkpoint.restore("before"), checkpoint.values, str(path), owners[at])
            os.pwrite(file.fileno(), original[at : at + 1], at)
    count_cases(8 * len(original))


@pytest.mark.parametrize("name", [INDEX, *DATA])
def test_every_truncation(checkpoint: Checkpoint, name: str, count_cases: CountCases) -> None:
    path, original = checkpoint.path(name), checkpoint.files[name]
    try:
        for nbytes in reversed(range(len(original))):
            os.truncate(path, nbytes)
            for read in (checkpoint.load, checkpoint.restore):
                assert is_refused(read, checkpoint.values, str(path))
    finally:
        path.write_bytes(original)
    count_cases(len(original))


@pytest.mark.parametrize("name", [INDEX, *DATA])
def test_a_file_that_is_missing(checkpoint: Checkpoint, name: str) -> None:
    path, aside = checkpoint.path(name), checkpoint.prefix.parent / "aside"
    path.rename(aside)
    try:
        missing = name if name == INDEX else str(path)
        with pytest.raises(NotFoundError, match=missing):
            checkpoint.load()
        with pytest.raises(InvalidArgumentError if name == INDEX else NotFoundError, match=missing):
            checkpoint.restore()
    finally:
        aside.rename(path)


def test_bytes_behind_the_end(checkpoint: Checkpoint) -> None:
    """They belong to nothing in a data file (O_DIRECT leaves such); an index has its footer at the end."""
    for name, original in checkpoint.files.items():
        path = checkpoint.path(name)
        path.write_bytes(original + b"more")
        for read in (checkpoint.load, checkpoint.restore):
            assert is_refused(read, checkpoint.values, str(path)) == (name == INDEX)
        path.write_bytes(original)


def test_data_files_that_changed_places(checkpoint: Checkpoint) -> None:
    first, second = (checkpoint.path(name) for name in DATA)
    for padding in (b"", bytes(64)):  # as they are, one is too short; then only checksums tell
        first.write_bytes(checkpoint.files[DATA[1]] + padding)
        second.write_bytes(checkpoint.files[DATA[0]])
        for read in (checkpoint.load, checkpoint.restore, lambda: checkpoint.restore("before")):
            with pytest.raises(DataLossError if padding else OutOfRangeError, match=str(checkpoint.prefix)):
                read()
    for name in DATA:
        checkpoint.path(name).write_bytes(checkpoint.files[name])
    assert checkpoint.restore() == checkpoint.values


def test_the_index_of_another_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The same names, shapes and places, but other values."""
    other = tmp_path / "model"
    with gpusaver.variables():
        state = saved_arrays() | {"f32": np.ones((2, 3), np.float32)}
        for name in ON_SECOND_SHARD:
            state[name] = gpusaver.Variable(state[name], name, device="cpu:1")
        state["table"] = parts_of(state["table"])
        gpusaver.Saver(state, sharded=True).save(other, write_state=False)
    path = checkpoint.path(INDEX)
    path.write_bytes(Path(f"{other}.index").read_bytes())
    for read in (checkpoint.load, checkpoint.restore):
        assert is_refused(read, checkpoint.values, str(checkpoint.path(DATA[1])), "f32")
    path.write_bytes(checkpoint.files[INDEX])


def test_the_bytes_between_tensors_carry_nothing(tmp_path: Path) -> None:
    """Large tensors begin 16 bytes into a page; what lies before them is not theirs."""
    prefix, nbytes = tmp_path / "model", 128 * 1024 + 12
    arrays = {"a": np.full(nbytes, 1, np.uint8), "b": np.full(nbytes, 2, np.uint8), "c": np.full(5, 3, np.uint8)}
    gpusaver.save(prefix, arrays)
    index = BundleIndex(Path(f"{prefix}.index").read_bytes(), INDEX)
    path = Path(f"{prefix}.data-00000-of-00001")
    data = np.frombuffer(bytearray(path.read_bytes()), np.uint8)
    gaps = np.ones(len(data), bool)
    for _, entry in index.items():
        gaps[entry.offset : entry.offset + entry.nbytes] = False
    assert gaps.sum() == PHASE + 4096 - 12
    data[gaps] ^= 0xFF
    path.write_bytes(data)
    assert exact(gpusaver.load(prefix)) == exact(arrays)
