"""What an output records beside the ledger: the settings of its job (job.json) and the state of each run (runs/)."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline.ledger.ledger import FLUSH_SECONDS, LedgerError
from pipeline.storage.redaction import redacted
from pipeline.storage.storage import Storage

RUNS = "runs"
JOB_FILE = "job.json"


def new_run_id() -> str:
    """Return an id that sorts by time: 20260131T235959-1a2b3c."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def claim(storage: Storage, record: Mapping[str, Any], pixel_settings: Mapping[str, Any]) -> None:
    """Write job.json, or check that the OUTPUT's own agrees in everything that changes pixels; raises LedgerError."""
    if not check_claim(storage, pixel_settings):
        write_job_record(storage, {**record, "pixels": dict(pixel_settings)})


def check_claim(storage: Storage, pixel_settings: Mapping[str, Any]) -> bool:
    """Return whether there is a job.json; raises LedgerError if it differs in what changes pixels."""
    claimed = job_record(storage)
    if claimed is None:
        return False
    earlier = claimed["pixels"]
    for name in {**pixel_settings, **earlier}:
        before, now = earlier.get(name), pixel_settings.get(name)
        if before != now:
            raise LedgerError(
                f"{storage.url(JOB_FILE)} was rendered with {name} {before!r}, this job has {now!r}: "
                "use another --output"
            )
    return True


def job_record(storage: Storage) -> dict[str, Any] | None:
    """Return job.json, None if there is none; raises LedgerError if it is damaged."""
    if not storage.exists(JOB_FILE):
        return None
    try:
        record: dict[str, Any] = json.loads(storage.get(JOB_FILE))
        return {**record, "pixels": dict(record["pixels"])}
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{storage.url(JOB_FILE)} is damaged: use another --output") from error


def write_job_record(storage: Storage, record: Mapping[str, Any]) -> None:
    """Write job.json."""
    storage.put(JOB_FILE, json.dumps(record, indent=2, default=str).encode())


@dataclass
class Heartbeat:
    """The state of a run in runs/<run>.json, rewritten every 30 s: what `pyramid-render status` reads.

    total: rows the run set out to render; done, failed: how many of them have arrived.
    """

    storage: Storage
    run: str
    total: int
    seconds: float = FLUSH_SECONDS
    done: int = 0
    failed: int = 0
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    _written_at: float = field(default_factory=time.monotonic)

    def count(self, done: int, failed: int) -> None:
        """Count rows that have arrived, and write the state if it is due."""
        self.done += done
        self.failed += failed
        if time.monotonic() - self._written_at >= self.seconds:
            self.write("running")

    def write(self, state: str, error: str | None = None) -> None:
        """Write the state: running, finished, interrupted or broken (with its traceback)."""
        self._written_at = time.monotonic()
        record = {
            "run": self.run,
            "state": state,
            "started_at": self.started_at.isoformat(),
            "at": datetime.now(UTC).isoformat(),
            "rows": {"total": self.total, "done": self.done, "failed": self.failed},
            "error": error and redacted(error),
        }
        self.storage.put(f"{RUNS}/{self.run}.json", json.dumps(record, indent=2).encode())


def read_runs(storage: Storage) -> list[dict[str, Any]]:
    """Return the states of all runs, the earliest first; raises LedgerError if one is damaged."""
    names = [name for name in storage.list(RUNS) if name.endswith(".json")]
    return [read_run(storage, name) for name in names]


def read_run(storage: Storage, name: str) -> dict[str, Any]:
    """Return the state of one run, given the name of its record; raises LedgerError if it is damaged."""
    try:
        record: dict[str, Any] = json.loads(storage.get(name))
        return {key: record[key] for key in ("run", "state", "started_at", "at", "rows", "error")}
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{storage.url(name)} is damaged or of another version") from error
