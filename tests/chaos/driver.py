"""The driver of a chaos test, a process of its own: `python -m tests.chaos.driver FOLDER` renders until all is done."""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.batch import runner
from pipeline.batch.job import STALL_S, RenderJob
from pipeline.batch.planner import Labels, Plan, PlanRequest, Resources, make_plan
from pipeline.ledger.job_records import claim, new_run_id
from pipeline.rows import Batch
from pipeline.storage.storage import Storage
from pipeline.tables.readers import list_parts
from pipeline.tables.worklist import RowRules, scan
from pyramid_flow import Preset
from tests.chaos.scenario import Scenario
from tests.chaos.stages import append, chaos_plan, specs

SETTINGS, TABLE = "settings.json", "in.parquet"


def write_settings(
    folder: Path,
    address: str,
    output: str,
    scenario: Scenario,
    planned_gpus: int = 0,
    stall_s: float = STALL_S,
    places: Mapping[str, Labels] | None = None,
) -> None:
    """Write what a driver in this folder reads; planned_gpus: plan as for so many GPUs, 0 = the scenario's pools."""
    settings = {"address": address, "output": output, "planned_gpus": planned_gpus, "stall_s": stall_s}
    settings |= {"scenario": asdict(scenario), "places": places or {}}
    (folder / SETTINGS).write_text(json.dumps(settings))


def main(folder: Path) -> None:
    """Run the job in a folder."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    settings = json.loads((folder / SETTINGS).read_text())
    scenario = Scenario(**settings["scenario"])
    with runner.session(settings["address"]):
        job = chaos_job(folder, settings["output"], scenario, settings["planned_gpus"], settings["places"])
        replace(job, stall_s=settings["stall_s"]).execute(lambda batch: _note(folder, batch))


def _note(folder: Path, batch: Batch | None) -> None:
    if batch is not None:
        append(folder / "arrivals", rows=[item.row.id for item in batch.items])


def chaos_job(
    folder: Path, output: str, scenario: Scenario, planned_gpus: int, places: Mapping[str, Labels]
) -> RenderJob:
    """Return the job over the table in a folder."""
    rules = RowRules(Preset(), allow_untrained=True)
    storage = Storage(output)
    claim(storage, {}, {})
    plan = chaos_plan(str(folder), output, scenario)
    if planned_gpus:
        plan = planned_for(planned_gpus, folder, output, scenario, places)
    return RenderJob(
        run=new_run_id(),
        storage=storage,
        worklist=scan(list_parts([str(folder / TABLE)]), rules),
        rules=rules,
        plan=plan,
        plan_for=lambda costs: plan,
        constants={"model": "chaos", "model_fingerprint": "0", "software_version": "0"},
        retry_failed=False,
        flush_rows=scenario.flush_rows,
        flush_seconds=scenario.flush_seconds,
        limits=runner.RetryLimits(scenario.max_attempts),
    )


def planned_for(gpus: int, folder: Path, output: str, scenario: Scenario, places: Mapping[str, Labels]) -> Plan:
    """Return the real plan for so many GPUs, with simulated stages."""
    stages = specs(str(folder), output, scenario)
    job = PlanRequest(
        model_path="",
        variant=None,
        device="cuda",
        dtype="bfloat16",
        output=output,
        image_root="",
        decode_window=1,
        tile=None,
        batch_size=scenario.batch_size,
        encoder_threads=1,
        places=places,
    )
    plan = make_plan(job, Resources(cpus=4 * gpus, gpus=gpus))
    simulated = (tuple(stages[spec.name] for spec in pool.stages) for pool in plan.pools)
    return replace(
        plan, pools=tuple(replace(pool, stages=own) for pool, own in zip(plan.pools, simulated, strict=True))
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
