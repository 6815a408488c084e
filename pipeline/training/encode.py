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

from pipeline.fetch import ImageError
from pipeline.inputs import InputPart, read_blocks
from pipeline.request import RequestError
from pipeline.storage import Storage
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

ROWS_PER_GROUP = 64
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
class Done:
    """An encoded row group: how many rows it has, and why some were left out."""

    rows: int
    left_out: tuple[str, ...] = ()


class ClipEncoder:
    """Writes one part per row group of clips; a part that is there already is left alone."""

    def __init__(self, source: Source, output: str, dtype: torch.dtype = torch.bfloat16) -> None:
        checkpoint = Checkpoint.open(source.path, source.variant)
        self.vae = checkpoint.load_vae(source.dtype, source.device)
        self.text = checkpoint.load_text_encoder(source.dtype, source.device)
        self.source, self.storage, self.dtype = source, Storage(output), dtype

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode the row groups that a block lists; returns what `Done` says of each."""
        done = [self.encode(row["number"], InputPart(**row["part"])) for row in table.to_pylist()]
        return pa.Table.from_pylist([asdict(each) for each in done], DONE_SCHEMA)

    @torch.no_grad()
    def encode(self, number: int, part: InputPart) -> Done:
        """Encode a row group as part `number`."""
        name = part_name(number)
        if self.storage.exists(name):
            return Done(part.num_rows)
        rows: list[dict[str, object]] = []
        left_out: list[str] = []
        for first, table in read_blocks(part, COLUMNS):
            for index in range(len(table)):
                try:
                    rows.append(self._row(table.slice(index, 1)))
                except (SampleError, RequestError, ImageError) as error:
                    left_out.append(f"{part.position(first + index)}: {error}")
        self.storage.put(name, _parquet(pa.Table.from_pylist(rows, ENCODED_SCHEMA)))
        return Done(len(rows) + len(left_out), tuple(left_out))

    def _row(self, table: pa.Table) -> dict[str, object]:
        """Encode the one row of a table."""
        [row] = table.to_pylist()
        if not row["prompt"]:
            raise SampleError("there is no prompt")
        if row.get("video"):
            clip = self.source.format.cut(self.source.videos.read(row["video"]))
        else:
            [clip] = clips(table)
        latent = self.vae.encode_moments(pixels_of(clip)[None]).mean[0]
        text = self.text([row["prompt"]])
        return encoded_row(row["prompt"], latent.to("cpu", self.dtype), text.to(torch.device("cpu"), self.dtype))


def encode(parts: Sequence[InputPart], source: Source, output: str, workers: int) -> Iterator[Done]:
    """Encode all row groups of clips on the connected Ray cluster; yields of each what became of it."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    items = [{"number": number, "part": asdict(part)} for number, part in enumerate(parts)]
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
