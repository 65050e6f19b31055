"""Reading what no writer of ours produces: indexes that promise what is not there, and how often files are touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpusaver
from gpusaver import (
    DataLossError,
    DataType,
    InvalidArgumentError,
    OutOfRangeError,
    PartitionedVariable,
    ResourceExhaustedError,
    TensorSlice,
    TensorSpec,
    UnimplementedError,
)
from gpusaver.bundle.crc import crc32c, mask
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.index import BundleIndex, encode_index
from gpusaver.bundle.slices import slice_key
from gpusaver.storage.local import LocalStorage

ZEROS = bytes(64)
#: More than any machine has memory for.
HUGE = 2**45


def write(directory: Path, entries: Sequence[tuple[bytes, Entry]]) -> Path:
    """A checkpoint with these index entries and 64 bytes of data."""
    prefix = directory / "model"
    Path(f"{prefix}.index").write_bytes(encode_index(1, sorted(entries)))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(ZEROS)
    return prefix


def stored(*shape: int, dtype: DataType = DataType.float32) -> Entry:
    spec = TensorSpec(dtype, shape)
    return Entry(spec, 0, 0, spec.nbytes, mask(crc32c(ZEROS[: spec.nbytes])))


def partitioned(shape: tuple[int, ...], *parts: TensorSlice) -> Entry:
    return Entry(TensorSpec(DataType.float32, shape), 0, 0, 0, 0, parts)


def part(start: int, length: int) -> TensorSlice:
    return TensorSlice(((start, length),))


FIRST, REST = part(0, 4), part(4, HUGE - 4)


@pytest.mark.parametrize(
    ("error", "entries"),
    [
        (OutOfRangeError, [(b"x", stored(HUGE))]),
        (InvalidArgumentError, [(b"x", partitioned((HUGE,), FIRST)), (slice_key(b"x", FIRST), stored(4))]),
        (DataLossError, [(b"x", partitioned((HUGE,), FIRST, REST)), (slice_key(b"x", FIRST), stored(4))]),
        (
            OutOfRangeError,
            [
                (b"x", partitioned((HUGE,), FIRST, REST)),
                (slice_key(b"x", FIRST), stored(4)),
                (slice_key(b"x", REST), stored(HUGE - 4)),
            ],
        ),
        (UnimplementedError, [(b"x", stored(*[1] * 65))]),
        (UnimplementedError, [(b"x", stored(0, 2**62))]),
    ],
)
def test_no_memory_for_what_is_not_there(tmp_path: Path, error: type[gpusaver.Error], entries: Any) -> None:
    prefix = write(tmp_path, entries)
    with pytest.raises(error, match="x"):
        gpusaver.load(prefix)


def test_more_than_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path, [(b"x", stored(4))])

    def no_memory(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(np, "empty", no_memory)
    with pytest.raises(ResourceExhaustedError, match=r"tensor x: .* float32\[4\]"):
        gpusaver.load(prefix)


@pytest.mark.parametrize("shape", [(0, 2**62), (1,) * 65])
def test_reshape_from_what_numpy_cannot_hold(tmp_path: Path, shape: tuple[int, ...]) -> None:
    prefix = write(tmp_path, [(b"x", stored(*shape))])
    array = np.ones(min(shape), np.float32)
    with pytest.raises(UnimplementedError, match="x"):
        gpusaver.Saver({"x": array}, reshape=True).restore(prefix)


class CountingStorage(LocalStorage):
    """Notes every file that is opened and every byte that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.nbytes = 0

    def open(self, path: str) -> Any:
        self.opened.append(Path(path).name)
        file = super().open(path)

        def noted(inner: Callable[..., None]) -> Callable[..., None]:
            def read(place: int | Sequence[int], buffers: Any) -> None:
                self.nbytes += sum(buffer.nbytes for buffer in buffers)
                inner(place, buffers)

            return read

        file.read_into = noted(file.read_into)  # type: ignore[method-assign]
        file.read_each = noted(file.read_each)  # type: ignore[method-assign]
        return file


def test_names_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``list(reader)`` asks for their number, too."""
    prefix = gpusaver.Saver({"b": np.zeros(2), "a": np.zeros(3)}).save(tmp_path / "k")
    asked = []
    tensors = BundleIndex.tensors
    monkeypatch.setattr(BundleIndex, "tensors", lambda index: asked.append(index) or tensors(index))
    reader = gpusaver.CheckpointReader(prefix)
    assert list(reader) == list(reader) == ["a", "b"]
    assert len(reader) == 2
    assert len(asked) == 1


def test_many_tensors_do_not_open_a_file_each(tmp_path: Path) -> None:
    prefix = gpusaver.save(tmp_path / "model", {f"t{number}": np.zeros(3) for number in range(100)})
    storage = CountingStorage()
    reader = gpusaver.load_checkpoint(prefix, storage=storage)
    assert len(reader.get_tensors(list(reader))) == 100
    assert storage.opened.count("model.data-00000-of-00001") <= 2


@pytest.mark.parametrize("cut", [1, 4])
def test_parts_that_lie_in_one_stored_part_read_it_once(tmp_path: Path, cut: int) -> None:
    """However many parts of a tensor are wanted, its bytes are read, and held, once."""
    table = np.arange(64 * 1000, dtype=np.int64).reshape(64, 1000)
    rows = [np.s_[start : start + 64 // cut, :] for start in range(0, 64, 64 // cut)]
    prefix = gpusaver.save(tmp_path / "model", {"t": [PartitionedVariable(table.shape, r, table[r]) for r in rows]})
    found = np.zeros_like(table)
    columns = [np.s_[:, start : start + 125] for start in range(0, 1000, 125)]
    storage = CountingStorage()
    state = {"t": [PartitionedVariable(table.shape, c, found[c]) for c in columns]}
    gpusaver.Saver(state, storage=storage).restore(prefix)
    assert (found == table).all()
    assert table.nbytes <= storage.nbytes < 1.1 * table.nbytes
