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

from pipeline.inputs import InputPart, read_blocks
from pipeline.storage import Storage
from pipeline.training.clips import CLIP_SCHEMA, ENCODED_SCHEMA, clips, encoded_row, pixels_of
from pyramid_flow import Checkpoint

BATCH_CLIPS = 4
ROWS_PER_GROUP = 64


@dataclass(frozen=True)
class Source:
    """What encodes: a checkpoint folder, a device and a dtype of its parts."""

    path: str
    device: str
    dtype: torch.dtype


class ClipEncoder:
    """Writes one part per row group of clips; a part that is there already is left alone."""

    def __init__(self, source: Source, output: str, dtype: torch.dtype = torch.bfloat16) -> None:
        checkpoint = Checkpoint.open(source.path)
        self.vae = checkpoint.load_vae(source.dtype, source.device)
        self.text = checkpoint.load_text_encoder(source.dtype, source.device)
        self.storage, self.dtype = Storage(output), dtype

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode the row groups that a block lists; returns their numbers of rows."""
        counts = [self.encode(row["number"], InputPart(**row["part"])) for row in table.to_pylist()]
        return pa.table({"rows": counts})

    @torch.no_grad()
    def encode(self, number: int, part: InputPart) -> int:
        """Encode a row group as part `number`; returns its rows."""
        name = part_name(number)
        if not self.storage.exists(name):
            rows = [row for _, table in read_blocks(part, CLIP_SCHEMA.names) for row in self._rows(table)]
            self.storage.put(name, _parquet(pa.Table.from_pylist(rows, ENCODED_SCHEMA)))
        return part.num_rows

    def _rows(self, table: pa.Table) -> list[dict[str, object]]:
        rows = []
        for start in range(0, len(table), BATCH_CLIPS):
            batch = table.slice(start, BATCH_CLIPS)
            prompts = batch["prompt"].to_pylist()
            latents = [self.vae.encode_moments(pixels_of(clip)[None]).mean[0] for clip in clips(batch)]
            texts = [self.text([prompt]) for prompt in prompts]
            rows += [
                encoded_row(prompt, latent.to("cpu", self.dtype), text.to(torch.device("cpu"), self.dtype))
                for prompt, latent, text in zip(prompts, latents, texts, strict=True)
            ]
        return rows


def encode(parts: Sequence[InputPart], source: Source, output: str, workers: int) -> Iterator[int]:
    """Encode all row groups of clips on the connected Ray cluster; yields the rows of each as it is done."""
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
        yield from table["rows"].to_pylist()


def part_name(number: int) -> str:
    """Return the name of an encoded part."""
    return f"part-{number:06d}.parquet"


def _parquet(table: pa.Table) -> bytes:
    sink = BytesIO()
    pq.write_table(table, sink, row_group_size=ROWS_PER_GROUP, compression="zstd")
    return sink.getvalue()
