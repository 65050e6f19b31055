"""What every storage must do; each backend runs all of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import s3_server

from gpusaver.bundle import filenames
from gpusaver.device.host import allocate_pages
from gpusaver.errors import Error, InvalidArgumentError, NotFoundError, OutOfRangeError
from gpusaver.storage import base
from gpusaver.storage.base import Buffer, ChangedError, Storage, WritableFile, read_bytes, write_bytes
from gpusaver.storage.local import LocalStorage
from gpusaver.storage.routing import RoutedStorage


def aligned(data: bytes) -> memoryview:
    """The data in memory that may be written around the page cache, padded with zeros to whole pages."""
    nbytes = -(-len(data) // 4096) * 4096
    pages = allocate_pages(nbytes)[:nbytes]
    pages[: len(data)] = np.frombuffer(data, np.uint8)
    return pages.data


def blocks(data: bytes, file: WritableFile, count: int) -> list[tuple[int, Buffer]]:
    """``(offset, buffer)`` of about ``count`` parts of the data, such as the file takes."""
    source = aligned(data) if file.alignment > 1 else memoryview(data)
    step = max(1, -(-len(source) // count // file.alignment) * file.alignment)
    return [(offset, source[offset : offset + step]) for offset in range(0, len(source), step)]


class StorageContract:
    """A backend's class derives from this and has two fixtures: ``storage``, and an empty ``directory``."""

    #: Whether files are asked for with ``direct=True``.
    direct = False
    #: Whether it has directories, open files that outlive their names, and locks that keep others out.
    is_file_system = True

    def written(self, storage: Storage, path: str, data: bytes, *, count: int = 3) -> str:
        file = storage.create(path, len(data), direct=self.direct)
        for offset, block in blocks(data, file, count):
            file.write_at(offset, [block])
        file.sync()
        file.close()
        return path

    def read(self, storage: Storage, path: str) -> bytes:
        return read_bytes(storage, path)

    @pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 100_000])
    def test_what_was_written_is_read(self, storage: Storage, directory: str, nbytes: int) -> None:
        data = random.Random(1).randbytes(nbytes)
        assert self.read(storage, self.written(storage, f"{directory}/f", data)) == data

    def test_short_pieces_are_read_each(self, storage: Storage, directory: str) -> None:
        data = random.Random(1).randbytes(50_000)
        file = storage.open(self.written(storage, f"{directory}/f", data))
        offsets = [49_990, 0, 20_001]
        buffers = [np.zeros(nbytes, np.uint8) for nbytes in (10, 4096, 999)]
        file.read_each(offsets, buffers)
        places = zip(offsets, buffers, strict=True)
        assert all(buffer.tobytes() == data[offset : offset + buffer.nbytes] for offset, buffer in places)
        with pytest.raises(OutOfRangeError, match="f ends at byte 50000"):
            file.read_each([100, 49_991], buffers[:1] * 2)
        file.close()

    @pytest.mark.parametrize("nbytes", [0, 5])
    def test_a_file_grows_beyond_the_size_that_was_said(self, storage: Storage, directory: str, nbytes: int) -> None:
        file = storage.create(f"{directory}/f", nbytes)
        assert file.alignment == 1
        for offset in (0, 4000, 8000):
            file.write_at(offset, [memoryview(bytes([offset // 4000]) * 4000)])
        file.sync()
        file.close()
        assert self.read(storage, f"{directory}/f") == b"".join(bytes([number]) * 4000 for number in range(3))

    def test_a_link_is_the_same_file(self, storage: Storage, directory: str) -> None:
        path = self.written(storage, f"{directory}/f", b"some bytes")
        version = storage.version(path)
        link = storage.link(path, f"{directory}/g")
        if link is None:
            pytest.skip("there are no links here")
        assert self.read(storage, f"{directory}/g") == b"some bytes"
        assert version is None or storage.version(f"{directory}/g") == storage.version(path) == version
        link.close()
        storage.remove(path)
        assert self.read(storage, f"{directory}/g") == b"some bytes"
        link.abort()
        assert storage.list(directory) == []
        assert storage.link(f"{directory}/missing", f"{directory}/h") is None

    def test_a_link_with_a_target(self, storage: Storage, directory: str) -> None:
        """As a data file that need not be written again."""
        path = self.written(storage, f"{directory}/f", b"content")
        target, temporary = f"{directory}/k.data", f"{directory}/k.data.{'0' * 16}{base.TEMPORARY_SUFFIX}"
        for outcome in ("aborted", "renamed"):
            link = storage.link(path, temporary, target=target)
            if link is None:
                pytest.skip("there are no links here")
            link.sync()
            link.close()
            if outcome == "renamed":
                storage.replace(temporary, target)
            link.abort()
            assert not storage.exists(temporary)
            assert storage.exists(target) == (outcome == "renamed")
        storage.remove(path)
        assert self.read(storage, target) == b"content"
        assert storage.link(f"{directory}/missing", temporary, target=f"{directory}/h") is None
        assert storage.list(directory) == ["k.data"]

    @pytest.mark.parametrize("nbytes", [3, 4096, 20_001, 40_000])
    def test_what_is_recycled_is_written_over(self, storage: Storage, directory: str, nbytes: int) -> None:
        old = self.written(storage, f"{directory}/f", b"?" * 20_001)
        assert storage.recycle(f"{directory}/missing", f"{directory}/spare") is None
        size = storage.recycle(old, f"{directory}/spare")
        if size is None:
            assert storage.list(directory) == []
            pytest.skip("there is no such thing here")
        assert (size, storage.list(directory)) == (20_001, ["spare"])
        data = random.Random(1).randbytes(nbytes)
        file = storage.reuse(f"{directory}/spare", f"{directory}/g", nbytes, direct=self.direct)
        assert file is not None
        assert storage.list(directory) == ["g"]
        for offset, block in blocks(data, file, 3):
            file.write_at(offset, [block])
        file.sync()
        file.close()
        assert self.read(storage, f"{directory}/g") == data
        assert storage.reuse(f"{directory}/spare", f"{directory}/h", 5) is None
        file.abort()
        assert storage.list(directory) == []

    def test_a_version_is_that_of_the_content(self, storage: Storage, directory: str) -> None:
        path = self.written(storage, f"{directory}/f", b"some bytes")
        version = storage.version(path)
        assert storage.version(path) == version
        assert storage.version(f"{directory}/missing") is None
        other = self.written(storage, f"{directory}/g", b"some other bytes")
        storage.replace(other, path)
        assert version is None or storage.version(path) != version

    def test_blocks_in_any_order(self, storage: Storage, directory: str) -> None:
        if not self.is_file_system:
            pytest.skip("offsets must ascend here")
        data = random.Random(2).randbytes(50_001)
        file = storage.create(f"{directory}/f", len(data), direct=self.direct)
        parts = blocks(data, file, 12)
        for offset, block in [parts[-1], *random.Random(3).sample(parts[:-1], len(parts) - 1)]:
            file.write_at(offset, [block])
        file.sync()
        file.close()
        assert self.read(storage, f"{directory}/f") == data

    def test_blocks_from_several_threads(self, storage: Storage, directory: str) -> None:
        if not self.is_file_system:
            pytest.skip("offsets must ascend here")
        data = random.Random(4).randbytes(300_001)
        file = storage.create(f"{directory}/f", len(data), direct=self.direct)
        parts = blocks(data, file, 60)

        def write(share: list[tuple[int, Buffer]]) -> None:
            for offset, block in share:
                file.write_at(offset, [block])

        threads = [threading.Thread(target=write, args=(parts[number::3],)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        file.sync()
        file.close()
        assert self.read(storage, f"{directory}/f") == data

    def test_thousands_of_buffers_at_once(self, storage: Storage, directory: str) -> None:
        file = storage.create(f"{directory}/f", 2500 * 4096, direct=self.direct)
        size = file.alignment if file.alignment > 1 else 3
        data = random.Random(5).randbytes(2500 * size)
        source = aligned(data) if file.alignment > 1 else memoryview(data)
        empty = memoryview(b"")
        buffers = [empty, *(source[n * size : (n + 1) * size] for n in range(2500)), empty]
        file.write_at(0, buffers)
        file.close()
        reader = storage.open(f"{directory}/f")
        found = bytearray(len(data))
        view = memoryview(found)
        reader.read_into(0, [empty, *(view[n : n + size] for n in range(0, len(data), size))])
        reader.close()
        assert found == data

    def test_parts_of_a_file(self, storage: Storage, directory: str) -> None:
        path = self.written(storage, f"{directory}/f", b"0123456789")
        file = storage.open(path)
        assert file.size == 10
        first, second = bytearray(2), bytearray(3)
        file.read_into(4, [memoryview(first), memoryview(second)])
        assert (first, second) == (b"45", b"678")
        file.read_into(10, [])
        file.close()
        file.close()

    @pytest.mark.parametrize(("offset", "nbytes"), [(0, 11), (9, 2), (10, 1), (4000, 1)])
    def test_reading_beyond_the_end(self, storage: Storage, directory: str, offset: int, nbytes: int) -> None:
        path = self.written(storage, f"{directory}/f", b"0123456789")
        file = storage.open(path)
        with pytest.raises(OutOfRangeError, match=path):
            file.read_into(offset, [memoryview(bytearray(nbytes))])
        file.close()

    def test_an_existing_file_is_not_touched(self, storage: Storage, directory: str) -> None:
        path = self.written(storage, f"{directory}/f", b"old")
        with pytest.raises(Error, match=path):
            storage.create(path, 3, direct=self.direct)
        assert self.read(storage, path) == b"old"

    def test_a_file_in_a_missing_directory(self, storage: Storage, directory: str) -> None:
        if not self.is_file_system:
            self.written(storage, f"{directory}/missing/f", b"123")
            return
        with pytest.raises(NotFoundError, match="missing"):
            storage.create(f"{directory}/missing/f", 3, direct=self.direct)
        with pytest.raises(NotFoundError, match="missing"):
            storage.make_directory(f"{directory}/missing/d")

    @pytest.mark.parametrize("moment", ["new", "written", "synced", "closed", "gone"])
    def test_abort(self, storage: Storage, directory: str, moment: str) -> None:
        path = f"{directory}/f"
        file = storage.create(path, 4096, direct=self.direct)
        if moment != "new":
            file.write_at(0, [aligned(b"x" * 4096)])
        if moment in ("synced", "closed", "gone"):
            file.sync()
        if moment in ("closed", "gone"):
            file.close()
        if moment == "gone":
            storage.remove(path)
        file.abort()
        assert not storage.exists(path)
        self.written(storage, path, b"another")
        file.abort()  # has nothing to do with the other file
        file.close()
        assert self.read(storage, path) == b"another"

    def test_opening_what_is_not_there(self, storage: Storage, directory: str) -> None:
        with pytest.raises(NotFoundError, match=f"{directory}/f"):
            storage.open(f"{directory}/f")
        with pytest.raises(NotFoundError):
            storage.modified_time(f"{directory}/f")

    def test_opening_a_directory(self, storage: Storage, directory: str) -> None:
        storage.make_directory(f"{directory}/d")
        self.written(storage, f"{directory}/d/f", b"1")
        with pytest.raises((InvalidArgumentError, NotFoundError), match=f"{directory}/d"):
            storage.open(f"{directory}/d")

    def test_existence(self, storage: Storage, directory: str) -> None:
        storage.make_directory(f"{directory}/d")
        self.written(storage, f"{directory}/d/f", b"1")
        assert storage.exists(f"{directory}/d/f")
        assert not storage.exists(f"{directory}/d/g")
        assert not storage.exists(f"{directory}/d")
        assert storage.is_directory(f"{directory}/d")
        assert not storage.is_directory(f"{directory}/d/f")

    def test_list(self, storage: Storage, directory: str) -> None:
        assert storage.list(directory) == []
        for name in ("b", "a.x", ".h", "\N{LATIN SMALL LETTER E WITH ACUTE}"):
            self.written(storage, f"{directory}/{name}", b"1")
        assert storage.list(directory) == sorted(["b", "a.x", ".h", "\N{LATIN SMALL LETTER E WITH ACUTE}"])
        assert storage.list(f"{directory}/missing") == []
        assert storage.list(f"{directory}/b") == []

    def test_make_directory_twice(self, storage: Storage, directory: str) -> None:
        storage.make_directory(f"{directory}/d")
        self.written(storage, f"{directory}/d/f", b"1")
        storage.make_directory(f"{directory}/d")
        assert storage.list(f"{directory}/d") == ["f"]

    @pytest.mark.parametrize("exists", [False, True])
    def test_replace(self, storage: Storage, directory: str, exists: bool) -> None:
        source = self.written(storage, f"{directory}/s", b"new")
        if exists:
            self.written(storage, f"{directory}/t", b"old and longer")
        storage.replace(source, f"{directory}/t")
        assert self.read(storage, f"{directory}/t") == b"new"
        assert storage.list(directory) == ["t"]

    def test_replace_by_nothing(self, storage: Storage, directory: str) -> None:
        self.written(storage, f"{directory}/t", b"old")
        with pytest.raises(NotFoundError, match=f"{directory}/s"):
            storage.replace(f"{directory}/s", f"{directory}/t")
        assert self.read(storage, f"{directory}/t") == b"old"

    def test_remove(self, storage: Storage, directory: str) -> None:
        path = self.written(storage, f"{directory}/f", b"1")
        storage.remove(path)
        storage.remove(path)
        assert storage.list(directory) == []

    def test_a_file_that_is_open_is_read_to_the_end(self, storage: Storage, directory: str) -> None:
        """A reader must not fall over a checkpoint that retention takes away."""
        if not self.is_file_system:
            pytest.skip("a removed object is gone at once")
        path = self.written(storage, f"{directory}/f", b"content")
        file = storage.open(path)
        storage.remove(path)
        found = bytearray(7)
        file.read_into(0, [memoryview(found)])
        file.close()
        assert found == b"content"

    def test_modified_time(self, storage: Storage, directory: str) -> None:
        path = self.written(storage, f"{directory}/f", b"1")
        other = self.written(storage, f"{directory}/g", b"1")
        assert 0 < storage.modified_time(path) <= storage.modified_time(other)

    def test_sync_directory(self, storage: Storage, directory: str) -> None:
        self.written(storage, f"{directory}/f", b"1")
        storage.sync_directory(directory)

    def test_whole_files(self, storage: Storage, directory: str) -> None:
        path, temporary = f"{directory}/f", f"{directory}/tmp"
        for content in (b"", b"first", b"2"):
            write_bytes(storage, path, temporary, content)
            assert read_bytes(storage, path) == content
        assert storage.list(directory) == ["f"]
        with pytest.raises(InvalidArgumentError, match="1 bytes, expected at most 0"):
            read_bytes(storage, path, limit=0)
        assert read_bytes(storage, path, limit=1) == b"2"

    @pytest.mark.parametrize("nbytes", [0, 5, 9 << 20])
    def test_a_file_with_a_target(self, storage: Storage, directory: str, nbytes: int) -> None:
        """As the data of a checkpoint are written."""
        data = random.Random(6).randbytes(nbytes)
        path, temporary = f"{directory}/k.data", f"{directory}/k.data.{'0' * 16}{base.TEMPORARY_SUFFIX}"
        for outcome in ("aborted", "synced and aborted", "renamed"):
            file = storage.create(temporary, nbytes, direct=self.direct, target=path)
            for offset, block in blocks(data, file, 3):
                file.write_at(offset, [block])
            if outcome != "aborted":
                file.sync()
                file.close()
                assert storage.exists(temporary)
                assert self.read(storage, temporary) == data
            if outcome == "renamed":
                storage.replace(temporary, path)
            file.abort()
            assert not storage.exists(temporary)
            assert storage.exists(path) == (outcome == "renamed")
        assert self.read(storage, path) == data
        assert storage.list(directory) == ["k.data"]

    def test_what_is_not_written_is_zeros(self, storage: Storage, directory: str) -> None:
        nbytes = 10 << 20
        file = storage.create(f"{directory}/f", nbytes, direct=self.direct)
        file.write_at(4096, [aligned(b"x" * 4096)])
        file.write_at(9 << 20, [aligned(b"y" * 4096)])
        file.sync()
        file.close()
        expected = bytearray(nbytes)
        expected[4096:8192] = b"x" * 4096
        expected[9 << 20 : (9 << 20) + 4096] = b"y" * 4096
        assert self.read(storage, f"{directory}/f") == expected

    def test_a_small_temporary_file(self, storage: Storage, directory: str) -> None:
        """As an index is written."""
        path, temporary = f"{directory}/k.index", f"{directory}/k.index.{'0' * 16}{base.TEMPORARY_SUFFIX}"
        for outcome in ("aborted", "removed", "renamed"):
            file = storage.create(temporary, 9)
            file.write_at(0, [memoryview(b"1234"), memoryview(b"")])
            file.write_at(4, [memoryview(b"56789")])
            file.sync()
            file.close()
            assert storage.exists(temporary)
            assert not storage.exists(path)
            assert self.read(storage, temporary) == b"123456789"
            if outcome == "aborted":
                file.abort()
            elif outcome == "removed":
                storage.remove(temporary)
            else:
                storage.replace(temporary, path)
            assert not storage.exists(temporary)
        file.abort()
        assert self.read(storage, path) == b"123456789"
        assert storage.list(directory) == ["k.index"]

    def test_of_two_writers_one_is_kept_out_or_told(self, storage: Storage, other: Storage, directory: str) -> None:
        path, temporary = f"{directory}/f", f"{directory}/f.{'0' * 16}{base.TEMPORARY_SUFFIX}"
        for content in (None, b"old"):  # the file is not there, or is there
            if content is not None:
                write_bytes(storage, path, temporary, content)
            lock = storage.lock(filenames.lock_path(path))
            if lock.is_exclusive:
                with pytest.raises(Error, match=path):
                    other.lock(filenames.lock_path(path), wait_seconds=0)
                lock.release()
                continue
            with locked(other, path):
                write_bytes(other, path, temporary, b"of the other")
            for _ in range(2):
                with pytest.raises(ChangedError, match=path):
                    write_bytes(storage, path, temporary, b"of this")
            assert self.read(storage, path) == b"of the other"
            lock.release()
            with locked(storage, path):  # its own writes are no news to it
                for number in range(3):
                    write_bytes(storage, path, temporary, b"%d" % number)
            assert self.read(other, path) == b"2"
            storage.remove(path)


@contextlib.contextmanager
def locked(storage: Storage, path: str) -> Iterator[None]:
    lock = storage.lock(filenames.lock_path(path))
    try:
        yield
    finally:
        lock.release()


def test_the_names_that_storages_know() -> None:
    assert base.TEMPORARY_SUFFIX == filenames.TEMPORARY_SUFFIX
    assert base.LOCK_SUFFIX == filenames.LOCK_SUFFIX


class TestBuffered(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return LocalStorage()

    @pytest.fixture
    def other(self) -> Storage:
        return LocalStorage()

    @pytest.fixture
    def directory(self, tmp_path: Path) -> str:
        return os.fspath(tmp_path)


class TestMemory(StorageContract):
    is_file_system = False
    _numbers = itertools.count()

    @pytest.fixture
    def storage(self) -> Storage:
        pytest.importorskip("obstore")
        return RoutedStorage()

    @pytest.fixture
    def other(self, storage: Storage) -> Storage:
        return RoutedStorage()

    @pytest.fixture
    def directory(self) -> str:
        return f"memory://contract/{next(self._numbers)}"


class TestS3(TestMemory):
    @pytest.fixture
    def directory(self, s3: str) -> str:
        return f"s3://bucket/contract/{os.getpid()}-{next(self._numbers)}"


class TestMoto(TestMemory):
    """Another S3 server, in this process; where it is installed (``gpusaver[dev]``)."""

    @pytest.fixture(scope="class")
    @classmethod
    def endpoint(cls) -> Iterator[str]:
        server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        s3_server.request("PUT", f"http://{host}:{port}/bucket")
        yield f"http://{host}:{port}"
        server.stop()

    @pytest.fixture
    def directory(self, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
        for name, value in s3_server.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        return f"s3://bucket/contract/{next(self._numbers)}"


class TestObstoreFiles(TestMemory):
    """A store without conditional updates."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        store = pytest.importorskip("obstore").store.LocalStore(tmp_path)
        return pytest.importorskip("gpusaver.storage.object_store").ObjectStorage("memory://files", store)

    @pytest.fixture
    def directory(self) -> str:
        return "memory://files/d"

    def test_of_two_writers_one_is_kept_out_or_told(
        self, storage: Storage, other: Storage, directory: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        path, temporary = f"{directory}/f", f"{directory}/f.{'0' * 16}{base.TEMPORARY_SUFFIX}"
        for content in (b"1", b"2", b"3"):
            with locked(storage, path):
                write_bytes(storage, path, temporary, content)
        assert self.read(storage, path) == b"3"
        (record,) = caplog.records
        assert "no conditional writes" in record.getMessage()


class TestDirect(TestBuffered):
    """Where the file system of the temporary folder has O_DIRECT; elsewhere the page cache must serve as well."""

    direct = True
