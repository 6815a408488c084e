"""Stages without a model: they do what a row's prompt says, and a job made of them."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.batch.job import RenderJob
from pipeline.batch.planner import Plan, Pool, StageSpec
from pipeline.batch.runner import RetryLimits
from pipeline.ledger.job_records import claim, new_run_id
from pipeline.rows import Batch, Item
from pipeline.stages.stage import Stage
from pipeline.storage.storage import Storage
from pipeline.tables.batching import read_rows
from pipeline.tables.readers import list_parts
from pipeline.tables.worklist import RowRules, Worklist, scan
from pyramid_flow import Preset


class Encode(Stage):
    """Passes rows on."""

    name = "encode"

    def process(self, items: Sequence[Item]) -> list[Item]:
        return list(items)


class Sample(Stage):
    """Appends each row's id to a file, then kills its process, hangs, raises or works, as the prompt says."""

    name = "sample"

    def __init__(self, log: str, seconds: float) -> None:
        self.log, self.seconds = Path(log), seconds

    def process(self, items: Sequence[Item]) -> list[Item]:
        prompts = [item.request.prompt.split()[0] for item in items]
        with self.log.open("a") as log:
            log.write(" ".join(item.row.id for item in items) + "\n")
        if "kill" in prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in prompts:
            time.sleep(1000)
        if "poison" in prompts:
            import torch  # here, so that other workers do not load it

            raise torch.AcceleratorError("device-side assert triggered")
        if "disk" in prompts:
            raise OSError("no space left on device")
        time.sleep(self.seconds)
        return [item.with_tensors({}, batch_size=len(items)) for item in items]


class Decode(Stage):
    """Takes its time."""

    name = "decode"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def process(self, items: Sequence[Item]) -> list[Item]:
        time.sleep(self.seconds)
        return list(items)


def simulated_job(table: Path, output: Path, *, batch_size: int = 4, seconds: float = 0.0, **job: object) -> RenderJob:
    """Return a job over a table whose stages are simulated; the sampler's log is `calls` beside the output."""
    rules = RowRules(Preset(), allow_untrained=True)
    output.mkdir(exist_ok=True)
    sample = StageSpec(Sample, {"log": str(output / "calls"), "seconds": seconds})
    pools = (Pool((StageSpec(Encode, {}),), workers=1, cpus=0, gpus=0), Pool((sample,), workers=2, cpus=0, gpus=0))
    storage = Storage(str(output))
    claim(storage, {}, {})
    return RenderJob(
        run=new_run_id(),
        storage=storage,
        worklist=scan(list_parts([str(table)]), rules),
        rules=rules,
        plan=Plan(pools, batch_size),
        plan_for=lambda costs: Plan(pools, batch_size, costs=costs),
        constants={"model": "simulated", "model_fingerprint": "0", "software_version": "0"},
        retry_failed=False,
        **{"limits": RetryLimits(), **job},
    )


class AsRead:
    """In place of `runner.Rendering`: delivers the rows of the first part as they were read, without any stage."""

    def __init__(self, worklist: Worklist, plan: Plan, rules: RowRules, limits: RetryLimits) -> None:
        self.batches = [batch for _, batch in read_rows(worklist.parts[0], rules, [0, 1])]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)
