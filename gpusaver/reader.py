"""Reading a checkpoint without variables: names, shapes, and single tensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpusaver.bundle.coding import printable
from gpusaver.bundle.filenames import index_path, split_data_path
from gpusaver.bundle.index import BundleIndex, Entry
from gpusaver.bundle.object_graph import OBJECT_GRAPH_KEY, readable_names, variable_name
from gpusaver.bundle.slices import slice_key
from gpusaver.bundle.v1 import V1Bundle
from gpusaver.checkpoint_state import PathLike, latest_checkpoint, v1_files
from gpusaver.device import HOST, Runtime
from gpusaver.errors import InvalidArgumentError, NotFoundError
from gpusaver.pipeline.assemble import Assembly, Target, allocate, cut, upload
from gpusaver.pipeline.chunk import CHUNK_NBYTES
from gpusaver.pipeline.workers import Slots
from gpusaver.storage.base import Storage, read_bytes
from gpusaver.storage.local import LocalStorage
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

READ_THREADS = 2


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
        self._storage = storage or LocalStorage()
        self._index: BundleIndex | None = None
        self._v1: V1Bundle | None = None
        if self._storage.exists(index_path(self.prefix)):
            path = index_path(self.prefix)
            self._index = BundleIndex(read_bytes(self._storage, path), path)
        elif files := v1_files(self._storage, self.prefix):
            self._v1 = V1Bundle([(path, read_bytes(self._storage, path)) for path in files])
        else:
            raise _not_a_prefix(self.prefix, self._storage)

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
        restore = TensorRead(self)
        values: dict[str, Any] = dict.fromkeys(names)  # in the order asked for, whatever is delivered first
        for name in names:
            spec = self.find(name)
            if spec is None:
                raise NotFoundError(f"Key {name} not found in checkpoint {self.prefix}")
            if spec.dtype is DataType.string:
                restore.strings(name, functools.partial(_deliver_strings, values, name, spec))
            else:
                restore.check_length(name)
                target = allocate(name, spec, runtime)
                restore.tensor(name, target)
                is_scalar = runtime is HOST and not spec.shape
                values[name] = target.array[()] if is_scalar else target.array
                if is_scalar:
                    restore.after(functools.partial(_deliver_scalar, values, name, target))
        restore.run(Slots(CHUNK_NBYTES), READ_THREADS)
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
        return iter(self._specs())

    def __len__(self) -> int:
        return len(self._specs())

    def __getitem__(self, name: str) -> Any:
        return self.get_tensor(name)

    def find(self, name: str) -> TensorSpec | None:
        """Dtype and full shape of a tensor, or None."""
        if self._v1 is not None:
            found = self._v1.tensors().get(_key(name))
            return None if found is None else found[0]
        entry = self.entry(name)
        return None if entry is None else entry[1].spec

    def entry(self, name: str) -> tuple[bytes, Entry] | None:
        """Key and index entry of a tensor by any of its names.  Requires: not a V1 checkpoint."""
        assert self._index is not None
        key = _key(name)
        found = self._index.get(key) if key else None
        if found is not None and not (key[0] == 0 and key in self._index.slice_keys()):
            return key, found
        other = self.readable_names.get(name)
        if other is None:
            return None
        found = self._index.get(_key(other))
        return None if found is None else (_key(other), found)

    def stored_name(self, name: str) -> str:
        """The key under which a tensor is stored, for any of its names."""
        found = self.entry(name) if self._index is not None else None
        return name if found is None else _text(found[0])

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are known to hold equal bytes, from their checksums alone."""
        entries = [self.entry(name) for name in (first, second)] if self._index is not None else [None]
        if any(entry is None or entry[1].slices for entry in entries):
            return False
        sums = {(entry[1].nbytes, entry[1].crc) for entry in entries if entry is not None}
        return len(sums) == 1

    @functools.cached_property
    def readable_names(self) -> dict[str, str]:
        """For object-based checkpoints: other names of a variable -> its key.  Empty for all others."""
        if self._index is None or self._index.get(OBJECT_GRAPH_KEY) is None:
            return {}
        names = {readable: name for name in self if (readable := variable_name(name)) is not None}
        elements: list[bytes] = []
        restore = TensorRead(self)
        restore.strings(OBJECT_GRAPH_KEY.decode(), elements.extend)
        restore.run(Slots(CHUNK_NBYTES), 1)
        return names | readable_names(elements[0])

    def _specs(self) -> dict[str, TensorSpec]:
        if self._v1 is not None:
            return {_text(name): spec for name, (spec, _) in sorted(self._v1.tensors().items())}
        assert self._index is not None
        return {_text(key): entry.spec for key, entry in self._index.tensors()}

    def __repr__(self) -> str:
        return f"<gpusaver.CheckpointReader {self.prefix!r}>"


class TensorRead:
    """Some tensors of one checkpoint, of either format, read together.  Made for one use by one thread."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._v1 = reader._v1
        self._after: list[Any] = []
        self._assembly = None
        if reader._index is not None:
            self._assembly = Assembly(reader._index, reader.prefix, reader._storage)

    def tensor(self, name: str, target: Target, wanted: TensorSlice | None = None) -> None:
        """Requires: the reader has ``name``, of a fixed-size type; the target has its shape or that of ``wanted``."""
        if self._assembly is not None:
            key, entry = self._entry(name)
            self._assembly.add_tensor(key, entry, target, wanted)
            return
        assert self._v1 is not None
        values = self._v1.get_array(_key(name))
        part = values if wanted is None else cut(values, wanted.index(values.shape))
        self._after.append(lambda: upload(target, part))

    def strings(self, name: str, deliver: Any) -> None:
        if self._assembly is not None:
            _, entry = self._entry(name)
            self._assembly.add_strings(name, entry, deliver)
            return
        assert self._v1 is not None
        items = list(self._v1.get_array(_key(name)).reshape(-1))
        self._after.append(lambda: deliver(items))

    def check_length(self, name: str) -> None:
        """Before memory is allocated: OutOfRangeError if the data file is too short for the tensor."""
        if self._assembly is None:
            return
        key, entry = self._entry(name)
        index = self._reader._index
        parts = [index.get(slice_key(key, part)) for part in entry.slices] if index is not None else []
        self._assembly.check_lengths([(name, part) for part in (entry, *parts) if part is not None])

    def after(self, call: Any) -> None:
        """``call()`` runs when everything is read and verified."""
        self._after.append(call)

    def run(self, slots: Slots, threads: int, *, verify_first: bool = False) -> None:
        """See :meth:`gpusaver.pipeline.assemble.Assembly.run`."""
        if self._assembly is not None:
            self._assembly.run(slots, threads, verify_first=verify_first)
        for call in self._after:
            call()

    def _entry(self, name: str) -> tuple[bytes, Entry]:
        found = self._reader.entry(name)
        if found is None:
            raise NotFoundError(f"Key {name} not found in checkpoint {self._reader.prefix}")
        return found


def _deliver_strings(values: dict[str, Any], name: str, spec: TensorSpec, items: list[bytes]) -> None:
    if not spec.shape:
        values[name] = items[0]
        return
    array = np.empty(len(items), dtype=object)
    array[:] = items
    values[name] = array.reshape(spec.shape)


def _deliver_scalar(values: dict[str, Any], name: str, target: Target) -> None:
    values[name] = target.array[()]


def _key(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _text(name: str | bytes) -> str:
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name


def _not_a_prefix(path: str, storage: Storage) -> NotFoundError | InvalidArgumentError:
    """The error for a path under which there is no checkpoint: what it is instead, and what to pass."""
    found = split_data_path(path)
    prefix = found[0] if found is not None else path.removesuffix(".index").removesuffix(".meta")
    if prefix != path and storage.exists(index_path(prefix)):
        return InvalidArgumentError(f"{path} is one file of a checkpoint; pass its prefix, {prefix}")
    if storage.is_directory(path):
        latest = latest_checkpoint(path, storage=storage)
        advice = f"its latest checkpoint is {latest}" if latest else "no checkpoint state file was found in it"
        return InvalidArgumentError(f"{path} is a directory, not a checkpoint; {advice} (see latest_checkpoint)")
    if storage.exists(path):
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
    if (storage or LocalStorage()).is_directory(path):
        latest = latest_checkpoint(path, storage=storage)
        if latest is None:
            raise ValueError(f"Couldn't find 'checkpoint' file or checkpoints in given directory {path}")
        path = latest
    return CheckpointReader(path, storage=storage)


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
        from gpusaver.device.cuda import cuda_runtime

        runtime = cuda_runtime(int(device.partition(":")[2] or 0))
    return reader.get_tensors(list(reader), runtime)
