"""Names of the files of a checkpoint.

::

    P.index                    the table of entries; its presence makes P a checkpoint
    P.data-00000-of-00002      shard 0 of 2: tensor bytes
    P.meta                     optional MetaGraphDef (the suffix can be chosen)
    <any of these>.<16 hex>.gpusaver-tmp     ours while being written, never part of a checkpoint
    P.index.gpusaver-lock                    there while P is being saved
    checkpoint.gpusaver-lock                 there while the state file of that name is being replaced
"""

from __future__ import annotations

import re

INDEX_SUFFIX = ".index"
TEMPORARY_SUFFIX = ".gpusaver-tmp"
LOCK_SUFFIX = ".gpusaver-lock"

_DATA = re.compile(r"\.data-([0-9]{5,})-of-([0-9]{5,})\Z")
_TEMPORARY = re.compile(r"\.([0-9a-f]{16})\.gpusaver-tmp\Z")
_V1_SHARD = re.compile(r"-([0-9]{5,}|\?{5})-of-([0-9]{5,})\Z")
_STEP = re.compile(r"-(-?[0-9]{1,20})\Z")


def index_path(prefix: str) -> str:
    return prefix + INDEX_SUFFIX


def data_path(prefix: str, shard: int, num_shards: int) -> str:
    """The data file of one shard; numbers have at least five digits."""
    return f"{prefix}.data-{shard:05d}-of-{num_shards:05d}"


def meta_graph_path(prefix: str, suffix: str) -> str:
    """The file of the MetaGraphDef; the shards of a V1 checkpoint share one."""
    return f"{v1_shard_prefix(prefix) or prefix}.{suffix}"


def temporary_path(path: str, token: str) -> str:
    """A name beside ``path`` for the time of writing; ``token`` is 16 hex digits."""
    return f"{path}.{token}{TEMPORARY_SUFFIX}"


def split_temporary(name: str) -> tuple[str, str] | None:
    """``(path, token)`` that :func:`temporary_path` was given, or None for any other name."""
    match = _TEMPORARY.search(name)
    return (name[: match.start()], match[1]) if match else None


def lock_path(path: str) -> str:
    """The lock of whoever writes ``path``; for all files of a checkpoint it is that of the index."""
    found = split_data_path(path)
    return (index_path(found[0]) if found else path) + LOCK_SUFFIX


def split_step(prefix: str) -> tuple[str, int | None]:
    """``("k", 5)`` of ``k-5``; no step: the prefix itself and None."""
    match = _STEP.search(prefix)
    return (prefix[: match.start()], int(match[1])) if match else (prefix, None)


def split_data_path(path: str) -> tuple[str, int, int] | None:
    """``(prefix, shard, num_shards)`` if the path is named like a data file, else None."""
    match = _DATA.search(path)
    return (path[: match.start()], int(match[1]), int(match[2])) if match else None


def v1_shard_prefix(path: str) -> str | None:
    """The part before ``-00000-of-00002`` or ``-?????-of-00002`` (V1 shards), or None if there is none."""
    match = _V1_SHARD.search(path)
    return path[: match.start()] if match else None


def is_data_of(name: str, base: str) -> bool:
    """Whether the file ``name`` is a data file of the prefix whose last component is ``base`` (both base names)."""
    found = split_data_path(name)
    return found is not None and found[0] == base
