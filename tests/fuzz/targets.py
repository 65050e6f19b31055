"""What is fuzzed: each target takes any bytes, reads them as a file of a checkpoint in every way there is, and returns.

Only members of our exception tree may come out of the readers, within a second of CPU time and 64 MiB beyond the input.
Checksums of blocks are not compared here: a fuzzer would never get past them, whoever forges a file does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import gpusaver
from gpusaver import checkpoint_state
from gpusaver.bundle.index import BundleIndex
from gpusaver.bundle.object_graph import readable_names
from gpusaver.bundle.strings import decode_strings
from gpusaver.bundle.table_reader import Table
from gpusaver.bundle.v1 import V1Bundle
from gpusaver.bundle.verify import structure_problems
from gpusaver.errors import Error, NotFoundError
from gpusaver.metagraph.reading import read_meta_graph, saved_variables

GOLDEN = Path(__file__).parents[1] / "golden"
CORPUS = Path(__file__).with_name("corpus")

CPU_SECONDS = 1.0
MEMORY_NBYTES = 64 << 20
#: Of the data file beside a fuzzed index.
DATA_NBYTES = 4096


class MemoryFile:
    parallel_reads = 1

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    def read_into(self, offset: int, buffers: Any) -> None:
        for buffer in buffers:
            octets = np.frombuffer(buffer, np.uint8)
            part = self._data[offset : offset + len(octets)]
            if len(part) != len(octets):
                raise gpusaver.OutOfRangeError("the file ends")
            octets[:] = np.frombuffer(part, np.uint8)
            offset += len(octets)

    def read_each(self, offsets: Any, buffers: Any) -> None:
        for offset, buffer in zip(offsets, buffers, strict=True):
            self.read_into(offset, [buffer])

    def close(self) -> None:
        pass


class MemoryStorage:
    """The reading half of a storage."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def open(self, path: str, *, uncached: bool = False) -> MemoryFile:
        if path not in self._files:
            raise NotFoundError(path)
        return MemoryFile(self._files[path])

    def exists(self, path: str) -> bool:
        return path in self._files

    def is_directory(self, path: str) -> bool:
        return False

    def modified_time(self, path: str) -> float:
        return 0.0

    def list(self, directory: str) -> list[str]:
        return sorted(os.path.basename(path) for path in self._files if os.path.dirname(path) == directory)


def ours(read: Callable[[], Any]) -> Any:
    """What it returns; None where an error of ours says why not."""
    try:
        return read()
    except Error:
        return None


def index(data: bytes) -> None:
    found = ours(lambda: BundleIndex(data, "k.index"))
    if found is None:
        return
    for walk in (found.items, found.tensors, found.slice_keys, lambda: structure_problems(found, {0: DATA_NBYTES})):
        ours(lambda walk=walk: list(walk()))  # type: ignore[misc]
    keys = [key for key, _ in ours(lambda: list(found.tensors())) or ()]
    ours(lambda: found.rows(keys * (1000 // len(keys) if keys else 0)))  # so many that it decodes all at once
    storage = MemoryStorage({"k.index": data, "k.data-00000-of-00001": bytes(DATA_NBYTES)})
    reader = ours(lambda: gpusaver.CheckpointReader("k", storage=storage))  # type: ignore[arg-type]
    for name in (ours(lambda: list(reader)) or ())[:64]:
        ours(lambda name=name: reader.get_tensor(name))  # type: ignore[misc]
    ours(lambda: reader.readable_names)


def v1(data: bytes) -> None:
    found = ours(lambda: V1Bundle([("k", data)]))
    for name in list(found.tensors())[:64] if found is not None else ():
        ours(lambda name=name: found.get_array(name))  # type: ignore[misc]


def state(data: bytes) -> None:
    storage: Any = MemoryStorage({"d/checkpoint": data, "d/k-1.index": b"", "e/k-1.index": b"", "/k-1.index": b""})
    ours(lambda: checkpoint_state.get_checkpoint_state("d", storage=storage))
    latest = ours(lambda: checkpoint_state.latest_checkpoint("d", storage=storage))
    assert latest is None or os.path.dirname(os.path.normpath(latest)) == "d", f"escapes to {latest}"


def meta(data: bytes) -> None:
    """Also the variables that a graph describes; not their arrays, which may be as large as it says."""
    storage: Any = MemoryStorage({"k.meta": data})
    found = ours(lambda: read_meta_graph("k.meta", storage=storage))
    if found is not None:
        ours(lambda: saved_variables(found))


def object_graph(data: bytes) -> None:
    ours(lambda: readable_names(data))


def strings(data: bytes) -> None:
    """The first byte says how many there should be."""
    for big_endian in (False, True):
        count = data[0] if data else 0
        ours(lambda big=big_endian, n=count: decode_strings(data[1:], n, "k", 0, big_endian=big))  # type: ignore[misc]


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (index, v1, state, meta, object_graph, strings)
}


def seeds(name: str) -> Iterator[bytes]:
    """Files of TensorFlow's to begin with, and the committed corpus: inputs that each reached something new."""
    for path in sorted(CORPUS.glob(f"{name}/*")):
        yield path.read_bytes()
    if name == "index":
        yield from (path.read_bytes() for path in sorted(GOLDEN.glob("*/*.index")) if path.stat().st_size < 4096)
    elif name == "v1":
        yield from (path.read_bytes() for path in sorted(GOLDEN.glob("v1_tf1/*.ckpt*")))
    elif name == "state":
        yield from (
            path.read_bytes() for path in sorted(GOLDEN.glob("*/*")) if path.name in ("checkpoint", "abs_state")
        )
    elif name == "meta":
        yield from (path.read_bytes() for path in sorted(GOLDEN.glob("*/*.meta")) if path.stat().st_size < 20_000)
    elif name == "object_graph":
        yield gpusaver.load(GOLDEN / "object_based_tf2" / "ckpt-2")["_CHECKPOINTABLE_OBJECT_GRAPH"]
    else:
        yield b"\x02\x01\x03\0\0\0\0abcd"


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """The checksums of table blocks always fit, and nothing is logged: a million records would be kept."""
    with mock.patch.object(Table, "_check_block", lambda table, offset, size: table._data[offset + size]):
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def run(name: str, data: bytes) -> None:
    """The target, under its limit of time.  Memory is the caller's to watch.  Requires: :func:`prepared`."""
    started = time.process_time()
    TARGETS[name](data)
    took = time.process_time() - started
    assert took < CPU_SECONDS, f"{name} took {took:.1f} s of CPU time for {len(data)} bytes"
