"""Does the pipeline keep its slowest stage busy, and does it pay to let stages overlap instead of taking turns?

Simulated stages, real everything else: one Parquet file of one row group and three shapes goes through a RenderJob on a
Ray cluster of this machine. All workers are built before any begins; how long that took is told as start-up.

utilisation: two workers that sample, and beside it decode, after one encoder; none on a GPU. Busy is the sum of the
samplers' calls over (the time from the first call to the end of the last one x samplers); the goal is 97 %.

layouts: GPUs that only one stage can use at a time: work on a GPU holds a lock in slices, the rest of a row's time
(ffmpeg, uploads) does not. Compared are the planner's two layouts: stages that overlap, and one worker per GPU that
does everything in turn. No layout is faster than the bound, GPUs / (seconds that a row takes on one); the goal for
overlap is 97 % of it. Rates are those from the first beginning to the last end, which includes that the pipeline fills
and empties: 1 to 2 % of 120 rows.
With host time, one worker for everything leaves its GPU idle while it encodes and uploads; without any, it loses
nothing. So the planner lets stages overlap on GPUs, where host time is never zero and where a worker for everything
would also have to hold the text encoders; and takes one pool without GPUs, where all stages share the same cores,
"device" and host time are one, and fewer processes are to be started. "wait" is how long a row waits for the GPU while
other stages hold it: it costs latency, and speed only if it leaves the samplers without work.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, write_result
from benchmarks.simulated import (
    STAGES,
    Event,
    Work,
    read_events,
    simulated,
    simulated_job,
    span_s,
    staged_plan,
    write_table,
)
from pipeline.batch.costs import Costs
from pipeline.batch.planner import Plan, PlanRequest, Resources, make_plan
from pipeline.batch.runner import session
from pipeline.stages import Layout

GOAL = 0.97
SAMPLERS = 2
LAYOUTS: tuple[Layout, ...] = ("staged", "fused")
HEADER = (
    f"{'host s per row':>14} {'layout':>7} {'videos/h':>9} {'bound':>6} {'of bound':>9} {'start-up s':>11}  "
    "wait s per row"
)


@dataclass(frozen=True)
class Run:
    """What a job left behind: its calls, and the seconds before the first and after the last one."""

    events: list[Event]
    start_up_s: float
    closing_s: float


def run(table: Path, folder: Path, plan: Plan, works: Mapping[str, Work], slice_s: float) -> Run:
    """Render a table with simulated stages."""
    plan = simulated(plan, works, folder / "events", slice_s)
    job = simulated_job(table, folder / "output", plan)
    started = time.monotonic()
    job.execute(lambda batch: None)
    ended = time.monotonic()
    events = read_events(folder / "events")
    start_up_s, closing_s = events[0].began - started, ended - max(event.ended for event in events)
    return Run(events, round(start_up_s, 2), round(closing_s, 2))


def utilisation(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure how busy the samplers are."""
    works = simulated_works(arguments)
    table = write_table(folder / "utilisation.parquet", arguments.rows)
    found = run(table, folder / "utilisation", staged_plan(SAMPLERS, 1), works, arguments.slice_s)
    calls = [event for event in found.events if event.stage == "sample"]
    busy = sum(event.ended - event.began for event in calls) / (span_s(calls) * SAMPLERS)
    print(f"\n{'rows':>5} {'samplers':>9} {'busy':>7} {'span s':>7} {'start-up s':>11} {'closing s':>10}")
    print(
        f"{arguments.rows:>5} {SAMPLERS:>9} {busy:>7.1%} {span_s(calls):>7.1f} {found.start_up_s:>11} "
        f"{found.closing_s:>10}"
    )
    print(f"the goal is {GOAL:.0%}: {'met' if busy >= GOAL else 'MISSED'}", flush=True)
    return {
        "rows": arguments.rows,
        "samplers": SAMPLERS,
        "busy_share": round(busy, 4),
        "goal_share": GOAL,
        "span_s": round(span_s(calls), 2),
        "start_up_s": found.start_up_s,
        "closing_s": found.closing_s,
    }


def simulated_works(arguments: argparse.Namespace, *, host: bool = True) -> dict[str, Work]:
    """Return what a row takes in each stage; host: whether anything is done beside the GPU."""
    return {
        "encode": Work(arguments.encode_s, passed_mib=arguments.embeddings_mib),
        "sample": Work(arguments.sample_s, passed_mib=arguments.latents_mib),
        "decode": Work(arguments.decode_s, arguments.decode_host_s * host, arguments.video_mib),
        "publish": Work(0.0, arguments.publish_host_s * host),
    }


def layouts(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Compare stages that overlap with one worker for all, with and without host time."""
    table = write_table(folder / "layouts.parquet", arguments.layout_rows)
    print(f"\n{HEADER}", flush=True)
    rows = []
    for host in (True, False):
        works = simulated_works(arguments, host=host)
        for layout in LAYOUTS:
            plan = planned(layout, works, arguments.gpus)
            found = run(table, folder / f"{layout}-{host}", plan, works, arguments.slice_s)
            row = compared(layout, plan, works, found, arguments.gpus)
            print(as_line(row), flush=True)
            rows.append(row)
    met = min(row["share_of_bound"] for row in rows if row["layout"] == "staged") >= GOAL
    print(f"the goal is {GOAL:.0%} of the bound for the staged layout: {'met' if met else 'MISSED'}")
    return rows


def planned(layout: Layout, works: Mapping[str, Work], gpus: int) -> Plan:
    """Return what the planner makes of a job that costs what the works say."""
    costs = Costs({name: work.device_s + work.host_s for name, work in works.items()}, measured=True)
    job = PlanRequest("model", None, "cuda", "bfloat16", "output", "images", 1, None, 1, layout=layout, costs=costs)
    return make_plan(job, Resources(cpus=8, gpus=gpus))


def compared(layout: Layout, plan: Plan, works: Mapping[str, Work], found: Run, gpus: int) -> dict[str, Any]:
    """Return the figures of one run."""
    num_rows = sum(event.rows for event in found.events if event.stage == "publish")
    bound = 3600 * gpus / sum(work.device_s for work in works.values())
    rate = 3600 * num_rows / span_s(found.events)
    waits = {
        name: round(sum(event.waited_s for event in found.events if event.stage == name) / num_rows, 3)
        for name in STAGES
        if works[name].device_s
    }
    return {
        "layout": layout,
        "host_s_per_row": sum(work.host_s for work in works.values()),
        "device_s_per_row": sum(work.device_s for work in works.values()),
        "workers": {pool.name: pool.workers for pool in plan.pools},
        "rows": num_rows,
        "bound_videos_per_hour": round(bound),
        "videos_per_hour": round(rate),
        "planner_expects_videos_per_hour": round(plan.rows_per_hour or 0),
        "share_of_bound": round(rate / bound, 4),
        "gpu_wait_s_per_row": waits,
        "start_up_s": found.start_up_s,
        "closing_s": found.closing_s,
    }


def as_line(row: Mapping[str, Any]) -> str:
    waits = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["gpu_wait_s_per_row"].items())
    return (
        f"{row['host_s_per_row']:>14} {row['layout']:>7} {row['videos_per_hour']:>9} {row['bound_videos_per_hour']:>6} "
        f"{row['share_of_bound']:>9.1%} {row['start_up_s']:>11}  {waits}"
    )


PARTS = {"utilisation": utilisation, "layouts": layouts}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    parser.add_argument("--rows", type=int, default=60, help="rows for utilisation (%(default)s)")
    parser.add_argument("--layout-rows", type=int, default=120, help="rows for each of the layouts (%(default)s)")
    parser.add_argument("--gpus", type=int, default=2, help="simulated GPUs (%(default)s)")
    parser.add_argument("--encode-s", type=float, default=0.1, help="GPU seconds of encoding a row (%(default)s)")
    parser.add_argument("--sample-s", type=float, default=1.0, help="GPU seconds of sampling a row (%(default)s)")
    parser.add_argument("--decode-s", type=float, default=0.25, help="GPU seconds of decoding a row (%(default)s)")
    parser.add_argument("--decode-host-s", type=float, default=0.25, help="seconds of ffmpeg per row (%(default)s)")
    parser.add_argument("--publish-host-s", type=float, default=0.25, help="seconds of upload per row (%(default)s)")
    parser.add_argument("--slice-s", type=float, default=0.02, help="seconds a process holds a GPU (%(default)s)")
    parser.add_argument("--embeddings-mib", type=float, default=1.0, help="from encode to sample (%(default)s)")
    parser.add_argument("--latents-mib", type=float, default=4.0, help="from sample to decode (%(default)s)")
    parser.add_argument("--video-mib", type=float, default=2.0, help="from decode to publish (%(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    settings = {name: value for name, value in vars(arguments).items() if name != "parts"}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    figures: dict[str, object] = {"settings": settings}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, session(None, Resources(cpus=8, gpus=arguments.gpus)):
        figures["cluster_start_s"] = round(time.monotonic() - started, 2)
        print(f"the cluster took {figures['cluster_start_s']} s to start", flush=True)
        for name in arguments.parts:
            figures[name] = PARTS[name](arguments, Path(folder))
    path = write_result("pipeline_utilisation", figures, sys.argv[1:])
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
