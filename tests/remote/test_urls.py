"""Which paths are URLs, and that no secret gets into an error or a log."""

from __future__ import annotations

import builtins
import logging
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest

import gpusaver
from gpusaver.errors import Error, UnimplementedError
from gpusaver.storage.object_store import ObjectStorage, _text
from gpusaver.storage.routing import RoutedStorage

SECRET = "the/secret+key-0123456789"


def test_file_urls_are_the_file_system(tmp_path: Path) -> None:
    with gpusaver.Saver({"w": np.arange(3)}) as saver:
        prefix = saver.save(f"file://{tmp_path}/k", 1)
        assert prefix == f"file://{tmp_path}/k-1"
        saver.restore(prefix)
        saver.restore(f"{tmp_path}/k-1")
    assert gpusaver.latest_checkpoint(f"file://{tmp_path}") == prefix
    assert gpusaver.latest_checkpoint(tmp_path) == f"{tmp_path}/k-1"
    assert list(gpusaver.verify(prefix)) == []
    with pytest.raises(ValueError, match="Parent directory"):
        gpusaver.save(f"file://{tmp_path}/no/such/k", {"w": np.arange(3)})


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("hdfs://host/k", "expected s3://, gs://, az://, memory://, file:// or a path"),
        ("s3:///k", "expected s3://<bucket or container>"),
        ("s3:/bucket/k", "pathlib takes one away"),
        ("file://host/k", "expected file:///directory"),
        ("memory://m", "is a whole bucket or container; expected memory://"),
    ],
)
def test_urls_that_are_none(path: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        gpusaver.CheckpointReader(path)
    with pytest.raises(ValueError, match=complaint):
        gpusaver.save(path, {"w": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_names_with_a_colon_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:").mkdir()
    assert gpusaver.load(gpusaver.save("a:/k:1", {"w": np.arange(3)}))["w"].tolist() == [0, 1, 2]
    assert (tmp_path / "a:" / "k:1.index").exists()


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gpusaver.storage.object_store":
            raise ImportError("No module named 'obstore'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UnimplementedError, match=r"pip install 'gpusaver\[remote\]'"):
        gpusaver.save("s3://bucket/k", {"w": np.zeros(3)})


@pytest.mark.parametrize(
    "url",
    [f"s3://user:{SECRET}@bucket/run/k", f"s3://{SECRET[4:]}@bucket/run/k", f"az://container/run/k?sig={SECRET}"],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """By whatever takes a path."""
    caplog.set_level(logging.DEBUG)
    saver = gpusaver.Saver({"w": np.zeros(3)})
    directory = url.rpartition("/")[0] if "?" not in url else url
    calls: list[Any] = [
        lambda: saver.save(url),
        lambda: saver.save_async(url, 1),
        lambda: saver.save(url.partition("?")[0] + "/" if "?" not in url else url),
        lambda: saver.restore(url),
        lambda: saver.restore_latest(directory),
        lambda: saver.export_meta_graph(url),
        lambda: saver.recover_last_checkpoints([url]),
        lambda: gpusaver.load(url),
        lambda: gpusaver.latest_checkpoint(directory),
        lambda: gpusaver.get_checkpoint_state(directory),
        lambda: gpusaver.update_checkpoint_state(directory, url),
        lambda: list(gpusaver.verify(url)),
        lambda: gpusaver.checkpoint_exists(url),
        lambda: gpusaver.remove_checkpoint(url),
        lambda: gpusaver.import_meta_graph(url),
        lambda: gpusaver.CheckpointManager(saver, directory).save(1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no place in the URL") as caught:
            call()
        assert SECRET[4:] not in "".join(traceback.format_exception(caught.value))
    saver.close()
    assert SECRET[4:] not in caplog.text


def test_secrets_of_the_environment_are_not_repeated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that cannot be reached, by a URL that holds a password, with a secret key."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = obstore.store.S3Store(
        "bucket",
        endpoint=f"http://user:{SECRET[:3]}hidden@127.0.0.1:1",
        region="us-east-1",
        access_key_id="the-access-key",
        secret_access_key=SECRET,
        session_token=f"token-{SECRET}",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    saver = gpusaver.Saver({"w": np.zeros(3)}, storage=ObjectStorage("s3://bucket", store))
    pending = saver.save_async("s3://bucket/k", 1, write_state=False)
    assert pending is not None
    with pytest.raises(Error, match="s3://bucket") as caught:
        pending.result()
    text = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(saver.storage)
    assert SECRET not in text
    assert "hidden" not in text
    saver.close()


def test_what_is_kept_of_a_servers_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "abcdefgh-the-token")
    error = obstore.exceptions.GenericError(
        "Error performing GET http://u:pass@host/b/k?X-Amz-Signature=1234 - Server returned 403, abcdefgh-the-token: "
        "<?xml version='1.0'?>\n<Error><Code>SignatureDoesNotMatch</Code><StringToSign>x</StringToSign></Error>\n\n"
        "Debug source:\n authorization: AWS4 abc"
    )
    assert _text(error) == ("Error performing GET http://host/b/k - Server returned 403, *** (SignatureDoesNotMatch)")


def test_a_path_of_another_store() -> None:
    storage = ObjectStorage("memory://one")
    with pytest.raises(gpusaver.InvalidArgumentError, match="is not below memory://one"):
        storage.open("memory://one-and-more/k")
    assert RoutedStorage().is_directory("memory://one")
