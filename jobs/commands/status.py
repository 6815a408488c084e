"""How far the jobs of an output are (`pyramid-render status OUT`); works wherever OUT can be read."""

import sys
from datetime import UTC, datetime
from typing import Any

from jobs.settings import EXIT_WRONG_JOB, StatusSettings
from jobs.summary import SUMMARY_COLUMNS, failures, num_failed
from pipeline.ledger import job_records, ledger
from pipeline.storage.storage import Storage
from pyramid_flow.errors import PyramidFlowError

SHOWN_RUNS = 5


def run(settings: StatusSettings) -> int:
    """Print the state of the ledger and of the latest runs; returns the exit code."""
    try:
        storage = Storage(settings.output)
        runs, view = job_records.read_runs(storage), ledger.read(storage, SUMMARY_COLUMNS)
    except PyramidFlowError as error:
        print(f"pyramid-render status: {error}", file=sys.stderr)
        return EXIT_WRONG_JOB
    if not runs:
        print(f"pyramid-render status: no job has written to {storage.uri}", file=sys.stderr)
        return EXIT_WRONG_JOB
    print(f"{len(view)} rows in the ledger, {num_failed(view)} failed")
    print(*failures(view), *(run_text(run, datetime.now(UTC)) for run in runs[-SHOWN_RUNS:]), sep="\n")
    return 0


def run_text(run: dict[str, Any], now: datetime) -> str:
    """Describe a run in one line: state, rows, rate, time left, age of its last sign of life."""
    rows, at = run["rows"], datetime.fromisoformat(run["at"])
    minutes = max((at - datetime.fromisoformat(run["started_at"])).total_seconds() / 60, 1e-9)
    text = f"run {run['run']} {run['state']}: {rows['done']} of {rows['total']} rows, {rows['failed']} failed"
    if rows["done"]:
        text += f", {rows['done'] / minutes:.1f} rows per minute"
    if run["state"] != "running":
        return text
    if rows["done"]:
        text += f", about {minutes * (rows['total'] - rows['done']) / rows['done']:.0f} min left"
    return f"{text}, last sign of life {(now - at).total_seconds():.0f} s ago"
