"""The dispatcher and the stages in this process: the real ones, or a stand-in for all but the last."""

import asyncio
import copy
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import nullcontext, suppress
from pathlib import Path

from pipeline.rows import Item, as_tensor, pack, unpack
from pipeline.serving.http.parsing import new_video
from pipeline.serving.queue.dispatcher import Dispatcher, DispatchSettings
from pipeline.serving.queue.records import Status
from pipeline.serving.queue.store import QueueLimits, Store
from pipeline.serving.streaming.live import LiveDecode, Relay
from pipeline.serving.streaming.progress import ProgressReporter
from pipeline.stages import FILE, THUMBNAIL
from pipeline.stages.encode import Encode
from pipeline.stages.model import ModelConfig
from pipeline.stages.publish import Publish
from pipeline.stages.sample import Sample
from pipeline.stages.stage import Stage
from pipeline.storage.storage import Storage
from pyramid_flow import Checkpoint

MODEL = ModelConfig("toy", None, "cpu", "float32", threads=1)
LEASE_S = 60.0
"""Longer than any of these tests: a slow machine must not make a dispatcher lose its jobs."""

QUICK = {"num_frames": 9, "num_inference_steps": 1, "video_num_inference_steps": 1}


class Models:
    """The stages that load a model, which all farms of a session share."""

    def __init__(self, folder: Path) -> None:
        self.encode = Encode(MODEL, "nowhere", frozenset())
        self.sample = Sample(MODEL)
        self.decode = LiveDecode(MODEL, 1, None, 1, 4, f"sqlite:///{folder}/videos.db", str(folder))
        self.decode.store.close()


class Inline(Executor):
    """Calls at once, so that a video's units are shown in the order in which they are finished."""

    def submit(self, call: Callable[..., object], /, *arguments: object, **options: object) -> Future[object]:
        done: Future[object] = Future()
        done.set_result(call(*arguments, **options))
        return done


class Draw(Stage):
    """Stands in for all stages before the last one: a video's file is its prompt."""

    name = "sample"

    def process(self, items: Sequence[Item]) -> list[Item]:
        files = {FILE: as_tensor(b"video"), THUMBNAIL: as_tensor(b"thumbnail")}
        return [
            item.with_tensors(
                {**files, FILE: as_tensor(item.request.prompt.encode())},
                latents_sha256=hashlib.sha256(item.row.id.encode()).hexdigest(),
                batch_size=len(items),
            )
            for item in items
        ]


class Local:
    """Stages in this process, one batch at a time; before: called with each batch before it is worked on."""

    def __init__(self, *stages: Callable[..., object]) -> None:
        self.stages = stages
        self.lock, self.decoding = threading.Lock(), threading.Lock()
        self.sizes: list[int] = []
        self.before: Callable[[list[str]], None] = lambda prompts: None

    @classmethod
    def drawing(cls, output: Path) -> "Local":
        """Return a stand-in for the model's stages, and the real last one."""
        return cls(Draw(), Publish(str(output), "here"))

    @classmethod
    def rendering(cls, models: Models, store: Store, output: Path) -> "Local":
        """Return the real stages, over a table and a folder for files."""
        decode, sample = copy.copy(models.decode), copy.copy(models.sample)
        decode.store, decode.storage, decode.videos = store, Storage(str(output)), {}
        local = cls(models.encode, sample, decode, Publish(str(output), "here"))
        local.decode = decode
        sample.watch = lambda items: ProgressReporter(store, Relay(local.show, Inline()), items)
        return local

    def work(self, batch):
        with self.lock:
            self.sizes.append(len(batch))
            self.before([item.request.prompt for item in batch.items])
            for stage in self.stages:
                with self.decoding if isinstance(stage, LiveDecode) else nullcontext():
                    batch = unpack(pack(stage(batch)))
            return batch

    def show(self, item, start):
        with self.decoding:
            return self.decode.show(item, start)

    async def render(self, batch):
        return await asyncio.to_thread(self.work, batch)

    async def capacity(self):
        return 1


class Farm:
    """A table, a place for files, the stages and a dispatcher; models: None = none is needed."""

    def __init__(self, folder: Path, models: Models | None = None) -> None:
        self.store = Store(f"sqlite:///{folder}/videos.db", limits=QueueLimits(), retention_s=1000)
        self.storage = Storage(str(folder / "out"))
        output = folder / "out"
        self.local = Local.rendering(models, self.store, output) if models else Local.drawing(output)
        self.preset = Checkpoint.open("toy").preset
        settings = DispatchSettings(batch_size=3, lease_s=LEASE_S, poll_s=0.02, expire_s=0.1)
        self.dispatcher = Dispatcher(self.store, self.storage, self.local, settings)

    def ask(self, prompt: str, image: bytes | None = None, **fields: object) -> str:
        video = new_video({"prompt": prompt, **QUICK, **fields}, image, self.preset, "toy")
        job = video.job(self.preset, owner="me", model="toy", created_at=self.store.clock())
        if image:
            job.image = f"uploads/{job.id}"
            self.storage.put(job.image, image)
        return self.store.add(job).id

    def job(self, video_id: str):
        return self.store.get(video_id, "me")

    def run(self, until: Callable[[], bool]) -> None:
        """Dispatch until something has happened."""

        async def both() -> None:
            task = asyncio.create_task(self.dispatcher.run())
            async with asyncio.timeout(60):
                while not until():
                    assert not task.done(), task.exception()
                    await asyncio.sleep(0.02)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        asyncio.run(both())

    def run_all(self) -> None:
        """Dispatch until nothing waits or is made."""
        self.run(lambda: not self.dispatcher.running and not self.going_on())

    def going_on(self) -> int:
        counts = self.store.counts()
        return counts[Status.QUEUED] + counts[Status.IN_PROGRESS]
