"""An S3 server behind a proxy that fails on demand: a pytest plugin with the fixtures `s3` and `bucket`."""

import http.client
import logging
import os
import re
import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET
from urllib.parse import unquote
from xml.sax.saxutils import escape, unescape

import fsspec.config
import pytest

ACCESS_KEY = "AKIADUMMYDUMMYDUMMY1"
_SIGNATURE = (
    f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
)
SECRET_KEY = "dummy+secret/of+the+tests"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "S3Server"
    body: bytes

    def handle_expect_100(self) -> bool:
        fault = self.server.due(self.command, unquote(self.path))
        return (fault is not None and fault.act is _stall) or super().handle_expect_100()

    def handle_request(self) -> None:
        fault = self.server.note(self.command, unquote(self.path))
        if fault is not None and fault.read_bytes is not None:
            self.rfile.read(fault.read_bytes)
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        (fault.act if fault else _forward)(self)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def ask_store(self) -> tuple[http.client.HTTPResponse, bytes]:
        with closing(http.client.HTTPConnection(*self.server.store, timeout=60)) as connection:
            connection.request(self.command, self.path, self.body, dict(self.headers))
            answer = connection.getresponse()
            return answer, answer.read()

    def send_answer(self, answer: http.client.HTTPResponse, body: bytes, sent_bytes: int | None = None) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body[:sent_bytes])

    def break_connection(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
        os.close(self.connection.detach())


def _forward(handler: _Handler) -> None:
    handler.send_answer(*handler.ask_store())


def _reset_in_answer(handler: _Handler) -> None:
    answer, body = handler.ask_store()
    handler.send_answer(answer, body, len(body) // 2)
    handler.break_connection()


def _lose_answer(handler: _Handler) -> None:
    handler.ask_store()
    handler.break_connection()


def _hold(handler: _Handler) -> None:
    handler.server.released.wait(60)
    handler.break_connection()


def _stall(handler: _Handler) -> None:
    _hold(handler)


def _claim_one_byte(handler: _Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1")
    handler.end_headers()


def _refuse(handler: _Handler, status: int, code: str, message: str = "no") -> None:
    text = f"<Error><Code>{code}</Code><Message>{escape(message)}</Message><RequestId>1</RequestId></Error>"
    body = b"" if handler.command == "HEAD" else text.encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


FAULTS: dict[str, Callable[[_Handler], None]] = {
    "resets": _Handler.break_connection,  # before the request reaches the store
    "resets in answer": _reset_in_answer,
    "loses answer": _lose_answer,  # the store does what was asked, but never says so
    "holds": _hold,  # for longer than the client waits
    "stalls": _stall,  # holds, and takes no byte of the request's body
    "claims one byte": _claim_one_byte,  # answers HEAD with a wrong size
}


@dataclass
class _Fault:
    act: Callable[[_Handler], None]
    method: str
    target: str
    times: int
    read_bytes: int | None

    def hits(self, method: str, target: str) -> bool:
        return self.times > 0 and method == self.method and self.target in target


@dataclass
class S3Server(ThreadingHTTPServer):
    """The proxy; `requests` are all that came since the test began, as "METHOD target"."""

    store: tuple[str, int]
    faults: list[_Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(
        self,
        how: str | tuple[int, str] | tuple[int, str, str],
        method: str,
        target: str = "",
        times: int = 1,
        read_bytes: int | None = None,
    ) -> None:
        """Have the next requests of one method whose target contains a text fail.

        Args:
            how: A key of FAULTS, or status, code and message of an error answer.
            method: GET, HEAD, PUT, POST or DELETE.
            target: Part of path and query.
            times: How many of them.
            read_bytes: Only so much of the request's body is read; None is all.
        """
        act = FAULTS[how] if isinstance(how, str) else lambda handler: _refuse(handler, *how)
        self.faults.append(_Fault(act, method, target, times, 0 if act is _stall else read_bytes))

    def pending(self) -> int:
        """Return how many requests are yet to fail."""
        return sum(fault.times for fault in self.faults)

    def due(self, method: str, target: str) -> _Fault | None:
        return next((fault for fault in self.faults if fault.hits(method, target)), None)

    def note(self, method: str, target: str) -> _Fault | None:
        with self._lock:
            self.requests.append(f"{method} {target}")
            fault = self.due(method, target)
            if fault is not None:
                fault.times -= 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that gave up, and connections that were broken on purpose

    def count(self, method: str, target: str = "") -> int:
        """Return how many requests of a method had a text in their target."""
        return sum(line.startswith(f"{method} ") and target in line for line in self.requests)

    def behind(self, method: str, target: str, body: bytes = b"") -> str:
        """Ask the store itself, past the proxy and past every cache; return its answer."""
        with closing(http.client.HTTPConnection(*self.store, timeout=60)) as connection:
            connection.request(method, target, body, {"Authorization": _SIGNATURE})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        assert answer.status < 300, text
        return text

    def keys(self, bucket: str) -> list[str]:
        """Return the objects that a bucket shows."""
        return _texts("Key", self.behind("GET", f"/{bucket}?list-type=2"))

    def open_uploads(self, bucket: str) -> list[str]:
        """Return the objects whose uploads in parts were neither completed nor aborted."""
        return _texts("Key", self.behind("GET", f"/{bucket}?uploads"))


def _texts(tag: str, xml: str) -> list[str]:
    return [unescape(text) for text in re.findall(f"<{tag}>(.*?)</{tag}>", xml)]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Run the store and the proxy before it, once per session."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer  # here, so that other sessions do not load it

    logging.getLogger("werkzeug").propagate = False  # a request that was stalled ends in the middle of other tests
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    server = S3Server(moto.get_host_and_port())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    moto.stop()


@pytest.fixture
def s3(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[S3Server]:
    """Point S3 clients of this test at a server without faults, by the environment as a user would."""
    nowhere = str(tmp_path_factory.getbasetemp() / "absent")
    settings = {
        "AWS_ENDPOINT_URL": s3_server.url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": nowhere,
        "AWS_SHARED_CREDENTIALS_FILE": nowhere,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    # one try per request, so that tests do not sit through botocore's own waits
    options = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    s3_server.released.clear()
    yield s3_server
    s3_server.released.set()
    s3_server.faults.clear()
    s3_server.requests.clear()


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """Return the name of an empty bucket of this test alone."""
    name = f"bucket-{secrets.token_hex(8)}"
    s3.behind("PUT", f"/{name}")
    return name
