"""Restoring variables: everything is compared before a byte is written, and every complaint comes in one error."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import operator
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from gpusaver.bundle.bulk import collector_paused
from gpusaver.bundle.entry import Entries
from gpusaver.device import (
    HOST,
    Admitted,
    Runtime,
    admit,
    are_contiguous,
    are_different,
    array_types,
    plain_types,
    runtimes_of,
)
from gpusaver.device.host import address, byte_bounds, own_memory
from gpusaver.distributed.group import Group
from gpusaver.distributed.parts import compare_parts
from gpusaver.errors import DataLossError, Error, InvalidArgumentError, NotFoundError, UnimplementedError
from gpusaver.pipeline.assemble import Target
from gpusaver.pipeline.workers import Slots
from gpusaver.reader import CheckpointReader, Located, TensorRead
from gpusaver.tensor import DataType, TensorSpec
from gpusaver.variables import Leaf, Leaves

_log = logging.getLogger("gpusaver")

_DTYPE = operator.attrgetter("dtype")

#: Looking for near matches compares every missing name with every stored one, 50 us or so a pair.
_MAX_SUGGESTIONS = 20
_MAX_COMPARISONS = 10_000


class RestoreReport:
    """What a restore did.

    ``prefix``: of the checkpoint; ``restored``: variables that now hold the stored values; ``missing``: not in the
    checkpoint, left as they were (``partial``); ``skipped``: there with another shape or dtype, left as they were
    (``partial="shapes"``); ``unexpected``: in the checkpoint, but wanted by no variable; ``values``: name -> new value
    for those that could not be overwritten and were replaced in their container.  The lists of names
    are sorted.  ``nbytes``: read from the data files, each byte counted once; ``seconds``: until all was read,
    verified, and on its way to its device.

    ``needed_nbytes``: of the variables, as they are stored; ``read_nbytes``: all that was read, with gaps between what
    is needed, and twice where it was verified before.  ``unverified``: of a stored slice of theirs only a part was
    read, by all ranks together, so that its checksum could not be compared (``verify="before"`` reads all of it).
    """

    def __init__(
        self, reader: CheckpointReader, restored: Sequence[str], missing: Sequence[str], skipped: Sequence[str]
    ) -> None:
        self.prefix = reader.prefix
        self.restored = list(restored)
        self.missing = list(missing)
        self.skipped = list(skipped)
        self.values: dict[str, Any] = {}
        self.nbytes = 0
        self.needed_nbytes = 0
        self.read_nbytes = 0
        self.unverified: list[str] = []
        self.seconds = 0.0
        self._reader = reader

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.seconds if self.seconds else 0.0

    @functools.cached_property
    def unexpected(self) -> list[str]:
        located = [self._reader.find(name) for name in (*self.restored, *self.skipped)]
        wanted = {found.key for found in located if found is not None}
        return [name for name in self._reader if name.encode("utf-8", "surrogateescape") not in wanted]

    def __repr__(self) -> str:
        return (
            f"<gpusaver.RestoreReport restored={len(self.restored)} missing={len(self.missing)} "
            f"skipped={len(self.skipped)} replaced={len(self.values)}>"
        )


class _Match(NamedTuple):
    leaf: Leaf
    admitted: Admitted
    found: Located


def restore_leaves(
    leaves: Leaves,
    reader: CheckpointReader,
    slots: Slots,
    threads: int,
    *,
    partial: bool | str,
    reshape: bool,
    verify_first: bool,
    group: Group | None,
) -> RestoreReport:
    """See :meth:`gpusaver.Saver.restore`.  Collective with a ``group``: if one rank fails, all do."""
    started_at = time.perf_counter()
    with group.step("compare") if group is not None else nullcontext(), collector_paused():
        report, read, runtimes = _plan_all(leaves, reader, partial=partial, reshape=reshape)
    for runtime in runtimes:
        runtime.order_after_caller()
    has_read = False
    try:
        with group.step("read") if group is not None else nullcontext():
            read.run(slots, threads, verify_first=verify_first)
            has_read = True
        report.unverified = compare_parts(read.partly_read, group)
    except DataLossError as error:
        if has_read:  # another rank's, or of parts that several have read
            error.modified = tuple(report.restored)
        raise
    report.nbytes, report.seconds = read.nbytes, time.perf_counter() - started_at
    report.needed_nbytes, report.read_nbytes = read.needed_nbytes, read.read_nbytes
    return report


def _plan_all(
    leaves: Leaves, reader: CheckpointReader, *, partial: bool | str, reshape: bool
) -> tuple[RestoreReport, TensorRead, set[Runtime]]:
    """Compares everything and plans the reads, by these runtimes; changes nothing."""
    read = TensorRead(reader)
    plain, runtimes, others = _add_plain(leaves, reader, read)
    matches, missing, mismatched = _match(others, reader, reshape)
    _complain(reader, len(leaves), bool(plain or matches), missing, mismatched, partial)
    _check_targets(matches, reader)
    skipped = [name for name, _ in mismatched]
    restored = sorted({*plain, *[match.leaf.name for match in matches]}) if matches else plain
    report = RestoreReport(reader, restored, missing, skipped)
    for match in matches:
        _plan(read, match, report.values)
    return report, read, runtimes | {match.admitted.runtime for match in matches}


def _add_plain(leaves: Leaves, reader: CheckpointReader, read: TensorRead) -> tuple[list[str], set[Runtime], Leaves]:
    """Adds the frequent and simple, NumPy and CuPy arrays stored as they are; returns their names, where they live, and
    all other leaves.

    Only where no array is known to overlap another one; with arrays of other libraries nothing of it is known.
    """
    types = array_types()
    candidates, others = leaves.split(list(map(types.__contains__, map(type, leaves.values))))
    arrays = candidates.values
    runtimes = runtimes_of(arrays)
    if not all(leaf.has_own_memory for leaf in others) or runtimes is None or not _are_simple(arrays, runtimes):
        return [], set(), leaves
    found = reader.plain_rows(candidates.names)
    if found is None:
        return [], set(), leaves
    entries, rows = found
    fits = _fitting(candidates, runtimes, entries, rows)
    if not all(fits):
        candidates, misfits = candidates.split(fits)
        others = others.merged(misfits)
        runtimes, rows = list(itertools.compress(runtimes, fits)), list(itertools.compress(rows, fits))
    ranges = entries.ranges
    if rows != range(len(entries)):
        ranges = ranges.take([row for row in rows if row is not None])
    read.plain(candidates.names, runtimes, candidates.values, ranges)
    return candidates.names, set(runtimes), others


def _fitting(leaves: Leaves, runtimes: Sequence[Runtime], entries: Entries, rows: Sequence[int | None]) -> list[bool]:
    """Of each array, whether its row holds just what lies in its memory."""
    specs: Iterable[TensorSpec | None] = entries.specs
    if rows != range(len(entries)):
        specs = [None if row is None else entries.specs[row] for row in rows]
    dtypes = list(map(_DTYPE, leaves.values))
    types = plain_types(dtypes)
    # A leaf without a key is a Variable's, which may have declared another type.
    return [
        spec is not None
        and spec.shape == array.shape
        and spec.dtype is types[dtype]
        and key is not None
        and part is None
        and (runtime is not HOST or array.flags.carray)
        for spec, array, dtype, key, part, runtime in zip(
            specs, leaves.values, dtypes, leaves.keys, leaves.parts, runtimes, strict=True
        )
    ]


def _are_simple(arrays: Sequence[Any], runtimes: Sequence[Runtime]) -> bool:
    """Whether no two overlap, as far as that is seen quickly: of arrays that own their memory, or are contiguous."""
    if not are_different(arrays):
        return False
    is_on_host = [runtime is HOST for runtime in runtimes]
    on_host = list(itertools.compress(arrays, is_on_host))
    if not own_memory(on_host):
        if not all(array.base is None or array.flags.c_contiguous for array in on_host):
            return False
        if not _overlap_nowhere(list(map(address, on_host)), on_host):
            return False
    on_device = list(itertools.compress(arrays, map(operator.not_, is_on_host)))
    return all(are_contiguous(on_device)) and _overlap_nowhere([array.data.ptr for array in on_device], on_device)


def _overlap_nowhere(addresses: Sequence[int], arrays: Sequence[Any]) -> bool:
    """Of arrays without gaps in them."""
    starts = np.array(addresses, np.int64)
    nbytes = np.array([array.nbytes for array in arrays], np.int64)
    starts, nbytes = starts[nbytes > 0], nbytes[nbytes > 0]
    order = np.argsort(starts)
    return bool(np.all((starts + nbytes)[order[:-1]] <= starts[order[1:]]))


def _match(
    leaves: Leaves, reader: CheckpointReader, reshape: bool
) -> tuple[list[_Match], list[str], list[tuple[str, str]]]:
    """What fits, the names that are missing, and (name, complaint) for those that do not fit."""
    matches: list[_Match] = []
    missing: list[str] = []
    mismatched: list[tuple[str, str]] = []
    for leaf in leaves:
        found = reader.find(leaf.name)
        if found is None:
            missing.append(leaf.name)
            continue
        stored = found.spec
        admitted = admit(leaf.value, leaf.name, leaf.dtype)
        dtype = admitted.spec.dtype
        shape = admitted.spec.shape if leaf.part is None else leaf.part.full_shape
        fits_reshaped = reshape and leaf.part is None and math.prod(shape) == math.prod(stored.shape)
        if dtype != stored.dtype:
            complaint = f"expected dtype {dtype.name} does not equal original dtype {stored.dtype.name}"
            mismatched.append((leaf.name, f"tensor_name = {leaf.name}; {complaint}"))
        elif shape != stored.shape and not fits_reshaped:
            complaint = f"expected shape {list(shape)} does not equal stored shape {list(stored.shape)}"
            mismatched.append((leaf.name, f"tensor_name = {leaf.name}; {complaint}"))
        else:
            matches.append(_Match(leaf, admitted, found))
    return matches, list(dict.fromkeys(missing)), list(dict(mismatched).items())


def _complain(
    reader: CheckpointReader,
    wanted: int,
    has_matches: bool,
    missing: Sequence[str],
    mismatched: Sequence[tuple[str, str]],
    partial: bool | str,
) -> None:
    if partial not in (False, True, "shapes"):
        raise ValueError(f"partial: expected False, True or 'shapes', found {partial!r}")
    is_missing = bool(missing) and not partial
    is_mismatched = bool(mismatched) and partial != "shapes"
    if not is_missing and not is_mismatched:
        if has_matches or not wanted:
            return
        is_missing, is_mismatched = bool(missing), bool(mismatched)
    lines = [f"Restoring from checkpoint {reader.prefix} failed; no variable was changed."]
    if is_missing:
        lines.append(f"Not found in checkpoint ({len(missing)} of {wanted} variables):")
        lines += _with_suggestions(missing, reader)
    if is_mismatched:
        lines.append("Stored otherwise, a mismatch between the variables and the checkpoint:")
        lines += [f"  {complaint}" for _, complaint in mismatched]
    if is_missing and not partial:
        lines.append(
            "partial=True skips variables that are not in the checkpoint; a dict {stored name: variable} renames."
        )
    kind: type[Error] = NotFoundError if is_missing else InvalidArgumentError
    raise kind("\n".join(lines))


def _with_suggestions(missing: Iterable[str], reader: CheckpointReader) -> list[str]:
    import difflib  # only this error needs it

    names = list(reader)
    count = min(_MAX_SUGGESTIONS, _MAX_COMPARISONS // max(1, len(names)))
    lines = []
    for number, name in enumerate(missing):
        near = difflib.get_close_matches(name, names, n=3) if number < count else []
        lines.append(f"  Key {name} not found in checkpoint" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return lines


def _plan(read: TensorRead, match: _Match, values: dict[str, Any]) -> None:
    leaf, admitted, found = match
    stored = found.spec
    wanted = None if leaf.part is None or leaf.part.slice.is_whole(stored.shape) else leaf.part.slice

    def replace(restored: Any) -> None:
        assert admitted.rebuild is not None
        values[leaf.name] = admitted.rebuild(restored)
        leaf.replace(values[leaf.name])

    if stored.dtype is DataType.string:
        read.strings(found, replace)
        return
    shape = admitted.spec.shape if wanted is not None else stored.shape
    if admitted.rebuild is None:
        array = admitted.array
        if shape != admitted.spec.shape:
            array = _reshaped_view(leaf.name, array, shape)
        read.tensor(found, Target(leaf.name, admitted.runtime, array, in_place=True), wanted)
        return
    fresh = _reshaped_view(leaf.name, np.empty(admitted.spec.shape, admitted.array.dtype), shape)
    read.tensor(found, Target(leaf.name, HOST, fresh, in_place=False), wanted)
    read.after(lambda: replace(fresh.reshape(admitted.spec.shape)))


def _reshaped_view(name: str, array: Any, shape: tuple[int, ...]) -> Any:
    try:
        view = array.reshape(shape)
    except ValueError as error:
        raise UnimplementedError(
            f"{name}: stored with shape {list(shape)}, which no array can have: {error}"
        ) from error
    if (
        view.size and not np.may_share_memory(view, array)
        if isinstance(array, np.ndarray)
        else not array.flags.c_contiguous
    ):
        raise InvalidArgumentError(
            f"{name}: reshape=True cannot restore {list(shape)} into the strided memory of an array of shape "
            f"{list(array.shape)}; pass a contiguous array"
        )
    return view


def _check_targets(matches: Sequence[_Match], reader: CheckpointReader) -> None:
    """Refuses memory that cannot hold what is restored: two elements, or two tensors, in one place."""
    places: dict[tuple[int, Any], _Match] = {}
    for match in matches:
        if match.admitted.rebuild is not None and match.leaf.part is None:
            # A container that is there under two names would take two values in one place.
            other = places.setdefault((id(match.leaf.holder), match.leaf.key), match)
            if other is not match:
                _check_same_bytes(reader, other, match)
    arrays = [match.admitted.array for match in matches]
    if all(type(a) is np.ndarray and a.base is None for a in arrays) and len({*map(id, arrays)}) == len(arrays):
        return  # each owns its memory
    spans: list[tuple[int, int, _Match]] = []
    for match in matches:
        array = match.admitted.array
        if match.admitted.rebuild is not None or not array.nbytes:
            continue
        if _overlaps_itself(array):
            raise InvalidArgumentError(
                f"{match.leaf.name}: several elements share one place in memory (an array that was broadcast, or of "
                "overlapping windows); restore into a copy"
            )
        spans.append((*byte_bounds(array), match))
    spans.sort(key=lambda span: span[:2])
    active: list[tuple[int, int, _Match]] = []
    for start, end, match in spans:
        active = [span for span in active if span[1] > start]
        for _, _, other in active:
            _check_pair(reader, other, match)
        active.append((start, end, match))


def _check_pair(reader: CheckpointReader, first: _Match, second: _Match) -> None:
    """``first`` and ``second`` lie in overlapping stretches of memory."""
    if _is_tied(first, second):
        _check_same_bytes(reader, first, second)
    elif _shares(first.admitted.array, second.admitted.array):
        raise InvalidArgumentError(
            f"{first.leaf.name} and {second.leaf.name} overlap in memory but are not the same array: restoring one "
            "would damage the other"
        )


def _check_same_bytes(reader: CheckpointReader, first: _Match, second: _Match) -> None:
    if not reader.same_bytes(first.found, second.found):
        raise InvalidArgumentError(
            f"{first.leaf.name} and {second.leaf.name} are one array, or one place in a container, but the checkpoint "
            "stores different values for them (values that are stored in slices count as different)"
        )


def _overlaps_itself(array: Any) -> bool:
    """Whether two elements may lie in one place.  In arrays that NumPy's indexing makes, each stride spans all of the
    dimensions with smaller ones; what has other strides is taken to overlap."""
    reach = array.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def _is_tied(first: _Match, second: _Match) -> bool:
    a, b = first.admitted.array, second.admitted.array
    return (a.shape, a.strides, a.dtype) == (b.shape, b.strides, b.dtype) and byte_bounds(a) == byte_bounds(b)


def _shares(a: Any, b: Any) -> bool:
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return type(a) is type(b)
    try:
        return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]  # NumPy's stubs know 0 and -1
    except np.exceptions.TooHardError:
        return True
