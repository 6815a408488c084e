"""Write the report of an output (`pyramid-render report OUT`); works wherever OUT can be used."""

import sys
from collections.abc import Sequence

from jobs.settings import EXIT_WRONG_JOB, ReportSettings, parse
from pipeline import ledger
from pipeline.html_report import write_report
from pipeline.storage import Storage
from pyramid_flow.errors import PyramidFlowError


def main(argv: Sequence[str] | None = None) -> int:
    """Write report.html and print its URL; returns the exit code."""
    settings = parse(ReportSettings, sys.argv[1:] if argv is None else argv)
    try:
        storage = Storage(settings.output)
        if not ledger.part_names(storage):
            raise ledger.LedgerError(f"there is no ledger in {storage.uri}")
        print(write_report(storage, settings.gpu_hour_price))
    except PyramidFlowError as error:
        print(f"pyramid-render report: {error}", file=sys.stderr)
        return EXIT_WRONG_JOB
    return 0


if __name__ == "__main__":
    sys.exit(main())
