"""Input tables, the fates of their rows, and their batches; nothing is lost, doubled or in the wrong place."""

import datetime
import decimal
import io
import random
import re
import traceback
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.request import RenderRequest, RequestError
from pipeline.rows import Batch, Item, as_bytes, ledger_table, pack, unpack
from pipeline.tables import batching
from pipeline.tables import readers as inputs
from pipeline.tables.batching import IMAGE, read_batches, read_rows, read_units
from pipeline.tables.readers import (
    REQUEST_COLUMNS,
    InputError,
    InputPart,
    list_parts,
    own_columns,
    read_blocks,
    request_values,
)
from pipeline.tables.worklist import RowRules, RowStatus, Worklist, candidates, scan
from pyramid_flow import Preset
from tests.pipeline.sample_tables import write_table

PRESET = Preset(sizes=((384, 640), (384, 384)), max_num_frames=121)
RULES = RowRules(PRESET)
BAD = {"prompt": "bad", "height": 700}
UNTRAINED = {"prompt": "big", "height": 448, "width": 448}


def scanned(*files: Path) -> Worklist:
    return scan(list_parts([str(file) for file in files]), RULES)


def table_of(folder: Path, *rows: dict[str, object], **options: object) -> Worklist:
    return scanned(write_table(folder / "input.parquet", rows, **options))


def fates(worklist: Worklist) -> list[str]:
    return [RowStatus(fate).name for fate in worklist.fates]


def batches(worklist: Worklist, batch_size: int = 4) -> list[Batch]:
    return [batch for unit in read_units(worklist.part_works()) for batch in read_batches(unit, RULES, batch_size)]


def strings(*values: str) -> pa.StringArray:
    return pa.array(values, pa.string())


def rendered(worklist: Worklist) -> dict[str, str]:
    """Return the position of every row that is rendered, by its id."""
    items = [item.row for batch in batches(worklist) for item in batch.items]
    assert len({row.id for row in items}) == len(items)
    return {row.id: row.position.rsplit("/", 1)[1] for row in items}


# ---- input tables


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "neither a file nor a folder"),
        (b"", "not a readable .parquet file"),
        (b"prompt\na fox\n", "not a readable .parquet file"),
        (pa.table({"text": ["a"]}), "no column 'prompt', it has: text"),
        (
            pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]),
            "several columns of one name: prompt",
        ),
        (pa.table([["a"], ["b"], ["c"]], names=["prompt", "x", "x"]), "several columns of one name: x"),
    ],
)
def test_what_is_no_table_of_prompts_is_an_input_error(tmp_path, content, reason):
    file = tmp_path / "input.parquet"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        pq.write_table(content, file)
    with pytest.raises(InputError, match=reason) as caught:
        list_parts([str(file)])
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("url", ["", "\0", "s4://bucket/a.parquet", "memory://nothing"])
def test_places_that_are_none_are_an_input_error(url):
    with pytest.raises(InputError, match=r"^input "):
        list_parts([url])


def test_a_folder_without_tables_is_an_input_error(tmp_path):
    (tmp_path / "notes.txt").write_text("a fox")
    with pytest.raises(InputError, match=r"a folder with \.parquet, \.csv, \.jsonl, \.ndjson files"):
        list_parts([str(tmp_path)])


TEXT_TABLES = {
    "t.csv": 'prompt,id,height,guidance_scale,note\n"a fox, running",one,128,4.5,x\n2024-01-01,,,,y\n,,128,,\n',
    "t.jsonl": (
        '{"prompt": "a fox, running", "id": "one", "height": 128, "guidance_scale": 4.5, "note": "x"}\n'
        '{"prompt": "2024-01-01", "note": "y"}\n'
        '{"height": 128}\n'
    ),
}


@pytest.mark.parametrize("name", TEXT_TABLES)
def test_text_files_hold_the_same_rows_as_parquet(tmp_path, name):
    rows = [
        {"prompt": "a fox, running", "id": "one", "height": 128, "guidance_scale": 4.5, "note": "x"},
        {"prompt": "2024-01-01", "note": "y"},
        {"height": 128},
    ]
    expected = scanned(write_table(tmp_path / "t.parquet", rows))
    file = tmp_path / name
    file.write_text(TEXT_TABLES[name])
    worklist = scanned(file)
    assert worklist.expected_ids().to_pylist() == expected.expected_ids().to_pylist()
    assert set(rendered(worklist)) == set(rendered(expected))
    [batch, *_] = batches(worklist)
    assert batch.columns.column_names == ["note"]
    assert batch.items[0].row.position == f"file://{file}:0"


def test_text_files_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "READ_ROWS", 3)
    file = tmp_path / "t.csv"
    file.write_text("prompt\n" + "".join(f"prompt {i}\n" for i in range(8)))
    [part] = list_parts([str(file)])
    assert [(start, len(table)) for start, table in read_blocks(part) if len(table)] == [(0, 3), (3, 3), (6, 2)]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", "", "not a readable .csv file"),
        ("t.csv", "text,note\na,b\n", "no column 'prompt', it has: text, note"),
        ("t.jsonl", '{"prompt": "a"\n', "not a readable .jsonl file"),
        ("t.jsonl", "prompt\n", "not a readable .jsonl file"),
    ],
)
def test_text_that_is_no_table_is_an_input_error(tmp_path, name, content, reason):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(InputError, match=reason):
        list_parts([str(file)])


def test_a_text_file_that_breaks_off_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "TEXT_BLOCK", 2**10)
    file = tmp_path / "t.csv"
    file.write_text("prompt,height\n" + "a fox,64\n" * 1000 + "a fox,64,what\n")
    with pytest.raises(InputError, match="cannot be read"):
        scanned(file)


def test_damaged_pages_are_an_input_error(tmp_path):
    file = write_table(tmp_path / "input.parquet", [{"prompt": f"prompt {i}"} for i in range(100)])
    data = bytearray(file.read_bytes())
    data[10:400] = bytes(390)
    file.write_bytes(data)
    with pytest.raises(InputError, match="row group 0, cannot be read"):
        scanned(file)


def test_parts_come_in_a_fixed_order_and_a_file_only_once(tmp_path):
    for name in ("b", "a", "sub/c", "a-b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_table(tmp_path / f"{name}.parquet", [{"prompt": name}])
    (tmp_path / "ignored.txt").write_text("x")
    parts = list_parts([str(tmp_path)])
    assert [part.url.rsplit(f"{tmp_path.name}/")[1] for part in parts] == [
        "a-b.parquet",
        "a.parquet",
        "b.parquet",
        "sub/c.parquet",
    ]
    assert list_parts([str(tmp_path), str(tmp_path / "a.parquet")]) == parts
    assert list_parts([str(tmp_path / "b.parquet"), str(tmp_path)]) == [parts[2], parts[0], parts[1], parts[3]]


@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_tables_with_few_or_no_rows(tmp_path, num_rows):
    file = tmp_path / "input.parquet"
    pq.write_table(pa.table({"prompt": pa.array([f"{i}" for i in range(num_rows)], pa.string())}), file)
    worklist = scanned(file)
    assert worklist.num_rows == len(worklist.expected_ids().to_pylist()) == num_rows
    assert len(batches(worklist)) == -(-num_rows // 4)


def test_a_file_without_row_groups_is_empty(tmp_path):
    schema = pa.schema([("prompt", pa.string())])
    with pq.ParquetWriter(tmp_path / "input.parquet", schema):
        pass
    worklist = scanned(tmp_path / "input.parquet")
    assert (worklist.num_rows, worklist.expected_ids().to_pylist(), batches(worklist)) == (0, [], [])


def test_positions_count_across_row_groups_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "READ_ROWS", 3)
    schema = pa.schema([("prompt", pa.string())])
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema) as writer:
        for first, size in ((0, 8), (8, 0), (8, 5)):
            writer.write_table(pa.table({"prompt": [f"{i}" for i in range(first, first + size)]}, schema), size or 1)
    (tmp_path / "input.parquet").write_bytes(sink.getvalue())
    worklist = scanned(tmp_path / "input.parquet")
    rows = [item.row for batch in batches(worklist) for item in batch.items]
    assert (
        [row.prompt for row in rows] == [row.position.rsplit(":", 1)[1] for row in rows] == [str(i) for i in range(13)]
    )
    assert rows[0].position.startswith("file:///")


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_prompts_of_any_text_type(tmp_path, kind):
    prompts = pa.array(["a", "b", "a"]).cast(kind) if not pa.types.is_dictionary(kind) else pa.array(["a", "b", "a"])
    prompts = prompts.dictionary_encode() if pa.types.is_dictionary(kind) else prompts
    pq.write_table(pa.table({"prompt": prompts, "id": prompts}), tmp_path / "input.parquet")
    worklist = scanned(tmp_path / "input.parquet")
    assert fates(worklist) == ["RENDER", "RENDER", "DUPLICATE"]
    assert list(rendered(worklist)) == ["a", "b"]


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([1]), "prompt 1: input should be a valid string"),
        (pa.nulls(1), "prompt is missing"),
        (pa.array([{"text": "a"}]), "valid string"),
        (pa.array([["a"]]), "valid string"),
        (pa.array([1], pa.timestamp("us")), "valid string"),
    ],
)
def test_prompts_of_other_types_are_bad_rows(tmp_path, column, reason):
    pq.write_table(pa.table({"prompt": column}), tmp_path / "input.parquet")
    [batch] = batches(scanned(tmp_path / "input.parquet"))
    assert reason in batch.items[0].row.error.message


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("name", ["prompt", "id", "image"])
def test_text_that_is_not_utf8_is_a_bad_row_only(tmp_path, name, encoded):
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    broken = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffc"))
    broken = broken.dictionary_encode() if encoded else broken
    columns = {"prompt": pa.array(["x", "y", "z"]), name: broken, "own": broken}
    pq.write_table(pa.table(columns), tmp_path / "input.parquet")
    done = [unpack(pack(batch)) for batch in batches(scanned(tmp_path / "input.parquet"), 1)]
    errors = {item.row.position[-1]: item.row.error for batch in done for item in batch.items}
    assert [position for position, error in errors.items() if error] == ["1"]
    assert "not valid Unicode" in errors["1"].message
    assert len(errors) == 3
    assert all(len(ledger_table(batch, {})) == 1 for batch in done)


def array_of(kind: pa.DataType, values: list[object]) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.array(values).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.bool_(), True),
        (pa.int8(), -1),
        (pa.uint64(), 2**64 - 1),
        (pa.float16(), 0.5),
        (pa.string_view(), "view"),
        (pa.large_string(), "large"),
        (pa.binary(), b"\xff\x00\x00"),
        (pa.binary(2), b"\x00\x00"),
        (pa.date32(), datetime.date(2026, 1, 31)),
        (pa.time64("us"), datetime.time(1, 2, 3)),
        (pa.timestamp("us", "UTC"), datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC)),
        (pa.duration("us"), datetime.timedelta(1)),
        (pa.decimal128(9, 2), decimal.Decimal("1.50")),
        (pa.decimal256(60, 2), decimal.Decimal("1.50")),
        (pa.list_(pa.int32()), [1, None]),
        (pa.list_(pa.int32(), 2), [1, 2]),
        (pa.struct([("a", pa.list_(pa.string()))]), {"a": ["x"]}),
        (pa.struct([("a", pa.large_list(pa.binary_view()))]), {"a": [b"x"]}),
        (pa.list_(pa.string_view()), ["x"]),
        (pa.map_(pa.string(), pa.string_view()), [("a", "x")]),
        (pa.map_(pa.string(), pa.int32()), [("a", 1)]),
        (pa.dictionary(pa.int32(), pa.string()), "word"),
        (pa.uuid(), b"0123456789abcdef"),
        (pa.null(), None),
    ],
    ids=str,
)
def test_own_columns_of_any_type_are_carried_through(tmp_path, kind, value):
    column = array_of(kind, [value, None, value])
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "own": column}), tmp_path / "input.parquet")
    expected = pq.read_table(tmp_path / "input.parquet")["own"].to_pylist()
    done = [ledger_table(unpack(pack(batch)), {}) for batch in batches(scanned(tmp_path / "input.parquet"), 2)]
    table = pa.concat_tables(done, promote_options="permissive")
    assert table["prompt"].to_pylist() == ["a", "b", "c"]
    assert table["own"].to_pylist() == expected


def test_only_the_asked_for_columns_are_read(tmp_path):
    file = write_table(tmp_path / "input.parquet", [{"prompt": "a", "prompt.b": 1, "own": 2, "status": 3}])
    [part] = list_parts([str(file)])
    [(start, request)] = read_blocks(part, REQUEST_COLUMNS)
    assert start == 0
    assert "own" not in request.column_names
    assert request_values(request) == [{"prompt": "a"}]
    [(_, table)] = read_blocks(part)
    assert own_columns(table).column_names == ["prompt.b", "own", "status"]


# ---- candidates


def test_copies_have_ids_seeds_and_one_content():
    made = candidates({"prompt": "a", "num_videos_per_prompt": 3, "seed": 5, "id": "x"}, "t:0", RULES)
    assert [(c.row.id, c.row.request.id, c.row.request.seed) for c in made] == [
        (f"x-{i}",) * 2 + (5 + i,) for i in range(3)
    ]
    [single] = candidates({"prompt": "a", "num_videos_per_prompt": 1, "id": "x"}, "t:0", RULES)
    assert single.row.id == "x"


def test_a_row_has_the_same_ids_whether_its_size_is_accepted_or_not():
    for values in ({}, {"id": "x"}, {"num_videos_per_prompt": 3}):
        refused = candidates({**UNTRAINED, **values}, "t:0", RULES)
        accepted = candidates({**UNTRAINED, **values}, "t:0", RowRules(PRESET, allow_untrained=True))
        assert [c.row.id for c in refused] == [c.row.id for c in accepted]
        assert all("--allow-untrained" in c.row.error.message for c in refused)
        assert all(c.row.error is None for c in accepted)


def test_a_bad_row_keeps_its_id_if_it_is_one_and_its_prompt_if_it_is_text():
    [good_id] = candidates({**BAD, "id": "x"}, "t:0", RULES)
    [bad_id] = candidates({**BAD, "id": "../x"}, "t:0", RULES)
    [no_text] = candidates({"prompt": 5, "id": "x"}, "t:0", RULES)
    assert (good_id.row.id, good_id.row.prompt, good_id.row.position) == ("x", "bad", "t:0")
    assert RenderRequest.parse({"prompt": "a", "id": bad_id.row.id})
    assert no_text.row.prompt is None
    assert all(c.row.request is None and c.row.error.stage == "read" for c in (good_id, bad_id, no_text))


# ---- fates


def test_equal_rows_are_rendered_once_across_files_and_row_groups(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "own": 1}]
    one = write_table(tmp_path / "1.parquet", rows, row_group_size=1)
    two = write_table(tmp_path / "2.parquet", rows[::-1], row_group_size=2)
    worklist = scanned(one, two)
    a, b = (RenderRequest(prompt=prompt).content_hash for prompt in "ab")
    assert fates(worklist) == ["RENDER"] * 2 + ["DUPLICATE"] * 4
    assert rendered(worklist) == {a: "1.parquet:0", b: "1.parquet:1"}
    assert [(echo.id, echo.duplicate_of, echo.part, echo.index) for echo in worklist.echoes] == [
        (f"{a}-dup1", a, 2, 0),
        (f"{a}-dup2", a, 3, 0),
        (f"{b}-dup1", b, 3, 1),
        (f"{a}-dup3", a, 4, 0),
    ]
    again = scanned(one, two)
    assert (again.expected_ids(), again.echoes) == (worklist.expected_ids(), worklist.echoes)


def test_one_id_with_equal_contents_is_a_duplicate(tmp_path):
    worklist = table_of(tmp_path, {"id": "x", "prompt": "a", "own": 1}, {"id": "x", "prompt": "a", "own": 2})
    assert fates(worklist) == ["RENDER", "DUPLICATE"]
    assert worklist.expected_ids().to_pylist() == ["x", "x-dup1"]


@pytest.mark.parametrize("prompts", ["ab", "abc", "aab", "aba", "abb", "aabba"])
def test_one_id_with_different_contents_fails_all_its_rows_naming_positions(tmp_path, prompts):
    worklist = table_of(tmp_path, *({"id": "x", "prompt": prompt} for prompt in prompts), {"prompt": "fine"})
    assert fates(worklist) == ["CONFLICT"] * len(prompts) + ["RENDER"]
    assert [echo.id for echo in worklist.echoes] == ["x", *(f"x-dup{i}" for i in range(1, len(prompts)))]
    assert worklist.num_rows == 1
    for echo in worklist.echoes:
        assert echo.duplicate_of is None
        one, other = (int(number) for number in re.findall(r"input\.parquet:(\d+)", echo.conflict))
        assert prompts[one] != prompts[other]
        assert prompts[echo.index] in (prompts[one], prompts[other])


def test_copies_and_rows_can_claim_one_id(tmp_path):
    copies = {"id": "x", "prompt": "a", "seed": 5, "num_videos_per_prompt": 2}
    assert fates(table_of(tmp_path, copies, copies)) == ["RENDER"] * 2 + ["DUPLICATE"] * 2
    assert fates(table_of(tmp_path, copies, {**copies, "num_videos_per_prompt": 3})) == (
        ["RENDER"] * 2 + ["DUPLICATE"] * 2 + ["RENDER"]
    )
    # the second copy's seed is 6, this row's is 5; derived seeds differ as well
    row = {"id": "x-1", "prompt": "a", "seed": 5}
    assert fates(table_of(tmp_path, copies, row)) == ["RENDER", "CONFLICT", "CONFLICT"]
    unseeded = [{**copies, "seed": None}, {"id": "x-0", "prompt": "a"}]
    assert fates(table_of(tmp_path, *unseeded)) == ["CONFLICT", "RENDER", "CONFLICT"]


def test_a_duplicate_never_takes_the_id_of_another_row(tmp_path):
    worklist = table_of(
        tmp_path,
        {"id": "x-dup2", "prompt": "first"},
        {"id": "x", "prompt": "a"},
        {"id": "x", "prompt": "a"},
        {"id": "x", "prompt": "a"},
        {"id": "x-dup1", "prompt": "last"},
    )
    assert fates(worklist) == ["RENDER", "RENDER", "DUPLICATE", "DUPLICATE", "RENDER"]
    assert [echo.id for echo in worklist.echoes] == ["x-dup3", "x-dup4"]


def test_equal_bad_rows_are_duplicates(tmp_path):
    worklist = table_of(tmp_path, BAD, {"prompt": "fine"}, BAD, {**BAD, "own": 1}, UNTRAINED, UNTRAINED)
    assert fates(worklist) == ["RENDER", "RENDER", "DUPLICATE", "DUPLICATE", "RENDER", "DUPLICATE"]
    assert len(set(worklist.expected_ids().to_pylist())) == 6


def test_no_fate_is_a_zero_byte():
    assert all(0 < fate < 256 for fate in RowStatus)


def random_rows(seed: int) -> list[dict[str, object]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(rng.randrange(1, 60)):
        row: dict[str, object] = {"prompt": rng.choice(["a", "b", "", None])}
        for name, values in (
            ("id", ["x", "x-0", "x-1", "x-dup1", "x-dup2", "x-0-dup1", "bad/id", "y"]),
            ("seed", [0, 1, -1]),
            ("height", [384, 700, 448]),
            ("num_videos_per_prompt", [1, 2, 0]),
            ("own", [1, 2]),
        ):
            if rng.random() < 0.4:
                row[name] = rng.choice(values)
        rows.append(row)
    return rows


def is_understood(values: dict[str, object]) -> bool:
    try:
        RenderRequest.parse(values)
    except RequestError:
        return False
    return True


def naive_claims(rows: list[dict[str, object]]) -> list[tuple[str, object]]:
    """Return what each row asks for, in the plainest way: (id, everything that makes its video), one per copy."""
    claims: list[tuple[str, object]] = []
    for position, row in enumerate(rows):
        values = {name: value for name, value in row.items() if value is not None and name != "own"}
        [*made] = candidates(values, f"naive:{position}", RULES)
        asked = {name: value for name, value in values.items() if name not in ("id", "num_videos_per_prompt")}
        contents = [(sorted(asked.items()), c.row.request.seed if c.row.request else None) for c in made]
        if not is_understood(values):
            contents = [(sorted(values.items()), "not understood")]
        claims += [(candidate.row.id, str(content)) for candidate, content in zip(made, contents, strict=True)]
    return claims


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_agree_with_a_naive_model(tmp_path, seed):
    rows = [{"prompt": "a"}, *random_rows(seed)]
    worklist = table_of(tmp_path, *rows, row_group_size=random.Random(seed).randrange(1, 70))
    claims = naive_claims(rows)
    contents: dict[str, list[object]] = {}
    expected = []
    for row_id, content in claims:
        contents.setdefault(row_id, []).append(content)
    met: Counter[str] = Counter()
    for row_id, _ in claims:
        disputed = len(set(contents[row_id])) > 1
        expected.append("CONFLICT" if disputed else "DUPLICATE" if met[row_id] else "RENDER")
        met[row_id] += 1
    assert fates(worklist) == expected

    ids = worklist.expected_ids().to_pylist()
    assert len(ids) == len(set(ids)) == len(claims)
    assert set(contents) <= set(ids)
    assert all(b"\0" not in work.fates for work in worklist.part_works())
    assert len(rendered(worklist)) == worklist.num_rows == expected.count("RENDER")
    assert {echo.duplicate_of for echo in worklist.echoes} - {None} <= set(rendered(worklist))

    places = [(echo.part, echo.index) for echo in worklist.echoes]
    assert places == sorted(set(places))
    done = set(random.Random(seed).sample(ids, len(ids) // 2))
    left = worklist.remaining(strings(*done))
    assert set(rendered(left)) | {echo.id for echo in left.echoes} == set(ids) - done
    assert set(left.expected_ids().to_pylist()) >= set(ids) - done
    assert worklist.remaining(strings(*ids)).num_rows == 0
    assert fates(worklist.remaining(strings())) == fates(worklist)


# ---- batches


def test_batches_have_one_shape_a_limit_and_the_order_of_the_input(tmp_path):
    shapes = [{}, {"height": 384, "width": 384}, {"num_frames": 1}, {"image": "a.png"}, {"guidance_scale": 0}]
    rng = random.Random(0)
    rows = [{"prompt": f"{i}", "own": i, **rng.choice([*shapes, {"height": 700}])} for i in range(60)]
    worklist = table_of(tmp_path, *rows)
    made = batches(worklist, 4)
    seen: dict[object, list[int]] = {}
    for batch in made:
        keys = {item.row.request.shape if item.row.request else None for item in batch.items}
        assert len(keys) == 1
        own = batch.columns["own"].to_pylist()
        assert own == [int(item.row.prompt) for item in batch.items]
        seen.setdefault(keys.pop(), []).extend(own)
        assert len(own) <= 4 or batch.items[0].row.error
    assert all(numbers == sorted(numbers) for numbers in seen.values())
    assert sorted(number for numbers in seen.values() for number in numbers) == list(range(60))
    assert sum(batch.items[0].row.error is not None for batch in made) == 1
    assert len(made) == 1 + sum(-(-len(numbers) // 4) for key, numbers in seen.items() if key)


def test_rows_of_many_small_files_fill_batches_together(tmp_path, monkeypatch):
    shapes = [{}, {"num_frames": 1}, {"guidance_scale": 0}]
    for number in range(20):
        rows = [{"prompt": f"{number}.{i}", "own": number, **shapes[(number + i) % 3]} for i in range(5)]
        write_table(tmp_path / f"{number:02}.parquet", rows)
    worklist = scanned(tmp_path)
    made = batches(worklist, 4)
    assert len(made) == sum(-(-count // 4) for count in worklist.num_rows_by_shape.values())
    assert sum(map(len, made)) == 100
    for batch in made:
        assert [item.row.prompt.split(".")[0] for item in batch.items] == list(
            map(str, batch.columns["own"].to_pylist())
        )
    monkeypatch.setattr(batching, "READ_ROWS", 10)
    assert [len(unit) for unit in read_units(worklist.part_works())] == [2] * 10


def test_files_with_different_columns_share_no_batch(tmp_path):
    write_table(tmp_path / "1.parquet", [{"prompt": "a", "own": 1}])
    write_table(tmp_path / "2.parquet", [{"prompt": "b", "own": "one"}])
    write_table(tmp_path / "3.parquet", [{"prompt": "c", "own": 3}])
    made = batches(scanned(tmp_path))
    assert sorted(batch.columns["own"].to_pylist() for batch in made if len(batch) > 1) == [[1, 3]]
    assert sum(map(len, made)) == 3


def test_rows_that_wait_for_their_shape_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "READ_ROWS", 3)
    monkeypatch.setattr(inputs, "READ_ROWS", 1)
    rows = [{"prompt": f"{i}", "num_frames": 1 + 8 * i} for i in range(9)]
    [unit] = [list(worklist_unit) for worklist_unit in [table_of(tmp_path, *rows).part_works()]]
    made = read_batches(unit, RULES, 4)
    assert next(made).items[0].row.prompt == "0"  # before the last row is read
    assert sum(map(len, made)) == 8


def test_only_rows_that_are_to_be_rendered_are_batched(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}, {"prompt": "c"}]
    worklist = table_of(tmp_path, *rows)
    ids = list(rendered(worklist))
    assert [batch.items[0].row.prompt for batch in batches(worklist, 1)] == ["a", "c"]
    assert list(rendered(worklist.remaining(strings(*ids[:1])))) == ids[1:]
    assert batches(worklist.remaining(strings(*ids))) == []


def test_image_bytes_reach_every_copy_and_no_other_row(tmp_path):
    data = b"\x89PNG\x00\x00"
    rows = [{"prompt": "a", "image": data, "num_videos_per_prompt": 2}, {"prompt": "b"}, {**UNTRAINED, "image": data}]
    items = {
        item.row.position[-1] + item.row.id[-2:]: item for b in batches(table_of(tmp_path, *rows)) for item in b.items
    }
    images = {name: as_bytes(item.tensors[IMAGE]) for name, item in items.items() if item.tensors}
    assert images == {"0-0": data, "0-1": data}


def test_image_uris_travel_without_bytes(tmp_path):
    [batch] = batches(table_of(tmp_path, {"prompt": "a", "image": "a.png"}))
    assert (batch.items[0].tensors, batch.items[0].request.image_uri) == ({}, "a.png")


SECRET = "s3cr3t"
SIGNED = [
    f"{start}{query}"
    for start in ("https://h/a.png", "s3://bucket/a.png", "a.png")
    for query in ("?X-Amz-Credential=s3cr3t&X-Amz-Signature=s3cr3t", "?X-Goog-Signature=s3cr3t", "?sv=1&sig=s3cr3t")
]


@pytest.mark.parametrize("url", [*SIGNED, "https://me:s3cr3t@h/a.png", "https://h/a.png?key=s3cr3t"])
def test_what_signs_an_image_url_is_read_but_not_recorded(url):
    [candidate] = candidates({"prompt": "a", "image": url}, "t:0", RULES)
    assert candidate.row.image_source == url
    row = unpack(pack(Batch((Item(candidate.row),), pa.table({"own": ["x"]})))).items[0].row
    assert row.image_source == url
    ledger = ledger_table(Batch((Item(row),), pa.table({"own": ["x"]})), {"run": "r"})
    assert ledger["image_uri"][0].as_py() in (
        "https://h/a.png?***",
        "https://***@h/a.png",
        "s3://bucket/a.png?***",
        "a.png?***",
    )
    assert "s3cr3t" not in str(ledger.to_pydict()) + row.request.model_dump_json()


@pytest.mark.parametrize("uri", ["a.png", "what?.png", "a#1.png", "s3://bucket/a.png", "https://h/a.png"])
def test_image_uris_that_are_not_signed_are_recorded_as_given(uri):
    [candidate] = candidates({"prompt": "a", "image": uri}, "t:0", RULES)
    assert candidate.row.request.image_uri == uri


def test_the_id_of_a_row_depends_on_its_image_url_as_given(tmp_path):
    url = "https://me:s3cr3t@h/a.png?X-Amz-Signature=s3cr3t"
    [candidate] = candidates({"prompt": "a fox", "image": url}, "t:0", RULES)
    assert candidate.row.id == "6c448d2945d5006e1f0bb09be687340d"
    before = table_of(tmp_path, {"prompt": "a", "id": "one", "image": "https://h/a.png?sig=old"})
    again = table_of(tmp_path, {"prompt": "a", "id": "one", "image": "https://h/a.png?sig=new"})
    assert again.remaining(before.ids).num_rows == 0


def test_the_position_of_a_row_holds_nothing_that_signs_the_url_of_its_table(tmp_path):
    part = InputPart("https://me:s3cr3t@h/t.parquet?X-Amz-Signature=s3cr3t", 0, 4, 8)
    assert part.position(3) == "https://***@h/t.parquet?***:7"


@pytest.mark.parametrize(
    "call", [lambda url: list_parts([url]), lambda url: next(read_blocks(InputPart(url, 0, 0, 1)))]
)
def test_errors_hold_nothing_that_signs_the_url_of_a_table(call):
    with pytest.raises(InputError, match=r"memory:/+t\.parquet\?\*\*\*") as caught:
        call(f"memory://t.parquet?X-Amz-Signature={SECRET}")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_single_rows_are_found_by_their_number_in_reading_order(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "READ_ROWS", 2)
    rows = [{"prompt": f"{i}", "num_videos_per_prompt": 1 + i % 2, "own": i} for i in range(6)]
    [work] = table_of(tmp_path, *rows).part_works()
    order = [number for number in range(6) for _ in range(1 + number % 2)]
    found = {index: batch for index, batch in read_rows(work.part, RULES, [0, 2, 5, 8])}
    assert {index: batch.items[0].row.prompt for index, batch in found.items()} == {
        i: str(order[i]) for i in (0, 2, 5, 8)
    }
    assert all(batch.columns["own"].to_pylist() == [order[index]] for index, batch in found.items())


# ---- folders, shards, shapes and rows


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("https://host.example/a/b/table.csv", "https://host.example/a/b"),
        ("https://host.example/a/b/table.csv?signature=c/d", "https://host.example/a/b"),
        ("memory://a/b/table.csv", "memory:///a/b"),
    ],
)
def test_the_folder_of_a_table_is_found_without_asking_a_web_server(url, folder):
    assert inputs.folder_of(url) == folder


def test_shards_share_out_every_row_once_with_its_duplicates(tmp_path):
    rows = [{"prompt": f"{i % 40}", "own": i} for i in range(60)]
    rows += [{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}]
    worklist = table_of(tmp_path, *rows)
    shards = [worklist.shard(number, 3) for number in (1, 2, 3)]
    ids = [shard.expected_ids().to_pylist() for shard in shards]
    together = sorted(row_id for own in ids for row_id in own)
    assert together == sorted(worklist.expected_ids().to_pylist())
    assert min(shard.num_rows for shard in shards) > 5
    assert sum(shard.num_rows for shard in shards) == worklist.num_rows
    for shard, own in zip(shards, ids, strict=True):
        assert set(rendered(shard)) <= set(own)
        assert all(echo.duplicate_of in own for echo in shard.echoes if echo.duplicate_of)
    [both] = [own for own in ids if "x" in own]
    assert "x-dup1" in both
    assert sorted(worklist.shard(1, 1).expected_ids().to_pylist()) == together


def test_the_head_of_a_table_is_its_first_rows_with_their_copies_and_duplicates(tmp_path):
    rows = [{"prompt": "a", "num_videos_per_prompt": 2}, BAD, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "b"}]
    worklist = table_of(tmp_path, *rows)
    whole = worklist.expected_ids().to_pylist()
    heads = [worklist.head(count) for count in range(1, 7)]
    assert [len(head.expected_ids()) for head in heads] == [2, 3, 4, 5, 6, 6]
    assert heads[-1].expected_ids().to_pylist() == whole
    assert [batch.items[0].row.prompt for batch in batches(heads[0], 1)] == ["a", "a"]
    assert [len(head.echoes) for head in heads] == [0, 0, 0, 0, 1, 1]


def test_the_first_rows_of_each_shape_stand_for_all(tmp_path):
    rows = [{"prompt": f"{i}", "num_frames": 9 if i % 3 else 17} for i in range(12)]
    worklist = table_of(tmp_path, BAD, *rows)
    first = worklist.first_of_each_shape(2)
    assert [batch.items[0].row.prompt for batch in batches(first, 1)] == ["0", "3", "1", "2"]
    assert sorted(first.num_rows_by_shape.values()) == [2, 2]
    assert sorted(worklist.num_rows_by_shape.values()) == [4, 8]
    assert len(first.expected_ids()) == 4


def test_only_some_rows_are_left_to_render(tmp_path):
    rows = [{"id": name, "prompt": name} for name in "abca"]
    worklist = table_of(tmp_path, *rows)
    some = worklist.only(strings("a", "c", "nobody"))
    assert list(rendered(some)) == ["a", "c"]
    assert some.echoes == ()
    assert worklist.remaining(strings("a")).only(strings("a", "b")).num_rows == 1
    assert worklist.only(strings()).num_rows == 0


def test_rows_are_found_by_their_ids(tmp_path):
    rows = [{"id": "x", "prompt": "a", "num_videos_per_prompt": 2}, {"prompt": "b"}, {"prompt": "b"}, {"prompt": "c"}]
    one = write_table(tmp_path / "1.parquet", rows)
    two = write_table(tmp_path / "2.parquet", [{"prompt": "d"}, {"prompt": "e"}])
    worklist = scanned(one, two)
    b, e = (RenderRequest(prompt=prompt).content_hash for prompt in "be")
    found = [(part.url.rsplit("/")[-1], rows) for part, rows in worklist.rows_of(strings("x-1", "x-0", f"{b}-dup1", e))]
    assert found == [("1.parquet", {0: "x-1", 2: f"{b}-dup1"}), ("2.parquet", {1: e})]
    assert list(worklist.rows_of(strings("nobody"))) == []
