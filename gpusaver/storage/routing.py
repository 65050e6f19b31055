"""Each path to the storage that keeps it: URLs to object stores, all others to the mounted file systems."""

from __future__ import annotations

import re
from collections.abc import Hashable

from gpusaver.errors import UnimplementedError
from gpusaver.storage.base import LOCK_SECONDS, Lock, ReadableFile, Storage, WritableFile
from gpusaver.storage.local import LocalStorage

_SCHEMES = ("s3", "gs", "az", "memory")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(.*)", re.DOTALL)
_LOST_SLASH = re.compile(rf"({'|'.join(_SCHEMES)}):/[^/]")


class UrlError(ValueError):
    """A path that begins like a URL and cannot be one.

    Not a :class:`gpusaver.errors.Error`: those are logged here and there, with the path, which may hold a secret.
    """


def check_url(path: str, *, is_file: bool = False) -> None:
    """UrlError for a URL that holds, or could hold, credentials, without repeating it, or that is none of ours.

    ``is_file``: it has to name one, or a prefix.
    """
    match = _URL.match(path)
    if match is None:
        if _LOST_SLASH.match(path):
            raise UrlError(f"{path}: a URL has two slashes; pathlib takes one away, so pass a str")
        return
    scheme, place, key = match.groups()
    if "@" in place or ":" in place or "?" in path or "#" in path:
        raise UrlError(
            f"{scheme}://...: user, password, query and fragment have no place in the URL of a checkpoint: credentials "
            "come from the environment, files and services that obstore knows, e.g. AWS_ACCESS_KEY_ID"
        )
    if scheme == "file":
        if place not in ("", "localhost") or not key:
            raise UrlError(f"{path}: expected file:///directory/model.ckpt")
    elif scheme not in _SCHEMES:
        raise UrlError(f"{path}: expected {', '.join(f'{name}://' for name in (*_SCHEMES, 'file'))} or a path")
    elif not place:
        raise UrlError(f"{path}: expected {scheme}://<bucket or container>/model.ckpt")
    elif is_file and not key:
        raise UrlError(f"{path} is a whole bucket or container; expected {path}/model.ckpt")


class RoutedStorage:
    """See :class:`gpusaver.storage.base.Storage`.  Raises UrlError for URLs that :func:`check_url` refuses."""

    def __init__(self) -> None:
        self._local = LocalStorage()
        self._stores: dict[str, Storage] = {}

    def _find(self, path: str, *, is_directory: bool = False) -> tuple[Storage, str]:
        """The storage, and the path that it knows."""
        if ":/" not in path:
            return self._local, path
        check_url(path, is_file=not is_directory)
        match = _URL.match(path)
        if match is None:
            return self._local, path
        scheme, place, key = match.groups()
        if scheme == "file":
            return self._local, key
        root = f"{scheme}://{place}"
        if root not in self._stores:
            self._stores[root] = _object_storage(root)
        return self._stores[root], path

    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> WritableFile:
        storage, path = self._find(path)
        return storage.create(path, nbytes, direct=direct, target=None if target is None else self._find(target)[1])

    def recycle(self, path: str, spare: str) -> int | None:
        storage, path = self._find(path)
        return storage.recycle(path, self._find(spare)[1])

    def reuse(self, spare: str, path: str, nbytes: int, *, direct: bool = False) -> WritableFile | None:
        storage, spare = self._find(spare)
        return storage.reuse(spare, self._find(path)[1], nbytes, direct=direct)

    def prefers_direct(self, directory: str) -> bool:
        storage, directory = self._find(directory, is_directory=True)
        return storage.prefers_direct(directory)

    def open(self, path: str, *, uncached: bool = False) -> ReadableFile:
        storage, path = self._find(path)
        return storage.open(path, uncached=uncached)

    def exists(self, path: str) -> bool:
        storage, path = self._find(path)
        return storage.exists(path)

    def is_directory(self, path: str) -> bool:
        storage, path = self._find(path, is_directory=True)
        return storage.is_directory(path)

    def version(self, path: str) -> Hashable | None:
        storage, path = self._find(path)
        return storage.version(path)

    def link(self, source: str, path: str, *, target: str | None = None) -> WritableFile | None:
        (storage, source), (other, path) = self._find(source), self._find(path)
        if storage is not other:
            return None
        return storage.link(source, path, target=None if target is None else self._find(target)[1])

    def modified_time(self, path: str) -> float:
        storage, path = self._find(path)
        return storage.modified_time(path)

    def list(self, directory: str) -> list[str]:
        storage, directory = self._find(directory, is_directory=True)
        return storage.list(directory)

    def make_directory(self, path: str) -> None:
        storage, path = self._find(path, is_directory=True)
        storage.make_directory(path)

    def replace(self, source: str, target: str) -> None:
        storage, source = self._find(source)
        storage.replace(source, self._find(target)[1])

    def remove(self, path: str) -> None:
        storage, path = self._find(path)
        storage.remove(path)

    def sync_directory(self, path: str) -> None:
        storage, path = self._find(path, is_directory=True)
        storage.sync_directory(path)

    def lock(self, path: str, *, wait_seconds: float = LOCK_SECONDS) -> Lock:
        storage, path = self._find(path)
        return storage.lock(path, wait_seconds=wait_seconds)

    def free_nbytes(self, directory: str) -> int | None:
        storage, directory = self._find(directory, is_directory=True)
        return storage.free_nbytes(directory)


def _object_storage(root: str) -> Storage:
    try:
        from gpusaver.storage.object_store import ObjectStorage
    except ImportError as error:
        raise UnimplementedError(f"{root}: object stores need obstore: pip install 'gpusaver[remote]'") from error
    return ObjectStorage(root)
