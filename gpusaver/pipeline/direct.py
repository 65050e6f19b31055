"""Chunks of host arrays for a disk that is written around the page cache: what it takes from where it is, what not.

::

    chunk      | small small | gap | large, most of it in huge pages | gap | strided | large, in small pages | gap |
    slot       | small small | 0   | edge |                   | edge | 0   | copy    | copy                  | 0   |
    written    | slot                     | the array's pages | slot                                               |

A slot has room for what is copied alone: a chunk may be longer than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpusaver.bundle.layout import Chunk, Piece
from gpusaver.device import HOST, Transfer
from gpusaver.device.host import address, byte_view, is_plain
from gpusaver.device.huge_pages import huge_region
from gpusaver.pipeline.chunk import Checksums
from gpusaver.tensor import Buffer

#: Shorter pieces are copied: that costs less than one more buffer of a vectored write.
IN_PLACE_NBYTES = 64 * 1024

#: A part of a slot, or memory of an array.
Place = slice | memoryview


@dataclass(slots=True)
class SlotPlan:
    """``slot_nbytes`` of a slot are filled, and the ``written`` places, one behind the other, are the chunk.

    ``small``: tensors side by side, where all of them go, and where each ends there; ``copied``: what else is;
    ``checked``: the pieces that are not small, and where their bytes are once that is done; ``gaps``: to be cleared.
    """

    chunk: Chunk
    small: list[tuple[list[int], slice, list[int]]] = field(default_factory=list)
    copied: list[Transfer] = field(default_factory=list)
    checked: list[tuple[Piece, Place]] = field(default_factory=list)
    gaps: list[slice] = field(default_factory=list)
    written: list[Place] = field(default_factory=list)
    slot_nbytes: int = 0
    in_place_nbytes: int = 0

    @property
    def copied_nbytes(self) -> int:
        gaps: int = sum(gap.stop - gap.start for gap in self.gaps)
        return self.slot_nbytes - gaps

    def copy(self, arrays: Sequence[Any], slot: memoryview) -> None:
        for tensors, octets, _ in self.small:
            HOST.gather([arrays[tensor] for tensor in tensors], slot[octets])
        HOST.to_slot(self.copied, slot)
        for gap in self.gaps:  # old bytes must not reach the file
            slot[gap] = bytes(gap.stop - gap.start)

    def check(self, slot: memoryview, checksums: Checksums) -> None:
        """Requires: all is copied."""
        for tensors, octets, ends in self.small:
            checksums.add_whole(tensors, slot[octets], ends)
        for piece, place in self.checked:
            checksums.add(piece, _octets(place, slot))

    def buffers(self, slot: memoryview) -> list[Buffer]:
        return [_octets(place, slot) for place in self.written]


def plan_slot(chunk: Chunk, arrays: Sequence[Any], alignment: int) -> SlotPlan:
    """``arrays``: by number of tensor; ``alignment``: of what is written, in bytes."""
    plan = SlotPlan(chunk)
    end = begin = 0  # of what is planned, in the chunk, and of the part of the slot that is not yet ``written``
    for run in chunk.runs(IN_PLACE_NBYTES):
        piece = chunk.piece(run.start)
        tensor, start, offset, nbytes = piece
        at = offset - plan.in_place_nbytes
        if offset > end:
            plan.gaps.append(slice(end - plan.in_place_nbytes, at))
        if len(run) > 1:
            ends = [stop - chunk.starts[run.start] for stop in chunk.ends[run.start : run.stop]]
            plan.small.append((chunk.tensors[run.start : run.stop], slice(at, at + ends[-1]), ends))
            end = offset + ends[-1]
            continue
        end = offset + nbytes
        first, last = _in_place(piece, arrays[tensor], alignment)
        if last - first < IN_PLACE_NBYTES:
            plan.copied.append(Transfer(arrays[tensor], start, at, nbytes))
            plan.checked.append((piece, slice(at, at + nbytes)))
            continue
        octets = byte_view(arrays[tensor])[start : start + nbytes]
        plan.checked.append((piece, octets))
        if first:
            plan.copied.append(Transfer(arrays[tensor], start, at, first))
        if last < nbytes:
            plan.copied.append(Transfer(arrays[tensor], start + last, at + first, nbytes - last))
        if begin < at + first:
            plan.written.append(slice(begin, at + first))
        plan.written.append(octets[first:last])
        begin = at + first
        plan.in_place_nbytes += last - first
    padded = chunk.padded_nbytes(alignment)
    plan.slot_nbytes = padded - plan.in_place_nbytes
    if end < padded:
        plan.gaps.append(slice(end - plan.in_place_nbytes, plan.slot_nbytes))
    if begin < plan.slot_nbytes:
        plan.written.append(slice(begin, plan.slot_nbytes))
    return plan


def _in_place(piece: Piece, array: Any, alignment: int) -> tuple[int, int]:
    """From where to where a disk takes the piece from where it is: whole pages, in the chunk and in memory.

    Nothing of a short piece, and of one of a NumPy array that does not lie as it is stored, or otherwise than the chunk
    modulo ``alignment``.
    """
    _, start, offset, nbytes = piece
    if nbytes < IN_PLACE_NBYTES or not is_plain(array):
        return 0, 0
    shift = address(array) + start - offset
    if shift % alignment:
        return 0, 0
    first, last = huge_region(shift + offset, shift + offset + nbytes)
    return -((shift - first) // alignment) * alignment - offset, (last - shift) // alignment * alignment - offset


def _octets(place: Place, slot: memoryview) -> memoryview:
    return slot[place] if isinstance(place, slice) else place
