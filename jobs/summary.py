"""What a render says before and after: the plan with its expected speed, and the closing summary."""

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.stages import STAGES

if TYPE_CHECKING:  # `status` shows failures only, and loads no more than the ledger for it
    from pipeline.batch.costs import Costs
    from pipeline.batch.job import RenderJob
    from pipeline.batch.planner import Plan

SUMMARY_COLUMNS = ("id", "status", "error_message", "flags", "rerolls")
SHOWN_REASONS = 5


def plan_text(job: "RenderJob", gpu_hour_price: float | None) -> str:
    """Say what would be done: rows, workers, expected speed and cost."""
    from pipeline.tables.worklist import RowStatus

    pending = job.pending()
    fates = pending.num_rows_by_status
    rows = (
        f"{fates[RowStatus.RENDER]} rows to render, {fates[RowStatus.SKIP]} in the ledger already, "
        f"{fates[RowStatus.DUPLICATE]} equal to an earlier row, {fates[RowStatus.CONFLICT]} with a disputed id"
    )
    if fates[RowStatus.ELSEWHERE]:
        rows += f", {fates[RowStatus.ELSEWHERE]} outside of this shard or limit"
    if again := job.num_due - pending.num_rows:
        rows += f", {again} flagged ones to render again"
    lines = [rows, job.plan.describe(), f"up to {job.plan.batch_size} rows of one shape in a batch"]
    return "\n".join(lines + expectation(job.plan, pending.num_rows, gpu_hour_price))


def expectation(plan: "Plan", num_rows: int, gpu_hour_price: float | None) -> list[str]:
    """Say how fast a plan is expected to be, what the rows will take, and how that is known."""
    if plan.costs is None or not plan.rows_per_hour:
        return []
    hours = num_rows / plan.rows_per_hour
    text = f"expected: {plan.rows_per_hour:.1f} videos per hour, {hours:.2f} hours for {num_rows} rows"
    if plan.num_gpus:
        text += f", {hours * plan.num_gpus:.2f} GPU-hours"
        if gpu_hour_price is not None:
            text += f", cost {hours * plan.num_gpus * gpu_hour_price:.2f}"
    source = "measured by earlier runs" if plan.costs.measured else "assumed from FLOPs; --calibrate measures them"
    return [text, f"seconds per video: {stage_seconds(plan.costs)} ({source})"]


def stage_seconds(costs: "Costs") -> str:
    """Return the seconds per row of each stage in one line."""
    return ", ".join(f"{stage} {costs.seconds[stage]:.3g}" for stage in STAGES if stage in costs.seconds)


def num_failed(view: pa.Table) -> int:
    """Return the number of failed rows."""
    return pc.sum(pc.equal(view["status"], "failed")).as_py() or 0


def failures(view: pa.Table) -> list[str]:
    """Return a line for each of the commonest reasons of failed rows."""
    reasons = pc.value_counts(view.filter(pc.equal(view["status"], "failed"))["error_message"]).to_pylist()
    common = sorted(reasons, key=lambda reason: -reason["counts"])[:SHOWN_REASONS]
    return [f"  failed, {reason['counts']} x: {reason['values']}" for reason in common]


def flagged(view: pa.Table) -> list[str]:
    """Return a line that says how many rows are flagged, by flag, and one for those that were rendered again."""
    lines = []
    counts = pc.value_counts(pc.list_flatten(view["flags"])).to_pylist()
    if counts:
        num_flagged = pc.sum(pc.greater(pc.list_value_length(view["flags"]), 0)).as_py()
        common = sorted(counts, key=lambda count: -count["counts"])
        by_flag = ", ".join(f"{count['counts']} {count['values']}" for count in common)
        lines.append(f"  flagged, {num_flagged} rows: {by_flag}")
    if rerolled := pc.sum(pc.greater(view["rerolls"], 0)).as_py():
        lines.append(f"  rendered again with another seed: {rerolled} rows")
    return lines


def summary_text(view: pa.Table, job: "RenderJob", *, rendered: int, seconds: float) -> str:
    """Say what was done, what failed and why, and where the time went."""
    succeeded = len(view) - num_failed(view)
    lines = [f"{succeeded} of {len(view)} rows succeeded; this run took {rendered} rows in {seconds:.1f} s"]
    return "\n".join(lines + failures(view) + flagged(view) + _measured(job))


def _measured(job: "RenderJob") -> list[str]:
    """Say what the rows of this run cost, and what a plan by these costs would give."""
    costs, fill = job.measured.costs(), job.measured.fill(job.plan.batch_size)
    if costs is None or fill is None:
        return []
    lines = [f"  seconds per video: {stage_seconds(costs)}; batches {100 * fill:.0f} % full"]
    if job.plan.num_gpus:
        gpu_seconds = job.plan.device_seconds(costs) * job.plan.gpus_per_clip
        lines.append(f"  GPU-seconds per video: {gpu_seconds:.3g}")
    return [*lines, f"  planned by these costs: {_advice(job, costs)}"]


def _advice(job: "RenderJob", costs: "Costs") -> str:
    from pipeline.batch.planner import PlanError

    try:
        better = job.plan_for(costs)
    except PlanError as error:
        return str(error)
    sizes = {pool.name: pool.workers for pool in better.pools}
    same = sizes == {pool.name: pool.workers for pool in job.plan.pools}
    workers = "the same workers" if same else ", ".join(f"{count} x {name}" for name, count in sizes.items())
    return f"{workers}, {better.rows_per_hour or 0:.1f} videos per hour"
