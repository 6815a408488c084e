"""Small runs as they were measured and as they are simulated, and what the driver takes for a batch."""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import simpy

from benchmarks.pipeline_utilisation import planned, simulated_works
from benchmarks.simulated import Work, fused_plan, staged_plan
from benchmarks.simulated_cluster import Farm, Overhead
from pipeline.batch.planner import Plan

TOLERANCE = 0.1


@dataclass(frozen=True)
class Comparison:
    """A figure of a small run, as it was measured and as it is simulated; use: "calibration" or "check"."""

    run: str
    use: str
    figure: str
    measured: float
    simulated: float

    @property
    def difference(self) -> float:
        """Relative to what was measured."""
        return self.simulated / self.measured - 1


def overhead_of(runs: Sequence[Mapping[str, Any]]) -> Overhead:
    """Return what a batch takes of the driver, from the longest runs of both layouts, with one pool and with three."""
    longest = max(run["rows"] for run in runs)

    def batch_s(layout: str) -> float:
        chosen = [run for run in runs if run["rows"] == longest and run["layout"] == layout]
        seconds: float = sum(run["ms_per_row"] * run["batch_size"] for run in chosen) / len(chosen) / 1000
        return seconds

    pool_s = (batch_s("staged") - batch_s("fused")) / 2
    return Overhead(batch_s("fused") - pool_s, pool_s)


def small_run(plan: Plan, works: Mapping[str, Work], num_rows: int, overhead: Overhead) -> Farm:
    """Simulate a whole job on one machine."""
    env = simpy.Environment()
    farm = Farm(env, plan, works, [plan.batch_size] * (num_rows // plan.batch_size), overhead)
    env.run(farm.feed)
    return farm


def calibration(scale: Mapping[str, Any], stages: Mapping[str, Any]) -> list[Comparison]:
    """Compare all small runs with their simulation; scale, stages: figures of scale and pipeline_utilisation."""
    overhead, found = overhead_of(scale["pipeline"]), []
    longest = max(run["rows"] for run in scale["pipeline"])
    for run in scale["pipeline"]:
        plan = (fused_plan if run["layout"] == "fused" else staged_plan)(1, run["batch_size"])
        finished = small_run(plan, {}, run["rows"], overhead).finished
        rate = sum(rows for _, rows in finished[1:]) / (finished[-1][0] - finished[0][0])
        name = f"{run['rows']} rows, {run['layout']}, batches of {run['batch_size']}"
        use = "calibration" if run["rows"] == longest else "check"
        found.append(Comparison(name, use, "rows per second", run["ceiling_rows_per_s"], rate))
    for run in scale["weak_scaling"]:
        farm = small_run(staged_plan(run["workers"], 1), {"sample": Work(scale["sample_s"])}, run["rows"], overhead)
        rate = run["rows"] / _span_s(farm, "sample")
        found.append(Comparison(f"{run['workers']} samplers", "check", "rows per second", run["rows_per_s"], rate))
    settings, run = Namespace(**stages["settings"]), stages["utilisation"]
    farm = small_run(staged_plan(run["samplers"], 1), simulated_works(settings), run["rows"], overhead)
    busy_s = sum(call.ended - call.began for call in farm.calls if call.stage == "sample")
    share = busy_s / _span_s(farm, "sample") / run["samplers"]
    found.append(Comparison(f"{run['samplers']} busy samplers", "check", "share", run["busy_share"], share))
    for run in stages["layouts"]:
        works = simulated_works(settings, host=run["host_s_per_row"] > 0)
        farm = small_run(planned(run["layout"], works, settings.gpus), works, run["rows"], overhead)
        name = f"{settings.gpus} GPUs, {run['layout']}, {run['host_s_per_row']} s beside them"
        rate = 3600 * run["rows"] / _span_s(farm)
        found.append(Comparison(name, "check", "videos per hour", run["videos_per_hour"], rate))
    return found


def _span_s(farm: Farm, stage: str | None = None) -> float:
    calls = [call for call in farm.calls if stage in (None, call.stage)]
    return max(call.ended for call in calls) - min(call.began for call in calls)


def check(scale: Mapping[str, Any], stages: Mapping[str, Any]) -> list[Comparison]:
    """Print measured and simulated small runs; ends the program if any differs by too much."""
    found = calibration(scale, stages)
    print(f"{'small run':<40} {'used for':<11} {'measured':>9} {'simulated':>9} {'difference':>10}")
    for row in found:
        figures = f"{row.measured:>9.4g} {row.simulated:>9.4g} {row.difference:>+10.1%}"
        print(f"{row.run:<40} {row.use:<11} {figures}  {row.figure}")
    if worst := [row.run for row in found if abs(row.difference) > TOLERANCE]:
        sys.exit(f"the simulation differs by more than {TOLERANCE:.0%} from: {'; '.join(worst)}")
    return found
