"""PyTorch's .pt files, read by PyTorch's loader for files that nobody trusts (``weights_only=True``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from gpusaver.conversion.tensors import Octets, Source, SourceTensor, in_blocks, octets
from gpusaver.device import HOST, admit
from gpusaver.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, from_os_error


@contextlib.contextmanager
def read(path: str) -> Iterator[Source]:
    """The tensors and numbers of nested dicts and lists, their keys joined by "/"; the rest is left out.

    The file is mapped, not read as a whole, but for those that PyTorch wrote before 1.6.  Raises
    FailedPreconditionError where PyTorch is not installed, DataLossError for what its safe loader does not take.
    """
    try:
        import torch
    except ImportError as error:
        raise FailedPreconditionError(
            f"{path}: reading PyTorch's files needs PyTorch, which cannot be imported: {error}"
        ) from error
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old format cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise from_os_error(error, "open", path) from error
    except Exception as error:  # unpickling raises what it likes
        raise DataLossError(
            f"{path}: PyTorch's safe loader does not take it: {str(error).partition('. ')[0]}"
        ) from error
    source = Source([], [])
    _flatten(content, "", source, path)
    names = [tensor.name for tensor in source.tensors]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgumentError(f"{path}: two tensors would have the name {twice}")
    yield source


def _flatten(value: Any, name: str, source: Source, path: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(inner, f"{name}/{key}" if name else str(key), source, path)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _flatten(inner, f"{name}/{number}" if name else str(number), source, path)
    elif value is None or isinstance(value, str | bytes):
        source.left_out.append(f"{name}, which is no tensor or number")
    else:
        try:
            admitted = admit(value, name or "the content")
        except TypeError as error:
            raise InvalidArgumentError(f"{path}: {error}") from error

        def blocks() -> Iterator[Octets]:
            yield from in_blocks(octets(admitted.array))

        assert admitted.runtime is HOST
        source.tensors.append(SourceTensor(name, admitted.spec, blocks))
