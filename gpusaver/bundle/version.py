"""Which versions of the format this reader may read (specification, section 3); V1 files carry the same message."""

from __future__ import annotations

from gpusaver.errors import InvalidArgumentError
from gpusaver.protos import types_pb2

#: What TensorFlow has written since 2016, and what it and we call ourselves as readers.
VERSION = 1


def check_version(version: types_pb2.VersionDef, name: str) -> None:
    """Raises InvalidArgumentError if the producer of the file ``name`` excludes us.  Later producers are fine."""
    if version.producer < 0:
        raise InvalidArgumentError(f"{name}: producer version {version.producer} is below the least, 0")
    if version.min_consumer > VERSION:
        raise InvalidArgumentError(
            f"{name}: min consumer version {version.min_consumer} above current version {VERSION}: the checkpoint was "
            "made for later readers; a newer gpusaver may read it"
        )
    if VERSION in version.bad_consumers:
        raise InvalidArgumentError(f"{name}: the checkpoint disallows readers of version {VERSION}")
