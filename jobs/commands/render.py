"""Render a table of prompts: parse, validate, run (`pyramid-render render`)."""

import logging
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from jobs.progress import Progress
from jobs.settings import EXIT_BROKEN, EXIT_WRONG_JOB, RenderSettings
from jobs.signals import Signals
from jobs.summary import SUMMARY_COLUMNS, num_failed, plan_text, summary_text
from pipeline.batch import runner
from pipeline.batch.costs import Costs, expected_costs, flops_estimate, read_measured
from pipeline.batch.job import RenderJob, StopRequest
from pipeline.batch.planner import Plan, PlanError, PlanRequest, Resources, make_plan
from pipeline.ledger import job_records
from pipeline.media.image_text import check_model
from pipeline.media.provenance import Signing
from pipeline.reports.report import REPORT
from pipeline.storage.redaction import brief
from pipeline.storage.storage import Storage
from pipeline.storage.weights import is_stored, open_checkpoint
from pipeline.tables.readers import check_apart, folder_of, full_url, list_parts
from pipeline.tables.worklist import RowRules, scan
from pyramid_flow import Checkpoint
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.parallel.config import parallel_config

EXIT_SOME_FAILED = 3

logger = logging.getLogger("pyramid-render")


def run(settings: RenderSettings) -> int:
    """Run the job; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signals = Signals()
    with ExitStack() as stack:
        try:
            resources = _resources(settings, stack)
            signals.install()
            job = prepare(settings, resources)
            if settings.dry_run and not settings.calibrate:
                print(plan_text(job, settings.gpu_hour_price))
                return 0
        except PyramidFlowError as error:
            logger.error("pyramid-render render: %s", error)
            return EXIT_WRONG_JOB
        except KeyboardInterrupt:
            logger.error("interrupted: nothing was rendered")
            return signals.exit_code
        return _run(job, settings, resources, stack, signals)


def prepare(settings: RenderSettings, resources: Resources) -> RenderJob:
    """Check everything that can be checked before a model is loaded; raises a PyramidFlowError if the job is wrong."""
    checkpoint = open_checkpoint(settings.model, settings.variant, tuple(settings.lora))
    checkpoint.check()
    parallel_config(settings.gpus_per_clip, checkpoint.num_attention_heads)
    parts = list_parts(settings.input)
    storage = Storage(settings.output)
    check_apart(settings.input, storage.uri)
    device = _device(settings, resources)
    dtype = settings.dtype if settings.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    facts = {
        "model": checkpoint.name,
        "model_fingerprint": checkpoint.fingerprint,
        "software_version": version("pyramid-render"),
    }
    target = _target(settings, checkpoint, storage, device, dtype, facts)
    make_plan(target, resources)  # a plan that cannot fit is said before the input is read
    rules = RowRules(checkpoint.preset, settings.allow_untrained)
    worklist = scan(parts, rules)
    if settings.limit:
        worklist = worklist.head(settings.limit)
    if settings.shard:
        worklist = worklist.shard(*settings.shard_of)
    tile = None if settings.tile == "auto" and device == "cpu" else settings.tile
    pixels = {"model_fingerprint": checkpoint.fingerprint, "dtype": dtype, "tile": tile}
    if settings.dry_run and not settings.calibrate:
        job_records.check_claim(storage, pixels)
    else:
        storage.probe()
        job_records.claim(storage, _job_record(settings), pixels)

    def plan_for(costs: Costs | None) -> Plan:
        return make_plan(replace(target, costs=costs), resources)

    costs = None
    if settings.dry_run or device != "cpu":  # else nothing depends on them, and counting FLOPs takes seconds per shape
        estimate = flops_estimate(checkpoint, device, settings.tile, target.cache_gib, target.gpus_per_clip)
        costs = expected_costs(worklist.num_rows_by_shape, read_measured(storage), estimate)
    return RenderJob(
        run=job_records.new_run_id(),
        storage=storage,
        worklist=worklist,
        rules=rules,
        plan=plan_for(costs),
        plan_for=plan_for,
        constants=facts,
        retry_failed=settings.retry_failed,
        shard=settings.shard and settings.shard.replace("/", "-of-"),
        flush_rows=settings.ledger_rows,
        flush_seconds=settings.ledger_seconds,
        limits=runner.RetryLimits(settings.max_attempts, settings.row_timeout_s),
        max_failures=settings.max_failures,
        grace_s=settings.grace_s,
        stall_s=settings.stall_s,
        reroll=settings.reroll,
        gpu_hour_price=settings.gpu_hour_price,
    )


def _target(
    settings: RenderSettings,
    checkpoint: Checkpoint,
    storage: Storage,
    device: str,
    dtype: str,
    facts: Mapping[str, str],
) -> PlanRequest:
    """Return what is to be planned; raises ImageTextError and SigningError for what workers could not do."""
    signing = Signing.read(settings.c2pa_certificate, facts) if settings.c2pa_certificate else None
    if signing:
        signing.check()
    if settings.image_text_model:
        check_model(settings.image_text_model)
    return PlanRequest(
        model_path=settings.model if is_stored(settings.model) else checkpoint.path,
        variant=checkpoint.transformer_folder.name,
        lora=checkpoint.lora,
        device=device,
        dtype=dtype,
        output=storage.uri,
        image_root=full_url(settings.image_root) if settings.image_root else folder_of(settings.input[0]),
        image_hosts=frozenset(settings.allow_image_host),
        decode_window=settings.decode_window,
        tile=settings.tile,
        cache_gib=None if settings.cache_gib == "auto" else settings.cache_gib,
        memory=settings.memory,
        batch_size=settings.batch_size,
        workers=settings.workers,
        gpu_shares=settings.gpu_shares,
        encoder_threads=settings.ffmpeg_threads,
        layout=settings.layout,
        gpus_per_clip=settings.gpus_per_clip,
        places=settings.places,
        thresholds=settings.thresholds,
        image_text=settings.image_text_model and str(Path(settings.image_text_model).absolute()),
        fingerprint=checkpoint.fingerprint,
        signing=signing,
    )


def _run(job: RenderJob, settings: RenderSettings, resources: Resources, stack: ExitStack, signals: Signals) -> int:
    started = time.monotonic()
    stop = StopRequest()
    try:
        total = job.num_due
        if total and settings.own_cluster:
            stack.enter_context(runner.session(None, resources))
            signals.install()
        signals.on_signal = stop.ask
        if settings.calibrate and total:
            job = calibrated(job, stop)
        if settings.dry_run and not stop.requested:
            print(plan_text(job, settings.gpu_hour_price))
            return 0
        with Progress(total) as progress:
            job.execute(progress.update, stop)
        gallery, failed = job.write_gallery(), job.write_failed()
    except KeyboardInterrupt:
        stop.requested = True
    except Exception as error:  # noqa: BLE001 - whatever it was, the run's record has the traceback
        cause = getattr(error, "cause", None) or error  # what a worker raised
        logger.error("the job broke: %s: %s", type(cause).__name__, brief(str(cause).strip().split("\n")[0]))
        logger.error("details: %s; run the same command again to resume", job.storage.url(f"runs/{job.run}.json"))
        return EXIT_BROKEN
    if stop.requested:
        logger.error("interrupted: what has finished is in the ledger, run the same command again to resume")
        return signals.exit_code
    view = job.view([*SUMMARY_COLUMNS, "media_type"])
    print(summary_text(view, job, rendered=total, seconds=time.monotonic() - started))
    print(*(f"  {name:<8} {url}" for name, url in _places(job, view, gallery, failed).items()), sep="\n")
    return 0 if settings.tolerates(num_failed(view), len(view)) else EXIT_SOME_FAILED


def calibrated(job: RenderJob, stop: StopRequest) -> RenderJob:
    """Render two batches of each shape, rows of the job like any other, and return it planned by their costs."""
    first = job.pending().first_of_each_shape(2 * job.plan.batch_size)
    logger.info("calibrating with %d rows", first.num_rows)
    trial = replace(job, run=job_records.new_run_id(), worklist=first, reroll=0)
    with Progress(first.num_rows) as progress:
        trial.execute(progress.update, stop)
    costs = trial.measured.costs()
    return job if costs is None else replace(job, plan=job.plan_for(costs))


def _places(job: RenderJob, view: pa.Table, gallery: str, failed: str | None) -> dict[str, str]:
    kinds = {name.partition("/")[0] for name in view["media_type"].unique().drop_null().to_pylist()}
    files = {f"{kind}s": job.storage.url(f"{kind}s") for kind in sorted(kinds)}
    places = {**files, "ledger": job.storage.url("metadata"), "gallery": gallery, "report": job.storage.url(REPORT)}
    return places if failed is None else places | {"failed": failed}


def _resources(settings: RenderSettings, stack: ExitStack) -> Resources:
    """Return what the job may use: of this machine, or of the running cluster, which is connected to."""
    if not settings.own_cluster:
        found = stack.enter_context(runner.session(settings.address))
    else:
        found = Resources(os.cpu_count() or 1, torch.cuda.device_count())
        if (settings.gpus or 0) > found.gpus:
            raise PlanError(f"--gpus {settings.gpus}: this machine has {found.gpus}")
    if settings.gpus is None and settings.cpus is None:
        return found
    cpus, gpus = settings.cpus or found.cpus, found.gpus if settings.gpus is None else settings.gpus
    return Resources(cpus, gpus, () if gpus != found.gpus else found.nodes)


def _device(settings: RenderSettings, resources: Resources) -> str:
    if settings.device == "auto":
        return "cuda" if resources.gpus else "cpu"
    return settings.device


def _job_record(settings: RenderSettings) -> dict[str, Any]:
    packages = ("pyramid-render", "torch", "ray", "diffusers", "transformers", "pyarrow")
    return {
        "settings": settings.record(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
