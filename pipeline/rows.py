"""What travels between stages: a batch of rows, each with its metadata and tensors, packed into binary columns."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pipeline.request import ResolvedRequest
from pipeline.storage.redaction import brief

if TYPE_CHECKING:  # torch is imported where tensors are made: commands that read the ledger need none
    from torch import Tensor

OWN_FAULTS = ("RequestError", "InvalidValueError", "ImageError", "NonFiniteError", "WorkerDied")
"""Types of errors that are the row's own doing; any other one speaks of the machine, the storage or the model."""


class RowError(BaseModel):
    """Why a row failed, and where."""

    model_config = ConfigDict(frozen=True)

    stage: str
    type: str
    message: str

    @property
    def is_own_fault(self) -> bool:
        """Whether the row itself is to blame."""
        return self.type in OWN_FAULTS

    @classmethod
    def of(cls, stage: str, error: Exception) -> "RowError":
        """Describe an exception that a stage caught."""
        message = brief(plain_text(str(error))) or type(error).__name__
        return cls(stage=stage, type=type(error).__name__, message=message)


class RenderRow(BaseModel):
    """Everything known about one video so far; at the end it is a row of the ledger.

    position: where the row stands in the input; prompt: as given, if it is text at all; image_source: URI of the input
    image as given, which may be signed: encoding needs it, and nothing records it; request: None only for a row that
    could not be understood; skipped: passed through untouched because the job is stopping; rerolls: which time it
    is rendered again with another seed; first_seed: the seed of its first rendering; seconds: the row's share of each
    stage's time; brightness to flags: see `pipeline.media.quality`.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    position: str
    prompt: str | None = None
    image_source: str | None = None
    request: ResolvedRequest | None = None
    error: RowError | None = None
    warnings: tuple[str, ...] = ()
    attempts: int = 1
    duplicate_of: str | None = None
    skipped: bool = False
    rerolls: int = 0
    first_seed: int | None = None
    uri: str | None = None
    thumbnail_uri: str | None = None
    media_type: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    signed: bool | None = None
    latents_sha256: str | None = None
    frames: int | None = None
    batch_size: int | None = None
    cached_levels: list[int] | None = None
    tiling: int | None = None
    brightness: float | None = None
    contrast: float | None = None
    sharpness: float | None = None
    motion: float | None = None
    max_motion: float | None = None
    motion_direction: float | None = None
    drift: float | None = None
    text_similarity: float | None = None
    aesthetics: float | None = None
    flags: list[str] | None = None
    dtype: str | None = None
    device: str | None = None
    node: str | None = None
    prompt_truncated: bool | None = None
    seconds: dict[str, float] = Field(default_factory=dict)  # a plain default would be copied for each row
    started_at: datetime | None = None
    finished_at: datetime | None = None

    def updated(self, **values: Any) -> "RenderRow":  # noqa: ANN401 - any field
        """Return the row with some fields replaced."""
        return self.model_copy(update=values)


@dataclass(frozen=True)
class Item:
    """A row and the tensors that belong to it at this point of the pipeline."""

    row: RenderRow
    tensors: "dict[str, Tensor]" = field(default_factory=dict)

    @property
    def is_pending(self) -> bool:
        """Whether a stage has work to do on the row."""
        return self.row.error is None and not self.row.skipped

    @property
    def request(self) -> ResolvedRequest:
        """The resolved request; only rows without an error are asked for it."""
        assert self.row.request is not None
        return self.row.request

    def with_tensors(self, tensors: "dict[str, Tensor]", **row: Any) -> "Item":  # noqa: ANN401 - any field of the row
        """Return the item with other tensors and some fields of its row replaced."""
        return Item(self.row.updated(**row), tensors)

    def failed(self, stage: str, error: Exception) -> "Item":
        """Return the item as a failed row; it keeps no tensors."""
        return Item(self.row.updated(error=RowError.of(stage, error)))


@dataclass(frozen=True)
class Batch:
    """Rows that are sampled together, and the user's own columns, one record per row in the same order."""

    items: tuple[Item, ...]
    columns: pa.Table

    def with_items(self, items: Sequence[Item]) -> "Batch":
        """Return the batch with its items replaced, one for one."""
        assert len(items) == len(self.items)
        return replace(self, items=tuple(items))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.items)

    def part(self, start: int, stop: int) -> "Batch":
        """Return some rows that follow one another as a batch of their own."""
        return Batch(self.items[start:stop], self.columns.slice(start, stop - start))

    def only(self, index: int) -> "Batch":
        """Return one row as a batch of its own."""
        return self.part(index, index + 1)

    def joined(self, other: "Batch") -> "Batch":
        """Return the batch followed by another one with the same columns."""
        return Batch(self.items + other.items, pa.concat_tables([self.columns, other.columns]))

    def without_skipped(self) -> "Batch":
        """Return the batch without the rows that nothing was done for."""
        kept = [index for index, item in enumerate(self.items) if not item.row.skipped]
        return Batch(tuple(self.items[index] for index in kept), self.columns.take(pa.array(kept, pa.int64())))


_ROWS = TypeAdapter(list[RenderRow])


def pack(batch: Batch) -> dict[str, bytes]:
    """Serialise a batch to three binary columns: rows (JSON), columns (Arrow IPC), tensors (safetensors)."""
    tensors = {
        f"{index}/{name}": tensor for index, item in enumerate(batch.items) for name, tensor in item.tensors.items()
    }
    return {
        "rows": _ROWS.dump_json([item.row for item in batch.items]),
        "columns": _to_ipc(batch.columns),
        "tensors": _to_safetensors(tensors),
    }


def unpack(columns: dict[str, bytes]) -> Batch:
    """Inverse of `pack`."""
    from safetensors.torch import load

    rows = _ROWS.validate_json(columns["rows"])
    tensors: list[dict[str, Tensor]] = [{} for _ in rows]
    for key, tensor in load(columns["tensors"]).items():
        index, name = key.split("/", 1)
        tensors[int(index)][name] = tensor
    items = tuple(Item(row, own) for row, own in zip(rows, tensors, strict=True))
    return Batch(items, _from_ipc(columns["columns"]))


def as_tensor(data: bytes) -> "Tensor":
    """Hold a file's bytes as a uint8 tensor [N]."""
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def as_bytes(tensor: "Tensor") -> bytes:
    """Inverse of `as_tensor`."""
    return tensor.numpy().tobytes()


def plain_text(text: str) -> str:
    """Return the text with what cannot be stored, lone halves of characters, written as escapes."""
    return text.encode(errors="backslashreplace").decode()


def ledger_table(batch: Batch, constants: dict[str, str]) -> pa.Table:
    """Return the batch as ledger rows: the rows' fields, the user's columns, and what is equal for the whole job."""
    records = pa.Table.from_pylist([_record(item.row) | constants for item in batch.items], LEDGER_SCHEMA)
    for name in batch.columns.column_names:
        records = records.append_column(_free_name(name, batch.columns.column_names), batch.columns[name])
    return records


def _free_name(name: str, others: Sequence[str]) -> str:
    """Prefix the name of a user's column until it is neither one of the ledger's nor another of the user's."""
    free = name
    while free in LEDGER_SCHEMA.names or (free != name and free in others):
        free = f"user_{free}"
    return free


def _record(row: RenderRow) -> dict[str, Any]:
    values = row.model_dump(exclude={"request", "error", "skipped", "image_source"})
    request = row.request.model_dump(exclude={"id", "has_image"}) if row.request else {}
    for name in ("num_inference_steps", "video_num_inference_steps", "guided_share"):
        if name in request:
            request[name] = json.dumps(request[name])
    error = row.error.model_dump() if row.error else {}
    return (
        values
        | request
        | {f"error_{name}": value for name, value in error.items()}
        | {"status": "failed" if row.error else "succeeded", "seconds": list(row.seconds.items())}
    )


LEDGER_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        ("error_stage", pa.string()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("warnings", pa.list_(pa.string())),
        ("attempts", pa.int32()),
        ("duplicate_of", pa.string()),
        ("position", pa.string()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("prompt_truncated", pa.bool_()),
        ("image_uri", pa.string()),
        ("image_sha256", pa.string()),
        ("image_fit", pa.string()),
        ("image_format", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.int32()),
        ("num_inference_steps", pa.string()),
        ("video_num_inference_steps", pa.string()),
        ("guidance_scale", pa.float64()),
        ("video_guidance_scale", pa.float64()),
        ("guidance_decay", pa.float64()),
        ("min_guidance_scale", pa.float64()),
        ("quality", pa.string()),
        ("skip_last_step", pa.bool_()),
        ("guided_share", pa.string()),
        ("seed", pa.int64()),
        ("rerolls", pa.int32()),
        ("first_seed", pa.int64()),
        ("uri", pa.string()),
        ("thumbnail_uri", pa.string()),
        ("media_type", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("signed", pa.bool_()),
        ("latents_sha256", pa.string()),
        ("frames", pa.int32()),
        ("batch_size", pa.int32()),
        ("cached_levels", pa.list_(pa.int32())),
        ("tiling", pa.int32()),
        ("brightness", pa.float32()),
        ("contrast", pa.float32()),
        ("sharpness", pa.float32()),
        ("motion", pa.float32()),
        ("max_motion", pa.float32()),
        ("motion_direction", pa.float32()),
        ("drift", pa.float32()),
        ("text_similarity", pa.float32()),
        ("aesthetics", pa.float32()),
        ("flags", pa.list_(pa.string())),
        ("dtype", pa.string()),
        ("device", pa.string()),
        ("node", pa.string()),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("started_at", pa.timestamp("us", "UTC")),
        ("finished_at", pa.timestamp("us", "UTC")),
        ("model", pa.string()),
        ("model_fingerprint", pa.string()),
        ("software_version", pa.string()),
        ("run", pa.string()),
    ]
)
"""Columns of every ledger row; the user's own follow (one whose name is taken here gets the prefix user_)."""


def _to_safetensors(tensors: "Mapping[str, Tensor]") -> bytes:
    from safetensors import TensorSpec, serialize

    # `safetensors.torch.save` makes a type of ctypes for each new number of bytes, and keeps it: 6 KiB for every file
    dense = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}  # held: pointers lead there
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in dense.items()
    }
    return serialize(specs)


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _from_ipc(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()
