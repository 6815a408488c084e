"""Stages that sleep instead of computing, tables and jobs to feed them with, and the record of when they worked."""

import fcntl
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.batch.job import RenderJob
from pipeline.batch.planner import Plan, Pool, StageSpec
from pipeline.ledger.job_records import claim, new_run_id
from pipeline.rows import Item
from pipeline.stages.stage import Stage
from pipeline.storage.storage import Storage
from pipeline.tables.readers import list_parts
from pipeline.tables.worklist import RowRules, scan
from pyramid_flow import Preset

SHAPES = ((384, 640, 121), (640, 384, 121), (768, 1280, 241))
"""Height, width and frames that the rows of a table have, mixed at random."""

RULES = RowRules(Preset(), allow_untrained=True)
ROWS_PER_GROUP = 100_000
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("campaign", pa.string()),
    ]
)
START_TIMEOUT_S = 600.0
POLL_S = 0.02


@dataclass(frozen=True)
class Work:
    """What a row takes in a stage: seconds on the GPU, then seconds beside it; and MiB of tensors that it passes on."""

    device_s: float = 0.0
    host_s: float = 0.0
    passed_mib: float = 0.0


@dataclass(frozen=True)
class Site:
    """What the workers of one run share: a folder, how many stages must be there before any begins, and GPU slices.

    slice_s: how long a stage holds its GPU at once, as processes on one GPU take turns.
    """

    folder: str
    num_stages: int
    slice_s: float


@dataclass(frozen=True)
class Event:
    """One call of a stage: its process, its rows, and when it began and ended on the machine's monotonic clock.

    waited_s: how much of it went by while another process held the GPU.
    """

    stage: str
    process: int
    rows: int
    began: float
    ended: float
    waited_s: float


class Gpu:
    """A GPU that processes use in turns, one at a time: a pair of locked files named by its number.

    Who wants it queues at one file and waits for the other: so the process that had it last cannot take it again before
    one that has waited.
    """

    def __init__(self, folder: Path, number: str, slice_s: float) -> None:
        self.queue = (folder / f"gpu-{number}-queue").open("w")
        self.turn = (folder / f"gpu-{number}-turn").open("w")
        self.slice_s = slice_s

    def work(self, seconds: float) -> float:
        """Hold the GPU for some seconds in all, and return the seconds spent waiting for it."""
        waited, left = 0.0, seconds
        while left > 0:
            asked = time.monotonic()
            with self._held():
                began = time.monotonic()
                time.sleep(min(left, self.slice_s))
                left -= time.monotonic() - began
            waited += began - asked
        return waited

    @contextmanager
    def _held(self) -> Iterator[None]:
        fcntl.flock(self.queue, fcntl.LOCK_EX)
        fcntl.flock(self.turn, fcntl.LOCK_EX)
        fcntl.flock(self.queue, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self.turn, fcntl.LOCK_UN)


class Simulated(Stage):
    """Sleeps as long as its work takes, and appends every call to a file of its own.

    Before its first call it waits until all stages of the run have been built: how long processes take to start is no
    part of what is measured.
    """

    def __init__(self, work: Work, site: Site) -> None:
        self.work, self.site = work, site
        folder, name = Path(site.folder), f"{self.name}-{uuid4().hex}"
        number = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpu = Gpu(folder, number, site.slice_s) if number else None
        self.events = (folder / f"{name}.jsonl").open("w")
        self.started = False

    def process(self, items: Sequence[Item]) -> list[Item]:
        self._wait_for_all()
        began = time.monotonic()
        waited = self._compute(self.work.device_s * len(items))
        time.sleep(self.work.host_s * len(items))
        event = Event(self.name, os.getpid(), len(items), began, time.monotonic(), waited)
        self.events.write(json.dumps(asdict(event)) + "\n")
        self.events.flush()
        return [item.with_tensors(self._tensors(), batch_size=len(items)) for item in items]

    def _compute(self, seconds: float) -> float:
        if self.gpu:
            return self.gpu.work(seconds)
        time.sleep(seconds)
        return 0.0

    def _tensors(self) -> dict[str, torch.Tensor]:
        size = int(self.work.passed_mib * 2**20)
        return {"data": torch.zeros(size, dtype=torch.uint8)} if size else {}

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.started:
            self.started = len(list(Path(self.site.folder).glob("*.jsonl"))) >= self.site.num_stages
            if time.monotonic() > deadline:
                os._exit(1)  # an error would only fail the row
            time.sleep(0 if self.started else POLL_S)


class Encode(Simulated):
    """A simulated encoder."""

    name = "encode"


class Sample(Simulated):
    """A simulated sampler."""

    name = "sample"


class Decode(Simulated):
    """A simulated decoder."""

    name = "decode"


class Publish(Simulated):
    """A simulated publisher."""

    name = "publish"


STAGES: dict[str, type[Simulated]] = {stage.name: stage for stage in (Encode, Sample, Decode, Publish)}


def staged_plan(samplers: int, batch_size: int) -> Plan:
    """Return the planner's staged layout with one encoder and one publisher; the workers take no resources."""
    encode, sample, decode, publish = (StageSpec(stage, {}) for stage in STAGES.values())
    pools = (
        Pool((encode,), 1, 0.0, 0.0),
        Pool((sample, decode), samplers, 0.0, 0.0, overlap=True),
        Pool((publish,), 1, 0.0, 0.0),
    )
    return Plan(pools, batch_size)


def fused_plan(workers: int, batch_size: int) -> Plan:
    """Return a plan of one pool for all stages; the workers take no resources."""
    return Plan((Pool(tuple(StageSpec(stage, {}) for stage in STAGES.values()), workers, 0.0, 0.0),), batch_size)


def simulated(plan: Plan, works: Mapping[str, Work], folder: Path, slice_s: float = 0.02) -> Plan:
    """Return the plan with its stages replaced by simulated ones; folder: a new one, where they record their calls."""
    folder.mkdir(parents=True)
    site = Site(str(folder), sum(pool.workers * len(pool.stages) for pool in plan.pools), slice_s)

    def replaced(spec: StageSpec) -> StageSpec:
        return StageSpec(STAGES[spec.name], {"work": works.get(spec.name, Work()), "site": site})

    pools = tuple(replace(pool, stages=tuple(map(replaced, pool.stages))) for pool in plan.pools)
    return replace(plan, pools=pools)


def simulated_job(table: Path, output: Path, plan: Plan) -> RenderJob:
    """Return the job that renders a table with a plan."""
    output.mkdir(parents=True)
    storage = Storage(str(output))
    claim(storage, {}, {})
    return RenderJob(
        run=new_run_id(),
        storage=storage,
        worklist=scan(list_parts([str(table)]), RULES),
        rules=RULES,
        plan=plan,
        plan_for=lambda costs: replace(plan, costs=costs),
        constants={"model": "simulated", "model_fingerprint": "0", "software_version": "0"},
        retry_failed=False,
    )


def read_events(folder: Path, stage: str | None = None) -> list[Event]:
    """Return the calls that the stages of a run recorded, or those of one stage, by when they began."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    events = [Event(**json.loads(line)) for line in lines]
    return sorted((event for event in events if stage in (None, event.stage)), key=lambda event: event.began)


def span_s(events: Sequence[Event]) -> float:
    """Return the seconds from the first beginning to the last end."""
    return max(event.ended for event in events) - min(event.began for event in events)


def write_table(path: Path, num_rows: int, first: int = 0) -> Path:
    """Write a Parquet table of rows with ids, three shapes and a column of the user's own; returns its path."""
    mixed = random.Random(first)
    starts = range(first, first + num_rows, ROWS_PER_GROUP)
    groups = (_group(range(start, min(start + ROWS_PER_GROUP, first + num_rows)), mixed) for start in starts)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for group in groups:
            writer.write_table(group)
    return path


def _group(numbers: range, mixed: random.Random) -> pa.Table:
    heights, widths, frames = zip(*mixed.choices(SHAPES, k=len(numbers)), strict=True)
    prompts = [f"A lighthouse on a cliff above a stormy sea, seen from a boat, take {number}" for number in numbers]
    columns = [
        [row_id(number) for number in numbers],
        prompts,
        heights,
        widths,
        frames,
        [f"campaign {number % 7}" for number in numbers],
    ]
    return pa.table(columns, SCHEMA)


def row_id(number: int) -> str:
    """Return the id of a table's row."""
    return f"row-{number:08d}"
