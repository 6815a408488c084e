"""What a render says before and after: the plan, and the closing summary."""

from collections import Counter

import pyarrow as pa

from pipeline.job import RenderJob
from pipeline.worklist import Fate

STAGES = ("encode", "sample", "decode", "publish")
SHOWN_REASONS = 5


def plan_text(job: RenderJob) -> str:
    """Say what would be done: rows, workers."""
    pending = job.pending()
    fates = Counter(fate for work in pending.parts for fate in work.fates)
    rows = (
        f"{fates[Fate.RENDER]} rows to render, {fates[Fate.SKIP]} in the ledger already, "
        f"{fates[Fate.DUPLICATE]} equal to an earlier row, {fates[Fate.CONFLICT]} with a disputed id"
    )
    return f"{rows}\n{job.plan.describe()}\nup to {job.plan.batch_size} rows of one shape in a batch"


def failures(view: pa.Table) -> list[str]:
    """Return a line for each of the commonest reasons of failed rows."""
    pairs = zip(view["status"].to_pylist(), view["error_message"].to_pylist(), strict=True)
    reasons = Counter(reason for status, reason in pairs if status == "failed")
    return [f"  failed, {count} x: {reason}" for reason, count in reasons.most_common(SHOWN_REASONS)]


def summary_text(view: pa.Table, job: RenderJob, gallery: str, *, rendered: int, seconds: float) -> str:
    """Say what was done, what failed and why, where the time went, and where to look."""
    rows = view.select(["status", "seconds", "run"]).to_pylist()
    succeeded = [row for row in rows if row["status"] == "succeeded"]
    lines = [f"{len(succeeded)} of {len(rows)} rows succeeded; this run took {rendered} rows in {seconds:.1f} s"]
    lines += failures(view)
    mine = [dict(row["seconds"]) for row in succeeded if row["run"] == job.run and row["seconds"]]
    if mine:
        means = {stage: sum(row.get(stage, 0) for row in mine) / len(mine) for stage in STAGES}
        lines.append("  seconds per video: " + ", ".join(f"{stage} {mean:.2f}" for stage, mean in means.items()))
        shares = {spec.name: spec.gpus for spec in job.plan.stages if spec.gpus}
        if shares:
            lines.append(f"  GPU-seconds per video: {sum(means[stage] * gpus for stage, gpus in shares.items()):.2f}")
    storage = job.storage
    lines += [
        f"  videos   {storage.url('videos')}",
        f"  ledger   {storage.url('metadata')}",
        f"  gallery  {gallery}",
    ]
    return "\n".join(lines)
