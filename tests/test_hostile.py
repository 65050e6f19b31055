"""Files made to hurt: time and memory stay in proportion to their size, and every error is one of ours.

Each case would take gigabytes or minutes if a count or length in it were believed.  What is measured is memory, in
multiples of the files' size; that a case ends at all is what is shown of its time.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cramjam
import numpy as np
import pytest
from bundle.bundle_tools import build_block, build_table, split_table, varint

import gpusaver
from gpusaver.bundle import coding, entry, filenames, slices
from gpusaver.bundle.crc import crc32c, mask
from gpusaver.bundle.index import BundleIndex, Entry, encode_index
from gpusaver.bundle.table_reader import Table
from gpusaver.bundle.table_writer import TableWriter
from gpusaver.errors import (
    DataLossError,
    Error,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnimplementedError,
)
from gpusaver.protos import tensor_bundle_pb2
from gpusaver.storage import base
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

MIB = 1 << 20

#: What may be allocated beyond so many times the size of the files.
FACTOR = 40
ALLOWANCE = 24 * MIB


def peak(call: Callable[[], object]) -> int:
    """Bytes that were allocated at once, whether it returned or raised one of our errors."""
    tracemalloc.start()
    try:
        call()
    except Error:
        pass
    finally:
        nbytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return nbytes


def write(directory: Path, data: bytes, entries: Sequence[tuple[bytes, Entry]]) -> str:
    prefix = f"{directory}/k"
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
    Path(f"{prefix}.index").write_bytes(encode_index(1, sorted(entries)))
    return prefix


def size(prefix: str) -> int:
    return os.path.getsize(f"{prefix}.index") + os.path.getsize(f"{prefix}.data-00000-of-00001")


def raw_index(values: Sequence[tuple[bytes, bytes]]) -> bytes:
    """With values as they are given."""
    header = tensor_bundle_pb2.BundleHeaderProto(num_shards=1)
    header.version.producer = 1
    writer = TableWriter()
    writer.add(b"", header.SerializeToString())
    for key, value in values:
        writer.add(key, value)
    return writer.finish()


def users(prefix: str) -> dict[str, Callable[[], object]]:
    """Everything that may be done with a checkpoint."""

    def restore() -> None:
        with gpusaver.Saver({"w": np.zeros(3)}) as saver:
            saver.restore(prefix)

    return {
        "load": lambda: gpusaver.load(prefix),
        "list": lambda: gpusaver.list_variables(prefix),
        "verify": lambda: sum(map(len, gpusaver.verify(prefix))),
        "restore": restore,
        "debug": lambda: gpusaver.load_checkpoint(prefix).debug_string(),
    }


def check_all(prefix: str) -> None:
    for name, use in users(prefix).items():
        nbytes = peak(use)
        assert nbytes < FACTOR * size(prefix) + ALLOWANCE, f"{name}: {nbytes / MIB:.0f} MiB"


def test_many_tensors_that_claim_the_same_bytes(tmp_path: Path) -> None:
    data = bytes(MIB)
    claim = Entry(TensorSpec(DataType.uint8, (MIB,)), 0, 0, MIB, mask(crc32c(data)))
    prefix = write(tmp_path, data, [(b"%05d" % number, claim) for number in range(1_500)])
    check_all(prefix)
    with pytest.raises(DataLossError, match="claim the same bytes"):
        gpusaver.load(prefix)


def test_strings_that_claim_the_same_bytes(tmp_path: Path) -> None:
    nbytes = 50_000
    claim = Entry(TensorSpec(DataType.string, (nbytes - 4,)), 0, 0, nbytes, 0)
    prefix = write(tmp_path, bytes(nbytes), [(b"%05d" % number, claim) for number in range(1_500)])
    check_all(prefix)


def test_slices_that_claim_the_same_bytes(tmp_path: Path) -> None:
    count, nbytes = 500, MIB
    parts = tuple(TensorSlice(((number * nbytes, nbytes),)) for number in range(count))
    entries = [(b"w", Entry(TensorSpec(DataType.uint8, (count * nbytes,)), 0, 0, 0, 0, parts))]
    stored = Entry(TensorSpec(DataType.uint8, (nbytes,)), 0, 0, nbytes, mask(crc32c(bytes(nbytes))))
    entries += [(slices.slice_key(b"w", part), stored) for part in parts]
    check_all(write(tmp_path, bytes(nbytes), entries))


def test_tied_tensors_are_no_lie(tmp_path: Path) -> None:
    """A shared layer may well have dozens of names."""
    layer = np.arange(100_000.0)
    prefix = gpusaver.save(tmp_path / "k", {f"layer{number}": layer for number in range(48)})
    assert os.path.getsize(f"{prefix}.data-00000-of-00001") < 1_000_000
    found = gpusaver.load(prefix)
    assert len(found) == 48
    assert all((values == layer).all() for values in found.values())


def test_a_long_name_in_many_slices(tmp_path: Path) -> None:
    """Each slice stands for a key that repeats the name."""
    name = b"n" * 60_000
    parts = tuple(TensorSlice(((number, 1),)) for number in range(8_000))
    claim = Entry(TensorSpec(DataType.float32, (8_000,)), 0, 0, 0, 0, parts)
    prefix = write(
        tmp_path, b"", [(b"\x00x", Entry(TensorSpec(DataType.float32, (0,)), 0, 0, 0, mask(0))), (name, claim)]
    )
    check_all(prefix)


def test_long_names_in_some_slices_each(tmp_path: Path) -> None:
    parts = tuple(TensorSlice(((number, 1),)) for number in range(1_500))
    claim = Entry(TensorSpec(DataType.float32, (1_500,)), 0, 0, 0, 0, parts)
    zero = Entry(TensorSpec(DataType.float32, (0,)), 0, 0, 0, mask(0))
    entries = [(b"\x00x", zero), *((b"%04d" % number + b"n" * 8_000, claim) for number in range(30))]
    check_all(write(tmp_path, b"", entries))


@pytest.mark.parametrize("block_nbytes", [2_000, 9_400, 64_000, 262_144])
def test_keys_that_share_nearly_everything(tmp_path: Path, block_nbytes: int) -> None:
    """Half of each block is one key; the others are stored in four bytes each, and as long."""
    value = entry.encode_entry(Entry(TensorSpec(DataType.float32, (0,)), 0, 0, 0, mask(0)))
    per_block = block_nbytes // 2 // (len(value) + 7)
    writer = TableWriter(block_nbytes=block_nbytes, restart_interval=1 << 20)
    header = tensor_bundle_pb2.BundleHeaderProto(num_shards=1)
    header.version.producer = 1
    writer.add(b"", header.SerializeToString())
    long = b"n" * (block_nbytes // 2)
    for number in range(per_block * (MIB // block_nbytes)):
        writer.add(long + number.to_bytes(4, "big"), value)
    prefix = write(tmp_path, b"", [])
    Path(f"{prefix}.index").write_bytes(writer.finish())
    check_all(prefix)


def test_blocks_without_number(tmp_path: Path) -> None:
    """What is done for each must not be done to the whole file."""
    value = entry.encode_entry(Entry(TensorSpec(DataType.float32, (0,)), 0, 0, 0, mask(0)))
    keys = [b"%06d" % number for number in range(5_000)]
    items = [(b"", b"\x08\x01\x1a\x02\x08\x01"), *((key, value) for key in keys)]
    prefix = write(tmp_path, b"", [])
    Path(f"{prefix}.index").write_bytes(split_table(items, 1))
    state = {key.decode(): np.zeros(0, np.float32) for key in keys}
    with gpusaver.Saver(state) as saver:
        assert len(saver.restore(prefix).restored) == len(keys)


def test_blocks_that_are_one_block() -> None:
    """A Snappy block stands for twenty times its size, and a thousand handles lead to it."""
    block = build_block([(b"%04d" % number, bytes(8000)) for number in range(1000)])
    compressed = bytes(cramjam.snappy.compress_raw(block))
    handle = varint(0) + varint(len(compressed))
    index = build_block([(b"%04d" % number, handle) for number in range(1000)], 1)
    data = build_table([(b"0999", block)], snappy=[0], index=index)

    def look_up_all() -> None:
        table = Table(data, "k.index")
        for number in range(1000):
            assert table.get(b"%04d" % number) == bytes(8000)

    assert peak(look_up_all) < FACTOR * len(data) + ALLOWANCE
    with pytest.raises(DataLossError, match="begins before"):
        look_up_all()


def test_a_shape_that_is_too_large_for_its_columns(tmp_path: Path) -> None:
    """2^63 - 1 elements of 16 bytes are more bytes than 64 bits can count."""
    spec = TensorSpec(DataType.complex128, (2**62,))
    entries = [(b"%05d" % number, Entry(spec, 0, 0, 16, 7)) for number in range(200)]
    prefix = write(tmp_path, bytes(16), entries)
    state = {f"{number:05}": np.zeros(3, np.complex128) for number in range(200)}
    with gpusaver.Saver(state) as saver, pytest.raises(Error, match="00000"):
        saver.restore(prefix)
    check_all(prefix)


def test_values_are_not_kept_when_the_file_is_gone() -> None:
    """A cache of decoded entries must not hold what a hostile file was made of."""
    padding = b"\x0a" + coding.varint(400_000) + bytes(400_000)  # of an unknown field

    def decode() -> None:
        for number in range(200):
            value = b"\x08\x01" + padding + b"\x12\x00\x28" + coding.varint(4) + b"\x35" + number.to_bytes(4, "little")
            index = BundleIndex(raw_index([(b"w", value)]), "k.index")
            try:
                index.get(b"w")
            except Error:
                continue

    tracemalloc.start()
    decode()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 4 * MIB


@pytest.mark.parametrize("count", [5_000, 60_000])
def test_slices_that_all_have_to_be_compared(count: int) -> None:
    """Rows above columns: along each axis half of them reach as far as all others."""
    parts = [TensorSlice(((n, 1), (0, count))) for n in range(count // 2)]
    parts += [TensorSlice(((count // 2, count), (n, 1))) for n in range(count // 2)]
    with pytest.raises((InvalidArgumentError, UnimplementedError)):
        slices.check_tiling(b"w", (2 * count, count), parts)


def test_slices_too_intricate_to_be_compared() -> None:
    """Nested corners overlap along every axis; comparing them pair by pair would take minutes."""
    count = 60_000
    parts = [TensorSlice(((n, 2 * count - 2 * n), (n, 2 * count - 2 * n))) for n in range(count)]
    with pytest.raises((Error,), match=r"(?i)overlap|intricately"):
        slices.check_tiling(b"w", (2 * count, 2 * count), parts[::-1])


def test_a_file_that_is_no_index_is_not_read(tmp_path: Path) -> None:
    """However large it is: its last bytes tell."""
    path = tmp_path / "k.index"
    with path.open("wb") as file:
        file.truncate(1 << 42)
    tracemalloc.start()
    with pytest.raises(DataLossError, match="bad magic number"):
        gpusaver.load_checkpoint(tmp_path / "k")
    assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    tracemalloc.stop()


def test_memory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path, b"", [])
    monkeypatch.setattr(base, "bytearray", lambda size: bytearray(size if size <= 64 else 1 << 62), raising=False)
    with pytest.raises(ResourceExhaustedError, match=r"k.index: no memory for its \d+ bytes"):
        gpusaver.load_checkpoint(prefix)


def test_messages_do_not_repeat_what_is_long() -> None:
    assert coding.printable(b"w" * 200) == "w" * 200
    shown = coding.printable(b"w" * 100_000)
    assert len(shown) < 300
    assert "100000 bytes" in shown


def test_digits_of_other_scripts_are_no_numbers(tmp_path: Path) -> None:
    """They are of a file name that somebody else has chosen, not of ours: an overwrite must not delete it."""
    digits = "".join(chr(0x0660) for _ in range(5))
    assert filenames.split_data_path(f"k.data-{digits}-of-00001") is None
    assert filenames.v1_shard_prefix(f"k-{digits}-of-00001") is None
    (tmp_path / f"k.data-{digits}-of-00001").write_bytes(b"mine")
    gpusaver.save(tmp_path / "k", {"w": np.zeros(2)})
    gpusaver.save(tmp_path / "k", {"w": np.zeros(2)})
    gpusaver.remove_checkpoint(tmp_path / "k")
    assert os.listdir(tmp_path) == [f"k.data-{digits}-of-00001"]


STATES: dict[str, str] = {
    "a long number": "last_preserved_timestamp: " + "9" * 60_000,
    "a long fraction": "last_preserved_timestamp: 0." + "0" * 60_000 + "1",
    "a huge exponent": "last_preserved_timestamp: 1e" + "9" * 1000,
    "a long word": "x" * 60_000,
    "nested": "a {" * 20_000,
    "nested lists": "all_model_checkpoint_paths: " + "[" * 20_000,
    "an extension": "[" + "a." * 20_000 + "b]: 1",
    "escapes": 'model_checkpoint_path: "' + "\\377" * 20_000 + '"',
    "many strings": "model_checkpoint_path: " + '"a" ' * 20_000,
    "comments": "#\n" * 60_000,
    "many entries": 'model_checkpoint_path: "a"\n' + 'all_model_checkpoint_paths: "../b"\n' * 2_000,
    "NULs": "\0" * 60_000,
}


@pytest.mark.parametrize("text", STATES.values(), ids=STATES)
def test_state_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint").write_text(text)

    def use() -> Any:
        gpusaver.latest_checkpoint(tmp_path, verify="structure")
        return gpusaver.get_checkpoint_state(tmp_path)

    assert peak(use) < 4 * FACTOR * len(text) + ALLOWANCE  # protobuf's parser of text takes more


def test_near_matches_among_many_names(tmp_path: Path) -> None:
    """Suggestions are a courtesy: they must not take longer than the restore."""
    name = "model/decoder/layer_{:05}/attention/self/query/kernel"
    prefix = gpusaver.save(tmp_path / "k", {name.format(n): np.zeros(0, np.float32) for n in range(9_000)})
    state = {name.format(n) + "s": np.zeros(0, np.float32) for n in range(30)}
    with gpusaver.Saver(state) as saver, pytest.raises(NotFoundError, match="30 of 30"):
        saver.restore(prefix)
