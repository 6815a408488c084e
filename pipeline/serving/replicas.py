"""Deployments of Ray Serve around the stages and the dispatcher."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
from ray import serve
from ray.serve.handle import DeploymentHandle

from pipeline.batch.planner import StageSpec
from pipeline.monitoring.heap import release_heap
from pipeline.monitoring.logs import log_as_json, log_fields
from pipeline.monitoring.metrics import StageMetrics
from pipeline.rows import Batch, Item, pack, unpack
from pipeline.serving.queue.dispatcher import Dispatcher, DispatchSettings
from pipeline.serving.queue.store import Store
from pipeline.serving.queue.webhooks import Webhook
from pipeline.serving.streaming.live import LiveDecode, Relay
from pipeline.serving.streaming.progress import ProgressReporter
from pipeline.stages.model import ModelConfig
from pipeline.stages.sample import Sample
from pipeline.storage.storage import Storage

logger = logging.getLogger(__name__)

CAPACITY_S = 5.0
"""How long a count of replicas is believed: Serve takes tens of milliseconds of CPU time to tell it."""

Packed = dict[str, bytes]
Handle = DeploymentHandle[Any]


class StageReplica:
    """One stage: takes packed batches, one at a time, in a thread, so that the replica goes on answering.

    It is the same thread for all of them: each further one that allocated tensors would keep memory of its own. What
    a batch took is given back after it.
    A batch that takes longer than `render_s`, or an error that leaves the stage, ends the process: a device in an
    unknown state would fail whatever comes next.
    """

    def __init__(self, spec: StageSpec, render_s: float) -> None:
        log_as_json(deployment=spec.stage.name)
        self.stage, self.render_s, self.metrics = spec.stage(**spec.arguments), render_s, StageMetrics()
        self.thread = ThreadPoolExecutor(1)

    async def __call__(self, packed: Packed) -> Packed:
        """Process a batch."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._work, packed)

    def _work(self, packed: Packed) -> Packed:
        batch = unpack(packed)
        with log_fields(videos=[item.row.position for item in batch.items]), self.guard():
            done = self.stage(batch)
            self.metrics.count(self.stage.name, batch, done)
            return pack(done)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """End the process if what is done meanwhile takes too long or breaks; then give back what it took."""
        watchdog = threading.Timer(self.render_s, _too_long)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        except Exception:
            logger.exception("the stage broke: this worker ends")
            os._exit(1)
        finally:
            watchdog.cancel()
            release_heap()


def _too_long() -> None:
    logger.error("a batch took too long: this worker ends")
    os._exit(1)


class SampleReplica(StageReplica):
    """The sampler, which tells the table of videos how far it is, and lets go of what nobody wants any more.

    decoder: shows the videos that are followed.
    """

    def __init__(self, model: ModelConfig, database: str, decoder: Handle, render_s: float) -> None:
        store, executor = Store(database), ThreadPoolExecutor(1)

        def watch(items: Sequence[Item]) -> ProgressReporter:
            show = decoder.options(method_name="show", session_id=items[0].row.id)
            return ProgressReporter(store, Relay(partial(_shown, show, render_s), executor), items)

        super().__init__(StageSpec(Sample, {"model": model, "watch": watch}), render_s)


def _shown(show: Handle, timeout_s: float, item: Item, start: int) -> int:
    wanted: int = show.remote(pack(Batch((item,), pa.table({}))), start).result(timeout_s=timeout_s)
    return wanted


class DecodeReplica(StageReplica):
    """The decoder, which also shows videos while they are sampled; a batch is a session, and has one replica."""

    stage: LiveDecode

    async def show(self, packed: Packed, start: int) -> int:
        """See `LiveDecode.show`."""
        [item] = unpack(packed).items
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._show, item, start)

    def _show(self, item: Item, start: int) -> int:
        with log_fields(videos=[item.row.position]), self.guard():
            return self.stage.show(item, start)


class RemoteStages:
    """The stages as deployments, by their names."""

    def __init__(self, stages: Mapping[str, Handle]) -> None:
        self.stages = stages
        self.counted, self.counted_at = 0, -CAPACITY_S

    async def render(self, batch: Batch) -> Batch:
        """Pass a batch from stage to stage; raises whatever a lost replica makes of it."""
        stages = self.stages
        decode = stages["decode"].options(session_id=batch.items[0].row.id)
        packed = pack(batch)
        for stage in (stages["encode"], stages["sample"], decode, stages["publish"]):
            packed = await stage.remote(packed)
        return unpack(packed)

    async def capacity(self) -> int:
        """Return the number of samplers that run, as of some seconds ago."""
        if time.monotonic() - self.counted_at >= CAPACITY_S:
            self.counted = await asyncio.to_thread(self._running_samplers)
            self.counted_at = time.monotonic()
        return self.counted

    def _running_samplers(self) -> int:
        name = self.stages["sample"].deployment_id
        deployments = serve.status().applications[name.app_name].deployments
        states: Mapping[Any, int] = deployments[name.name].replica_states
        return states.get("RUNNING", 0)


class DispatcherReplica:
    """The dispatcher, as long as the replica lives."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        database: str,
        retention_s: float,
        output: str,
        settings: DispatchSettings,
        webhook: Webhook | None,
        stages: Mapping[str, Handle],
    ) -> None:
        log_as_json(deployment="dispatcher")
        store = Store(database, retention_s=retention_s)
        self.dispatcher = Dispatcher(store, Storage(output), RemoteStages(stages), settings, webhook)
        self.task = asyncio.get_running_loop().create_task(self.dispatcher.run())

    def check_health(self) -> None:
        """Raise if the dispatcher has ended, so that Serve starts another one."""
        if self.task.done():
            self.task.result()
            raise RuntimeError("the dispatcher has ended")

    async def __del__(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
