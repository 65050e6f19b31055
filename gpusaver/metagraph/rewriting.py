"""MetaGraphDefs and SaverDefs changed, and written to a file."""

from __future__ import annotations

from google.protobuf import text_format

from gpusaver.bundle.filenames import lock_path, temporary_path
from gpusaver.protos.meta_graph_pb2 import MetaGraphDef
from gpusaver.protos.saver_pb2 import SaverDef
from gpusaver.storage.base import Storage, new_token, write_bytes
from gpusaver.storage.routing import RoutedStorage

_NAMES = ("filename_tensor_name", "save_tensor_name", "restore_op_name")


def write_meta_graph(
    meta_graph: MetaGraphDef, path: str, *, as_text: bool = False, storage: Storage | None = None
) -> None:
    """Replaces the file atomically and durably.  Text leaves out what this library's messages do not know."""
    data = text_format.MessageToString(meta_graph).encode() if as_text else encoded(meta_graph)
    storage = storage or RoutedStorage()
    lock = storage.lock(lock_path(path))
    try:
        write_bytes(storage, path, temporary_path(path, new_token()), data)
    finally:
        lock.release()


def encoded(meta_graph: MetaGraphDef) -> bytes:
    """The same bytes for the same message."""
    return meta_graph.SerializeToString(deterministic=True)


def remove_devices(meta_graph: MetaGraphDef) -> None:
    for node in meta_graph.graph_def.node:
        node.device = ""


def without_scope(saver_def: SaverDef, scope: str | None) -> SaverDef | None:
    """A copy with ``scope`` and its slash cut off the three names; None if one of them does not start so."""
    copy = SaverDef()
    copy.CopyFrom(saver_def)
    prefix = f"{scope.rstrip('/')}/" if scope else ""
    for field in _NAMES:
        name = getattr(saver_def, field)
        if not name.startswith(prefix):
            return None
        setattr(copy, field, name.removeprefix(prefix))
    return copy


def with_scope(saver_def: SaverDef, scope: str | None) -> SaverDef:
    """A copy with ``scope`` and a slash before the three names."""
    copy = SaverDef()
    copy.CopyFrom(saver_def)
    if scope:
        for field in _NAMES:
            setattr(copy, field, f"{scope.rstrip('/')}/{getattr(saver_def, field)}")
    return copy
