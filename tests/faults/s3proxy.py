"""An HTTP proxy before an object store that breaks a seeded share of the requests, and counts what it did."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = ("error500", "error503", "forbidden", "late", "reset", "truncated", "lost")
"""late: silent for longer than a client waits; truncated: half of an answer's body; lost: done, but not answered."""
FAULTS = ("error500", "error503", "late", "reset", "truncated", "lost")
"""What passes by itself."""
ERRORS = {"error500": (500, "InternalError"), "error503": (503, "SlowDown"), "forbidden": (403, "AccessDenied")}
HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade"}


class Proxy:
    """Stands at `url` before a server on this machine; `rates` are shares of all requests by kind."""

    def __init__(
        self,
        port: int,
        rates: Mapping[str, float] | None = None,
        seed: int = 0,
        late: float = 3.0,
        strip: bool = False,
        latency: float = 0.0,
    ) -> None:
        self.rates, self.late, self.strip, self.port = dict(rates or {}), late, strip, port
        self.latency = latency
        """Seconds before every request, as a store elsewhere has them."""
        self.counts: Counter[str] = Counter()
        self.left: dict[str, int] = {}
        """At most so many more of a kind; no limit for one that is not named."""
        self.only: tuple[str, ...] = ()
        """Methods that are broken; empty: all."""
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def fate(self, method: str) -> str:
        """What becomes of the next request; empty: nothing happens to it."""
        with self._lock:
            self.counts[method] += 1
            if self.only and method not in self.only:
                return ""
            drawn = self._random.random()
            for kind, rate in self.rates.items():
                drawn -= rate
                if drawn < 0:
                    if kind == "lost" and method in ("GET", "HEAD"):
                        kind = "reset"
                    if kind == "truncated" and method != "GET":
                        kind = "error503"
                    if self.left.get(kind, 1) <= 0:
                        return ""
                    if kind in self.left:
                        self.left[kind] -= 1
                    self.counts[kind] += 1
                    return kind
        return ""

    def wait(self) -> None:
        """As long as a client does not, or until the proxy is closed."""
        self._over.wait(self.late)


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60
        disable_nagle_algorithm = True
        wbufsize = -1

        def log_message(self, *arguments: Any) -> None:
            pass

        def _pass(self) -> None:
            body = self._body()
            time.sleep(proxy.latency)
            kind = proxy.fate(self.command)
            if kind in ERRORS:
                status, code = ERRORS[kind]
                self._answer(status, [], f"<Error><Code>{code}</Code><Message>broken</Message></Error>".encode())
                return
            if kind == "late":
                proxy.wait()
                self.close_connection = True
                return
            if kind == "reset":
                self._reset()
                return
            status, headers, answer = self._forward(body)
            if kind == "lost":
                self._reset()
            elif kind == "truncated" and len(answer) > 1:
                self._answer(status, headers, answer, len(answer) // 2)
                self._reset()
            else:
                self._answer(status, headers, answer)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)

        def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            conditions = {"if-none-match", "if-match"} if proxy.strip else set()
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in HOP | conditions | {"content-length", "expect"}
            }
            upstream = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
            try:
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                data = answer.read()
                return answer.status, answer.getheaders(), data
            finally:
                upstream.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: int | None = None) -> None:
            self.send_response_only(status)
            length = str(len(data))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() not in HOP | {"content-length"}:
                    self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:cut])
            self.wfile.flush()

        def _reset(self) -> None:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
            self.connection.close()

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):  # closed by us, or by a client that gave up
                self.close_connection = True

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    return Handler


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, seconds: float = 30) -> None:
    """Until a server listens."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
