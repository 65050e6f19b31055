"""What every format is to the others while it is converted: named tensors that yield their bytes block by block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from gpusaver.bundle.filenames import temporary_path
from gpusaver.errors import Error, InvalidArgumentError, from_os_error
from gpusaver.storage.base import new_token
from gpusaver.storage.routing import RoutedStorage
from gpusaver.tensor import TensorSpec

#: As much is read, and handed on, at once.
BLOCK_NBYTES = 8 << 20

Octets = npt.NDArray[np.uint8]


class SourceTensor(NamedTuple):
    """A tensor to be converted.

    ``blocks()`` reads it: little-endian, row-major bytes, each block valid until the next.  Damage may show after the
    last block only.  Of strings ``items()`` gives the elements, and there are no blocks.
    """

    name: str
    spec: TensorSpec
    blocks: Callable[[], Iterator[Octets]]
    items: Callable[[], list[bytes]] | None = None


class Source(NamedTuple):
    """An opened file or checkpoint: its tensors, and what it holds that is no tensor, in words."""

    tensors: list[SourceTensor]
    left_out: list[str]


#: ``on_written(nbytes)`` after each block.
OnWritten = Callable[[int], None]


def octets(array: npt.NDArray[Any]) -> Octets:
    """The bytes of an array, little-endian and row-major; a view if it is that already."""
    array = np.ascontiguousarray(array, None if array.dtype.isbuiltin == 2 else array.dtype.newbyteorder("<"))
    return array.reshape(-1).view(np.uint8)


def in_blocks(data: Octets) -> Iterator[Octets]:
    for start in range(0, len(data), BLOCK_NBYTES):
        yield data[start : start + BLOCK_NBYTES]


def is_utf8(name: str) -> bool:
    """False for names in a checkpoint that are not, which come with surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse(path: str, lacking: Sequence[SourceTensor], why: str) -> None:
    """InvalidArgumentError naming every tensor of ``lacking``, if there is any."""
    if lacking:
        names = ", ".join(f"{tensor.name} ({tensor.spec.dtype.name})" for tensor in lacking[:20])
        more = f" and {len(lacking) - 20} more" if len(lacking) > 20 else ""
        raise InvalidArgumentError(
            f"{path}: {why}: {names}{more}. Leave them out with --exclude, or choose another format"
        )


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file that appears under ``path``, whole and durable, when the ``with`` ends without an error."""
    storage, temporary = RoutedStorage(), temporary_path(path, new_token())
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except Error:
            raise
        except OSError as error:
            raise from_os_error(error, "write", path) from error
        storage.replace(temporary, path)
        storage.sync_directory(os.path.dirname(path))
    finally:
        with contextlib.suppress(Error):
            storage.remove(temporary)


def write_blocks(file: BinaryIO, tensor: SourceTensor, on_written: OnWritten) -> None:
    """Exactly the tensor's bytes.  The source promises their number: a mistake there must not damage the rest."""
    written = 0
    for block in tensor.blocks():
        file.write(block.data)
        written += len(block)
        on_written(len(block))
    if written != tensor.spec.nbytes:
        raise InvalidArgumentError(f"tensor {tensor.name}: {written} bytes were read, {tensor.spec} has another number")
