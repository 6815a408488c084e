"""A rendered output as a dataset: shards of WebDataset or Parquet, in splits that share no prompt, with a card."""

import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipeline.datasets.prompts import normalised
from pipeline.ledger import ledger
from pipeline.request import hash_of
from pipeline.storage.storage import Storage
from pipeline.training.record import check_record
from pyramid_flow.errors import PyramidFlowError

Kind = Literal["webdataset", "parquet"]
RECORD, CARD, SAMPLES = "export.json", "README.md", 8
READERS = 16
HASH_BITS = 64
VIDEO = "video/mp4"
SOURCES = ("position", "image_uri")
"""Columns that name the files of whoever rendered: internal buckets and folders."""

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


class ExportError(PyramidFlowError):
    """The output cannot be exported as asked."""


@dataclass(frozen=True)
class Options:
    """What is exported, and how.

    where: conditions on columns of the ledger, such as "motion>0.01", all of which must hold; of a list, = and != ask
    whether it holds the value. splits: shares by name; a prompt, whatever its case and spaces, is in one of them.
    split_column: take the splits from there instead. near: bits of 64 by which the perceptual hashes of two videos'
    thumbnails may differ for the later one to be left out, None = any. shard_mb: of the videos in a shard, at most.
    include_sources: export the columns `SOURCES`, too.
    """

    kind: Kind
    where: tuple[str, ...] = ()
    unflagged: bool = False
    splits: Mapping[str, float] | None = None
    split_column: str | None = None
    near: int | None = 2
    shard_mb: float = 256.0
    license: str = "other"
    include_sources: bool = False


@dataclass(frozen=True)
class Selection:
    """The rows to export, with the column `dataset_split`, and how many others were left out, by reason."""

    rows: pa.Table
    left_out: Counter[str]


@dataclass(frozen=True)
class Shard:
    """A file of the dataset, and the rows in it."""

    name: str
    split: str
    rows: pa.Table


def select(storage: Storage, options: Options) -> Selection:
    """Choose the rows of an output, in the order of their ids; raises ExportError."""
    rows = ledger.read(storage).sort_by("id")
    left_out: Counter[str] = Counter()

    def keep(mask: pa.Array, reason: str) -> None:
        nonlocal rows
        kept = rows.filter(pc.fill_null(mask, fill_value=False))
        if dropped := len(rows) - len(kept):
            left_out[reason] += dropped
        rows = kept

    keep(pc.equal(rows["status"], "succeeded"), "failed")
    keep(pc.equal(rows["media_type"], VIDEO), "no video")
    keep(pc.is_null(rows["duplicate_of"]), "equal to another row")
    if options.unflagged:
        if "flags" not in rows.column_names:
            raise ExportError("the ledger is of a version without flags")
        keep(pc.equal(pc.list_value_length(rows["flags"]), 0), "flagged")
    for condition in options.where:
        keep(_holds(rows, condition), f"not {condition}")
    if options.near is not None and len(rows):
        keep(pa.array(_first_of_alike(_hashes(storage, rows), options.near)), "nearly equal to another video")
    if not len(rows):
        raise ExportError(f"there is nothing to export; left out: {dict(left_out)}")
    rows = rows.append_column("dataset_split", pa.array(_splits(rows, options)))
    if not options.include_sources:
        rows = rows.drop_columns([name for name in SOURCES if name in rows.column_names])
    return Selection(rows, left_out)


def _holds(rows: pa.Table, condition: str) -> pa.Array:
    """Return for which rows a condition holds."""
    match = re.fullmatch(r"(\w+)\s*(<=|>=|!=|=|<|>)\s*(.*)", condition.strip())
    if match is None:
        raise ExportError(f"{condition!r} is no condition such as motion>0.01")
    name, sign, text = match.groups()
    if name not in rows.column_names:
        raise ExportError(f"there is no column {name!r}, there are: {', '.join(rows.column_names)}")
    column = rows[name]
    if pa.types.is_list(column.type):
        if sign not in ("=", "!="):
            raise ExportError(f"{name} is a list: it can only be asked what it holds (=) or not (!=)")
        held = pa.array([text in map(str, values or ()) for values in column.to_pylist()])
        return held if sign == "=" else pc.invert(held)
    try:
        return COMPARE[sign](column, pa.scalar(text).cast(column.type))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ExportError(f"{name} cannot be compared with {text!r}: it is {column.type}") from error


def _splits(rows: pa.Table, options: Options) -> list[str]:
    """Return each row's split: that of its prompt, chosen by a hash of it alone, or what a column says."""
    if options.split_column:
        if options.split_column not in rows.column_names:
            raise ExportError(f"there is no column {options.split_column!r} to take splits from")
        return [_checked_split(value) for value in rows[options.split_column].to_pylist()]
    shares = dict(options.splits or {"train": 1.0})
    ends = list(accumulate(share / sum(shares.values()) for share in shares.values()))
    names = list(shares)
    places = (int(hash_of({"prompt": normalised(prompt)}), 16) / 16**32 for prompt in rows["prompt"].to_pylist())
    return [next((name for name, end in zip(names, ends, strict=True) if place < end), names[-1]) for place in places]


def _checked_split(name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name, re.ASCII):
        raise ExportError(f"split {name!r} is no word of letters, digits and underscores")
    return name


# Near duplicates


def _hashes(storage: Storage, rows: pa.Table) -> list[int | None]:
    """Return the perceptual hash of each row's thumbnail, which shows four frames; None without one."""
    from imagehash import phash  # here, since it comes with an extra

    def hashed(uri: str | None) -> int | None:
        if uri is None:
            return None
        with Image.open(io.BytesIO(storage.get(uri))) as picture:
            return int(str(phash(picture.convert("RGB"))), 16)

    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(hashed, rows["thumbnail_uri"].to_pylist()))


def _first_of_alike(hashes: Sequence[int | None], near: int) -> list[bool]:
    """Tell of each whether no earlier one that was kept differs by at most so many bits.

    Two that do so are equal in at least one of near + 1 bands of bits, so only those that share a band are compared.
    """
    edges = [HASH_BITS * band // (near + 1) for band in range(near + 2)]
    bands = [(start, (1 << (end - start)) - 1) for start, end in pairwise(edges)]
    kept: dict[tuple[int, int], list[int]] = {}
    first = []
    for value in hashes:
        if value is None:
            first.append(True)
            continue
        keys = [(start, value >> start & mask) for start, mask in bands]
        alike = any((value ^ other).bit_count() <= near for key in keys for other in kept.get(key, ()))
        if not alike:
            for key in keys:
                kept.setdefault(key, []).append(value)
        first.append(not alike)
    return first


# Shards


def shards(selection: Selection, options: Options) -> list[Shard]:
    """Return the files of the dataset, each split's rows in a random order that is always the same."""
    planned = []
    for split in sorted(set(selection.rows["dataset_split"].to_pylist())):
        rows = selection.rows.filter(pc.equal(selection.rows["dataset_split"], split))
        order = pa.array([hash_of({"row": row_id}) for row_id in rows["id"].to_pylist()])
        rows = rows.take(pc.sort_indices(order))
        starts, filled = [0], 0
        for place, size in enumerate(rows["bytes"].to_pylist()):
            if filled and filled + size > options.shard_mb * 1e6:
                starts.append(place)
                filled = 0
            filled += size
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(rows)], strict=True)):
            name = FILE_NAMES[options.kind].format(split=split, number=number, count=len(starts))
            planned.append(Shard(name, split, rows.slice(start, end - start)))
    return planned


FILE_NAMES = {
    "webdataset": "{split}-{number:06d}.tar",
    "parquet": "data/{split}-{number:05d}-of-{count:05d}.parquet",
}


def export(storage: Storage, target: Storage, selection: Selection, options: Options) -> Iterator[Shard]:
    """Write what is missing of the dataset, shard by shard, and yield each one once it is there; the card comes last.

    A shard is written whole or not at all, so an export that was cut off goes on. Raises RecordError if the target
    holds another one, and StorageError.
    """
    rows = selection.rows
    made_of = hash_of({"videos": rows["sha256"].to_pylist(), "splits": rows["dataset_split"].to_pylist()})
    check_record(target, RECORD, asdict(options) | {"source": storage.uri, "rows": made_of})
    there = set(target.list())
    for shard in shards(selection, options):
        if shard.name not in there:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "shard"
                WRITERS[options.kind](path, shard, storage)
                target.put(shard.name, path)
        yield shard
    for number, uri in enumerate(rows["thumbnail_uri"].drop_null().to_pylist()[:SAMPLES]):
        target.put(f"samples/{number}.webp", storage.get(uri))
    target.put(CARD, card(selection, options).encode())


def _write_tar(path: Path, shard: Shard, storage: Storage) -> None:
    from webdataset import TarWriter  # here, since it comes with an extra

    with path.open("wb") as file, TarWriter(file, mtime=0) as writer:
        for row, video in _videos(shard, storage):
            record = json.dumps(row, ensure_ascii=False, default=str)
            writer.write({"__key__": row["sha256"][:32], "mp4": video, "json": record.encode()})


def _write_parquet(path: Path, shard: Shard, storage: Storage) -> None:
    table = _columns(shard.rows)
    videos = [{"bytes": video, "path": f"{row['id']}.mp4"} for row, video in _videos(shard, storage)]
    table = table.append_column("video", pa.array(videos, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    features = {field.name: _feature(field.type) for field in table.schema} | {"video": {"_type": "Video"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd", row_group_size=64)


WRITERS: dict[str, Callable[[Path, Shard, Storage], None]] = {"webdataset": _write_tar, "parquet": _write_parquet}


def _videos(shard: Shard, storage: Storage) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield each row with its video; several are read ahead."""
    rows = _columns(shard.rows).to_pylist()
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(rows), READERS):
            some = rows[start : start + READERS]
            yield from zip(some, readers.map(storage.get, (row["uri"] for row in some)), strict=True)


def _columns(rows: pa.Table) -> pa.Table:
    """Return a dataset's columns: the ledger's, with what few readers know as JSON."""
    for place, field in enumerate(rows.schema):
        if pa.types.is_map(field.type) or pa.types.is_struct(field.type):
            values = [None if value is None else json.dumps(dict(value)) for value in rows[field.name].to_pylist()]
            rows = rows.set_column(place, field.name, pa.array(values, pa.string()))
        elif pa.types.is_null(field.type):
            rows = rows.set_column(place, field.name, rows[field.name].cast(pa.string()))
    return rows


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """Return what the library `datasets` calls a column of a type."""
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    names = {"double": "float64", "float": "float32"}
    return {"dtype": names.get(str(kind), str(kind)), "_type": "Value"}


# The card

COUNTED = ("height", "width", "num_frames", "fps", "quality", "model", "model_fingerprint", "software_version")
SPREAD = ("brightness", "contrast", "sharpness", "motion", "drift", "guidance_scale")


def card(selection: Selection, options: Options) -> str:
    """Return the dataset's README: what it is made of, how it was chosen, how its figures are spread."""
    rows = selection.rows
    there = partial(filter, rows.column_names.__contains__)  # an output of an earlier version lacks some
    counts = Counter(rows["dataset_split"].to_pylist())
    lines = ["---", f"license: {options.license}", "task_categories: [text-to-video]"]
    if options.kind == "parquet":
        lines += ["configs:", "- config_name: default", "  data_files:"]
        lines += [f"  - {{split: {split}, path: data/{split}-*.parquet}}" for split in sorted(counts)]
    prompts = len({normalised(prompt) for prompt in rows["prompt"].to_pylist()})
    lines += ["---", "", "# Generated videos", ""]
    lines += [f"{len(rows)} videos of {prompts} prompts, rendered by pyramid-render."]
    if not options.split_column:
        lines += ["No prompt is in two splits, whatever its case and spaces."]
    lines += ["", "| split | videos | megabytes |", "|---|---|---|"]
    for split, count in sorted(counts.items()):
        size = pc.sum(rows.filter(pc.equal(rows["dataset_split"], split))["bytes"]).as_py()
        lines.append(f"| {split} | {count} | {size / 1e6:,.2f} |")
    pictures = len(rows) - rows["thumbnail_uri"].null_count
    lines += ["", *(f"![sample](samples/{number}.webp)" for number in range(min(SAMPLES, pictures)))]
    if selection.left_out:
        lines += ["", "## Left out", "", "| reason | rows |", "|---|---|"]
        lines += [f"| {reason} | {count} |" for reason, count in selection.left_out.most_common()]
    lines += ["", "## Made with", "", "| column | values |", "|---|---|"]
    for name in there(COUNTED):
        values = Counter(rows[name].to_pylist()).most_common(5)
        lines.append(f"| {name} | {', '.join(f'{value} ({count})' for value, count in values)} |")
    lines += ["", "## Figures", "", "| column | least | median | greatest |", "|---|---|---|---|"]
    for name in there(SPREAD):
        if values := sorted(rows[name].drop_null().to_pylist()):
            lines.append(f"| {name} | {values[0]:.3g} | {values[len(values) // 2]:.3g} | {values[-1]:.3g} |")
    return "\n".join([*lines, ""])
