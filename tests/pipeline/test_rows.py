"""What travels between stages comes out as it went in, and becomes rows of the ledger."""

import gc
from datetime import UTC, datetime

import pyarrow as pa
import pytest
import torch

from pipeline.request import RenderRequest
from pipeline.rows import (
    LEDGER_SCHEMA,
    Batch,
    Item,
    RenderRow,
    RowError,
    as_bytes,
    as_tensor,
    ledger_table,
    pack,
    plain_text,
    unpack,
)
from pyramid_flow import Preset

PROMPT = "Füchse 🦊 \0 \u2028 \"'\\ "
REQUEST = RenderRequest.parse({"prompt": PROMPT, "seed": 2**63 - 1, "num_inference_steps": [1, 2, 3]})
FULL = RenderRow(
    id="x",
    position="file:///t.parquet:0",
    prompt=PROMPT,
    request=REQUEST.resolve(Preset(), "x"),
    warnings=("one", "two"),
    attempts=2,
    bytes=2**40,
    prompt_truncated=False,
    seconds={"encode": 0.1, "sample": 1e-300},
    started_at=datetime(2026, 1, 31, 1, 2, 3, 456789, UTC),
)
FAILED = RenderRow(id="y", position="t:1", error=RowError(stage="read", type="RequestError", message="height 700"))


def table(rows: int, **columns: list[object]) -> pa.Table:
    return pa.table({"own": [f"{i}" for i in range(rows)], **columns})


def assert_round_trip(batch: Batch) -> None:
    packed = pack(batch)
    assert all(isinstance(column, bytes) for column in packed.values())
    through_arrow = pa.Table.from_pylist([packed]).to_pylist()[0]
    back = unpack(through_arrow)
    assert [item.row for item in back.items] == [item.row for item in batch.items]
    assert back.columns.equals(batch.columns)
    for item, before in zip(back.items, batch.items, strict=True):
        assert item.tensors.keys() == before.tensors.keys()
        for name, tensor in before.tensors.items():
            assert item.tensors[name].dtype == tensor.dtype
            assert item.tensors[name].shape == tensor.shape
            assert torch.equal(item.tensors[name], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
def test_tensors_of_any_type_and_shape_survive(dtype, shape):
    assert_round_trip(Batch((Item(FULL, {"x": torch.ones(shape, dtype=dtype)}),), table(1)))


def test_rows_with_many_one_and_no_tensors_survive():
    items = [Item(FULL, {"a": torch.rand(2), "b.c/d": torch.rand(3)}), Item(FAILED), Item(FULL, {"a": torch.rand(1)})]
    assert_round_trip(Batch(tuple(items), table(3)))
    assert_round_trip(Batch((Item(FAILED),), table(1)))
    assert_round_trip(Batch((), table(0)))
    assert_round_trip(Batch(tuple(Item(FULL, {"n": torch.tensor(i)}) for i in range(12)), table(12)))


def test_shared_and_strided_memory_survives():
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"row": whole[1], "column": whole[:, 2], "turned": whole.T, "wide": whole[:1].expand(3, 6), "same": whole}
    assert_round_trip(Batch((Item(FULL, views), Item(FULL, {"row": whole[1]})), table(2)))


def test_files_of_ever_new_lengths_leave_nothing_behind():
    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    before = objects()
    for length in range(1000, 1200):
        pack(Batch((Item(FULL, {"file": torch.zeros(length, dtype=torch.uint8)}),), table(1)))
    assert objects() - before < 200


def test_packing_does_not_change_the_batch():
    tensor = torch.rand(3, 4).T
    before = tensor.clone()
    pack(Batch((Item(FULL, {"x": tensor}),), table(1)))
    assert torch.equal(tensor, before)
    assert not tensor.is_contiguous()


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0a\0\0", bytes(range(256)), b"x" * 100_000 + b"\0"])
def test_files_survive_as_tensors_with_their_trailing_zeros(data):
    assert as_bytes(as_tensor(data)) == data
    item = unpack(pack(Batch((Item(FULL, {"file": as_tensor(data)}),), table(1)))).items[0]
    assert as_bytes(item.tensors["file"]) == data


@pytest.mark.parametrize("text", ["half \ud83d of a fox", "\udcff", "fine 🦊"])
def test_errors_of_any_text_can_be_packed(text):
    error = RowError.of("decode", ValueError(text))
    assert_round_trip(Batch((Item(FAILED.updated(error=error, prompt=plain_text(text))),), table(1)))
    assert RowError.of("decode", ValueError()).message == "ValueError"


def test_a_failed_item_keeps_its_row_and_loses_its_tensors():
    item = Item(FULL, {"x": torch.ones(1)}).failed("sample", MemoryError("no memory"))
    assert item.tensors == {}
    assert item.row.error == RowError(stage="sample", type="MemoryError", message="no memory")
    assert item.row.request == FULL.request


def test_ledger_rows_hold_the_request_the_error_and_the_constants():
    records = ledger_table(Batch((Item(FULL), Item(FAILED)), table(2)), {"model": "m", "run": "r"})
    good, bad = records.to_pylist()
    assert records.schema.names == [*LEDGER_SCHEMA.names, "own"]
    assert (good["status"], good["id"], good["prompt"], good["seed"]) == ("succeeded", "x", PROMPT, 2**63 - 1)
    assert (good["num_inference_steps"], good["bytes"], good["warnings"]) == ("[1, 2, 3]", 2**40, ["one", "two"])
    assert (good["image_fit"], good["image_format"], good["guidance_decay"]) == (None, None, None)
    assert dict(good["seconds"]) == FULL.seconds
    assert good["started_at"] == FULL.started_at
    assert (bad["status"], bad["error_stage"], bad["error_message"]) == ("failed", "read", "height 700")
    assert {row["model"] for row in (good, bad)} == {"m"}
    assert bad["seed"] is None
    assert [row["own"] for row in (good, bad)] == ["0", "1"]


def test_a_ledger_row_holds_what_was_resolved_of_every_field():
    given = {"image": "a.png", "image_fit": "pad", "num_frames": 1, "guidance_decay": 0.5, "min_guidance_scale": 1.0}
    given |= {"quality": "high", "skip_last_step": True, "guided_share": 0.5}
    request = RenderRequest.parse({"prompt": "a", **given}).resolve(Preset(), "x")
    [record] = ledger_table(Batch((Item(FULL.updated(request=request)),), table(1)), {}).to_pylist()
    expected = given | {"image_uri": "a.png", "image_format": "png", "guided_share": "0.5"}
    del expected["image"]
    assert {name: record[name] for name in expected} == expected


def test_a_ledger_row_names_the_given_id_also_for_duplicates():
    row = FULL.updated(id="x-dup1", duplicate_of="x")
    [record] = ledger_table(Batch((Item(row),), table(1)), {}).to_pylist()
    assert (record["id"], record["duplicate_of"]) == ("x-dup1", "x")


@pytest.mark.parametrize("names", [("status", "user_status"), ("user_status", "status")])
def test_own_columns_never_hide_the_ledgers_or_each_other(names):
    columns = pa.table({name: [name] for name in (*names, "uri", "user_user_x")})
    [record] = ledger_table(Batch((Item(FULL),), columns), {}).to_pylist()
    assert (record["status"], record["uri"]) == ("succeeded", None)
    assert (record["user_status"], record["user_user_status"]) == ("user_status", "status")
    assert (record["user_uri"], record["user_user_x"]) == ("uri", "user_user_x")


def test_a_table_without_own_columns_has_ledger_rows_as_well():
    batch = Batch((Item(FULL), Item(FAILED)), table(2).select([]))
    assert ledger_table(unpack(pack(batch)), {}).schema.equals(LEDGER_SCHEMA)
