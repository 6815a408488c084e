"""How far does it go: rows that the driver plans, rows per second that the pipeline moves, workers that it feeds.

Every measurement runs in a fresh process on data that was written before. Parts are chosen by their flags; without any
all are measured.

--rows: no stages, only what the driver does with a job's input: scan a table with three shapes, read a ledger in parts
of 1000 rows that holds all of them, half of them failed (which are to be rendered again), take the done ones out, split
the rest, list the units of work, and read the ledger's view of the input as at the end. For 1 million rows the goal is
60 s in total and 1 GiB of resident memory at the peak, imports included. Then what the read tasks do: put all rows into
batches, and pack those; the goal is that 90 % of the places in batches hold a row, also with many small files.

--pipeline: a whole job on a Ray cluster of this machine, with stages that do nothing. Milliseconds per row are those
between the first and the last finished batch; their inverse is the most that the pipeline can move, whatever GPUs there
are. Driver memory is that of the driver's process, its growth a straight line through all but the first fifth.

--weak-scaling: sampling sleeps, and there are as many rows per worker for any number of workers. Rows per second, from
the first beginning to the last end of sampling, against as many times those of the fewest workers; the goal is 95 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.report import ROOT, write_result
from benchmarks.simulated import (
    RULES,
    Work,
    fused_plan,
    read_events,
    row_id,
    simulated,
    simulated_job,
    span_s,
    staged_plan,
    write_table,
)
from pipeline.batch.planner import Resources
from pipeline.batch.runner import session
from pipeline.ledger import ledger
from pipeline.rows import LEDGER_SCHEMA, Batch, pack
from pipeline.storage.storage import Storage
from pipeline.tables.batching import read_batches, read_units
from pipeline.tables.readers import list_parts
from pipeline.tables.worklist import PartWork, RowStatus, scan

ROWS = [10_000, 100_000, 1_000_000]
PIPELINE_ROWS = [1000, 10_000]
WORKERS = [1, 4, 16]
LEDGER_PART_ROWS = 1000
SMALL_FILES, SMALL_FILE_ROWS = 1000, 30
SHARDS = 4
GOAL_ROWS, GOAL_S, GOAL_MIB = 1_000_000, 60, 1024
GOAL_FILL = 0.9
GOAL_EFFICIENCY = 0.95


@dataclass
class Steps:
    """Seconds of each step of a measurement, and the peak of resident memory after it."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)
        self.peak_mib[name] = memory_mib("VmHWM")


def memory_mib(which: str) -> float:
    """Return this process's resident memory: now (VmRSS), or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{which}:")), 1)


def plan_rows(table: str, output: str) -> dict[str, Any]:
    """Do what the driver does with an input and a ledger."""
    steps, imports_mib, storage = Steps(), memory_mib("VmHWM"), Storage(output)
    with steps("list"):
        parts = list_parts([table])
    with steps("scan"):
        worklist = scan(parts, RULES)
    with steps("ledger"):
        view = ledger.read(storage, ["id", "status", "run"])
        done = view.filter(pc.equal(view["status"], "succeeded"))["id"].combine_chunks()
    with steps("anti_join"):
        remaining = worklist.remaining(done)
    with steps("shard"):
        shard = remaining.shard(1, SHARDS)
    with steps("units"):
        units = list(read_units(remaining.part_works()))
    with steps("view"):
        ledger.read(storage, ["id", "status", "error_message"], worklist.expected_ids())
    return {
        "rows": worklist.num_rows,
        "rows_remaining": remaining.num_rows,
        "rows_of_shard": shard.num_rows,
        "units": len(units),
        "total_s": round(sum(steps.seconds.values()), 2),
        "seconds": steps.seconds,
        "imports_mib": imports_mib,
        "peak_mib": memory_mib("VmHWM"),
        "peak_mib_after": steps.peak_mib,
    }


def batch_rows(table: str, batch_size: int) -> dict[str, Any]:
    """Do what the read tasks do, one after another."""
    works = [PartWork(part, bytes([RowStatus.RENDER]) * part.num_rows) for part in list_parts([table])]
    rows, batches, packing_s, started = 0, 0, 0.0, time.perf_counter()
    units = list(read_units(works))
    for unit in units:
        for batch in read_batches(unit, RULES, batch_size):
            rows, batches, before = rows + len(batch), batches + 1, time.perf_counter()
            pack(batch)
            packing_s += time.perf_counter() - before
    seconds = time.perf_counter() - started
    return {
        "rows": rows,
        "files": len({work.part.url for work in works}),
        "units": len(units),
        "batch_size": batch_size,
        "batches": batches,
        "fill": round(rows / (batches * batch_size), 4),
        "batching_rows_per_s": round(rows / (seconds - packing_s)),
        "with_packing_rows_per_s": round(rows / seconds),
        "peak_mib": memory_mib("VmHWM"),
    }


@dataclass
class Progress:
    """When batches arrived at the driver, and how many rows, MiB and CPU seconds it had come to by then."""

    samples: list[tuple[float, int, float, float]] = field(default_factory=list)

    def take(self, batch: Batch | None) -> None:
        """Note a finished batch."""
        if batch is not None:
            rows = len(batch) + (self.samples[-1][1] if self.samples else 0)
            self.samples.append((time.monotonic(), rows, memory_mib("VmRSS"), time.process_time()))

    def figures(self) -> dict[str, Any]:
        """Return milliseconds per row, and how the driver's memory grows."""
        moments, rows, mib, cpu_s = np.array(self.samples).T
        moved = rows[-1] - rows[0]
        settled = len(rows) // 5
        slope_mib, _ = np.polyfit(rows[settled:], mib[settled:], 1)
        ms_per_row = 1000 * (moments[-1] - moments[0]) / moved
        return {
            "ms_per_row": round(ms_per_row, 2),
            "ceiling_rows_per_s": round(1000 / ms_per_row, 1),
            "driver_cpu_ms_per_row": round(1000 * (cpu_s[-1] - cpu_s[0]) / moved, 2),
            "driver_mib_first": mib[0],
            "driver_mib_last": mib[-1],
            "driver_growth_kib_per_1000_rows": round(1024 * 1000 * slope_mib, 1),
            "driver_mib_after_rows": [[int(rows[n]), mib[n]] for n in range(0, len(rows), max(1, len(rows) // 20))],
        }


def move_rows(table: str, folder: str, layout: str, batch_size: int) -> dict[str, Any]:
    """Run a job whose stages do nothing."""
    plan = fused_plan(1, batch_size) if layout == "fused" else staged_plan(1, batch_size)
    job = simulated_job(Path(table), Path(folder, "output"), simulated(plan, {}, Path(folder, "events")))
    progress = Progress()
    started = time.monotonic()
    with session(None, Resources(cpus=8, gpus=0)):
        job.execute(progress.take)
    figures = {"rows": job.worklist.num_rows, "layout": layout, "batch_size": batch_size, **progress.figures()}
    return figures | {"start_up_s": round(progress.samples[0][0] - started, 1)}


def feed_workers(table: str, folder: str, workers: int, sample_s: float) -> dict[str, Any]:
    """Run a job of which only sampling takes time."""
    plan = simulated(staged_plan(workers, 1), {"sample": Work(sample_s)}, Path(folder, "events"))
    job = simulated_job(Path(table), Path(folder, "output"), plan)
    started = time.monotonic()
    with session(None, Resources(cpus=workers + 4, gpus=0)):
        job.execute(lambda batch: None)
    calls = read_events(Path(folder, "events"), "sample")
    return {
        "workers": workers,
        "rows": len(calls),
        "span_s": round(span_s(calls), 2),
        "rows_per_s": round(len(calls) / span_s(calls), 4),
        "busy_share": round(sum(call.ended - call.began for call in calls) / (workers * span_s(calls)), 4),
        "start_up_s": round(calls[0].began - started, 1),
    }


CALLS = {call.__name__: call for call in (plan_rows, batch_rows, move_rows, feed_workers)}


def in_fresh_process(call: str, **arguments: object) -> dict[str, Any]:
    """Run one of the measurements above in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--job", json.dumps([call, arguments])]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_ledger(output: Path, num_rows: int) -> None:
    """Write the ledger of a table as an earlier run left it: every second row failed."""
    folder = output / ledger.PARTS
    folder.mkdir(parents=True)
    numbers = range(LEDGER_PART_ROWS)
    one = {"run": "20260101T000000-000000", "model": "a model", "model_fingerprint": "0" * 64, "software_version": "1"}
    one |= {"prompt": "A lighthouse on a cliff above a stormy sea, seen from a boat", "seconds": [("sample", 1.0)]}
    one |= {"height": 384, "width": 640, "num_frames": 121, "seed": 1, "device": "cuda", "dtype": "bfloat16"}
    states = [{"status": "succeeded"}, {"status": "failed", "error_type": "OSError", "error_message": "no space left"}]
    hashes = [np.random.default_rng(number).bytes(32).hex() for number in numbers]
    records = [one | states[n % 2] | {"id": "", "sha256": hashes[n], "uri": f"videos/{hashes[n]}.mp4"} for n in numbers]
    part = pa.Table.from_pylist(records, LEDGER_SCHEMA)
    for start in range(0, num_rows, LEDGER_PART_ROWS):
        stop = min(start + LEDGER_PART_ROWS, num_rows)
        ids = pa.array([row_id(number) for number in range(start, stop)])
        rows = part.slice(0, stop - start).set_column(0, LEDGER_SCHEMA.field("id"), ids)
        pq.write_table(rows, folder / f"part-{one['run']}-{start // LEDGER_PART_ROWS:06d}.parquet")


def measure_rows(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure what is done with rows before and after they are rendered."""
    found: dict[str, list[dict[str, Any]]] = {"driver": [], "read_tasks": []}
    steps = ("list", "scan", "ledger", "anti_join", "shard", "units", "view")
    names = " ".join(f"{name} s".rjust(11) for name in steps)
    print(f"\n{'rows':>8} {names} {'total s':>8} {'peak MiB':>9}")
    for num_rows in arguments.rows:
        table, output = write_table(folder / f"{num_rows}.parquet", num_rows), folder / f"{num_rows}"
        write_ledger(output, num_rows)
        row = in_fresh_process("plan_rows", table=str(table), output=str(output))
        seconds = " ".join(f"{row['seconds'][name]:>11}" for name in steps)
        print(f"{row['rows']:>8} {seconds} {row['total_s']:>8} {row['peak_mib']:>9}", flush=True)
        found["driver"].append(row)
        if num_rows == GOAL_ROWS:
            met = row["total_s"] < GOAL_S and row["peak_mib"] < GOAL_MIB
            print(f"the goal is below {GOAL_S} s and {GOAL_MIB} MiB: {'met' if met else 'MISSED'}")
    small = folder / "small"
    small.mkdir()
    for number in range(SMALL_FILES):
        write_table(small / f"{number:04d}.parquet", SMALL_FILE_ROWS, number * SMALL_FILE_ROWS)
    print(f"\n{'rows':>8} {'files':>6} {'batch size':>11} {'fill':>7} {'rows/s':>7} {'packed rows/s':>14}")
    for table in [*(folder / f"{num_rows}.parquet" for num_rows in arguments.rows), small]:
        for batch_size in arguments.batch_sizes:
            row = in_fresh_process("batch_rows", table=str(table), batch_size=batch_size)
            print(
                f"{row['rows']:>8} {row['files']:>6} {batch_size:>11} {row['fill']:>7.1%} "
                f"{row['batching_rows_per_s']:>7} {row['with_packing_rows_per_s']:>14}",
                flush=True,
            )
            found["read_tasks"].append(row)
    met = min(row["fill"] for row in found["read_tasks"]) >= GOAL_FILL
    print(f"the goal is a fill of {GOAL_FILL:.0%}: {'met' if met else 'MISSED'}")
    return found


def measure_pipeline(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure what the pipeline itself costs per row."""
    print(
        f"\n{'rows':>6} {'layout':>7} {'batch size':>11} {'ms/row':>7} {'rows/s':>7} {'driver CPU ms/row':>18} "
        f"{'driver MiB':>11} {'KiB/1000 rows':>14} {'start-up s':>11}",
        flush=True,
    )
    rows = []
    for num_rows in arguments.pipeline:
        table = write_table(folder / f"pipeline-{num_rows}.parquet", num_rows)
        for layout in arguments.layouts:
            for batch_size in arguments.batch_sizes:
                place = folder / f"pipeline-{num_rows}-{layout}-{batch_size}"
                row = in_fresh_process(
                    "move_rows", table=str(table), folder=str(place), layout=layout, batch_size=batch_size
                )
                print(
                    f"{num_rows:>6} {layout:>7} {batch_size:>11} {row['ms_per_row']:>7} "
                    f"{row['ceiling_rows_per_s']:>7} {row['driver_cpu_ms_per_row']:>18} {row['driver_mib_last']:>11} "
                    f"{row['driver_growth_kib_per_1000_rows']:>14} {row['start_up_s']:>11}",
                    flush=True,
                )
                rows.append(row)
    return rows


def measure_weak_scaling(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure whether twice the workers sample twice as fast."""
    print(f"\n{'workers':>8} {'rows':>5} {'rows/s':>8} {'span s':>7} {'busy':>7} {'efficiency':>11} {'start-up s':>11}")
    rows: list[dict[str, Any]] = []
    for workers in sorted(arguments.weak_scaling):
        table = write_table(folder / f"weak-{workers}.parquet", workers * arguments.rows_per_worker)
        place = folder / f"weak-{workers}"
        row = in_fresh_process(
            "feed_workers", table=str(table), folder=str(place), workers=workers, sample_s=arguments.sample_s
        )
        least = rows[0] if rows else row
        efficiency = (row["rows_per_s"] / workers) / (least["rows_per_s"] / least["workers"])
        row["efficiency"] = round(efficiency, 4)
        print(
            f"{workers:>8} {row['rows']:>5} {row['rows_per_s']:>8} {row['span_s']:>7} {row['busy_share']:>7.1%} "
            f"{efficiency:>11.1%} {row['start_up_s']:>11}",
            flush=True,
        )
        rows.append(row)
    met = min(row["efficiency"] for row in rows) >= GOAL_EFFICIENCY
    print(f"the goal is an efficiency of {GOAL_EFFICIENCY:.0%}: {'met' if met else 'MISSED'}")
    return rows


PARTS = {
    "rows": (measure_rows, ROWS),
    "pipeline": (measure_pipeline, PIPELINE_ROWS),
    "weak_scaling": (measure_weak_scaling, WORKERS),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", help=f"rows to plan and to batch {ROWS}")
    parser.add_argument("--pipeline", type=int, nargs="+", help=f"rows to move {PIPELINE_ROWS}")
    parser.add_argument("--weak-scaling", type=int, nargs="+", help=f"workers to feed {WORKERS}")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="of rows and pipeline (%(default)s)")
    parser.add_argument(
        "--layouts", nargs="+", choices=("staged", "fused"), default=["staged", "fused"], help="of pipeline"
    )
    parser.add_argument("--rows-per-worker", type=int, default=4, help="of weak scaling (%(default)s)")
    parser.add_argument("--sample-s", type=float, default=10.0, help="of a row, for weak scaling (%(default)s)")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.job:
        call, values = arguments.job
        print(json.dumps(CALLS[call](**values)))
        return
    chosen = [name for name in PARTS if getattr(arguments, name)] or list(PARTS)
    figures: dict[str, object] = {
        "goals": {"s": GOAL_S, "mib": GOAL_MIB, "fill": GOAL_FILL, "efficiency": GOAL_EFFICIENCY},
        "sample_s": arguments.sample_s,
    }
    for name in chosen:
        measure, default = PARTS[name]
        setattr(arguments, name, getattr(arguments, name) or default)
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(arguments, Path(folder))
    path = write_result("scale", figures, sys.argv[1:])
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
