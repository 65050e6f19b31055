"""TensorFlow checkpoints, read from any format the reader knows and written as V2, one data file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from gpusaver.arguments import checkpoint_prefix
from gpusaver.bundle.crc import crc32c, mask
from gpusaver.bundle.index import Entry, encode_index
from gpusaver.bundle.layout import PAGE, plan_layout
from gpusaver.bundle.object_graph import OBJECT_GRAPH_KEY
from gpusaver.bundle.strings import encode_strings
from gpusaver.conversion.tensors import Octets, OnWritten, Source, SourceTensor, octets, refuse
from gpusaver.errors import FailedPreconditionError, InvalidArgumentError
from gpusaver.pipeline.commit import BundleCommit
from gpusaver.reader import CheckpointReader
from gpusaver.storage.routing import RoutedStorage
from gpusaver.streaming import TensorStream
from gpusaver.tensor import DataType

OBJECT_GRAPH = OBJECT_GRAPH_KEY.decode()

_ZEROS = np.zeros(PAGE, np.uint8)


@contextlib.contextmanager
def read(reader: CheckpointReader) -> Iterator[Source]:
    with TensorStream(reader) as stream:
        yield Source([source_tensor(stream, reader, name) for name in reader], [])


def source_tensor(stream: TensorStream, reader: CheckpointReader, name: str) -> SourceTensor:
    found = reader.find(name)
    assert found is not None

    def blocks() -> Iterator[Octets]:
        for block in stream.blocks(name):
            yield octets(block)

    def items() -> list[bytes]:
        value = reader.get_tensor(name)
        return [value] if isinstance(value, bytes) else value.reshape(-1).tolist()

    return SourceTensor(name, found.spec, blocks, items if found.spec.dtype is DataType.string else None)


def write(prefix: str, tensors: Sequence[SourceTensor], on_written: OnWritten) -> None:
    """A V2 checkpoint that appears whole, like one of a Saver.  Strings are held in memory, of others a block."""
    checkpoint_prefix(prefix, None, padded=False)  # refuses a directory
    unknown = [t for t in tensors if t.items is None and not t.spec.dtype.is_fixed_size]
    refuse(prefix, unknown, "gpusaver cannot read these tensors")
    keys = [tensor.name.encode("utf-8", "surrogateescape") for tensor in tensors]
    if b"" in keys:
        raise InvalidArgumentError(f"{prefix}: the empty name is reserved in a checkpoint; rename or --exclude it")
    strings = {n: encode_strings(tensor.items()) for n, tensor in enumerate(tensors) if tensor.items is not None}
    sizes = [len(strings[n][0]) if n in strings else tensor.spec.nbytes for n, tensor in enumerate(tensors)]
    order = sorted(range(len(tensors)), key=keys.__getitem__)
    layout = plan_layout([sizes[n] for n in order], [0] * len(order), [0] * len(order), 1)
    offsets = dict(zip(order, layout.offset.tolist(), strict=True))
    crcs: dict[int, int] = {}
    storage = RoutedStorage()
    if not storage.is_directory(prefix.rpartition("/")[0]):
        raise FailedPreconditionError(f"{prefix}: its directory does not exist")
    commit = BundleCommit(storage, prefix, layout.shard_nbytes, direct=False)
    try:
        end = 0
        for n in sorted(order, key=offsets.__getitem__):  # as object stores want them, gaps filled
            blocks = iter([np.frombuffer(strings[n][0], np.uint8)]) if n in strings else tensors[n].blocks()
            crc, start = 0, offsets[n]
            if sizes[n]:
                commit.files[0].write_at(end, [_ZEROS[: start - end]])
                end = start
            for block in blocks:
                commit.files[0].write_at(end, [block])
                crc = crc32c(block, crc)
                end += len(block)
                on_written(len(block))
            if sizes[n] and end != start + sizes[n]:
                raise InvalidArgumentError(f"tensor {tensors[n].name}: read {end - start} bytes, expected {sizes[n]}")
            crcs[n] = strings[n][1] if n in strings else crc
        commit.sync()
        entries = [(keys[n], Entry(tensors[n].spec, 0, offsets[n], sizes[n], mask(crcs[n]))) for n in order]
        commit.publish(encode_index(commit.num_shards, entries))
    except BaseException:
        commit.abort()
        raise
