"""The seam between gpusaver and whatever holds the arrays: the host's memory, or one device's.

A runtime turns parts of arrays into host bytes and back.  Everything above it deals in pieces and slots, and never
asks what kind of array it has.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gpusaver.tensor import Buffer, TensorSpec

Column = npt.NDArray[np.int64]


class Event(Protocol):
    """Something that will have happened: copies, or the computing of checksums."""

    def synchronize(self) -> None:
        """Blocks until it has, GIL free; raises if it failed.  Nothing uses the slot any more, in either case."""

    def hold_back(self, stream: Any) -> None:
        """Work queued in ``stream`` from now on (None: the device's current one) starts when it has happened."""


class Checking(Protocol):
    """Checksums that a device will compute, of bytes that lie there."""

    def start(self) -> None:
        """Queues it, after all copies that were queued before."""

    def result(self) -> list[int]:
        """Of each array, unmasked: waits for what :meth:`start` queued.  Raises if that failed."""

    def close(self) -> None:
        """Waits for what is queued and gives memory back.  Idempotent; never raises."""


class HostBuffer(Protocol):
    """Page-aligned host memory that a runtime copies to and from fast."""

    view: memoryview

    def free(self) -> None:
        """Idempotent.  Requires: no copy uses it any more."""


class Transfer(NamedTuple):
    """``nbytes`` bytes of ``array`` (of its row-major form, from byte ``start``) against ``offset`` of a slot."""

    array: Any
    start: int
    offset: int
    nbytes: int


class Transfers:
    """Many of them, as columns; iterating makes rows, each of which takes as long as to copy some kilobytes."""

    def __init__(self, arrays: Sequence[Any], starts: Column, offsets: Column, nbytes: Column) -> None:
        self.arrays = arrays
        self.starts = starts
        self.offsets = offsets
        self.nbytes = nbytes

    @classmethod
    def of(cls, rows: Iterable[Transfer]) -> Transfers:
        if isinstance(rows, cls):
            return rows
        arrays, *columns = zip(*rows, strict=True)
        return cls(arrays, *np.array(columns, np.int64))

    def __iter__(self) -> Iterator[Transfer]:
        columns = self.starts.tolist(), self.offsets.tolist(), self.nbytes.tolist()
        return map(_transfer, zip(self.arrays, *columns, strict=True))


_transfer = functools.partial(tuple.__new__, Transfer)  # a third of the time of Transfer(...)
_C_CONTIGUOUS = operator.attrgetter("_c_contiguous")


def are_contiguous(arrays: Sequence[Any]) -> list[bool]:
    """Of CuPy arrays: by the attribute behind their flags, which are made anew each time and take ten times as long."""
    try:
        return list(map(bool, map(_C_CONTIGUOUS, arrays)))
    except AttributeError:
        return [bool(array.flags.c_contiguous) for array in arrays]


def are_different(arrays: Sequence[Any]) -> bool:
    """Whether no object is there twice; a set of them takes longer."""
    identities = np.sort(np.fromiter(map(id, arrays), np.int64, len(arrays)))
    return not np.any(identities[1:] == identities[:-1])


class Runtime(Protocol):
    """One place where arrays live.  Methods may be called from any thread unless they say otherwise.

    The arrays handed to it are those that :func:`gpusaver.device.admit` returned for it.
    """

    #: "cpu:0", or "cuda:0" and so on.
    name: str

    def owns(self, value: Any) -> bool:
        """Whether it is an array of NumPy's or CuPy's own class that lives here; False says nothing of other kinds."""

    def order_after_caller(self) -> None:
        """Later copies see all work that the calling thread has queued so far.  Call it in the caller's thread."""

    def free_memory(self) -> int | None:
        """Bytes that a snapshot could take; None if only trying tells."""

    def snapshot(
        self, arrays: Sequence[Any], places: Column, memory: Any | None
    ) -> tuple[list[Any], Any, Event | None]:
        """Copies of the arrays as they are now, in order of the caller's work; the memory that holds them; and when
        they will be there (None: they are).

        ``places``: where each copy begins in that memory (bytes, as far from each other as in the data file, so that a
        chunk lies there in one piece).  ``memory`` is what an earlier call returned, reused and, if it does not
        suffice, grown.  Call it in the caller's thread.  Raises ResourceExhaustedError, before anything is copied, if
        memory is short.  The copies are for :meth:`to_slot` alone.
        """

    def view(self, array: Any, start: int, nbytes: int) -> Buffer | None:
        """The bytes themselves (the array, if all), where the host can address them in place; else None."""

    def allocate(self, nbytes: int) -> HostBuffer:
        """Host memory for slots.  ResourceExhaustedError if there is none."""

    def to_slot(self, transfers: Iterable[Transfer], slot: memoryview) -> Event | None:
        """Copies the parts into the slot; they are there when the event has happened (None: already).

        Gaps between them may be overwritten with anything until then.  The parts are in order of their offsets, and all
        of arrays or all of copies of one snapshot.  If it raises, nothing uses the slot any more.
        """

    def from_slot(self, transfers: Iterable[Transfer], slot: memoryview) -> Event | None:
        """Copies from the slot into the arrays; the slot may be reused when the event has happened (None: already).

        Otherwise as :meth:`to_slot`.
        """

    def checking(self, arrays: Sequence[Any], combine: Callable[[int, int, int], int]) -> Checking | None:
        """Of the bytes of contiguous arrays, or of copies of one snapshot, as they will be when it starts; None where
        the device cannot do it, and the host must.

        ``combine(first, second, nbytes of the second)``: the checksum of both, one behind the other.
        """

    def synchronize(self) -> None:
        """Waits for all copies queued so far, also after one of them failed.  Never raises."""

    def warm_up(self) -> None:
        """Does what the first copies would wait for; may take seconds."""

    def trim(self) -> None:
        """Frees what is kept for later copies, as far as nothing uses it.  Never raises."""

    def empty(self, spec: TensorSpec) -> Any:
        """A new array in this place."""
