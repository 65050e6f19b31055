"""Reading a checkpoint without variables: names, shapes, and single tensors."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpusaver.bundle.bulk import collector_paused
from gpusaver.bundle.coding import printable
from gpusaver.bundle.entry import Entries, Entry, Ranges
from gpusaver.bundle.filenames import index_path, split_data_path
from gpusaver.bundle.index import BundleIndex
from gpusaver.bundle.object_graph import OBJECT_GRAPH_KEY, readable_names, variable_name
from gpusaver.bundle.table_reader import check_end
from gpusaver.bundle.v1 import V1Bundle
from gpusaver.checkpoint_files import PathLike, v1_files
from gpusaver.checkpoint_state import latest_checkpoint
from gpusaver.device import HOST, Runtime, cuda_module
from gpusaver.errors import InvalidArgumentError, NotFoundError
from gpusaver.pipeline.assemble import Assembly, PartlyRead, Target, allocate, cut, upload
from gpusaver.pipeline.chunk import CHUNK_NBYTES
from gpusaver.pipeline.workers import Slots
from gpusaver.storage.base import Storage, read_bytes
from gpusaver.storage.routing import RoutedStorage
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

READ_THREADS = 2


class Located(NamedTuple):
    """A tensor in a checkpoint: the name asked for, the key it is stored under, and its index entry (V2 only)."""

    name: str
    key: bytes
    spec: TensorSpec
    entry: Entry | None


class CheckpointReader:
    """Opens a checkpoint by its prefix; methods as on TensorFlow's reader, and the mapping from names to arrays.

    Names are ``str``; those that are not UTF-8 come with ``surrogateescape``.  In object-based checkpoints (TF2) a
    variable is found under its raw key, under its readable path, and under its graph-style name.

    The index is read at once, data when asked for; nothing stays open.  Methods may be called from any thread.  Raises
    NotFoundError if there is no such checkpoint, DataLossError for damage, InvalidArgumentError for a path that is a
    file of a checkpoint but not its prefix.
    """

    def __init__(self, save_path: PathLike, *, storage: Storage | None = None) -> None:
        self.prefix = os.fsdecode(save_path)
        self._storage = storage or RoutedStorage()
        self._index: BundleIndex | None = None
        self._v1: V1Bundle | None = None
        if self._storage.exists(index_path(self.prefix)):
            path = index_path(self.prefix)
            self._index = BundleIndex(read_table(self._storage, path), path)
        elif files := v1_files(self._storage, self.prefix):
            self._v1 = V1Bundle([(path, read_table(self._storage, path)) for path in files])
        else:
            raise not_a_prefix(self.prefix, self._storage)

    @collector_paused()
    def get_variable_to_shape_map(self) -> dict[str, list[int]]:
        return {name: list(spec.shape) for name, spec in self._specs().items()}

    def get_variable_to_dtype_map(self) -> dict[str, DataType]:
        return {name: spec.dtype for name, spec in self._specs().items()}

    def has_tensor(self, name: str | bytes) -> bool:
        return self.find(_text(name)) is not None

    def get_tensor(self, name: str | bytes) -> Any:
        """A new, writable, row-major array; rank 0: a NumPy scalar.

        Strings: an object array of bytes, rank 0: bytes.  Quantized types come as the integers they are stored as.
        Raises NotFoundError for an unknown name, UnimplementedError for variants.
        """
        return self.get_tensors([_text(name)])[_text(name)]

    def get_tensors(self, names: list[str], runtime: Runtime = HOST) -> dict[str, Any]:
        """Several at once, each byte read once; arrays of the runtime's kind (strings on the host)."""
        read = TensorRead(self)
        values: dict[str, Any] = dict.fromkeys(names)  # in the order asked for, whatever is delivered first
        for name in names:
            found = self.find(name)
            if found is None:
                raise NotFoundError(f"Key {name} not found in checkpoint {self.prefix}")
            spec = found.spec
            if spec.dtype is DataType.string:
                read.strings(found, functools.partial(_deliver_strings, values, name, spec))
            else:
                read.check(found)
                target = allocate(name, spec, runtime)
                read.tensor(found, target)
                is_scalar = runtime is HOST and not spec.shape
                values[name] = target.array[()] if is_scalar else target.array
                if is_scalar:
                    read.after(functools.partial(_deliver_scalar, values, name, target))
        runtime.order_after_caller()  # whose memory others may still be using
        with contextlib.closing(Slots(CHUNK_NBYTES)) as slots:
            read.run(slots, READ_THREADS)
        return values

    def debug_string(self) -> bytes:
        """One line per tensor: ``name (DT_FLOAT) [2,3]``."""
        lines = [
            f"{name} ({spec.dtype.enum_name}) [{','.join(map(str, spec.shape))}]\n"
            for name, spec in self._specs().items()
        ]
        return "".join(lines).encode("utf-8", "surrogateescape")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str | bytes) and self.has_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Any:
        return self.get_tensor(name)

    def find(self, name: str) -> Located | None:
        """Where a tensor is, by any of its names; None if it is not there."""
        key = _key(name)
        if self._v1 is not None:
            found = self._v1.tensors().get(key)
            return None if found is None else Located(name, key, found[0], None)
        assert self._index is not None
        entry = self._index.get(key) if key else None
        if entry is not None and not (key[0] == 0 and key in self._index.slice_keys()):
            return Located(name, key, entry.spec, entry)
        other = self.readable_names.get(name)
        if other is None or (entry := self._index.get(_key(other))) is None:
            return None
        return Located(name, _key(other), entry.spec, entry)

    def plain_rows(self, names: Sequence[str]) -> tuple[Entries, Sequence[int | None]] | None:
        """The entries, and for each name the row of the tensor stored under it, whole and as it lies in memory.

        A row is None, or all of it, where that is not so or not worth finding out for so few.
        """
        if self._index is None or self._index.big_endian:
            return None
        try:
            keys = list(map(str.encode, names))
        except UnicodeEncodeError:
            keys = list(map(_key, names))
        found = self._index.rows(keys)
        if found is None or not found[0].others:
            return found
        entries, rows = found
        # Where there are slices they have keys of their own, which might be asked for as names.
        return entries, [
            None if row is None or row in entries.others or key[:1] == b"\0" else row
            for key, row in zip(keys, rows, strict=True)
        ]

    def same_bytes(self, first: Located, second: Located) -> bool:
        """Whether two tensors are known to hold equal bytes; of whole V2 tensors their checksums tell."""
        if self._v1 is not None:
            one, other = self._v1.get_array(first.key), self._v1.get_array(second.key)
            if one.dtype == object:
                return bool(one.tolist() == other.tolist())
            return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
        a, b = first.entry, second.entry
        if a is None or b is None or a.slices or b.slices:
            return False
        return (a.nbytes, a.crc) == (b.nbytes, b.crc)

    @functools.cached_property
    def readable_names(self) -> dict[str, str]:
        """For object-based checkpoints: other names of a variable -> its key.  Empty for all others."""
        if self._index is None:
            return {}
        graph = self._index.get(OBJECT_GRAPH_KEY)
        if graph is None:
            return {}
        elements: list[bytes] = []
        read = TensorRead(self)
        read.strings(Located(OBJECT_GRAPH_KEY.decode(), OBJECT_GRAPH_KEY, graph.spec, graph), elements.extend)
        with contextlib.closing(Slots(CHUNK_NBYTES)) as slots:
            read.run(slots, 1)
        names = {readable: name for name in self if (readable := variable_name(name)) is not None}
        return names | readable_names(elements[0])

    @functools.cached_property
    def _names(self) -> list[str]:
        """Kept, for ``list(reader)`` asks for their number first."""
        return list(self._specs())

    @collector_paused()
    def _specs(self) -> dict[str, TensorSpec]:
        if self._v1 is not None:
            return {_text(name): spec for name, (spec, _) in sorted(self._v1.tensors().items())}
        assert self._index is not None
        return {key.decode("utf-8", "surrogateescape"): spec for key, spec in self._index.tensors()}

    def __repr__(self) -> str:
        return f"<gpusaver.CheckpointReader {self.prefix!r}>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        from gpusaver.display import html_table

        return html_table(self.prefix, self._specs().items())


class TensorRead:
    """Some tensors of one checkpoint, of either format, read together.  Made for one use by one thread."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._v1 = reader._v1
        self._v1_arrays: dict[bytes, Any] = {}
        self._after: list[Callable[[], object]] = []
        self._assembly = None
        if reader._index is not None:
            self._assembly = Assembly(reader._index, reader.prefix, reader._storage)

    @property
    def nbytes(self) -> int:
        """Stored bytes that will be read; of a V1 checkpoint, whose tensors are in its index, 0."""
        return self._assembly.nbytes if self._assembly is not None else 0

    @property
    def needed_nbytes(self) -> int:
        """Stored bytes of what is wanted; of a V1 checkpoint 0."""
        return self._assembly.needed_nbytes if self._assembly is not None else 0

    @property
    def read_nbytes(self) -> int:
        """What :meth:`run` has read from the data files, in all."""
        return self._assembly.read_nbytes if self._assembly is not None else 0

    @property
    def partly_read(self) -> list[PartlyRead]:
        """See :attr:`gpusaver.pipeline.assemble.Assembly.partly_read`."""
        return self._assembly.partly_read if self._assembly is not None else []

    def tensor(self, found: Located, target: Target, wanted: TensorSlice | None = None) -> None:
        """Requires: a fixed-size type; the target has the tensor's shape, or that of ``wanted``."""
        if self._assembly is not None and found.entry is not None:
            self._assembly.add_tensor(found.key, found.entry, target, wanted)
            return
        values = self._v1_array(found.key)
        part = values if wanted is None else cut(values, wanted.index(values.shape))
        self._after.append(lambda: upload(target, part))

    def plain(self, names: Sequence[str], runtimes: Sequence[Runtime], arrays: Sequence[Any], ranges: Ranges) -> None:
        """The same for contiguous arrays of the user and rows of :meth:`CheckpointReader.plain_rows`."""
        assert self._assembly is not None
        self._assembly.add_plain(names, runtimes, arrays, ranges)

    def strings(self, found: Located, deliver: Callable[[list[bytes]], None]) -> None:
        """``deliver`` gets the elements of a string tensor when everything is read and verified."""
        if self._assembly is not None and found.entry is not None:
            self._assembly.add_strings(found.name, found.entry, deliver)
            return
        items = list(self._v1_array(found.key).reshape(-1))
        self._after.append(lambda: deliver(items))

    def check(self, found: Located) -> None:
        """Before memory is allocated for the tensor: raises if it is not stored, or its data file is too short."""
        if self._assembly is not None and found.entry is not None:
            self._assembly.check(found.name, found.key, found.entry)
        else:
            self._v1_array(found.key)

    def _v1_array(self, key: bytes) -> Any:
        assert self._v1 is not None
        if key not in self._v1_arrays:
            self._v1_arrays[key] = self._v1.get_array(key)
        return self._v1_arrays[key]

    def after(self, call: Callable[[], object]) -> None:
        """``call()`` runs when everything is read and verified."""
        self._after.append(call)

    def run(self, slots: Slots, threads: int, *, verify_first: bool = False) -> None:
        """See :meth:`gpusaver.pipeline.assemble.Assembly.run`."""
        if self._assembly is not None:
            self._assembly.run(slots, threads, verify_first=verify_first)
        for call in self._after:
            call()


def _deliver_strings(values: dict[str, Any], name: str, spec: TensorSpec, items: list[bytes]) -> None:
    if not spec.shape:
        values[name] = items[0]
        return
    array = np.empty(len(items), dtype=object)
    array[:] = items
    values[name] = array.reshape(spec.shape)


def _deliver_scalar(values: dict[str, Any], name: str, target: Target) -> None:
    values[name] = target.array[()]


def read_table(storage: Storage, path: str) -> bytes:
    """An index or V1 file; DataLossError, without reading all of it, for a file that does not end as one."""
    return read_bytes(storage, path, check_end=check_end)


def _key(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _text(name: str | bytes) -> str:
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name


def not_a_prefix(path: str, storage: Storage) -> NotFoundError | InvalidArgumentError:
    """The error for a path under which there is no checkpoint: what it is instead, and what to pass."""
    found = split_data_path(path)
    prefix = found[0] if found is not None else path.removesuffix(".index").removesuffix(".meta")
    if prefix != path and storage.exists(index_path(prefix)):
        return InvalidArgumentError(f"{path} is one file of a checkpoint; pass its prefix, {prefix}")
    if path and storage.is_directory(path):
        latest = latest_checkpoint(path, storage=storage)
        advice = f"its latest checkpoint is {latest}" if latest else "no checkpoint state file was found in it"
        return InvalidArgumentError(f"{path} is a directory, not a checkpoint; {advice} (see latest_checkpoint)")
    if storage.exists(path):
        latest = latest_checkpoint(*os.path.split(path), storage=storage)
        if latest is not None:
            return InvalidArgumentError(f"{path} is a state file; the latest checkpoint it names is {latest}")
        return InvalidArgumentError(
            f"{path} is a file, but not a checkpoint of any format (no {path}.index, no V1 table)"
        )
    directory, base = os.path.split(path)
    others = [name.removesuffix(".index") for name in storage.list(directory) if name.endswith(".index")]
    there = f"; {directory or '.'} has {', '.join(others[:5])}" if others else ""
    return NotFoundError(f"no checkpoint {path}: there is no file {printable(_key(base))}.index{there}")


def load_checkpoint(ckpt_dir_or_file: PathLike, *, storage: Storage | None = None) -> CheckpointReader:
    """A reader for a prefix, or for the latest checkpoint of a directory.

    Raises ValueError if the directory has none, NotFoundError if there is no such prefix.
    """
    path = os.fsdecode(ckpt_dir_or_file)
    if (storage or RoutedStorage()).is_directory(path):
        latest = latest_checkpoint(path, storage=storage)
        if latest is None:
            raise ValueError(f"Couldn't find 'checkpoint' file or checkpoints in given directory {path}")
        path = latest
    return CheckpointReader(path, storage=storage)


@collector_paused()
def list_variables(ckpt_dir_or_file: PathLike) -> list[tuple[str, list[int]]]:
    """``(name, shape)`` of every tensor, sorted by name."""
    return sorted(load_checkpoint(ckpt_dir_or_file).get_variable_to_shape_map().items())


def load_variable(ckpt_dir_or_file: PathLike, name: str) -> Any:
    """The value of one tensor; a trailing ``:0`` of the name is ignored."""
    return load_checkpoint(ckpt_dir_or_file).get_tensor(name.removesuffix(":0"))


def load(prefix: PathLike, *, device: str = "cpu") -> dict[str, Any]:
    """Every tensor of a checkpoint (a prefix, or a directory's latest): name -> array on ``device``.

    ``device``: "cpu" (NumPy) or "cuda:0" (CuPy).  Strings stay on the host.
    """
    reader = load_checkpoint(prefix)
    runtime: Runtime = HOST
    if device.partition(":")[0] != "cpu":
        runtime = cuda_module().cuda_runtime(int(device.partition(":")[2] or 0))
    return reader.get_tensors(list(reader), runtime)
