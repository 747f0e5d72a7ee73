"""Servers on this machine that hand out files as S3 and as plain HTTP, count the bytes, and fail when told to."""

from __future__ import annotations

import json
import re
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Fault = Callable[["Request"], int | None]
"""What goes wrong with a request: an HTTP status to answer with, `CUT` to stop in the middle of the body, None for
nothing"""
CUT = -1


@dataclass(frozen=True)
class Request:
    """One request, and what the server sent for it."""

    method: str
    path: str
    range: str | None
    status: int
    nbytes: int
    """Bytes of the body"""


@dataclass
class Log:
    """All requests since the last `clear`, and what goes wrong with the next ones."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    fault: Fault | None = None

    def clear(self) -> None:
        self.requests.clear()
        self.fault = None

    def nbytes(self, ending: str = "") -> int:
        """Bytes of bodies that answered a GET of paths with this ending."""
        return sum(request.nbytes for request in self.gets(ending))

    def gets(self, ending: str = "") -> list[Request]:
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(ending)]

    def what_goes_wrong(self, method: str, path: str, range_: str | None) -> int | None:
        return None if self.fault is None else self.fault(Request(method, path, range_, 0, 0))


def times(n: int, status: int, ending: str = "", *, method: str = "GET", after: int = 0) -> Fault:
    """A fault for `n` requests of paths with this ending, after the first `after` of them."""
    count = 0

    def fault(request: Request) -> int | None:
        nonlocal count
        if request.method != method or not request.path.endswith(ending):
            return None
        count += 1
        return status if after < count <= after + n else None

    return fault


# --- S3 --------------------------------------------------------------------------------------


@contextmanager
def s3_server() -> Iterator[Log]:
    """An S3 endpoint in memory (moto) that counts what it sends."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, type: str, message: str, *args: Any) -> None:
            """Say nothing."""

    log = Log()
    server = make_server(
        "127.0.0.1",
        0,
        _Counted(DomainDispatcherApplication(create_backend_app), log),
        threaded=True,
        request_handler=Handler,
    )
    server.daemon_threads = True
    log.url = f"http://127.0.0.1:{server.server_port}"
    with _serving(server):
        yield log


class _Counted:
    """A WSGI application whose answers are counted, or replaced by faults."""

    def __init__(self, app: Any, log: Log) -> None:
        self._app, self._log = app, log

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path, range_ = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE")
        wrong = self._log.what_goes_wrong(method, path, range_)
        if wrong is not None and wrong != CUT:
            self._log.requests.append(Request(method, path, range_, wrong, 0))
            start_response(f"{wrong} Told To Fail", [("Content-Length", "0")])
            return [b""]
        statuses: list[int] = []

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            statuses.append(int(status.split()[0]))
            return start_response(status, headers, *more)

        body = b"".join(self._app(environ, start))
        if wrong == CUT:
            body = body[: len(body) // 2]
        self._log.requests.append(Request(method, path, range_, statuses[0], len(body)))
        return [body]


# --- HTTP ------------------------------------------------------------------------------------


@contextmanager
def http_server(
    files: dict[str, bytes], *, ranges: bool = True, sizes: bool = True, tls: ssl.SSLContext | None = None
) -> Iterator[Log]:
    """A server of these files (path with its slash -> content), with or without byte ranges and sizes."""
    log = Log()
    server = _Server(files, log, ranges, sizes, _Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    log.url = f"http{'' if tls is None else 's'}://127.0.0.1:{server.server_port}"
    with _serving(server):
        yield log


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self, files: dict[str, bytes], log: Log, ranges: bool, sizes: bool, handler: type[BaseHTTPRequestHandler]
    ) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.files, self.log, self.ranges, self.sizes = files, log, ranges, sizes

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        body, cut = self._answer()
        try:
            self.wfile.write(body)
        except OSError:  # the client wants no more
            cut = True
        self.close_connection = self.close_connection or cut

    def _answer(self) -> tuple[bytes, bool]:
        """Send the head of the answer; the body, and whether it ends too early."""
        asked, log = self.headers.get("Range"), self.server.log
        wrong = log.what_goes_wrong(self.command, self.path, asked)
        content = None if wrong not in (None, CUT) else self.server.files.get(unquote(self.path))
        status = (404 if wrong in (None, CUT) else wrong) if content is None else 200
        body = content or b""
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "") if self.server.ranges and content is not None else None
        if span:
            status, body = 206, body[int(span[1]) : int(span[2]) + 1]
        self.send_response(status)
        self.send_header(*(("Content-Length", str(len(body))) if self.server.sizes else ("Connection", "close")))
        if span:
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(body) - 1}/{len(content)}")
        if content is not None:
            self.send_header("ETag", f'"{zlib.crc32(content):x}"')
        self.end_headers()
        sent = body[: len(body) // 2] if wrong == CUT else body
        log.requests.append(Request(self.command, self.path, asked, status, len(sent) if self.command == "GET" else 0))
        return sent, wrong == CUT

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


# --- the hub ---------------------------------------------------------------------------------

REPOSITORY = "owner/name"
_FILES = f"/datasets/{REPOSITORY}/resolve/main/"


@contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[Log]:
    """As much of the Hugging Face hub as its client needs to read the files (path -> content) of one dataset."""
    log = Log()
    server = _Server({_FILES + path: content for path, content in files.items()}, log, True, True, _HubHandler)
    log.url = f"http://127.0.0.1:{server.server_port}"
    with _serving(server):
        yield log


class _HubHandler(_Handler):
    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if not path.startswith("/api/"):
            return super().do_GET()
        if path in (f"/api/datasets/{REPOSITORY}", f"/api/datasets/{REPOSITORY}/revision/main"):
            return self._say({"id": REPOSITORY, "sha": "0" * 40, "siblings": [], "private": False, "tags": []})
        under = re.fullmatch(f"/api/datasets/{REPOSITORY}/tree/main/?(.*)", path)
        return self._say(self._listing(under[1])) if under else self._say({"error": "Repository not found"}, 404)

    def _listing(self, folder: str) -> list[dict[str, Any]]:
        inside = f"{folder}/" if folder else ""
        entries = {}
        for path, content in self.server.files.items():
            path = path.removeprefix(_FILES)
            if path.startswith(inside):
                first, below, _ = path.removeprefix(inside).partition("/")
                kind = {"type": "directory", "size": 0} if below else {"type": "file", "size": len(content)}
                entries[inside + first] = {"path": inside + first, "oid": f"{zlib.crc32(content):040x}"} | kind
        return list(entries.values())

    def _say(self, answer: Any, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("X-Error-Code", "RepoNotFound" if status == 404 else ""),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def _serving(server: Any) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
