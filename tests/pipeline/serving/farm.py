"""The dispatcher and the real stages in this process."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

from pipeline.rows import pack, unpack
from pipeline.serving.creation import new_video
from pipeline.serving.dispatcher import Dispatcher, DispatchSettings
from pipeline.serving.live import LiveDecode, Relay
from pipeline.serving.store import Limits, Store
from pipeline.serving.tables import Status
from pipeline.serving.watch import Watch
from pipeline.stages.encode import Encode
from pipeline.stages.publish import Publish
from pipeline.stages.sample import Sample
from pipeline.stages.stage import ModelConfig
from pipeline.storage import Storage
from pyramid_flow import Checkpoint

MODEL = ModelConfig("toy", None, "cpu", "float32", threads=1)
QUICK = {"num_frames": 9, "num_inference_steps": 1, "video_num_inference_steps": 1}


class Local:
    """The stages in this process, one batch at a time; before: called with each batch before it is sampled."""

    def __init__(self, store: Store, encode: Encode, output: Path) -> None:
        self.decode = LiveDecode(MODEL, 1, None, 1, 4, str(store.engine.url), str(output))
        self.relaying = ThreadPoolExecutor(1)
        sample = Sample(MODEL, lambda items: Watch(store, Relay(self.show, self.relaying), items))
        self.stages = encode, sample, self.decode, Publish(str(output), "here")
        self.lock, self.decoding = threading.Lock(), threading.Lock()
        self.sizes: list[int] = []
        self.before: Callable[[list[str]], None] = lambda prompts: None

    def work(self, batch):
        with self.lock:
            self.sizes.append(len(batch))
            self.before([item.request.prompt for item in batch.items])
            for stage in self.stages:
                with self.decoding if stage is self.decode else nullcontext():
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
    """A table, a place for files, the stages and a dispatcher."""

    def __init__(self, folder: Path, encode: Encode) -> None:
        self.store = Store(f"sqlite:///{folder}/videos.db", limits=Limits(), retention_s=1000)
        self.storage = Storage(str(folder / "out"))
        self.local = Local(self.store, encode, folder / "out")
        self.preset = Checkpoint.open("toy").preset
        settings = DispatchSettings(batch_size=3, lease_s=3, poll_s=0.02, expire_s=0.1)
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
