"""Render a table of prompts: parse, validate, run (`pyramid-render render`, `python -m jobs.render`)."""

import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from types import FrameType
from typing import Any

import torch

from jobs.progress import Progress
from jobs.settings import EXIT_WRONG_JOB, RenderSettings, parse
from jobs.summary import plan_text, summary_text
from pipeline import ledger, runner
from pipeline.inputs import check_apart, folder_of, full_url, list_parts
from pipeline.job import RenderJob, StopRequest
from pipeline.plan import Job, PlanError, Resources, make_plan
from pipeline.storage import Storage
from pipeline.worklist import RowRules, scan
from pyramid_flow import Checkpoint
from pyramid_flow.errors import PyramidFlowError

EXIT_BROKEN, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 1, 3, 130

logger = logging.getLogger("pyramid-render")


class Signals:
    """Takes SIGINT and SIGTERM: the first asks the job to stop, a second one stops it at once."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.exit_code = EXIT_INTERRUPTED

    def install(self) -> None:
        """Take the signals from now on; after ray.init, which replaces handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.take)

    def take(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal; raises KeyboardInterrupt at the second."""
        self.exit_code = 128 + number
        if self.stop.requested:
            raise KeyboardInterrupt
        self.stop.requested = True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    settings = parse(RenderSettings, sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with ExitStack() as stack:
        try:
            resources = _resources(settings, stack)
            job = prepare(settings, resources)
            if settings.dry_run:
                print(plan_text(job))
                return 0
        except PyramidFlowError as error:
            logger.error("pyramid-render render: %s", error)
            return EXIT_WRONG_JOB
        except KeyboardInterrupt:
            logger.error("interrupted: nothing was rendered")
            return EXIT_INTERRUPTED
        return _run(job, settings, resources, stack)


def prepare(settings: RenderSettings, resources: Resources) -> RenderJob:
    """Check everything that can be checked before a model is loaded; raises a PyramidFlowError if the job is wrong."""
    checkpoint = Checkpoint.open(settings.model, settings.variant)
    checkpoint.check()
    parts = list_parts(settings.input)
    storage = Storage(settings.output)
    check_apart(settings.input, storage.uri)
    device = _device(settings, resources)
    dtype = settings.dtype if settings.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    request = Job(
        model_path=str(checkpoint.root),
        variant=checkpoint.transformer_folder.name,
        device=device,
        dtype=dtype,
        output=storage.uri,
        image_root=full_url(settings.image_root) if settings.image_root else folder_of(settings.input[0]),
        decode_window=settings.decode_window,
        tile=settings.tile,
        batch_size=settings.batch_size,
        workers=settings.workers,
    )
    plan = make_plan(request, resources)
    rules = RowRules(checkpoint.preset, settings.allow_untrained)
    worklist = scan(parts, rules)
    if not settings.dry_run:
        storage.probe()
        pixels = {"model_fingerprint": checkpoint.fingerprint, "dtype": dtype, "tile": settings.tile}
        ledger.claim(storage, _job_record(settings), pixels)
    return RenderJob(
        run=ledger.new_run_id(),
        storage=storage,
        worklist=worklist,
        rules=rules,
        plan=plan,
        constants={
            "model": f"{checkpoint.root.name}/{checkpoint.variant}",
            "model_fingerprint": checkpoint.fingerprint,
            "software_version": version("pyramid-render"),
        },
        retry_failed=settings.retry_failed,
        flush_rows=settings.ledger_rows,
        flush_seconds=settings.ledger_seconds,
        limits=runner.Limits(settings.max_attempts, settings.row_timeout_s),
        max_failures=settings.max_failures,
        grace_s=settings.grace_s,
    )


def _run(job: RenderJob, settings: RenderSettings, resources: Resources, stack: ExitStack) -> int:
    started = time.monotonic()
    stop = StopRequest()
    signals = Signals(stop)
    try:
        total = job.pending().num_rows
        if total and settings.address is None:
            stack.enter_context(runner.session(None, resources))
        signals.install()
        with Progress(total) as progress:
            job.execute(progress.update, stop)
        gallery = job.write_gallery()
    except KeyboardInterrupt:
        stop.requested = True
    except Exception as error:  # noqa: BLE001 - whatever it was, the run's record has the traceback
        cause = getattr(error, "cause", None) or error  # what a worker raised
        logger.error("the job broke: %s: %s", type(cause).__name__, str(cause).strip().split("\n")[0])
        logger.error("details: %s; run the same command again to resume", job.storage.url(f"runs/{job.run}.json"))
        return EXIT_BROKEN
    if stop.requested:
        logger.error("interrupted: what has finished is in the ledger, run the same command again to resume")
        return signals.exit_code
    view = job.view()
    print(summary_text(view, job, gallery, rendered=total, seconds=time.monotonic() - started))
    failed = view["status"].to_pylist().count("failed")
    return 0 if settings.tolerates(failed, len(view)) else EXIT_SOME_FAILED


def _resources(settings: RenderSettings, stack: ExitStack) -> Resources:
    """Return what the job may use: of this machine, or of the running cluster, which is connected to."""
    if settings.address is not None:
        found = stack.enter_context(runner.session(settings.address))
    else:
        found = Resources(os.cpu_count() or 1, torch.cuda.device_count())
        if (settings.gpus or 0) > found.gpus:
            raise PlanError(f"--gpus {settings.gpus}: this machine has {found.gpus}")
    return found if settings.gpus is None else Resources(found.cpus, settings.gpus)


def _device(settings: RenderSettings, resources: Resources) -> str:
    if settings.device == "auto":
        return "cuda" if resources.gpus else "cpu"
    return settings.device


def _job_record(settings: RenderSettings) -> dict[str, Any]:
    packages = ("pyramid-render", "torch", "ray", "diffusers", "transformers", "pyarrow")
    return {
        "settings": settings.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


if __name__ == "__main__":
    sys.exit(main())
