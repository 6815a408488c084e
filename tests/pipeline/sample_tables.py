"""Input tables and single batches for tests."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.rows import Batch, Item, RenderRow
from pipeline.tables.readers import list_parts
from pipeline.tables.worklist import RowRules, Worklist, candidates, scan
from pyramid_flow import Preset


def write_table(path: Path, rows: Sequence[dict[str, object]], **options: object) -> Path:
    """Write rows as a Parquet file; a column that a row lacks is null there."""
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path, **options)
    return path


def scanned(path: Path, preset: Preset) -> Worklist:
    """Return the worklist of one table."""
    return scan(list_parts([str(path)]), RowRules(preset))


def item(preset: Preset, **values: object) -> Item:
    """Return one row of a table as an item, with its image bytes as the read stage would deliver them."""
    from pipeline.rows import as_tensor
    from pipeline.tables.batching import IMAGE

    [candidate] = candidates(values, "table:0", RowRules(preset))
    return Item(candidate.row, {} if candidate.image is None else {IMAGE: as_tensor(candidate.image)})


def batch(*items: Item) -> Batch:
    """Return items as a batch without columns of the user's own."""
    return Batch(items, pa.table({"row": list(range(len(items)))}))


def rows(result: Batch) -> list[RenderRow]:
    """Return the rows of a batch."""
    return [one.row for one in result.items]
