"""The HTTP face of a node's status: its page, its figures, Prometheus' text, and two probes.

Knows paths, headers and how much a reader may ask; what is told comes from `status` and `metrics`. Nothing can be
changed here, and nobody is asked who they are.
"""

import base64
import hashlib
import json
import logging
import re
import socket
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socketserver import TCPServer
from threading import Lock, Thread, Timer
from typing import Any

from cloud_node.metrics import Metrics
from cloud_node.status import Status
from isthmus.errors import UsageError
from isthmus.trust.address import is_loopback

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
"""Where the port is unless another host is asked for: this machine alone reads it."""

READERS = 16
"""Requests answered at once; one more is turned away."""

READERS_OF_ONE = 4
"""Of them, those of one address: a stranger that says nothing leaves room for the probes of others."""

WITHIN_S = 10.0
"""A request is heard and answered in this time, or dropped."""

PAGE = files("cloud_node").joinpath("status_page.html").read_text(encoding="utf-8")

Answer = tuple[HTTPStatus, str, bytes]


def _hash_of(tag: str) -> str:
    """The page's one element of a kind, as a policy names it: nothing else of that kind may run."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    digest = hashlib.sha256(found[1].encode() if found else b"").digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class StatusServer(ThreadingHTTPServer):
    """Answers GET of `/`, `/status.json`, `/metrics`, `/healthz` and `/readyz`, in threads of its own."""

    daemon_threads = True

    def __init__(self, status: Status, host: str, port: int) -> None:
        """Bind; port 0 takes a free one.

        Raises:
            OSError: the address cannot be bound.
        """
        metrics = Metrics(status)
        self.answers: dict[str, Callable[[], Answer]] = {
            "/": lambda: (HTTPStatus.OK, "text/html; charset=utf-8", PAGE.encode()),
            "/status.json": lambda: (HTTPStatus.OK, "application/json", json.dumps(status.figures()).encode()),
            "/metrics": lambda: (HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", metrics.text()),
            "/healthz": lambda: _alive(status),
            "/readyz": lambda: _ready(status),
        }
        self._readers: Counter[str] = Counter()  # by address
        self._lock = Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Reader)

    def server_bind(self) -> None:
        """Bind, without asking a name server what this host is called."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if there is room for one."""
        if not self._enters(client_address[0]):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, within the time for that."""
        late = Timer(WITHIN_S, _cut_off, (request,))
        late.daemon = True
        late.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            late.cancel()
            self._leaves(client_address[0])

    def _enters(self, peer: str) -> bool:
        with self._lock:
            if self._readers[peer] >= READERS_OF_ONE or self._readers.total() >= READERS:
                return False
            self._readers[peer] += 1
            return True

    def _leaves(self, peer: str) -> None:
        with self._lock:
            self._readers -= Counter((peer,))  # who has none left is forgotten

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 (the parent's signature)
        """A reader that went away or came too late is nothing to tell; what else goes wrong is."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.error("the status port failed unexpectedly", exc_info=True)


class _Reader(BaseHTTPRequestHandler):
    server: StatusServer
    timeout = WITHIN_S
    server_version, sys_version = "isthmus", ""

    def do_GET(self) -> None:
        """Answer a path that exists."""
        answer = self.server.answers.get(self.path.partition("?")[0])
        code, kind, body = answer() if answer is not None else _said(HTTPStatus.NOT_FOUND, "no such page")
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the parent's name)
        """Reading is not logged: it happens every few seconds."""


def _cut_off(request: socket.socket) -> None:
    with suppress(OSError):  # it has gone by itself
        request.shutdown(socket.SHUT_RDWR)


def _said(code: HTTPStatus, words: str) -> Answer:
    return code, "text/plain; charset=utf-8", f"{words}\n".encode()


def _alive(status: Status) -> Answer:
    if status.wedged():
        return _said(HTTPStatus.SERVICE_UNAVAILABLE, "nothing comes out of the span any more")
    return _said(HTTPStatus.OK, "alive")


def _ready(status: Status) -> Answer:
    missing = status.missing(status.load())
    return _said(HTTPStatus.OK, "ready") if missing is None else _said(HTTPStatus.SERVICE_UNAVAILABLE, missing)


def start(status: Status, host: str, port: int) -> StatusServer:
    """Serve a node's status until `shutdown`, from before it has loaded its model; the log says where.

    The page is plain HTTP and asks nobody for a name, whatever certificates the node itself has: on loopback only this
    machine reads it, elsewhere whoever reaches the port.

    Args:
        status: the node.
        host: the interface, by name or address; it need not be that of the node itself.
        port: 0 takes a free one.

    Raises:
        UsageError: the address cannot be bound.
    """
    try:
        server = StatusServer(status, host, port)
    except OSError as error:
        raise UsageError(
            f"--status-host {host} --status-port {port}: {error.strerror or error}; "
            "choose another of this machine's addresses or another port, 0 for a free one"
        ) from None
    Thread(target=server.serve_forever, name="status", daemon=True).start()
    log.info(
        "status page at http://%s:%d/, for %s",
        f"[{host}]" if ":" in host else host,
        server.server_port,
        "this machine" if is_loopback(host) else "anyone who reaches it",
    )
    return server
