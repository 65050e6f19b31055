"""Data files that need not be written, because the last save has written the same bytes.

Variables that do not change, *frozen* ones, lie in data files of their own::

    first save    frozen: Variables with trainable=False              [ the rest ] [ frozen ]    both are written
    each save     frozen files are hashed while the rest is written, and compared with those of the last save:
                  the same bytes at the same places, in a file that is what it was then?   it gets another name
                                                                                           (object stores copy it)
                  else                                                                     it is written
    after it      what changed is frozen no more (for ever, the third time); what kept its checksum is frozen from the
                  next save on, if that is worth a new layout

Saying that a variable is frozen, or finding it so by its checksum, decides where it lies.  What is not written again is
decided by its bytes: by XXH3's 128-bit hash of every tensor of the file, each time.  With ``"declared"`` the word of
trainable=False is taken for tensors of more than a MiB: of these one 64 KiB in sixteen are hashed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gpusaver.bundle.layout import Layout
from gpusaver.device import HOST, Runtime, Transfer
from gpusaver.errors import CancelledError, UnimplementedError
from gpusaver.pipeline.chunk import CHUNK_NBYTES
from gpusaver.pipeline.commit import FileVersion
from gpusaver.pipeline.plan import Plan, Save
from gpusaver.pipeline.timeline import Timeline
from gpusaver.pipeline.workers import LazySlot, Slots
from gpusaver.storage.base import Storage
from gpusaver.variables import Leaf, Variable

#: Variables that were found unchanged get a file of their own if they have this part of all bytes.
_WORTHWHILE = 0.1
#: Of threads that hash: one alone does not use all of the memory's speed.
_THREADS = 2
#: Each new layout has everything written: what has changed so often while it was frozen never is again.
_PATIENCE = 3
#: Tensors that are declared frozen, and larger than so many blocks, are hashed but for one block in so many.
_BLOCK_NBYTES = 64 * 1024
_BLOCKS = 16


class Contents(NamedTuple):
    """What a data file holds: its size, and of each tensor, in order, offset, size and hash."""

    nbytes: int
    tensors: tuple[tuple[int, int, bytes], ...]


class WrittenFile(NamedTuple):
    """A data file of the last save; ``checksums`` as in the index, unmasked, in the order of ``contents``."""

    file: FileVersion
    contents: Contents
    checksums: tuple[int, ...]


class Incremental:
    """What one Saver knows of its last save.  One save at a time; UnimplementedError without xxhash."""

    def __init__(self, mode: Literal[True, "declared"]) -> None:
        try:
            import xxhash  # noqa: F401
        except ImportError as error:
            raise UnimplementedError("incremental=True needs xxhash: pip install 'gpusaver[incremental]'") from error
        self._mode = mode
        self._frozen: frozenset[str] | None = None
        self._declared: frozenset[str] = frozenset()
        #: How often variables have changed that were frozen.
        self._changes: Counter[str] = Counter()
        self._checksums: dict[str, list[int | None]] = {}
        self._files: list[WrittenFile] = []

    def frozen(self, leaves: Iterable[Leaf]) -> frozenset[str]:
        """Names of the variables that lie in files of their own at the next save."""
        self._declared = frozenset(
            leaf.name for leaf in leaves if isinstance(leaf.holder, Variable) and not leaf.holder.trainable
        )
        if self._frozen is None:
            self._frozen = self._declared
        return self._frozen

    def trusted(self, plan: Plan) -> set[int]:
        """Numbers of the tensors that are not hashed whole."""
        return {row.tensor for row in plan.rows if row.name in self._declared} if self._mode == "declared" else set()

    @property
    def has_files(self) -> bool:
        return bool(self._files)

    def find(self, contents: Contents, storage: Storage) -> WrittenFile | None:
        """A file of the last save that holds just this, and is what it was."""
        for written in self._files:
            if written.contents == contents and written.file.version is not None:
                return written if storage.version(written.file.path) == written.file.version else None
        return None

    def saved(self, plan: Plan, checksums: dict[int, int], files: list[WrittenFile]) -> None:
        """The save is durable: ``files`` are its frozen ones, ``checksums`` those of all tensors, by number."""
        self._files = files
        before, self._checksums = self._checksums, {}
        nbytes: dict[str, int] = {}
        for row in plan.rows:
            self._checksums.setdefault(row.name, []).append(checksums.get(row.tensor))
            nbytes[row.name] = nbytes.get(row.name, 0) + row.nbytes
        if not before:
            return
        kept = {name for name, found in self._checksums.items() if before.get(name) == found}
        self._changes.update(plan.frozen - kept)
        kept = {name for name in kept if self._changes[name] < _PATIENCE}
        if sum(nbytes[name] for name in kept - plan.frozen) < _WORTHWHILE * sum(nbytes.values()):
            kept &= plan.frozen
        self._frozen = frozenset(kept)

    def forget_files(self) -> None:
        """The next save writes everything."""
        self._files = []


class Hashing:
    """Hashes the tensors of some data files in threads; where no thread, or no other one, may read, at once.

    Reads the sources until :meth:`result` or :meth:`stop` has returned.
    """

    def __init__(
        self,
        save: Save,
        shards: Collection[int],
        trusted: Collection[int],
        slots: Slots,
        cancelled: threading.Event,
        timeline: Timeline,
    ) -> None:
        self._save = save
        self._shards = shards
        self._trusted = trusted
        self._slots = slots
        self._cancelled = cancelled
        self._timeline = timeline
        self._is_stopped = False
        self._digests: dict[int, bytes] = {}
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        tensors = tensors_of(save.plan.layout, shards)
        # Only one thread at a time may queue copies from a device.
        is_beside = all(runtime is HOST for runtime in save.runtimes)
        parts = [tensors[number::_THREADS] for number in range(_THREADS)] if is_beside else [tensors]
        for number, part in enumerate(parts):
            if not (is_beside and self._start(number, part)):
                self._run(part)

    def result(self) -> dict[int, Contents]:
        """By data file."""
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error
        layout = self._save.plan.layout
        return {
            shard: Contents(
                layout.shard_nbytes[shard],
                tuple(
                    (int(layout.offset[tensor]), int(layout.nbytes[tensor]), self._digests[tensor])
                    for tensor in tensors_of(layout, [shard])
                ),
            )
            for shard in self._shards
        }

    def stop(self) -> None:
        """Never raises."""
        self._is_stopped = True
        for thread in self._threads:
            thread.join()

    def _start(self, number: int, tensors: Sequence[int]) -> bool:
        thread = threading.Thread(target=self._run_beside, args=(tensors,), name=f"gpusaver-hash-{number}")
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down
            return False
        self._threads.append(thread)
        return True

    def _run_beside(self, tensors: Collection[int]) -> None:
        with self._timeline.in_background():
            self._run(tensors)

    def _run(self, tensors: Collection[int]) -> None:
        try:
            self._hash(tensors)
        except BaseException as error:
            self._error = error

    def _hash(self, tensors: Collection[int]) -> None:
        import xxhash

        layout, sources = self._save.plan.layout, self._save.sources
        hashes = {tensor: xxhash.xxh3_128() for tensor in tensors}
        slot = LazySlot(self._slots)
        try:
            for chunk in layout.chunks(CHUNK_NBYTES):
                if chunk.shard not in self._shards:
                    continue
                if self._is_stopped or self._cancelled.is_set():
                    raise CancelledError("the save was cancelled before it was committed")
                pieces = [piece for piece in chunk.pieces if piece.tensor in hashes]
                with self._timeline.span("compare", sum(piece.nbytes for piece in pieces)):
                    for tensor, start, _, nbytes in pieces:
                        is_sampled = tensor in self._trusted and layout.nbytes[tensor] > _BLOCKS * _BLOCK_NBYTES
                        for first, size in _blocks(start, nbytes) if is_sampled else [(start, nbytes)]:
                            hashes[tensor].update(
                                _octets(sources.runtimes[tensor], sources.arrays[tensor], first, size, slot)
                            )
        finally:
            slot.close()
        self._digests.update((tensor, found.digest()) for tensor, found in hashes.items())


def _blocks(start: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Start and size of what is hashed of this part of a tensor."""
    step = _BLOCKS * _BLOCK_NBYTES
    for block in range(start // step * step, start + nbytes, step):
        first, end = max(block, start), min(block + _BLOCK_NBYTES, start + nbytes)
        if first < end:
            yield first, end - first


def _octets(runtime: Runtime, array: Any, start: int, nbytes: int, slot: LazySlot) -> memoryview:
    """A part of a tensor: where it is, or copied into the slot."""
    view = HOST.view(array, start, nbytes) if runtime is HOST else None
    if view is not None:
        return np.frombuffer(view, np.uint8).data
    event = runtime.to_slot([Transfer(array, start, 0, nbytes)], slot.get())
    if event is not None:
        event.synchronize()
    return slot.get()[:nbytes]


def tensors_of(layout: Layout, shards: Collection[int]) -> Sequence[int]:
    """The numbers of those that have bytes in these data files, in the order in which they lie there."""
    numbers = np.flatnonzero(np.isin(layout.shard, list(shards)) & (layout.nbytes > 0))
    ordered: list[int] = numbers[np.lexsort((layout.offset[numbers], layout.shard[numbers]))].tolist()
    return ordered
