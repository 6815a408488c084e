"""Texts without secrets, of limited length, made in linear time from whatever anyone wrote."""

import logging
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.settings import RenderSettings
from pipeline.ledger.job_records import Heartbeat, claim
from pipeline.ledger.ledger import LedgerWriter
from pipeline.reports.report import write_report
from pipeline.request import RenderRequest
from pipeline.rows import Batch, Item, RenderRow, RowError, ledger_table
from pipeline.stages.stage import Stage
from pipeline.storage.redaction import MAX_MESSAGE, redacted
from pipeline.storage.storage import Storage
from pipeline.storage.urls import climbs, is_address, shown
from pipeline.tables.readers import InputPart
from pipeline.tables.worklist import RowRules, candidates
from pyramid_flow import Preset

LENGTH = 2**18
LIMIT_S = 10.0
"""Of CPU time for so many characters; a linear pattern takes 0.1 s, a quadratic one minutes, and a cubic one years."""

HOSTILE = [
    *("token-", "token ", "token\t:\n", "token=", "sig", "secret_", "password'=", "token\\", "&sig=", "a:", "a@", "-"),
    *("://", "://a?", "://a:", "://:@", "://u:p@", "://a:b:", "https://", "https://a@", "AKIA", "//", "?", "#"),
    *(" ", "\\", '"', "x", "1.", "0x", ":", "%2e", "%25", "/.."),
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("call", [redacted, shown, climbs, is_address])
def test_long_hostile_text_takes_linear_time(call, text):
    began = time.process_time()
    call(text * (LENGTH // len(text)) + "\n")
    assert time.process_time() - began < LIMIT_S


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://h/a.png?X-Amz-Signature=s3cr3t&x=1 is gone", "https://h/a.png?*** is gone"),
        ("https://h/a.png? is gone", "https://h/a.png? is gone"),
        ("s3://b/a.png?X-Goog-Signature=s3cr3t", "s3://b/a.png?***"),
        ("https://me:s3@cr3t@h/a", "https://***@h/a"),
        ("https://s3cr3t@h/a", "https://***@h/a"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("a.png?sv=2024&sig=s3cr3t&X-Amz-Signature=s3cr3t", "a.png?sv=2024&sig=***&X-Amz-Signature=***"),
        (r"{\"access_token\": \"s3cr3t\"}", r'{\"access_token\": \"***"}'),
        ("password='s3cr3t s3cr3t' is wrong", "password='***' is wrong"),
        ("api_key=s3cr3t, Cookie: id=s3cr3t", "api_key=***, Cookie: ***"),
        ("no key pr-s3cr3ts3cr3ts3cr3ts3cr3t", "no key ***"),
        ("signal=1, tokenizer of a design: x", "signal=1, tokenizer of a design: x"),
    ],
)
def test_secrets_are_replaced_and_the_rest_is_kept(text, expected):
    assert redacted(text) == expected


def test_a_message_of_a_row_is_short_and_holds_no_secret():
    error = RowError.of("encode", ValueError("token=s3cr3t " + "x" * LENGTH))
    assert error.message.startswith("token=*** xxx")
    assert error.message.endswith("...")
    assert len(error.message) == MAX_MESSAGE


class Failing(Stage):
    name = "encode"

    def process(self, items):
        raise ValueError("https://h/a.png?X-Amz-Signature=s3cr3t " + "x" * LENGTH)


def test_a_log_tells_of_a_failed_row_what_the_ledger_tells(caplog):
    row = RenderRow(id="a", position="t:0", request=RenderRequest.parse({"prompt": "a"}).resolve(Preset(), "a"))
    with caplog.at_level(logging.WARNING):
        done = Failing()(Batch((Item(row),) * 2, pa.table({"own": [1, 2]})))
    assert done.items[0].row.error.message.startswith("https://h/a.png?*** xxx")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert all("?***" in message and len(message) < 2 * MAX_MESSAGE for message in messages)


def test_no_file_of_an_output_holds_what_signs_a_url(tmp_path):
    table, image = (f"https://me:s3cr3t@h/{name}?X-Amz-Signature=s3cr3t" for name in ("t.parquet", "a.png"))
    storage, part = Storage(str(tmp_path)), InputPart(table, 0, 0, 2)
    rows = [{"prompt": "a", "image": image}, {"prompt": "a", "image": image, "height": 7}]
    found = [one for i, row in enumerate(rows) for one in candidates(row, part.position(i), RowRules(Preset()))]
    writer = LedgerWriter(storage, "r")
    writer.append(ledger_table(Batch(tuple(Item(one.row) for one in found), pa.table({"own": [1, 2]})), {"run": "r"}))
    writer.flush()
    settings = RenderSettings(input=[table], output=str(tmp_path), model="toy", image_root=image)
    claim(storage, {"settings": settings.record()}, {"dtype": "float32"})
    Heartbeat(storage, "r", total=1).write("broken", f"InputError: input {table} cannot be read")
    write_report(storage)
    names = storage.list()
    assert {"job.json", "report.html", "runs/r.json"} < set(names)
    for name in names:
        data = storage.get(name)
        text = str(pq.read_table(pa.BufferReader(data)).to_pydict()) if name.endswith(".parquet") else data.decode()
        assert "t.parquet?***" in text
        assert "s3cr3t" not in text
