"""Records over HTTP: POST /records with JSON lines, answered once they are on disk."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from streamcl.errors import ConfigError, StreamclError

from .intake import Intake, Lines
from .records import Line, Problem, Reader
from .spool import Ended, Full, Spool

TOKEN = "STREAMCL_TOKEN"  # the environment variable that holds it, where a person chose it
CONNECTIONS = 32  # at a time
TIMEOUT = 30  # seconds without a byte until a connection is closed
RETRY = "1"  # seconds after which a sender may come again
SHOWN = 20  # problems that an answer lists


class Push(Intake):
    """A small server. Whoever knows the token may push; what is not acknowledged with 200 is to be sent again.

    The token is that of the environment variable STREAMCL_TOKEN, or it is drawn at random and written, with the address, into http.json
    beside the spool, which only its owner can read.
    """

    def __init__(self, spool: Spool, reader: Reader, host: str, port: int, limit: int) -> None:
        super().__init__(spool, reader)
        self.host, self.port, self.limit = host, port, limit
        self.token = ""
        self.server: _Server | None = None

    @property
    def where(self) -> str:
        token = f"the token of {TOKEN}" if os.environ.get(TOKEN) else f"the token in {self.spool.folder / 'http.json'}"
        return f"POST {self.address} (with {token})"

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server.server_port if self.server else self.port}/records"

    def start(self) -> None:
        try:
            self.server = _Server(self)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"live: host and port: cannot listen at {self.host}:{self.port}: {reason}") from None
        self._keep_token()
        super().start()

    def run(self) -> None:
        assert self.server is not None
        serving = threading.Thread(target=self.server.serve_forever, args=(0.1,), name="live http", daemon=True)
        serving.start()
        try:
            while not self.stopping and not self.finishing:
                self.pause(60)
        finally:
            self.server.shutdown()
            self.server.server_close()

    def _keep_token(self) -> None:
        path = self.spool.folder / "http.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        chosen = os.environ.get(TOKEN)
        self.token = chosen or known.get("token") or secrets.token_urlsafe(32)
        aside = path.with_name(".http.json.writing")
        aside.touch(mode=0o600)
        aside.write_text(json.dumps({"url": self.address} | ({} if chosen else {"token": self.token})), encoding="utf-8")
        aside.replace(path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, push: Push) -> None:
        self.push = push
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in push.host else socket.AF_INET
        super().__init__((push.host, push.port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A sender that went away is no error of the run; what was not acknowledged it sends again."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "streamcl", ""
    timeout = TIMEOUT

    def log_message(self, format: str, *arguments: Any) -> None:
        """The spool knows what came; a line for each request would drown the progress of the run."""

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path != "/status":
            self._refuse(404, "there is GET /status and POST /records")
            return
        spool = self.server.push.spool
        with spool.changed:
            self._answer(
                200,
                {
                    "records": spool.count,
                    "unlearned": spool.learnable - spool.learned,
                    "queue": spool.queue,
                    "tasks": len(spool.cuts),
                    "problems": dict(spool.problems),
                },
            )

    def do_POST(self) -> None:
        length = self._expected()
        if length is None:
            return
        body = self.rfile.read(length)
        if len(body) < length:  # the sender broke off: nothing of it is taken
            self.close_connection = True
            return
        push = self.server.push
        source = f"HTTP {self.client_address[0]}"
        if self.headers.get_content_type() == "application/json":  # one object, which may be written over several lines
            body = body.replace(b"\r", b" ").replace(b"\n", b" ")
        cut = Lines(source, push.limit)
        lines = [*cut.feed(body), *cut.end()]
        parsed = push.reader.lines((line for line in lines if isinstance(line, Line)), None)
        parsed.problems += [line for line in lines if isinstance(line, Problem)]
        try:
            receipt = push.spool.take(parsed)
        except Full:
            self._full()
        except Ended:
            self._refuse(410, "the stream has ended and takes nothing more")
        except StreamclError as error:
            self._refuse(507, str(error))
        else:
            problems = [{"line": problem.line.number, "reason": problem.reason} for problem in receipt.problems]
            answer = {"accepted": receipt.accepted, "duplicates": receipt.duplicates, "quarantined": len(problems)}
            nothing = bool(problems) and not receipt.accepted and not receipt.duplicates
            self._answer(422 if nothing else 200, {**answer, "problems": problems[:SHOWN]})

    def handle_expect_100(self) -> bool:
        """A sender that asks first is told before it sends."""
        return self._expected() is not None and super().handle_expect_100()

    def _expected(self) -> int | None:
        """How long the body is; None where it was refused unread."""
        push = self.server.push
        if not self._allowed():
            return None
        if self.path != "/records":
            self._refuse(404, "there is GET /status and POST /records")
            return None
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            self._refuse(411, "say how long the body is: Content-Length is needed")
            return None
        if len(length) > 18 or int(length) > push.limit:
            self._refuse(413, f"the body is longer than {push.limit} bytes (body): send less at a time")
            return None
        if self.headers.get("Content-Encoding", "identity") != "identity":
            self._refuse(415, "send it as it is, not compressed")
            return None
        if push.finishing or push.spool.closed or push.spool.ended:
            self._refuse(410, "the stream has ended and takes nothing more")
            return None
        if push.spool.full():
            self._full()
            return None
        return int(length)

    def _allowed(self) -> bool:
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.server.push.token.encode()):
            return True
        self._refuse(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        return False

    def _full(self) -> None:
        queue = self.server.push.spool.queue
        self._refuse(429, f"{queue} records wait to be learned (queue): send it again later", {"Retry-After": RETRY})

    def _refuse(self, code: int, reason: str, headers: dict[str, str] | None = None) -> None:
        """An answer to a body that was not read. A little of it is passed over, so that the sender comes to read the answer."""
        self.close_connection = True
        self._answer(code, {"error": reason}, headers)
        try:
            self.connection.settimeout(1)
            self.connection.shutdown(socket.SHUT_WR)
            left = 1 << 20
            while left > 0 and (data := self.rfile.read1(1 << 16)):
                left -= len(data)
        except OSError:
            return

    def _answer(self, code: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode() + b"\n"
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
