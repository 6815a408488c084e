"""A Hugging Face Hub on this machine: serves a folder as a repository, by the parts of the HTTP interface in use."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it serves and what it has served.

    cuts: after how many bytes of a file the connection ends, once per entry of its list. stall: a file that ends
    halfway and then waits, which `stalled` tells.
    """

    repository: str
    folder: Path
    url: str = ""
    served: Counter[str] = field(default_factory=Counter)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    stall: str | None = None
    stalled: threading.Event = field(default_factory=threading.Event)

    @property
    def names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    @property
    def num_served(self) -> int:
        return sum(self.served.values())


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    class Bound(_Handler):
        pass

    Bound.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        model, resolved = f"/api/models/{self.hub.repository}", f"/{self.hub.repository}/resolve/{COMMIT}/"
        if path in (model, f"{model}/revision/main", f"{model}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.hub.names]
            self.send(200, json.dumps({"id": self.hub.repository, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"{model}/revision/"):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(resolved) and path.removeprefix(resolved) in self.hub.names:
            self.send_file(path.removeprefix(resolved))
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str) -> None:
        data = (self.hub.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.hub.cuts.get(name, [])
        part = data[start : start + cuts.pop(0)] if cuts and self.command == "GET" else data[start:]
        if self.command == "GET":
            self.hub.served[name] += len(part)
            if self.hub.stall == name:
                part = part[: len(part) // 2]
        self.send(206 if start else 200, part, headers, length=len(data) - start)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length or len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()
        if self.command == "GET" and length is not None and len(body) < length and self.hub.stall:
            self.hub.stalled.set()
            with suppress(ConnectionError):
                self.connection.recv(1)  # until the other side has gone
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass
