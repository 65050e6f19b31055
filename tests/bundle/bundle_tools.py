"""Shared by the tests of the bundle format: golden files, a second table writer, and ways to maltreat parsers."""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cramjam
import pytest

from gpusaver.bundle.crc import crc32c, mask
from gpusaver.errors import DataLossError, Error

GOLDEN = Path(__file__).parent.parent / "golden"

Item = tuple[bytes, bytes]


def golden_indexes() -> list[Any]:
    return [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in sorted(GOLDEN.glob("*/*.index"))]


def golden_shards(index: Path) -> list[bytes]:
    """The data files that belong to an index, in shard order."""
    return [path.read_bytes() for path in sorted(index.parent.glob(f"{index.stem}.data-?????-of-?????"))]


def expected_tensors(path: Path) -> dict[bytes, dict[str, Any]]:
    """The tensors of an ``expected-*.json``, by raw name."""
    return {
        base64.b64decode(tensor["name_b64"]) if "name_b64" in tensor else tensor["name"].encode(): tensor
        for tensor in json.loads(path.read_text())["tensors"]
    }


def varint(number: int) -> bytes:
    encoded = b""
    while number > 127:
        encoded += bytes((number & 127 | 128,))
        number >>= 7
    return encoded + bytes((number,))


def build_block(items: Sequence[Item], restart_interval: int = 16) -> bytes:
    block, restarts, last = b"", [0], b""
    for number, (key, value) in enumerate(items):
        shared = 0
        if number % restart_interval:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        else:
            restarts = [0] if number == 0 else [*restarts, len(block)]
        block += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return block + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def build_table(
    blocks: Sequence[tuple[bytes, bytes]],
    *,
    snappy: Sequence[int] = (),
    index_restart_interval: int = 1,
    index: bytes | None = None,
) -> bytes:
    """A table from ``(separator key, block)``; blocks whose number is in ``snappy`` are compressed.

    ``index`` replaces the index block.
    """
    content = b""

    def append(block: bytes, compress: bool) -> bytes:
        nonlocal content
        stored = bytes(cramjam.snappy.compress_raw(block)) if compress else block
        handle = varint(len(content)) + varint(len(stored))
        kind = bytes((compress,))
        content += stored + kind + mask(crc32c(stored + kind)).to_bytes(4, "little")
        return handle

    handles = [(key, append(block, number in snappy)) for number, (key, block) in enumerate(blocks)]
    footer = append(build_block([]), False)
    footer += append(build_block(handles, index_restart_interval) if index is None else index, False)
    return content + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def split_table(items: Sequence[Item], block_entries: int, restart_interval: int = 16, **options: Any) -> bytes:
    """A table of these entries, ``block_entries`` in a block."""
    parts = [items[start : start + block_entries] for start in range(0, len(items), block_entries)]
    return build_table([(part[-1][0], build_block(part, restart_interval)) for part in parts], **options)


def single_bit_flips(data: bytes) -> Iterator[tuple[int, bytes]]:
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(flipped)


def check_every_prefix(parse: Callable[[bytes], object], data: bytes) -> None:
    """The whole input parses; every shorter one, and one that goes on, raise DataLossError."""
    parse(data)
    for nbytes in range(len(data)):
        with pytest.raises(DataLossError):
            parse(data[:nbytes])
    with pytest.raises(DataLossError):
        parse(data + b"\0")


def check_damage(parse: Callable[[bytes], object], data: bytes) -> int:
    """Any flipped bit raises DataLossError or changes nothing; returns how many changed nothing."""
    whole = parse(data)
    harmless = 0
    for bit, flipped in single_bit_flips(data):
        try:
            assert parse(flipped) == whole, f"bit {bit} changed the content silently"
        except DataLossError:
            continue
        harmless += 1
    return harmless


def only_our_errors(parse: Callable[[], object]) -> None:
    """Whatever the input, the parser returns or raises an error of the tree: any other fails the test."""
    with contextlib.suppress(Error):
        parse()
