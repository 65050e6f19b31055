"""From one file format to another, tensor by tensor: TensorFlow checkpoints, safetensors, .npz; from PyTorch's .pt.

The ending of a path tells its format: ``.safetensors``, ``.npz``, ``.pt`` and ``.pth``; anything else is the prefix of
a TensorFlow checkpoint (to read: of any kind, also a SavedModel, or a directory, whose newest is taken).

Values keep every bit.  What the other format has no dtype for is refused by name before a byte is written.  No more
than a few blocks of 8 MiB are held at once, but for strings, tensors of V1 checkpoints, partitioned tensors one row of
which is larger, and arrays in Fortran order.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from typing import NamedTuple

from gpusaver.checkpoint_files import PathLike, checkpoint_exists
from gpusaver.conversion import npz, safetensors, tensorflow, torch_file
from gpusaver.conversion.tensors import OnWritten, Source, SourceTensor
from gpusaver.errors import InvalidArgumentError
from gpusaver.finding import prefix_of
from gpusaver.reader import CheckpointReader
from gpusaver.storage.routing import RoutedStorage

_FILES = {".safetensors": safetensors.read, ".npz": npz.read, ".pt": torch_file.read, ".pth": torch_file.read}
_WRITERS: dict[str, Callable[[str, list[SourceTensor], OnWritten], None]] = {
    ".safetensors": safetensors.write,
    ".npz": npz.write,
    "": tensorflow.write,
}


class Conversion(NamedTuple):
    """What was written: how many tensors and bytes, and what the source holds besides, in words."""

    tensors: int
    nbytes: int
    left_out: list[str]


def convert(
    source: PathLike,
    destination: PathLike,
    *,
    include: str | re.Pattern[str] | None = None,
    exclude: str | re.Pattern[str] | None = None,
    overwrite: bool = False,
    on_written: Callable[[int, int], None] = lambda written, total: None,
) -> Conversion:
    """Writes the tensors of ``source`` to ``destination``, which appears whole or not at all.

    ``include``, ``exclude``: regular expressions, searched for in the names.  ``on_written(bytes so far, in total)`` is
    called after every block.  The graph of objects in a TF2 checkpoint is left out where the other side is no
    checkpoint.  Raises InvalidArgumentError for dtypes and names that the other format lacks (naming them), for an
    existing destination unless ``overwrite``, and for a ``.pt`` to be written, which would take pickle; NotFoundError,
    DataLossError and OutOfRangeError for what is wrong with the source, then the destination is as it was.
    """
    path = os.fsdecode(destination)
    kind = _kind(path)
    if kind not in _WRITERS:
        raise InvalidArgumentError(f"{path}: PyTorch's files are read, not written; write safetensors instead")
    exists = checkpoint_exists(path) or (bool(kind) and RoutedStorage().exists(path))
    if exists and not overwrite:
        raise InvalidArgumentError(f"{path} exists; pass --overwrite (overwrite=True) to replace it, or another name")
    with open_source(source) as (tensors, left_out):
        chosen = [
            tensor
            for tensor in tensors
            if (include is None or re.search(include, tensor.name))
            and not (exclude is not None and re.search(exclude, tensor.name))
        ]
        left_out = list(left_out)
        if kind and any(tensor.name == tensorflow.OBJECT_GRAPH for tensor in chosen):
            chosen = [tensor for tensor in chosen if tensor.name != tensorflow.OBJECT_GRAPH]
            left_out.append(f"{tensorflow.OBJECT_GRAPH}, TensorFlow's graph of objects")
        total, written = sum(tensor.spec.nbytes for tensor in chosen), 0

        def count(nbytes: int) -> None:
            nonlocal written
            written += nbytes
            on_written(written, max(total, written))

        _WRITERS[kind](path, chosen, count)
    return Conversion(len(chosen), written, left_out)


def open_source(source: PathLike) -> contextlib.AbstractContextManager[Source]:
    path = os.fsdecode(source)
    kind = _kind(path)
    return _FILES[kind](path) if kind else tensorflow.read(CheckpointReader(prefix_of(path)))


def _kind(path: str) -> str:
    """The ending that tells the format; "" of a TensorFlow checkpoint."""
    return next((ending for ending in _FILES if path.endswith(ending)), "")
