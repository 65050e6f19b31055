"""Says what is wrong with a checkpoint, one line per problem, instead of raising at the first.

Everything is judged from the index, the sizes of the data files and the bytes of one tensor at a time; reading them
is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gpusaver.bundle.coding import printable
from gpusaver.bundle.crc import crc32c, unmask
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.index import BundleIndex
from gpusaver.bundle.slices import check_tiling, slice_key
from gpusaver.bundle.strings import decode_strings, variants_crc
from gpusaver.errors import Error, InvalidArgumentError
from gpusaver.tensor import DataType


def structure_problems(
    index: BundleIndex, shard_nbytes: Mapping[int, int | None], *, some_slices: bool = False
) -> Iterator[str]:
    """What is wrong with the layout: files missing or too short, tensors on top of each other, slices lacking.

    ``some_slices``: a bundle may have some slices of a tensor only, as one that is part of a larger save.

    ``shard_nbytes`` maps shards to the sizes of their data files (None or absent: there is no such file).  A shard
    in which no entry lies need not exist.  Raises DataLossError if the index itself cannot be read.
    """
    index.slice_keys()  # raises if they are more than there can be
    stored: list[tuple[int, int, int, bytes]] = []
    missing: dict[int, int] = {}
    for key, entry in index.items():
        if entry.slices:
            yield from _slice_problems(index, key, entry, some_slices)
            continue
        size = shard_nbytes.get(entry.shard)
        if size is None:
            missing[entry.shard] = missing.get(entry.shard, 0) + 1
        elif entry.nbytes and entry.offset + entry.nbytes > size:
            yield (
                f"tensor {printable(key)}: its {entry.nbytes} bytes at {entry.offset} reach beyond the end of the data "
                f"file of shard {entry.shard}, which has {size} bytes"
            )
        if entry.nbytes:
            stored.append((entry.shard, entry.offset, entry.nbytes, key))
    for shard, count in sorted(missing.items()):
        yield f"the data file of shard {shard} of {index.num_shards} is missing, and with it {count} tensors"
    yield from _overlaps(stored)


def _slice_problems(index: BundleIndex, key: bytes, whole: Entry, some: bool) -> Iterator[str]:
    for part in whole.slices:
        entry = index.get(slice_key(key, part))
        if entry is None:
            yield f"tensor {printable(key)}: its slice {part} is not in the index"
        elif entry.slices or (entry.spec.dtype, entry.spec.shape) != (whole.spec.dtype, part.shape(whole.spec.shape)):
            yield f"tensor {printable(key)}: its slice {part} is stored as {entry.spec}, which is not that part"
    try:
        check_tiling(key, whole.spec.shape, whole.slices)
    except Error as error:
        if not (some and isinstance(error, InvalidArgumentError)):
            yield str(error)


def _overlaps(stored: list[tuple[int, int, int, bytes]]) -> Iterator[str]:
    stored.sort()
    previous = (-1, 0, 0, b"")
    for item in stored:
        shard, offset, nbytes, key = item
        # Equal ranges are tensors stored once under several names.
        if shard == previous[0] and offset < previous[1] + previous[2] and (offset, nbytes) != previous[1:3]:
            yield f"tensors {printable(previous[3])} and {printable(key)} overlap at byte {offset} of shard {shard}"
        if shard != previous[0] or offset + nbytes > previous[1] + previous[2]:
            previous = item


def tensor_problem(name: bytes, entry: Entry, data: bytes | memoryview, *, big_endian: bool = False) -> str | None:
    """What is wrong with the stored bytes of a tensor or slice, or None.  Requires: not an entry with ``slices``."""
    shown = printable(name)
    expected = unmask(entry.crc)
    try:
        if len(data) != entry.nbytes:
            return f"tensor {shown}: {len(data)} bytes are there, expected {entry.nbytes}"
        if entry.spec.dtype == DataType.string:
            decode_strings(data, entry.spec.num_elements, shown, expected, big_endian=big_endian)
            return None
        if entry.spec.dtype == DataType.variant:
            actual = variants_crc(data, entry.spec.num_elements, shown)
        else:
            actual = crc32c(data)
    except Error as error:
        return str(error)
    return checksum_problem(name, entry, actual)


def checksum_problem(name: bytes, entry: Entry, actual: int) -> str | None:
    """The same for a checksum that was calculated already, unmasked."""
    expected = unmask(entry.crc)
    if actual != expected:
        shown = printable(name)
        return f"tensor {shown}: checksum {actual:08x}, expected {expected:08x}; shard {entry.shard} is damaged"
    return None
