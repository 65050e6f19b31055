"""Checksums of stored slices that nobody has read whole, put together from what each rank has read of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence

from gpusaver.bundle.crc import unmask
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.runs import Run, joined_crc
from gpusaver.distributed.group import Group
from gpusaver.errors import DataLossError
from gpusaver.pipeline.assemble import PartlyRead

#: More are not put together: each takes ten microseconds.
_MAX_RUNS = 4096

#: Of a slice: shard, offset, number of bytes, stored checksum.  And its name, its file, and some runs of it.
_Key = tuple[int, int, int, int]
_Row = tuple[_Key, str, str, list[Run]]


def compare_parts(slices: Sequence[PartlyRead], group: Group | None) -> list[str]:
    """Names of the tensors whose checksums cannot be compared, because not all bytes of a slice were read by anybody.

    Collective with a ``group``.  Raises DataLossError, on every rank, for a checksum that differs.
    """
    rows: list[_Row] = [
        (_key(entry), name, where, runs if len(runs) <= _MAX_RUNS else []) for name, where, entry, runs in slices
    ]
    if group is None:
        compared = _compare(rows)
    else:

        def answer(bodies: list[bytes]) -> list[bytes]:
            found = _compare(
                (tuple(key), name, where, [Run(*run) for run in runs])
                for body in bodies
                for key, name, where, runs in json.loads(body)
            )
            return [json.dumps(sorted(found)).encode()] * len(bodies)

        compared = {tuple(key) for key in json.loads(group.exchange("checksums", json.dumps(rows).encode(), answer))}
    return sorted({name for key, name, _, _ in rows if key not in compared})


def _key(entry: Entry) -> _Key:
    return entry.shard, entry.offset, entry.nbytes, int(unmask(entry.crc))


def _compare(rows: Iterable[_Row]) -> set[_Key]:
    """Those that could be compared."""
    parts: dict[_Key, list[Run]] = defaultdict(list)
    names: dict[_Key, tuple[str, str]] = {}
    for key, name, where, runs in rows:
        parts[key] += runs
        names[key] = name, where
    compared = set()
    for key, read in parts.items():
        _, offset, nbytes, expected = key
        crc = joined_crc(read, nbytes)
        if crc is None:
            continue
        if crc != expected:
            name, where = names[key]
            raise DataLossError(
                f"{where}: the bytes of tensor {name} are damaged. Checksum does not match: stored {expected:#010x} "
                f"vs. calculated on its restored parts {crc:#010x} ({nbytes} bytes at offset {offset}). Restore an "
                "older checkpoint"
            )
        compared.add(key)
    return compared
