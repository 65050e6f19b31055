"""Variables made anew from a `.meta` file, ours or TensorFlow's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpusaver.checkpoint_files import PathLike
from gpusaver.errors import InvalidArgumentError, ResourceExhaustedError
from gpusaver.metagraph.reading import read_meta_graph, saved_variables
from gpusaver.metagraph.variables import GraphVariable, is_fully_known
from gpusaver.saver import Saver
from gpusaver.storage.base import Storage
from gpusaver.tensor import DataType
from gpusaver.variables import Variable, all_or_none

if TYPE_CHECKING:
    from gpusaver.protos import MetaGraphDef

_DEVICE = re.compile(r"/(?:device:)?(cpu|gpu):(\d+)$", re.IGNORECASE)


def import_meta_graph(
    meta_graph_or_file: PathLike | MetaGraphDef,
    clear_devices: bool = False,
    import_scope: str | None = None,
    *,
    storage: Storage | None = None,
) -> Saver:
    """Makes the variables that a `.meta` file describes, and a Saver for them: ready for :meth:`Saver.restore`.

    ``meta_graph_or_file``: a path, or a MetaGraphDef, ours or TensorFlow's.  The Variables are named as in checkpoints
    and hold zeros (empty strings) until then; a partitioned variable comes back whole.  Retention and sharding of the
    Saver are those of the file.  What else its graph has is not looked at.  ``clear_devices``: the Variables stay in
    host memory, whatever device the graph puts them on.  ``import_scope``: put before their names, with a slash; the
    Saver finds them in checkpoints all the same.

    The Variables join the current collection, all or none.  Raises FileNotFoundError for a missing file, DataLossError
    (an OSError) for a damaged one or another kind of file, InvalidArgumentError if it describes no variables or one
    whose shape is not known, ValueError if a Variable of a name exists, ResourceExhaustedError for lack of memory.
    """
    meta_graph = read_meta_graph(meta_graph_or_file, storage=storage)
    by_key: dict[str, list[GraphVariable]] = {}
    for key, variable in saved_variables(meta_graph):
        by_key.setdefault(key, []).append(variable)
    if not by_key:
        raise InvalidArgumentError(
            "the meta graph describes no variables: it has no SaverDef that restores any, and no collection 'variables'"
        )
    scope = f"{import_scope.rstrip('/')}/" if import_scope else ""
    with all_or_none():
        variables = {key: _make(f"{scope}{key}", key, parts, clear_devices) for key, parts in by_key.items()}
    saver_def = meta_graph.saver_def if meta_graph.saver_def.restore_op_name else None
    return Saver(variables, saver_def=saver_def, storage=storage)


def _make(name: str, key: str, parts: Sequence[GraphVariable], clear_devices: bool) -> Variable:
    first = parts[0]
    shape = first.shape if first.part is None else first.part.full_shape
    if shape is None or not is_fully_known(shape):
        raise InvalidArgumentError(
            f"the shape of the variable {first.name} ({key} in checkpoints) is not known: found "
            f"{'any rank' if shape is None else list(shape)}; gpusaver.load(prefix) reads a checkpoint without a Saver"
        )
    device = None if clear_devices else _device(first.device)
    trainable = any(part.trainable for part in parts)
    try:
        return Variable(_zeros(name, first.dtype, shape), name, first.dtype, trainable, device)
    except Exception as error:
        if device is not None:
            error.add_note(f"The graph has {first.name} on {first.device}; clear_devices=True keeps it in host memory.")
        raise


def _zeros(name: str, dtype: DataType, shape: tuple[int, ...]) -> Any:
    try:
        return np.full(shape, b"", object) if dtype is DataType.string else np.zeros(shape, dtype.numpy_dtype)
    except MemoryError as error:
        raise ResourceExhaustedError(f"{name}: no memory for {dtype.name}{list(shape)}") from error
    except (ValueError, TypeError) as error:  # a shape, or a type, that no array can have
        raise InvalidArgumentError(f"{name}: no array can be {dtype.name}{list(shape)}: {error}") from error


def _device(graph_device: str) -> str | None:
    """As a Variable spells it: "cuda:0" for "/device:GPU:0", on whatever machine; None if it names none of these."""
    match = _DEVICE.search(graph_device)
    return None if match is None else f"{'cpu' if match[1].lower() == 'cpu' else 'cuda'}:{int(match[2])}"
