"""Merge the ledger of an output and look for orphans (`pyramid-render compact OUT`); works wherever OUT can be used."""

import logging
import sys

from jobs.settings import EXIT_BROKEN, EXIT_INTERRUPTED, EXIT_WRONG_JOB, CompactSettings
from pipeline.ledger import compact, ledger
from pipeline.rows import plain_text
from pipeline.storage.storage import Storage
from pyramid_flow.errors import PyramidFlowError

SHOWN_ORPHANS = 20


def run(settings: CompactSettings) -> int:
    """Compact the ledger, then list the orphans or delete them; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        storage = Storage(settings.output)
        if not ledger.part_names(storage):
            return _ended(EXIT_WRONG_JOB, f"there is no ledger in {storage.uri}")
    except PyramidFlowError as error:
        return _ended(EXIT_WRONG_JOB, str(error))
    try:
        print(*compaction_text(compact.compact(storage)), sep="\n")
        _orphans(storage, settings.delete_orphans)
    except ledger.LedgerError as error:
        return _ended(EXIT_WRONG_JOB, str(error))
    except (PyramidFlowError, OSError) as error:
        return _ended(EXIT_BROKEN, f"{error}; nothing is lost, run it again")
    except KeyboardInterrupt:
        return _ended(EXIT_INTERRUPTED, "interrupted; nothing is lost, run it again")
    return 0


def compaction_text(done: compact.Compaction) -> list[str]:
    """Say what was merged and what was left alone."""
    merged = f"{done.replaced} parts of the ledger became {done.written}" if done.replaced else "nothing to merge"
    return [merged, *(f"  left alone: {line}" for line in done.left)]


def _orphans(storage: Storage, delete: bool) -> None:
    names = compact.find_orphans(storage)
    print(f"{len(names)} files that no row names")
    print(*(f"  {plain_text(name)}" for name in names[:SHOWN_ORPHANS]), sep="\n", end="\n" if names else "")
    if len(names) > SHOWN_ORPHANS:
        print(f"  and {len(names) - SHOWN_ORPHANS} more")
    if delete and names:
        deleted, young = compact.delete_orphans(storage, names)
        print(f"deleted {deleted} of them, left {young} that are younger than 24 hours")


def _ended(code: int, message: str) -> int:
    print(f"pyramid-render compact: {message}", file=sys.stderr)
    return code
