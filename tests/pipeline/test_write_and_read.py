"""Through files and back: any arrays, any subset, into memory of any layout, with and without O_DIRECT."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import gpusaver
from gpusaver import saving
from gpusaver.bundle import layout
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.layout import PHASE
from gpusaver.device import HOST, Transfer
from gpusaver.device.host import HostRuntime, address, allocate_pages
from gpusaver.pipeline import direct as direct_io
from gpusaver.pipeline import restore, save
from gpusaver.storage.local import LocalStorage
from gpusaver.tensor import DataType, TensorSpec

DTYPES = ["?", "u1", "<i2", ">f4", "<f8", "<c16", ml_dtypes.bfloat16]
PLACES = ["own", "fortran", "strided", "reversed", "big-endian", "read-only"]


@pytest.fixture(autouse=True, scope="module")
def small_scale() -> Iterator[None]:
    """Chunks of two pages, tensors that are large from one page on, and no waiting for the disk."""
    with (
        mock.patch.object(layout, "LARGE_NBYTES", 4096),
        mock.patch.object(save, "CHUNK_NBYTES", 8192),
        mock.patch.object(saving, "CHUNK_NBYTES", 8192),
        mock.patch.object(direct_io, "IN_PLACE_NBYTES", 4096),
        mock.patch.object(restore, "CHUNK_NBYTES", 8192),
        mock.patch.object(restore, "_STAGED_NBYTES", 1024),
        mock.patch.object(restore, "_MAX_GAP", 4096),
        mock.patch.object(os, "fsync"),
    ):
        yield


def in_huge_pages(answer: bool) -> contextlib.AbstractContextManager[Any]:
    """As if all memory lay in huge pages, or none."""
    found = (lambda begin, end: (begin, end)) if answer else (lambda begin, end: (begin, begin))
    return mock.patch.object(direct_io, "huge_region", found)


def content(number: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 2, shape).astype(dtype)


def empty_in(place: str, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array of zeros with that shape and type, in memory of another kind."""
    zeros = np.zeros(like.shape, like.dtype)
    if place == "fortran":
        return np.zeros(like.shape, like.dtype, order="F")
    if place == "strided" and like.ndim:
        return np.zeros((*like.shape[:-1], 2 * like.shape[-1]), like.dtype)[..., ::2]
    if place == "reversed" and like.ndim:
        return zeros[::-1]
    if place == "big-endian" and like.dtype.kind in "iufc":
        return zeros.astype(like.dtype.newbyteorder(">"))
    if place == "read-only":
        zeros.flags.writeable = False
    return zeros


shapes = st.one_of(
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.tuples(st.integers(1, 40), st.integers(1, 120)),
    st.tuples(st.integers(1, 20_000)),
)
states = st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.sampled_from(PLACES)), min_size=1, max_size=12)


@given(states, st.sampled_from([False, True]), st.booleans(), st.data())
def test_any_subset_comes_back(
    given_state: list[tuple[Any, Any, str]], direct: bool, huge_pages: bool, data: st.DataObject
) -> None:
    expected = {f"t{n:02d}": content(n, shape, dtype) for n, (shape, dtype, _) in enumerate(given_state)}
    sources = {name: empty_in(place, expected[name]) for name, (_, _, place) in zip(expected, given_state, strict=True)}
    for name, array in sources.items():
        array.flags.writeable = True
        array[...] = expected[name]
    wanted = data.draw(st.sets(st.sampled_from(sorted(expected)), min_size=1))
    places = data.draw(st.lists(st.sampled_from(PLACES), min_size=len(wanted), max_size=len(wanted)))
    verify = data.draw(st.sampled_from(["during", "before"]))
    with tempfile.TemporaryDirectory() as directory:
        with gpusaver.Saver(sources, direct_io=direct) as saver, in_huge_pages(huge_pages):
            prefix = saver.save(os.path.join(directory, "k"))
        targets = {name: empty_in(place, expected[name]) for name, place in zip(sorted(wanted), places, strict=True)}
        state = dict(targets)
        with gpusaver.Saver(state) as saver:
            report = saver.restore(prefix, verify=verify)
        for name in wanted:
            np.testing.assert_array_equal(state[name], expected[name])
            assert (state[name] is targets[name]) == targets[name].flags.writeable
        assert report.restored == sorted(wanted)
        assert report.unexpected == sorted(set(expected) - wanted)
        read = gpusaver.CheckpointReader(prefix).get_tensors(sorted(wanted))
        assert {name: read[name].tobytes() for name in wanted} == {
            name: expected[name].astype(expected[name].dtype.newbyteorder("<")).tobytes()
            if expected[name].dtype.byteorder == ">"
            else expected[name].tobytes()
            for name in wanted
        }


@given(
    st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 3000), st.integers(0, 1)), max_size=60),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@example([(9000, 1000, 0)] * 20 + [(9000, 1000, 1)] * 20, True, Random(1))
@example([(9000, 1000, 0), (10, 1000, 0)] * 5 + [(10, 1000, 0)] * 20, True, Random(2))
def test_jobs_read_every_byte_once_and_fit_a_slot(
    places: list[tuple[int, int, int]], is_local: bool, random: Any
) -> None:
    ends, entries = [0, 0], []
    for gap, nbytes, shard in places:
        entries.append(Entry(TensorSpec(DataType.uint8, (nbytes,)), shard, ends[shard] + gap, nbytes, 0))
        ends[shard] += gap + nbytes
    random.shuffle(entries)
    reads = restore.Reads()
    for number, entry in enumerate(entries):
        reads.add(entry, HOST, np.empty(entry.nbytes, np.uint8), str(number), in_place=True)
    scattered, parts = restore._jobs(reads, 4096, is_local=is_local)
    found = []
    for job in scattered:
        assert job.nbytes <= restore.CHUNK_NBYTES
        assert [piece.offset for piece in job.pieces] == list(np.cumsum([0, *job.sizes[:-1]]))
        found += [(tensor, 0, size) for tensor, size in zip(job.tensors, job.sizes, strict=True)]
        assert [(entries[t].shard, entries[t].offset) for t in job.tensors] == [(job.shard, o) for o in job.offsets]
    for part in parts or []:
        assert part.nbytes <= restore.CHUNK_NBYTES
        found += [(tensor, start, nbytes) for tensor, start, _, nbytes in part.pieces]
    whole = {number: entry.nbytes for number, entry in enumerate(entries) if entry.nbytes}
    reached = dict.fromkeys(whole, 0)
    for tensor, start, nbytes in sorted(found):
        assert start == reached[tensor]
        reached[tensor] += nbytes
    assert reached == whole


@pytest.mark.parametrize(
    ("together", "is_local", "is_read_alone"), [(8, True, True), (9, True, False), (2, False, False)]
)
def test_few_that_lie_together_are_read_one_by_one(together: int, is_local: bool, is_read_alone: bool) -> None:
    """A chunk for each few costs several times as much, but for a request of an object store."""
    reads = restore.Reads()
    for number in range(5 * together):
        spec, offset = TensorSpec(DataType.uint8, (100,)), number * 100 + number // together * 100_000
        reads.add(Entry(spec, 0, offset, 100, 0), HOST, np.empty(100, np.uint8), str(number), in_place=True)
    scattered, parts = restore._jobs(reads, 65536, is_local=is_local)
    assert [len(job.tensors) for job in scattered] == [5 * together] * is_read_alone
    assert len(list(parts or [])) == (0 if is_read_alone else 5)


class Watching(LocalStorage):
    """Keeps the buffers of every write by offset; ``gate`` holds the writes back."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, list[Any]] = {}
        self.gate = threading.Event()

    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
        file = super().create(path, nbytes, direct=direct, target=target)
        write_at = file.write_at

        def note(offset: int, buffers: Any) -> None:
            assert self.gate.wait(10)
            self.written[offset] = buffers
            write_at(offset, buffers)

        if ".data-" in path:
            file.write_at = note  # type: ignore[method-assign]
        return file


def test_pages_of_arrays_are_written_from_where_they_are(tmp_path: Path) -> None:
    """Around the page cache: all but the first and the last bytes, which are copied along with their neighbours."""
    storage = Watching()
    memory = allocate_pages(65536)
    memory[:] = content(1, (65536,), np.uint8)
    arrays = {
        "a": memory[PHASE : PHASE + 20000],
        "b": memory[24576 + PHASE : 45000],
        "c": memory[50001:50010],
        "d": memory[50016:60000],  # at another phase
    }
    expected = {name: array.copy() for name, array in arrays.items()}
    with gpusaver.Saver(arrays, direct_io=True, storage=storage) as saver, in_huge_pages(True):
        pending = saver.save_async(tmp_path / "k", capture="deferred")
        assert pending is not None
        waiter = threading.Thread(target=pending.fence)
        waiter.start()
        waiter.join(0.1)
        assert waiter.is_alive()  # the arrays are read until they are written
        storage.gate.set()
        prefix = pending.result()
        waiter.join(10)
        assert not waiter.is_alive()
        first = dict(storage.written)
        shares = sum(b.nbytes for bs in first.values() for b in bs if np.shares_memory(np.frombuffer(b, "B"), memory))
        assert shares == sum(
            (end // 4096 - -(-start // 4096)) * 4096 for start, end in ((PHASE, PHASE + 20000), (24576 + PHASE, 45000))
        )
        assert all(
            offset % 4096 == 0 and address(np.frombuffer(b, "B")) % 4096 == 0 and b.nbytes % 4096 == 0
            for offset, bs in first.items()
            for b in bs
        )
        assert {name: array.tobytes() for name, array in gpusaver.load(prefix).items()} == {
            name: array.tobytes() for name, array in expected.items()
        }


def test_a_snapshot_is_written_from_where_it_lies(tmp_path: Path) -> None:
    """It lies in memory as in the file, wherever the arrays do; the file is the one that a copying save writes."""
    storage = Watching()
    storage.gate.set()
    arrays = {"a": content(1, (20000,), np.uint8), "b": content(2, (5, 1001), np.int32)}
    with gpusaver.Saver(arrays, direct_io=True, storage=storage) as saver, in_huge_pages(True):
        pending = saver.save_async(tmp_path / "k", capture="snapshot")
        assert pending is not None
        pending.result()
        (memory,) = saver._saving._snapshots.values()
        written = [np.frombuffer(b, "B") for bs in storage.written.values() for b in bs]
        assert (
            sum(octets.nbytes for octets in written if np.shares_memory(octets, memory)) == 2 * 12288
        )  # but for the ends
    with gpusaver.Saver(arrays, direct_io=True) as saver:
        saver.save(tmp_path / "l")
    assert (tmp_path / "k.data-00000-of-00001").read_bytes() == (tmp_path / "l.data-00000-of-00001").read_bytes()


def test_files_do_not_tell_where_arrays_lay(tmp_path: Path) -> None:
    values = content(1, (20000,), np.uint8)
    files = []
    for shift in (0, PHASE, 1000):
        array = allocate_pages(24096)[shift : shift + 20000]
        array[:] = values
        with gpusaver.Saver({"a": array}, direct_io=True) as saver, in_huge_pages(True):
            saver.save(tmp_path / "k")
        (data_file,) = (path for path in tmp_path.iterdir() if ".data-" in path.name and path.stat().st_size)
        files.append(data_file.read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("direct", [False, True])
def test_files_end_where_the_layout_says(tmp_path: Path, direct: bool) -> None:
    """Padding for O_DIRECT is cut off, and the gaps between tensors are zeros, not what a slot held before."""
    arrays = {"a": np.full(4097, 255, np.uint8), "b": np.full(5001, 255, np.uint8), "c": np.full(3, 255, np.uint8)}
    with gpusaver.Saver(arrays, direct_io=direct) as saver:
        for _ in range(2):
            prefix = saver.save(tmp_path / "k")
    (data_file,) = (path for path in tmp_path.iterdir() if ".data-" in path.name and path.stat().st_size)
    stored = data_file.read_bytes()
    start = bytes(PHASE)
    assert stored == start + b"\xff" * 4097 + bytes(4095) + b"\xff" * 5004
    assert gpusaver.load(prefix).keys() == arrays.keys()


def test_files_in_the_page_cache_are_filled_side_by_side(tmp_path: Path) -> None:
    """One thread at a time can write to a file there, so each thread finds another one to write to."""
    written: list[str] = []

    class Noting(LocalStorage):
        def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
            file = super().create(path, nbytes, direct=direct, target=target)
            write_at = file.write_at

            def note(offset: int, buffers: Any) -> None:
                written.append(f"{(target or path).rpartition('.data-')[2][:5]}:{offset}")
                write_at(offset, buffers)

            file.write_at = note  # type: ignore[method-assign]
            return file

    with gpusaver.variables():
        state = [gpusaver.Variable(content(n, (20000,), np.uint8), f"v{n}", device=f"cpu:{n}") for n in range(2)]
    saver = gpusaver.Saver(state, sharded=True, direct_io=False, storage=Noting())
    with mock.patch.object(saving, "_THREADS", 1):
        prefix = saver.save(tmp_path / "k")
    assert written[:6] == [f"0000{shard}:{offset}" for offset in (0, 8192, 16384) for shard in (0, 1)]
    assert {name: array.tobytes() for name, array in gpusaver.load(prefix).items()} == {
        variable.name: variable.value.tobytes() for variable in state
    }


def test_where_offsets_must_ascend_they_do(tmp_path: Path) -> None:
    """As object stores want it: one thread, file by file."""
    written: dict[str, list[int]] = {}

    class Ordered(LocalStorage):
        def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> Any:
            file = super().create(path, nbytes, direct=direct, target=target)
            file.ordered = True
            write_at = file.write_at

            def note(offset: int, buffers: Any) -> None:
                time.sleep(0.005 * (len(written.setdefault(path, [])) % 2))  # another thread would come first
                written[path].append(offset)
                write_at(offset, buffers)

            file.write_at = note  # type: ignore[method-assign]
            return file

    with gpusaver.Saver({f"t{n}": np.zeros(3000 * n) for n in range(6)}, storage=Ordered()) as saver:
        saver.save(tmp_path / "k")
    assert max(map(len, written.values())) > 20
    assert all(offsets == sorted(offsets) for offsets in written.values())


def test_an_element_cut_by_the_border_of_two_chunks_is_written_by_one_thread_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In strided memory it is read, changed and written back: two threads at once would undo each other's half."""
    expected = {name: np.random.default_rng(ord(name)).random(975, np.float32) for name in "bcd"}
    # Packed: 3 bytes, then three tensors of 3900; the end of the first chunk, at 8192, lies within an element.
    prefix = gpusaver.save(tmp_path / "k", {"a": np.ones(3, np.uint8), **expected})
    inside = threading.Semaphore(0)
    busy: list[int] = []
    original = HostRuntime.from_slot

    def slow(self: HostRuntime, transfers: list[Transfer], slot: memoryview) -> Any:
        busy.append(1)
        together = len(busy)
        inside.acquire(timeout=0.05)  # long enough for the other thread to come
        try:
            assert together == 1
            return original(self, transfers, slot)
        finally:
            busy.pop()

    monkeypatch.setattr(HostRuntime, "from_slot", slow)
    targets = {name: np.zeros(2 * 975, np.float32)[::2] for name in expected}
    with gpusaver.Saver({"a": np.zeros(3, np.uint8), **targets}) as saver:
        saver.restore(prefix)
    for name, target in targets.items():
        np.testing.assert_array_equal(target, expected[name])
