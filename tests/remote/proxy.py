"""A proxy in front of the S3 server that spoils chosen requests."""

from __future__ import annotations

import http.client
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

#: "error": answered by 500, never forwarded.  "drop": the connection is closed instead.  "lost": forwarded, then closed
#: without an answer.  "stall": neither forwarded nor answered while the client waits.
Fault = Literal["error", "drop", "lost", "stall"]

#: Longer than the clients of these tests wait.
STALL_SECONDS = 5.0


class Proxy:
    """``spoil(number, method, path)`` says what happens to a request; requests are counted from 0 since :meth:`arm`."""

    def __init__(self, endpoint: str) -> None:
        self._target = urllib.parse.urlsplit(endpoint).netloc
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self.log: list[tuple[str, str]] = []
        self.spoil: Callable[[int, str, str], Fault | None] = lambda number, method, path: None
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one(self) -> None:
                proxy._handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def arm(self, spoil: Callable[[int, str, str], Fault | None] | None = None) -> None:
        with self._lock:
            self.log = []
            self.spoil = spoil or (lambda number, method, path: None)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            fault = self.spoil(len(self.log), handler.command, handler.path)
            self.log.append((handler.command, handler.path))
        if fault == "stall":
            self._ending.wait(STALL_SECONDS)
        if fault in ("drop", "stall"):
            handler.close_connection = True
            return
        if fault == "error":
            self._answer(handler, 500, {}, b"")
            return
        connection = http.client.HTTPConnection(self._target, timeout=30)
        try:
            connection.request(handler.command, handler.path, body, dict(handler.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if fault == "lost":
            handler.close_connection = True
            return
        self._answer(handler, answer.status, dict(answer.getheaders()), content)

    @staticmethod
    def _answer(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                handler.send_header(name, value)
        length = headers.get("Content-Length", "0") if handler.command == "HEAD" else str(len(content))
        handler.send_header("Content-Length", length)
        handler.end_headers()
        handler.wfile.write(content)
