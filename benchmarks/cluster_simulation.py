"""What would a large cluster do: videos per hour, use and cost of 8 to 1024 GPUs, and what becomes the limit?

A simulation by discrete events (benchmarks/simulated_cluster.py) of the planner's own plans.

calibration (benchmarks/calibration.py): the driver's seconds for a batch and for a pool come from the 10,000-row runs
of benchmarks.scale. Then all its small runs, and those of benchmarks.pipeline_utilisation, are simulated from begin to
end; none may differ by more than 10 %.

steady: for a clip, a batch size and a number of GPUs a window of work is simulated, some ten thousand batches. What is
busy 95 % of that time is the limit. If that is the encoders, twice as many are tried; if it is the driver, several
shards: each has a driver, a ledger writer and its part of the GPUs, storage they share. reach: how many GPUs each of
these could serve, by division. spot: the use of 256 GPUs that are interrupted more or less often.

jobs: 100 million prompts are not simulated one by one. A job's hours are its rows at the steady rate, and what the
driver does before and after (list, scan; then read the ledger, take done rows out and view it, three times each), at
the seconds and MiB per row that benchmarks.scale measured with 1 million rows, in proportion. GPUs are paid for all
of it.
"""

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product, repeat
from math import ceil
from pathlib import Path
from typing import Any

import simpy
from matplotlib.figure import Figure

from benchmarks.calibration import check, overhead_of
from benchmarks.report import RESULTS, ROOT, write_result
from benchmarks.simulated import Work
from benchmarks.simulated_cluster import Farm, Nodes, Overhead, Shared, Station
from pipeline.batch.costs import ASSUMED_FLOPS, ASSUMED_PUBLISH_S, Costs
from pipeline.batch.planner import Plan, PlanRequest, Resources, make_plan
from pipeline.batch.runner import READ_TASKS
from pipeline.ledger.ledger import FLUSH_ROWS, THREADS

GPUS, PROMPTS = [8, 64, 256, 512, 1024], [1_000_000, 10_000_000, 100_000_000]
SPOT_GPUS, SPOT_PER_H = 256, [0.0, 0.02, 0.1, 0.5]
BATCHES, LEAST_CYCLES, SETTLE_CYCLES = 10_000, 40, 50  # what waits at first takes so long to run dry
BUSY, FILL = 0.95, 0.9
LEDGER_READS = 3  # after the last row: what is pending is asked three times, and the view, too
NODES = Nodes(arrive_s=60.0, mtbf_h=2000.0, spot_per_h=0.02)
PICTURE = ROOT / "docs/images/cluster_simulation.png"
REMEDIES = {
    "GPUs": "more GPUs",
    "encode": "--encode-workers",
    "publish": "--publish-workers",
    "driver": "greater batches, then --shard i/n",
    "reading": "--shard i/n",
    "ledger": "--shard i/n",
    "object store": "encoders on more nodes",
    "storage": "a faster link, more prefixes; shards share it",
}


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted of a cluster, none of it measured.

    Measured are the driver's seconds per batch and per row, its MiB per row and the rows per second of the read tasks,
    all in benchmarks/results/scale.json. Counted, not measured, are the FLOPs of a `Clip`.

    gpu_flops: speed, and publish_s: seconds of an upload, both as the planner assumes; spread: how much a batch's
    seconds vary, evenly, up and down; puts_per_s: what S3 states for one prefix (a row has two files);
    storage_mb_per_s: of the cluster's link to the store, 10 Gbit/s; get_s, part_s: to read and to write a ledger part
    (0.03 s of it are encoding); embeddings_mb: of a row, from its encoder; link_mb_per_s: of the one node by which all
    embeddings are taken to leave; nodes: how they come and go.
    """

    gpu_flops: float = ASSUMED_FLOPS["cuda"]
    publish_s: float = ASSUMED_PUBLISH_S
    gpu_hour_price: float = 2.5
    cpus_per_gpu: int = 8
    spread: float = 0.1
    puts_per_s: float = 3500.0
    storage_mb_per_s: float = 1250.0
    get_s: float = 0.03
    part_s: float = 0.15
    embeddings_mb: float = 2.0
    link_mb_per_s: float = 1250.0
    nodes: Nodes = NODES


@dataclass(frozen=True)
class Clip:
    """PFLOP of a row, counted by `pyramid_flow.render_flops` for the published miniFLUX; ffmpeg and MB are assumed."""

    name: str
    encode_pflop: float
    sample_pflop: float
    decode_pflop: float
    ffmpeg_s: float
    video_mb: float


SMALL = Clip("384p, 5 s", 0.0024, 2.2282, 0.5736, 1.0, 1.5)
LARGE = Clip("768p, 5 s", 0.0024, 11.7542, 2.3004, 4.0, 5.0)


@dataclass(frozen=True)
class Workload:
    """Clips of one kind, and how many are sampled together."""

    clip: Clip
    batch_size: int

    @property
    def name(self) -> str:
        """Such as "384p, 5 s, batches of 4"."""
        return f"{self.clip.name}, batches of {self.batch_size}"

    def works(self, assumed: Assumptions) -> dict[str, Work]:
        """Return what a row takes in each stage."""
        clip, second = self.clip, assumed.gpu_flops / 1e15
        return {
            "encode": Work(clip.encode_pflop / second),
            "sample": Work(clip.sample_pflop / second),
            "decode": Work(clip.decode_pflop / second, clip.ffmpeg_s),
            "publish": Work(host_s=assumed.publish_s),
        }

    def gpu_s(self, assumed: Assumptions) -> float:
        """Return the seconds that a row takes of a GPU."""
        return sum(work.device_s for work in self.works(assumed).values())

    def shared(self, assumed: Assumptions, scale: Mapping[str, Any]) -> Shared:
        """Return what a row takes of what all workers share."""
        [measured] = [row for row in scale["rows"]["read_tasks"] if row["rows"] == 1_000_000 and row["batch_size"] == 4]
        return Shared(
            reading=1 / (READ_TASKS * measured["with_packing_rows_per_s"]),
            object_store=assumed.embeddings_mb / assumed.link_mb_per_s,
            storage=max(2 / assumed.puts_per_s, self.clip.video_mb / assumed.storage_mb_per_s),
            part=assumed.part_s,
        )


WORKLOADS = [Workload(SMALL, 1), Workload(SMALL, 4), Workload(LARGE, 4)]


@dataclass(frozen=True)
class Steady:
    """A window of steady work.

    encoders: of each shard; utilisation: GPU seconds of all there were, without those of batches that had to begin
    again; videos_per_hour: as many as these make; busy: shares of the time, of the busiest shard; lost_rows: of those
    that began, the share that had to begin again; parts_per_row: of the ledger.
    """

    workload: str
    gpus: int
    shards: int
    encoders: int
    videos_per_hour: int
    utilisation: float
    busy: dict[str, float]
    lost_rows: float
    parts_per_row: float

    @property
    def limit(self) -> str:
        """What has no time left; workers that wait for something else come last."""
        return next((name for name, share in self.busy.items() if share >= BUSY), "GPUs")


def cluster_plan(workload: Workload, gpus: int, encoders: int | None, assumed: Assumptions) -> Plan:
    """Return what the planner makes of a number of GPUs; encoders: a pinned number of them."""
    seconds = {name: work.device_s + work.host_s for name, work in workload.works(assumed).items()}
    costs, pinned = Costs(seconds, measured=False), {} if encoders is None else {"encode": encoders}
    target = PlanRequest(
        "model", None, "cuda", "bfloat16", "output", "images", 1, None, workload.batch_size, workers=pinned, costs=costs
    )
    return make_plan(target, Resources(gpus * assumed.cpus_per_gpu, gpus))


def steady(
    workload: Workload,
    gpus: int,
    overhead: Overhead,
    shared: Shared,
    assumed: Assumptions,
    *,
    batches: int = BATCHES,
    shards: int = 1,
    encoders: int | None = None,
) -> Steady:
    """Simulate so many batches, 40 per GPU at least, after 50 per GPU that are not counted.

    encoders: a pinned number of them in each shard.
    """
    env, works, endless = simpy.Environment(), workload.works(assumed), repeat(workload.batch_size)
    storage, plan = Station(env), cluster_plan(workload, gpus // shards, encoders, assumed)
    farms = [
        Farm(env, plan, works, endless, overhead, shared, assumed.nodes, assumed.spread, seed, storage)
        for seed in range(shards)
    ]
    cycle_s = workload.gpu_s(assumed) * workload.batch_size
    begin, window_s = assumed.nodes.arrive_s + SETTLE_CYCLES * cycle_s, cycle_s * max(LEAST_CYCLES, batches / gpus)
    env.run(begin)
    before, gpu_s = [farm.busy_s() for farm in farms], -sum(farm.gpu_s() for farm in farms)
    env.run(begin + window_s)
    gpu_s += sum(farm.gpu_s() for farm in farms)
    busy = [
        {name: (busy_s - then[name]) / window_s for name, busy_s in farm.busy_s().items()}
        | {pool: farm.in_use(pool, begin) for pool in ("encode", "publish")}
        for farm, then in zip(farms, before, strict=True)
    ]
    rows = sum(rows for farm in farms for _, rows in farm.finished)
    lost = sum(farm.lost_rows for farm in farms)
    return Steady(
        workload=workload.name,
        gpus=gpus,
        shards=shards,
        encoders=plan.pools[0].workers,
        videos_per_hour=round(3600 * gpu_s / (workload.gpu_s(assumed) * window_s)),
        utilisation=round(gpu_s / (gpus * window_s), 4),
        busy={name: round(max(shares[name] for shares in busy), 3) for name in busy[0]},
        lost_rows=round(lost / (rows + lost), 5),
        parts_per_row=sum(farm.num_parts for farm in farms) / rows,
    )


def reach(workload: Workload, overhead: Overhead, shared: Shared, assumed: Assumptions) -> dict[str, int]:
    """Return how many GPUs at full speed each of what they share can serve; all but storage once per shard."""
    driver_s = (overhead.batch_s + 3 * overhead.pool_s) / workload.batch_size
    seconds = {"driver": driver_s, "reading": shared.reading, "ledger": shared.part / FLUSH_ROWS}
    seconds |= {"object store": shared.object_store, "storage": shared.storage}
    return {name: round(workload.gpu_s(assumed) / value) for name, value in seconds.items()}


def job(found: Steady, prompts: int, scale: Mapping[str, Any], assumed: Assumptions) -> dict[str, Any]:
    """Return hours, cost and a driver's memory of a whole job: the steady rate, and what the driver does around it."""
    measured = max(scale["rows"]["driver"], key=lambda run: run["rows"])
    row_s = {step: seconds / measured["rows"] for step, seconds in measured["seconds"].items()}
    mib = (measured["peak_mib"] - measured["imports_mib"]) / measured["rows"]
    start_s = prompts * (row_s["list"] + row_s["scan"] + row_s["shard"])
    end_s = LEDGER_READS * prompts * (row_s["ledger"] + row_s["anti_join"] + row_s["view"])
    end_s += 2 * LEDGER_READS * prompts * found.parts_per_row * assumed.get_s / THREADS
    hours = (start_s + end_s) / 3600 + prompts / found.videos_per_hour
    return {
        "workload": found.workload,
        "gpus": found.gpus,
        "shards": found.shards,
        "encoders": found.encoders,
        "prompts": prompts,
        "hours": round(hours, 1),
        "start_and_end_h": round((start_s + end_s) / 3600, 2),
        "cost_usd": round(hours * found.gpus * assumed.gpu_hour_price),
        "ledger_parts": round(prompts * found.parts_per_row),
        "driver_gib": round((measured["imports_mib"] + mib * prompts) / 1024, 1),
    }


def draw(found: Sequence[Steady], path: Path) -> None:
    """Draw videos per hour and utilisation over GPUs: what the planner plans as lines, what was mended as squares."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = rates, shares = figure.subplots(1, 2)
    for number, workload in enumerate(WORKLOADS):
        first: dict[int, Steady] = {}
        for row in found:
            if row.workload == workload.name and first.setdefault(row.gpus, row) is not row:
                rates.plot(row.gpus, row.videos_per_hour, "s", color=f"C{number}", fillstyle="none", markersize=9)
                shares.plot(row.gpus, 100 * row.utilisation, "s", color=f"C{number}", fillstyle="none", markersize=9)
        planned = list(first.values())
        gpus, label = [row.gpus for row in planned], workload.name
        rates.plot(gpus, [row.videos_per_hour for row in planned], "o-", color=f"C{number}", label=label, alpha=0.7)
        shares.plot(gpus, [100 * row.utilisation for row in planned], "o-", color=f"C{number}", alpha=0.7)
    rates.plot([], [], "ks", fillstyle="none", markersize=9, label="with more shards or encoders")
    rates.set(yscale="log", ylabel="videos per hour")
    shares.set(ylim=(0, 105), ylabel="use of GPUs, %")
    for axis in axes:
        axis.set(xscale="log", xlabel="GPUs")
        axis.set_xticks(ticks := sorted({row.gpus for row in found}), [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    rates.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="(%(default)s)")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="(%(default)s)")
    parser.add_argument("--batches", type=int, default=BATCHES, help="of a window (%(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments, assumed = parse_arguments(), Assumptions()
    scale, stages = (_figures(name) for name in ("scale", "pipeline_utilisation"))
    compared, overhead = check(scale, stages), overhead_of(scale["pipeline"])
    print(f"driver: {1000 * overhead.batch_s:.1f} ms per batch, and {1000 * overhead.pool_s:.1f} ms for each pool")
    shared = {row: row.shared(assumed, scale) for row in WORKLOADS}
    reaches = {row.name: reach(row, overhead, shared[row], assumed) for row in WORKLOADS}

    def window(workload: Workload, gpus: int, spot_per_h: float = NODES.spot_per_h, **pinned: int) -> Steady:
        with_spot = replace(assumed, nodes=replace(NODES, spot_per_h=spot_per_h))
        found = steady(workload, gpus, overhead, shared[workload], with_spot, batches=arguments.batches, **pinned)
        print(
            f"{found.workload:<24} {gpus:>5} {found.shards:>6} {found.encoders:>8} {spot_per_h:>6} "
            f"{found.videos_per_hour:>8} {found.utilisation:>6.1%} {found.lost_rows:>6.2%} "
            f"{found.limit:<7} {REMEDIES[found.limit]}",
            flush=True,
        )
        return found

    windows = []
    heads = f"{'GPUs':>5} {'shards':>6} {'encoders':>8} {'spot/h':>6} {'videos/h':>8} {'use':>6} {'again':>6}"
    print(f"\n{'workload':<24} {heads} limit   helps")
    for workload, gpus in product(WORKLOADS, arguments.gpus):
        windows.append(found := window(workload, gpus))
        if found.limit == "encode":
            windows.append(window(workload, gpus, encoders=2 * found.encoders))
        if found.limit == "driver":
            shards = ceil(gpus / (FILL * reaches[workload.name]["driver"]))
            windows.append(window(workload, gpus, shards=shards, encoders=found.encoders))
    spot = {rate: window(WORKLOADS[-1], SPOT_GPUS, rate) for rate in SPOT_PER_H}
    print("\nGPUs at which each becomes the limit, of every shard (storage: of all):")
    print(*(f"{name:<24} {row}" for name, row in reaches.items()), sep="\n")
    jobs = [job(row, prompts, scale, assumed) for row in windows for prompts in arguments.prompts]
    print("", *map(_line, [list(jobs[0]), *(row.values() for row in jobs)]), sep="\n")
    figures = {
        "assumptions": asdict(assumed),
        "workloads": [asdict(row) for row in WORKLOADS],
        "overhead": asdict(overhead),
        "calibration": [asdict(row) | {"difference": round(row.difference, 4)} for row in compared],
        "steady": [asdict(row) | {"limit": row.limit, "remedy": REMEDIES[row.limit]} for row in windows],
        "reach_gpus": reaches,
        "spot": [{"spot_per_h": rate} | asdict(row) for rate, row in spot.items()],
        "jobs": jobs,
    }
    path = write_result("cluster_simulation", figures, sys.argv[1:])
    draw(windows, PICTURE)
    print(f"wrote {path.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


def _line(values: Iterable[object]) -> str:
    return "".join(f"{value:>{24 if column == 0 else 16}}" for column, value in enumerate(values))


def _figures(name: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["figures"]
    return figures


if __name__ == "__main__":
    main()
