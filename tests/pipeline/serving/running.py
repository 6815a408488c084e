"""An interface that answers on a port of this machine; a worker is played by hand on its table."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2 as httpx
import uvicorn
from PIL import Image

from pipeline.serving.http.access import Polling, Service
from pipeline.serving.http.api import create_app
from pipeline.serving.http.keys import Keys, hashed
from pipeline.serving.queue.store import QueueLimits, Store
from pipeline.storage.storage import Storage
from pyramid_flow import Preset

if TYPE_CHECKING:
    import openai

KEYS = Keys.parse(f"me:{hashed('secret')}\nyou:{hashed('other')}\nmetrics:{hashed('scraper')}")
LIMITS = QueueLimits()
POLLING = Polling(client_s=0.02, events_s=0.01, stream_s=0.01)
PRESET = Preset(sizes=((64, 64),), max_num_frames=33)
JSON = {"content-type": "application/json"}
WAIT_S = 20.0
"""Time limit for what happens in another thread."""

VIDEO, STRIP = bytes(range(256)) * 10, io.BytesIO()
Image.new("RGB", (4 * 20, 10), (200, 0, 0)).save(STRIP, "WEBP")


@dataclass(frozen=True)
class Running:
    """A service that runs, and what it stands on."""

    url: str
    service: Service
    clients: ExitStack

    def client(self, key: str = "secret") -> "openai.OpenAI":
        import openai  # here, so that sessions without its tests do not load it

        return self.clients.enter_context(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0))

    def http(self, key: str | None = "secret") -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.clients.enter_context(httpx.Client(base_url=self.url, headers=headers, verify=False))  # http

    @contextmanager
    def after(self, method: str, action: Callable[[], object] = lambda: None) -> Iterator[threading.Event]:
        """Run an action in a thread once a method of the table has returned; yields the event of its return."""
        original, returned = getattr(self.service.store, method), threading.Event()

        def wrapped(*arguments: object, **options: object) -> object:
            result = original(*arguments, **options)
            returned.set()
            return result

        def wait() -> None:
            if returned.wait(WAIT_S):
                action()

        setattr(self.service.store, method, wrapped)
        thread = threading.Thread(target=wait)
        thread.start()
        try:
            yield returned
        finally:
            setattr(self.service.store, method, original)
            thread.join()

    def work(self) -> None:
        """Make what waits."""
        store, storage = self.service.store, self.service.storage
        while jobs := store.claim(10, 60):
            for job in jobs:
                storage.put(f"videos/{job.id}.mp4", VIDEO)
                storage.put(f"thumbnails/{job.id}.webp", STRIP.getvalue())
                files = {"uri": f"videos/{job.id}.mp4", "thumbnail_uri": f"thumbnails/{job.id}.webp"}
                facts = {
                    "media_type": "video/mp4",
                    "bytes": len(VIDEO),
                    "sha256": "ab" * 32,
                    "seconds": {"sample": 1.5},
                }
                store.complete(job.claim, files | facts)


def service_in(folder: Path, limits: QueueLimits = LIMITS, preset: Preset = PRESET) -> Service:
    """Return a service whose table and files lie in a folder; it knows the keys "secret" and "other"."""
    store = Store(f"sqlite:///{folder}/videos.db", limits=limits)
    return Service(store, Storage(str(folder / "out")), preset, "toy", "f00d", KEYS, polling=POLLING)


def until(happened: Callable[[], object]) -> None:
    """Wait for a condition that another thread brings about."""
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def run(service: Service) -> Iterator[Running]:
    """Let a service answer."""
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with ExitStack() as clients:
        yield Running(f"http://127.0.0.1:{port}", service, clients)
    server.should_exit = True
    thread.join()
    service.store.close()
