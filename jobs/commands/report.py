"""Write the report of an output (`pyramid-render report OUT`); works wherever OUT can be used."""

import sys

from jobs.settings import EXIT_WRONG_JOB, ReportSettings
from pipeline.ledger import ledger
from pipeline.reports.report import write_report
from pipeline.storage.storage import Storage
from pyramid_flow.errors import PyramidFlowError


def run(settings: ReportSettings) -> int:
    """Write report.html and print its URL; returns the exit code."""
    try:
        storage = Storage(settings.output)
        if not ledger.part_names(storage):
            raise ledger.LedgerError(f"there is no ledger in {storage.uri}")
        print(write_report(storage, settings.gpu_hour_price))
    except PyramidFlowError as error:
        print(f"pyramid-render report: {error}", file=sys.stderr)
        return EXIT_WRONG_JOB
    return 0
