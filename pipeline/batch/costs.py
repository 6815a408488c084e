"""What a row costs in each stage, in seconds: measured by earlier runs of the same OUTPUT, else from its FLOPs."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from pipeline.ledger.job_records import job_record, write_job_record
from pipeline.request import Shape
from pipeline.rows import Batch
from pipeline.storage.storage import Storage
from pyramid_flow.vae.tile import Tile

if TYPE_CHECKING:
    from pyramid_flow import Checkpoint

ASSUMED_FLOPS = {"cuda": 150e12, "cpu": 30e9}
"""Floating-point operations per second of one device that are assumed until a run has measured its own."""

ASSUMED_PUBLISH_S = 0.5
MAX_COUNTED_SHAPES = 8
MEASURED = "seconds_per_row"  # in job.json

Key = TypeVar("Key")

Seconds = Mapping[str, float]
"""Seconds per row by the name of the stage."""


@dataclass(frozen=True)
class Costs:
    """Mean seconds per row of a job by stage, and whether they were measured."""

    seconds: Seconds
    measured: bool


@dataclass
class Measured:
    """Mean seconds per row by shape and stage, and how full batches were, collected from finished batches.

    batches: number of batches that were sampled.
    """

    batches: float = 0.0
    rows: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def take(self, batch: Batch | None) -> None:
        """Count the rows of a finished batch that have gone through all stages."""
        for item in batch.items if batch else ():
            row = item.row
            if row.request and row.seconds and not row.error:
                shape = str(row.request.shape)
                self.rows[shape] += 1
                self.seconds[shape].update(row.seconds)
                self.batches += 1 / (row.batch_size or 1)

    def fill(self, batch_size: int) -> float | None:
        """Return the share of the places in sampled batches that held a row; None before the first batch."""
        return self.rows.total() / (self.batches * batch_size) if self.batches else None

    def costs(self) -> Costs | None:
        """Return the mean costs over all rows; None before the first one."""
        means = self.means()
        return Costs(_mean(self.rows, means), measured=True) if means else None

    def means(self) -> dict[str, dict[str, float]]:
        """Return the mean seconds per row by shape and stage."""
        return {
            shape: {stage: total / self.rows[shape] for stage, total in stages.items()}
            for shape, stages in self.seconds.items()
        }


def read_measured(storage: Storage) -> dict[str, Seconds]:
    """Return what earlier runs measured, by shape; empty if there is nothing."""
    return dict((job_record(storage) or {}).get(MEASURED, {}))


def write_measured(storage: Storage, measured: Measured) -> None:
    """Store what a run measured in job.json; shapes that it did not render keep their figures."""
    record = job_record(storage)
    if record is not None and (means := measured.means()):
        write_job_record(storage, record | {MEASURED: record.get(MEASURED, {}) | means})


def expected_costs(
    rows: Counter[Shape], measured: Mapping[str, Seconds], estimate: Callable[[Shape], Seconds]
) -> Costs | None:
    """Return the mean costs over the rows of a job; None if there are none.

    A shape that was never measured costs what it is estimated at, times what the measured ones differ from their
    estimates. Of many shapes the commonest 8 stand for all.
    """
    common = dict(rows.most_common(MAX_COUNTED_SHAPES))
    if not common:
        return None
    known = {shape: measured[str(shape)] for shape in common if str(shape) in measured}
    if len(known) == len(common):
        return Costs(_mean(common, known), measured=True)
    estimates = {shape: estimate(shape) for shape in common}
    if known:
        counts = {shape: common[shape] for shape in known}
        found, thought = _mean(counts, known), _mean(counts, estimates)
        factors = {stage: found.get(stage, 0.0) / seconds for stage, seconds in thought.items()}
        estimates = {shape: _scaled(seconds, factors) for shape, seconds in estimates.items()} | known
    return Costs(_mean(common, estimates), measured=bool(known))


def flops_estimate(
    checkpoint: "Checkpoint", device: str, tile: Tile, cache_gib: float | None = None, gpus_per_clip: int = 1
) -> Callable[[Shape], Seconds]:
    """Return a function from a shape to its estimated seconds per row and stage on one device.

    tile: auto = none; cache_gib: sampling is taken to have memory for the whole history cache, unless it is 0;
    gpus_per_clip: each is taken to do its full share.
    """
    from pyramid_flow.flops import LEVELS, render_flops

    side, cached = None if tile == "auto" else tile, () if cache_gib == 0 else LEVELS

    def estimate(shape: Shape) -> Seconds:
        flops = render_flops(checkpoint, shape.sampling_params(), has_image=shape.has_image, tile=side, cached=cached)
        speed = ASSUMED_FLOPS[device]
        seconds = {"encode": flops.encode, "sample": flops.sample / gpus_per_clip, "decode": flops.decode}
        return {stage: count / speed for stage, count in seconds.items()} | {"publish": ASSUMED_PUBLISH_S}

    return estimate


def _mean(rows: Mapping[Key, int], seconds: Mapping[Key, Seconds]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for shape, count in rows.items():
        total.update({stage: count * value for stage, value in seconds[shape].items()})
    return {stage: value / sum(rows.values()) for stage, value in total.items()}


def _scaled(seconds: Seconds, factors: Seconds) -> dict[str, float]:
    return {stage: value * factors[stage] for stage, value in seconds.items()}
