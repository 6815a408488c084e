"""Deployments of Ray Serve around the stages and the dispatcher."""

import asyncio
import time
from collections.abc import Sequence

from ray import serve
from ray.serve.handle import DeploymentHandle

from pipeline.metrics import StageMetrics
from pipeline.plan import StageSpec
from pipeline.rows import Batch, pack, unpack
from pipeline.serving.dispatcher import Dispatcher, DispatchSettings
from pipeline.serving.store import Claim, Store
from pipeline.serving.watch import Watches
from pipeline.serving.webhooks import Webhook
from pipeline.stages import ModelConfig, Sample, Stage
from pipeline.storage import Storage

CAPACITY_S = 1.0
"""How long a count of replicas is believed."""

Packed = dict[str, bytes]


class StageReplica:
    """One stage: takes packed batches one at a time, in a thread, so that the replica goes on answering."""

    def __init__(self, spec: StageSpec) -> None:
        self._begin(spec.stage(**spec.arguments))

    def _begin(self, stage: Stage) -> None:
        self.stage, self.metrics, self.turn = stage, StageMetrics(), asyncio.Lock()

    async def __call__(self, packed: Packed) -> Packed:
        """Process a batch."""
        async with self.turn:
            return await asyncio.to_thread(self._work, packed)

    def _work(self, packed: Packed) -> Packed:
        batch = unpack(packed)
        done = self.stage(batch)
        self.metrics.count(self.stage.name, batch, done)
        return pack(done)


class SampleReplica(StageReplica):
    """The sampler, which tells the table of videos how far it is, and lets go of what nobody wants any more."""

    def __init__(self, model: ModelConfig, database: str) -> None:
        self.watches = Watches(Store(database))
        self._begin(Sample(model, self.watches))

    async def sample(self, packed: Packed, claims: Sequence[Claim]) -> Packed:
        """Process a batch whose rows have these claims."""
        async with self.turn:
            rows = unpack(packed).items
            self.watches.expect({item.row.id: claim for item, claim in zip(rows, claims, strict=True)})
            return await asyncio.to_thread(self._work, packed)


class RemoteStages:
    """The stages as deployments."""

    def __init__(
        self, encode: DeploymentHandle, sample: DeploymentHandle, decode: DeploymentHandle, publish: DeploymentHandle
    ) -> None:
        self.encode, self.sample, self.decode, self.publish = encode, sample, decode, publish
        self.counted, self.counted_at = 0, -CAPACITY_S

    async def render(self, batch: Batch, claims: Sequence[Claim]) -> Batch:
        """Pass a batch from stage to stage; raises whatever a lost replica makes of it."""
        packed = await self.encode.remote(pack(batch))
        packed = await self.sample.sample.remote(packed, list(claims))
        packed = await self.decode.remote(packed)
        return unpack(await self.publish.remote(packed))

    async def capacity(self) -> int:
        """Return the number of samplers that run, as of the last second."""
        if time.monotonic() - self.counted_at >= CAPACITY_S:
            self.counted = await asyncio.to_thread(self._running_samplers)
            self.counted_at = time.monotonic()
        return self.counted

    def _running_samplers(self) -> int:
        name = self.sample.deployment_id
        deployments = serve.status().applications[name.app_name].deployments
        return int(deployments[name.name].replica_states.get("RUNNING", 0))


class DispatcherReplica:
    """The dispatcher, as long as the replica lives."""

    async def __init__(
        self,
        database: str,
        retention_s: float,
        output: str,
        settings: DispatchSettings,
        webhook: Webhook | None,
        *stages: DeploymentHandle,
    ) -> None:
        store = Store(database, retention_s=retention_s)
        self.dispatcher = Dispatcher(store, Storage(output), RemoteStages(*stages), settings, webhook)
        self.task = asyncio.get_running_loop().create_task(self.dispatcher.run())

    def check_health(self) -> None:
        """Raise if the dispatcher has ended, so that Serve starts another one."""
        if self.task.done():
            self.task.result()
            raise RuntimeError("the dispatcher has ended")

    async def __del__(self) -> None:
        self.task.cancel()
