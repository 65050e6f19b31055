"""The seam between gpusaver and whatever holds the arrays: the host's memory, or one device's.

A runtime turns parts of arrays into host bytes and back.  Everything above it deals in pieces and slots, and never
asks what kind of array it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from gpusaver.tensor import Buffer, TensorSpec


class Event(Protocol):
    """Something that will have happened: a copy to or from a slot."""

    @property
    def checksums(self) -> Sequence[int] | None:
        """Of each transfer's bytes, unmasked, if the device computed them; there when ``synchronize`` has returned."""

    def synchronize(self) -> None:
        """Blocks until it has, GIL free; raises if it failed.  Nothing uses the slot any more, in either case."""

    def hold_back(self, stream: Any) -> None:
        """Work queued in ``stream`` from now on (None: the device's current one) starts when it has happened."""


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

    def snapshot(self, arrays: Sequence[Any], places: Sequence[int], memory: Any | None) -> tuple[list[Any], Any]:
        """Copies of the arrays as they are now, in order of the caller's work, and the memory that holds them.

        ``places``: where each copy begins in that memory (bytes, as far from each other as in the data file, so that a
        chunk lies there in one piece).  ``memory`` is what an earlier call returned, reused and, if it does not
        suffice, grown.  Call it in the caller's thread.  Raises ResourceExhaustedError, before anything is copied, if
        memory is short.  The copies are for :meth:`to_slot` alone.
        """

    def view(self, array: Any, start: int, nbytes: int) -> Buffer | None:
        """The bytes themselves (the array, if all), where the host can address them in place; else None."""

    def allocate(self, nbytes: int) -> HostBuffer:
        """Host memory for slots.  ResourceExhaustedError if there is none."""

    def to_slot(self, transfers: Sequence[Transfer], slot: memoryview) -> Event | None:
        """Copies the parts into the slot; they are there when the event has happened (None: already).

        Gaps between them may be overwritten with anything until then.  The parts are in order of their offsets, and all
        of arrays or all of copies of one snapshot.  If it raises, nothing uses the slot any more.
        """

    def from_slot(self, transfers: Sequence[Transfer], slot: memoryview, *, checked: bool = False) -> Event | None:
        """Copies from the slot into the arrays; the slot may be reused when the event has happened (None: already).

        ``checked``: the event has the checksums, where the device can compute them.  Otherwise as :meth:`to_slot`.
        """

    def synchronize(self) -> None:
        """Waits for all copies queued so far, also after one of them failed.  Never raises."""

    def warm_up(self) -> None:
        """Does what the first copies would wait for; may take seconds."""

    def trim(self) -> None:
        """Frees what is kept for later copies, as far as nothing uses it.  Never raises."""

    def empty(self, spec: TensorSpec) -> Any:
        """A new array in this place."""
