"""Runs of entries whose keys share beginnings, as table blocks have them, all read side by side.

::

    run 0   entry | entry | ...     step 0 is the first entry of each run, step 1 the second,
    run 1   entry | entry | ...     and so on: all that follows is done with a step as a whole

Half the time of reading one entry after the other.  Only what every writer writes is read so, lengths of one octet and
keys that do not end in zeros; the rest is said to be unusual, whatever it is, and left to :mod:`table_reader`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpusaver.bundle.coding import octet_masks, rows_at, texts_at

_MAX_RUN_LENGTH = 64

Column = npt.NDArray[np.int64]
Octets = npt.NDArray[np.uint8]


class RunEntries(NamedTuple):
    """By step and run.  ``keys``: those that are shorter end in zeros.  ``is_usual``: of each run, whether all of it
    was read; where not, up to the first entry that is another's."""

    is_there: npt.NDArray[np.bool_]
    keys: npt.NDArray[np.bytes_]
    key_nbytes: Octets
    starts: Column
    ends: Column
    is_usual: npt.NDArray[np.bool_]


def read_runs(data: bytes, starts: Column, stops: Column, allowance: int) -> RunEntries | None:
    """The entries of the runs that begin and end there; None if their keys would take more than ``allowance``, or if
    few of the runs are long, so that most steps would be empty."""
    octets = np.frombuffer(data, np.uint8)
    steps: list[tuple[npt.NDArray[Any], ...]] = []
    position = starts
    most_places = int((stops - starts).sum())  # an entry has three octets, and writers' runs are of one length
    while (is_there := position < stops).any():
        if len(starts) * (len(steps) + 1) > most_places:
            return None
        if len(steps) == _MAX_RUN_LENGTH:
            break
        shared, unshared, value_nbytes = _lengths(octets, position)
        start = position + 3 + unshared
        end = start + value_nbytes
        steps.append((is_there, shared, unshared, value_nbytes, start, end))
        position = np.where(
            shared | unshared | value_nbytes < 128, end, stops
        )  # of what is no entry, what follows is none
    if not steps:
        return None
    is_entry, shared, unshared, value_nbytes, starts, ends = map(np.array, zip(*steps, strict=True))
    is_sound = (shared | unshared | value_nbytes < 128) & (ends <= stops)
    key_nbytes = shared + unshared  # where it is sound, this fits
    is_sound[0] &= shared[0] == 0
    is_sound[1:] &= shared[1:] <= key_nbytes[:-1]
    is_usual = (is_sound | ~is_entry).all(axis=0) & ~is_there
    is_there = np.logical_and.accumulate(is_sound & is_entry)
    shared *= is_there
    key_nbytes *= is_there
    origins = np.where(is_there, starts - unshared - shared, 0)
    longest = max(1, int(key_nbytes.max()))
    if max(int(shared.sum(dtype=np.int64)), key_nbytes.size * longest) > allowance:
        return None
    masks = octet_masks(longest)
    is_shared = masks.take(shared, axis=0)
    letters = rows_at(octets, origins, longest)
    letters &= masks.take(key_nbytes, axis=0) ^ is_shared
    for step in range(1, len(steps)):
        letters[step] |= letters[step - 1] & is_shared[step]
    return RunEntries(is_there, letters.view(f"S{longest}")[..., 0], key_nbytes, starts, ends, is_usual)


def find_in_runs(
    data: bytes, keys: Sequence[bytes], starts: Column, stops: Column, allowance: int
) -> tuple[list[int], Column, Column]:
    """Which of the keys are found in their runs, which begin and end there, and where the value of each lies."""
    _, first, run = np.unique(starts, return_index=True, return_inverse=True)  # many keys may be in one
    entries = read_runs(data, starts[first], stops[first], allowance)
    if entries is None:
        return [], starts[:0], starts[:0]
    nbytes = np.fromiter(map(len, keys), np.int64, len(keys))
    is_it = (entries.keys[:, run] == np.array(keys)) & (entries.key_nbytes[:, run] == nbytes)
    is_it &= entries.is_there[:, run]
    rows = np.flatnonzero(is_it.any(axis=0))
    place = is_it.argmax(axis=0)[rows], run[rows]
    return rows.tolist(), entries.starts[place], entries.ends[place]


def first_keys(data: bytes, starts: Column, stops: Column) -> npt.NDArray[np.bytes_] | None:
    """Of each run, None if one of them is unusual."""
    octets = np.frombuffer(data, np.uint8)
    shared, nbytes, value_nbytes = _lengths(octets, starts)
    ends = starts + 3 + nbytes
    if (shared | (nbytes | value_nbytes) // 128).any() or (ends + value_nbytes > stops).any():
        return None
    if (octets[ends - 1] == 0)[nbytes > 0].any():  # it could not be told from a shorter one
        return None
    return texts_at(octets, starts + 3, nbytes)


def _lengths(octets: Octets, position: Column) -> Iterator[Octets]:
    """Of the shared and the own part of the key, and of the value, where each takes one octet."""
    return (octets.take(position + n, mode="clip") for n in range(3))
