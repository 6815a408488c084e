"""Stages without a model, whose workers tell who they are and what they sample, so that kills can be explained."""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import ray

from pipeline.batch.planner import Plan, Pool, StageSpec
from pipeline.rows import Item, as_bytes, as_tensor
from pipeline.stages import FILE, THUMBNAIL
from pipeline.stages.publish import Publish
from pipeline.stages.stage import Stage
from tests.chaos.scenario import Scenario, latent_bytes, video_bytes

LATENTS = "latents"
DECODE_S = 0.1

BRAKE, BRAKE_S = "brake", 1.0
"""As long as there is a file of this name, every call of the sampler takes longer."""


class Registered(Stage):
    """A stage whose workers write a file named for the stage and their process; it holds their node."""

    def __init__(self, folder: str) -> None:
        self.folder, self.node = Path(folder), ray.get_runtime_context().get_node_id()
        path = self.folder / "workers" / f"{self.name}-{os.getpid()}"
        path.write_text(self.node)


class Encode(Registered):
    """Passes rows on."""

    name = "encode"

    def process(self, items: Sequence[Item]) -> list[Item]:
        return list(items)


class Sample(Registered):
    """Writes what it is about to sample into a log, then kills its process if a row says so, or works for a while."""

    name = "sample"

    def __init__(self, folder: str, seconds: tuple[float, float]) -> None:
        super().__init__(folder)
        self.seconds, self.rng = seconds, Random(os.getpid())

    def process(self, items: Sequence[Item]) -> list[Item]:
        ids = [item.row.id for item in items]
        append(self.folder / "samples", rows=ids, pid=os.getpid(), node=self.node)
        if any(item.request.prompt == "kill" for item in items):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(BRAKE_S if (self.folder / BRAKE).exists() else self.rng.uniform(*self.seconds))
        return [item.with_tensors(self._latents(item), batch_size=len(items)) for item in items]

    def _latents(self, item: Item) -> dict[str, object]:
        return {LATENTS: as_tensor(latent_bytes(item.row.id, item.request.seed))}


class Decode(Registered):
    """Makes the files of a row, if the latents are its own."""

    name = "decode"

    def process(self, items: Sequence[Item]) -> list[Item]:
        return [self._decoded(item) for item in items]

    def _decoded(self, item: Item) -> Item:
        seed = item.request.seed
        assert as_bytes(item.tensors[LATENTS]) == latent_bytes(item.row.id, seed)
        time.sleep(DECODE_S)
        video = video_bytes(item.row.id, seed)
        return item.with_tensors({FILE: as_tensor(video), THUMBNAIL: as_tensor(b"strip of " + video)}, frames=9)


def specs(folder: str, output: str, scenario: Scenario) -> dict[str, StageSpec]:
    """Return the stages by name."""
    stages = (
        StageSpec(Encode, {"folder": folder}),
        StageSpec(Sample, {"folder": folder, "seconds": scenario.sample_s}),
        StageSpec(Decode, {"folder": folder}),
        StageSpec(Publish, {"output": output}),
    )
    return {spec.name: spec for spec in stages}


def chaos_plan(folder: str, output: str, scenario: Scenario) -> Plan:
    """Return a plan whose workers all need a node with a GPU."""
    stages = specs(folder, output, scenario)
    pools = (
        Pool((stages["encode"],), workers=1, cpus=0, gpus=0.05),
        Pool((stages["sample"], stages["decode"]), workers=scenario.samplers, cpus=0, gpus=0.3, overlap=True),
        Pool((stages["publish"],), workers=1, cpus=0, gpus=0.05),
    )
    return Plan(pools, scenario.batch_size)


def append(path: Path, **record: object) -> None:
    """Append a line to a log that several processes write; lines are short enough to stay whole."""
    with path.open("a") as log:
        log.write(json.dumps({"at": time.time(), **record}) + "\n")


def read_log(path: Path) -> list[dict[str, object]]:
    """Return the records of a log; a line that is still being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
