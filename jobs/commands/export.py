"""Make a dataset of an output (`pyramid-render export OUT DATASET`); works wherever both can be used."""

import logging
import sys

from tqdm import tqdm

from jobs.settings import EXIT_BROKEN, EXIT_INTERRUPTED, EXIT_WRONG_JOB, ExportSettings
from pipeline.datasets.export import ExportError, Options, export, select, shards
from pipeline.ledger import ledger
from pipeline.storage.faults import StorageError
from pipeline.storage.storage import Storage
from pyramid_flow.errors import PyramidFlowError


def run(settings: ExportSettings) -> int:
    """Write the dataset; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _write(settings)
    except ImportError as error:
        print(f"pyramid-render export: {error}: pip install 'pyramid-render[export]'", file=sys.stderr)
        return EXIT_WRONG_JOB
    except StorageError as error:
        print(f"pyramid-render export: {error}; run it again to go on", file=sys.stderr)
        return EXIT_BROKEN
    except PyramidFlowError as error:
        print(f"pyramid-render export: {error}", file=sys.stderr)
        return EXIT_WRONG_JOB
    except KeyboardInterrupt:
        print("pyramid-render export: interrupted; run it again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED


def _write(settings: ExportSettings) -> int:
    """Choose the rows, say what is left out, and write the shards."""
    storage, target = Storage(settings.output), Storage(settings.dataset)
    if not ledger.part_names(storage):
        raise ExportError(f"there is no ledger in {storage.uri}")
    options = Options(
        kind=settings.to,
        where=tuple(settings.where),
        unflagged=settings.unflagged,
        splits=settings.shares,
        split_column=settings.split_column,
        near=settings.near,
        shard_mb=settings.shard_mb,
        license=settings.license,
        include_sources=settings.include_sources,
    )
    target.probe()
    selection = select(storage, options)
    for reason, count in selection.left_out.most_common():
        print(f"left out, {count} x: {reason}")
    with tqdm(total=len(shards(selection, options)), unit=" shards") as bar:
        for shard in export(storage, target, selection, options):
            bar.set_postfix_str(shard.name)
            bar.update()
    print(f"{len(selection.rows)} videos in {target.uri}")
    return 0
