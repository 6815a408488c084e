"""Clips to what a transformer is trained on: latents and text embeddings, made once by a checkpoint's own parts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext

from pipeline.storage.faults import StorageError
from pipeline.storage.storage import Storage
from pipeline.tables.readers import InputPart, read_blocks
from pipeline.training.clips import (
    CLIP_SCHEMA,
    ENCODED_SCHEMA,
    SampleError,
    clips,
    encoded_row,
    pixels_of,
)
from pipeline.training.videos import ClipFormat, VideoRoot
from pyramid_flow import Checkpoint
from pyramid_flow.errors import PyramidFlowError

ROWS_PER_UNIT = 32
ROWS_PER_GROUP = 8
"""Of what is written: a stream of training samples has row groups of its own, so there must be many."""

WINDOW = 16
"""Frames that pass through the VAE at once."""

CPU = torch.device("cpu")
COLUMNS = [*CLIP_SCHEMA.names, "video"]
DONE_SCHEMA = pa.schema([("rows", pa.int64()), ("left_out", pa.list_(pa.string()))])


@dataclass(frozen=True)
class Source:
    """What encodes: a checkpoint folder and its variant, a device and a dtype of its parts.

    videos, format: where the video files of tables without pixels lie, and what is cut out of them.
    """

    path: str
    variant: str | None
    device: str
    dtype: torch.dtype
    videos: VideoRoot
    format: ClipFormat


@dataclass(frozen=True)
class Unit:
    """What is encoded at once and becomes a file: rows `start` to `stop` of a part."""

    part: InputPart
    start: int
    stop: int


@dataclass(frozen=True)
class Done:
    """An encoded unit: how many rows it has, and why some were left out."""

    rows: int
    left_out: tuple[str, ...] = ()


def units(parts: Sequence[InputPart]) -> list[Unit]:
    """Divide tables into units; text files, whose length is not known, are read for that."""
    found = []
    for part in parts:
        count = part.num_rows or sum(len(table) for _, table in read_blocks(part, ["prompt"]))
        found += [Unit(part, start, min(start + ROWS_PER_UNIT, count)) for start in range(0, count, ROWS_PER_UNIT)]
    return found


class ClipEncoder:
    """Writes a file per unit; one that is there already is left alone."""

    def __init__(self, source: Source, output: str, dtype: torch.dtype = torch.bfloat16) -> None:
        checkpoint = Checkpoint.open(source.path, source.variant)
        self.vae = checkpoint.load_vae(source.dtype, source.device)
        self.text = checkpoint.load_text_encoder(source.dtype, source.device)
        self.source, self.storage, self.dtype = source, Storage(output), dtype
        self.empty = self.text([""]).to(CPU, dtype)
        self.read: tuple[InputPart, pa.Table] | None = None  # the part that was read last

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode the units that a block lists; returns what `Done` says of each."""
        done = []
        for row in table.to_pylist():
            done.append(self.encode(row["number"], Unit(InputPart(**row["part"]), row["start"], row["stop"])))
        return pa.Table.from_pylist([asdict(each) for each in done], DONE_SCHEMA)

    @torch.no_grad()
    def encode(self, number: int, unit: Unit) -> Done:
        """Encode a unit as part `number`."""
        name = part_name(number)
        if self.storage.exists(name):
            return Done(unit.stop - unit.start)
        rows: list[dict[str, object]] = []
        left_out: list[str] = []
        for index in range(unit.start, unit.stop):
            try:
                rows.append(self._row(self._table(unit.part).slice(index, 1)))
            except StorageError:
                raise
            except PyramidFlowError as error:
                left_out.append(f"{unit.part.position(index)}: {error}")
        self.storage.put(name, _parquet(pa.Table.from_pylist(rows, ENCODED_SCHEMA)))
        return Done(unit.stop - unit.start, tuple(left_out))

    def _table(self, part: InputPart) -> pa.Table:
        if self.read is None or self.read[0] != part:
            self.read = part, pa.concat_tables([table for _, table in read_blocks(part, COLUMNS)])
        return self.read[1]

    def _row(self, table: pa.Table) -> dict[str, object]:
        """Encode the one row of a table."""
        [row] = table.to_pylist()
        prompt, video = row["prompt"], row.get("video")
        if not isinstance(prompt, str) or not prompt.strip():
            raise SampleError(f"prompt {prompt!r} is no text")
        if isinstance(video, str):
            clip = self.source.format.cut(self.source.videos.read(video))
        else:
            [clip] = clips(table)
        pixels = pixels_of(clip)[None].to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode_moments(pixels, window=WINDOW).mean[0]
        if not latents.isfinite().all():
            raise SampleError("its latents are not finite")
        return encoded_row(prompt, latents.to(CPU, self.dtype), self.text([prompt]).to(CPU, self.dtype), self.empty)


def encode(todo: Sequence[Unit], source: Source, output: str, workers: int) -> Iterator[Done]:
    """Encode units on the connected Ray cluster; yields of each what became of it."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a unit of long clips is no failure
    items = [{"number": number, **asdict(unit)} for number, unit in enumerate(todo)]
    dataset: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset = dataset.map_batches(
        ClipEncoder,
        fn_constructor_args=(source, output),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=workers),
        num_cpus=0 if source.device != "cpu" else 1,
        num_gpus=None if source.device == "cpu" else 1,
    )
    done: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for table in done:
        yield from (Done(row["rows"], tuple(row["left_out"])) for row in table.to_pylist())


def part_name(number: int) -> str:
    """Return the name of an encoded part."""
    return f"part-{number:06d}.parquet"


def _parquet(table: pa.Table) -> bytes:
    sink = BytesIO()
    pq.write_table(table, sink, row_group_size=ROWS_PER_GROUP, compression="zstd")
    return sink.getvalue()
