"""A Dataset's stand-in that runs the stages in the test's own process, for jobs without Ray."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.batch.planner import Plan
from pipeline.batch.runner import RetryLimits
from pipeline.rows import Batch
from pipeline.stages.publish import Publish
from pipeline.tables.batching import read_batches, read_units
from pipeline.tables.worklist import RowRules, Worklist


@dataclass
class InProcess:
    """Takes the place of `runner.Rendering`."""

    worklist: Worklist
    plan: Plan
    rules: RowRules
    limits: RetryLimits

    def __iter__(self) -> Iterator[Batch]:
        """Yield every batch after all stages."""
        specs = [spec for pool in self.plan.pools for spec in pool.stages]
        stages = [spec.stage(**spec.arguments, **({"node": "n"} if spec.stage is Publish else {})) for spec in specs]
        for works in read_units(self.worklist.part_works()):
            for batch in read_batches(works, self.rules, self.plan.batch_size):
                for stage in stages:
                    batch = stage(batch)
                yield batch
