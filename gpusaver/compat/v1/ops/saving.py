"""The nodes of a Saver, when they are run by themselves: :class:`~gpusaver.compat.v1.saver.Saver` does not run them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from gpusaver.bundle.filenames import data_path, index_path
from gpusaver.bundle.index import BundleIndex, encode_index
from gpusaver.bundle.merge import merge_indexes
from gpusaver.compat.v1.ops.rules import is_text, nothing, scalar
from gpusaver.compat.v1.table import op
from gpusaver.errors import InvalidArgumentError
from gpusaver.reader import CheckpointReader
from gpusaver.saver import save
from gpusaver.storage.base import read_bytes, write_bytes
from gpusaver.storage.routing import RoutedStorage
from gpusaver.tensor import TensorSlice
from gpusaver.variables import PartitionedVariable


def text(value: Any) -> str:
    """A string tensor of rank 0 as str."""
    item = value.item() if isinstance(value, np.ndarray) else value
    return item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else str(item)


def texts(value: Any) -> list[str]:
    return [item.decode("utf-8", "surrogateescape") for item in np.asarray(value, object).reshape(-1)]


def parse_spec(spec: str) -> tuple[tuple[int, ...], TensorSlice] | None:
    """The full shape and the slice that an entry of shape_and_slices means; None: the whole tensor.

    Raises InvalidArgumentError for text that is none.
    """
    if not spec:
        return None
    *sizes, part = spec.split(" ")
    return tuple(int(size) for size in sizes), TensorSlice.parse(part)


def _save(run: Any, node: Any, prefix: Any, names: Any, specs: Any, *tensors: Any) -> tuple[()]:
    state: dict[str, Any] = {}
    for name, spec, value in zip(texts(names), texts(specs), tensors, strict=True):
        parsed = parse_spec(spec)
        if parsed is None:
            state[name] = value if is_text(value) else run.xp.asarray(value)
        else:
            state.setdefault(name, []).append(PartitionedVariable(*parsed, run.xp.asarray(value)))
    save(text(prefix), state)
    return ()


def _restore(run: Any, node: Any, prefix: Any, names: Any, specs: Any) -> tuple[Any, ...]:
    reader = CheckpointReader(text(prefix))
    wanted = list(zip(texts(names), texts(specs), node.attrs["dtypes"], strict=True))
    values = reader.get_tensors(list(dict.fromkeys(name for name, _, _ in wanted)))
    stored = reader.get_variable_to_dtype_map()
    found = []
    for name, spec, dtype in wanted:
        value, parsed = values[name], parse_spec(spec)
        if stored.get(name, dtype) != dtype:
            raise InvalidArgumentError(
                f"tensor_name = {name}; expected dtype {dtype.name} does not equal original dtype {stored[name].name}"
            )
        if parsed is not None:
            full_shape, part = parsed
            if full_shape != value.shape:
                raise InvalidArgumentError(
                    f"tensor_name = {name}; shape in shape_and_slice spec {list(full_shape)} does not match the shape "
                    f"stored in checkpoint: {list(value.shape)}"
                )
            value = value[part.index(full_shape)]
        is_string = isinstance(value, bytes) or is_text(value)
        found.append(np.asarray(value, object) if is_string else run.xp.asarray(value))
    return tuple(found)


def _restored_shapes(node: Any) -> list[None]:
    return [None] * len(node.attrs["dtypes"])


op(
    "SaveV2",
    "prefix:string tensor_names:string shape_and_slices:string tensors:dtypes* ->",
    "dtypes:list(type)",
    shape=nothing,
    kernel=_save,
)
op(
    "RestoreV2",
    "prefix:string tensor_names:string shape_and_slices:string -> dtypes*",
    "dtypes:list(type)",
    shape=_restored_shapes,
    kernel=_restore,
)


def _join(run: Any, node: Any, *parts: Any) -> Any:
    separator = node.attrs["separator"]
    between = separator.encode() if isinstance(separator, str) else separator
    return np.asarray(between.join(text(part).encode() for part in parts), object)


def _shard_name(run: Any, node: Any, base: Any, shard: Any, count: Any) -> Any:
    return np.asarray(f"{text(base)}-{int(shard):05d}-of-{int(count):05d}".encode(), object)


op("StringJoin", "inputs:N*string -> string", "N:int separator:string=''", shape=scalar, kernel=_join)
op("ShardedFilename", "basename:string shard:int32! num_shards:int32! -> string", shape=scalar, kernel=_shard_name)
op(
    "StaticRegexFullMatch",
    "input:string -> bool",
    "pattern:string",
    shape=scalar,
    kernel=lambda run, node, x: np.asarray(re.fullmatch(text(node.attrs["pattern"]), text(x)) is not None),
)


def _merge(run: Any, node: Any, prefixes: Any, destination: Any) -> tuple[()]:
    storage, sources, target = RoutedStorage(), texts(prefixes), text(destination)
    paths = [index_path(source) for source in sources]
    indexes = [BundleIndex(read_bytes(storage, path), path) for path in paths]
    merged = merge_indexes(indexes)
    for number, old, new in merged.moves:
        storage.replace(
            data_path(sources[number], old, indexes[number].num_shards), data_path(target, new, merged.num_shards)
        )
    written = index_path(target)
    write_bytes(storage, written, f"{written}.gpusaver-tmp", encode_index(merged.num_shards, merged.entries))
    for path in paths:
        storage.remove(path)
    return ()


op(
    "MergeV2Checkpoints",
    "checkpoint_prefixes:string destination_prefix:string ->",
    "delete_old_dirs:bool=True",
    shape=nothing,
    kernel=_merge,
)
