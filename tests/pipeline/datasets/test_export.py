"""A rendered output as a dataset: what is left out, splits, shards that resume, and what readers make of it."""

import hashlib
import io
import json
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from jobs import cli
from pipeline.datasets.export import ExportError, Options, _first_of_alike, export, select, shards
from pipeline.ledger import job_records
from pipeline.rows import LEDGER_SCHEMA
from pipeline.storage.storage import Storage
from pipeline.training.record import RecordError

PARQUET = Options("parquet", near=None)
WHOLE = 30


def thumbnail(number: int) -> bytes:
    """A picture unlike those of other numbers."""
    picture = Image.new("RGB", (128, 32), "black")
    draw = ImageDraw.Draw(picture)
    for place in range(32):
        if (number * 2654435761 >> place) & 1:
            draw.rectangle([4 * place, place % 4 * 8, 4 * place + 6, place % 4 * 8 + 7], fill="white")
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def row(number: int, **values: object) -> dict[str, object]:
    video = b"video %d" % number * (number + 1)
    return {
        "id": f"row{number:03d}",
        "status": "succeeded",
        "prompt": f"prompt {number // 2}" if number % 2 else f"Prompt  {number // 2}",
        "uri": f"videos/row{number:03d}.mp4",
        "thumbnail_uri": f"thumbnails/row{number:03d}.webp",
        "media_type": "video/mp4",
        "bytes": len(video),
        "sha256": hashlib.sha256(video).hexdigest(),
        "motion": number / 100,
        "flags": ["jump"] if number % 10 == 3 else [],
        "seconds": [("encode", 0.1), ("sample", 2.0)],
        "seed": number,
    } | values


@pytest.fixture
def output(tmp_path) -> Storage:
    """An output of 30 videos, two of each prompt, and of what no dataset wants."""
    storage = Storage(str(tmp_path / "out"))
    rows = [row(number) for number in range(WHOLE)]
    rows += [row(90, status="failed"), row(91, media_type="image/png"), row(92, duplicate_of="row000")]
    for number in range(WHOLE):
        storage.put(f"videos/row{number:03d}.mp4", b"video %d" % number * (number + 1))
        storage.put(f"thumbnails/row{number:03d}.webp", thumbnail(number))
    storage.put(ledger_part(), as_parquet(pa.Table.from_pylist(rows, LEDGER_SCHEMA)))
    return storage


def ledger_part() -> str:
    return f"metadata/part-{job_records.new_run_id()}-000000.parquet"


def as_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@pytest.fixture
def target(tmp_path) -> Storage:
    return Storage(str(tmp_path / "dataset"))


def test_only_videos_of_their_own_are_chosen(output):
    selection = select(output, PARQUET)
    assert selection.rows["id"].to_pylist() == [f"row{number:03d}" for number in range(WHOLE)]
    assert selection.left_out == {"failed": 1, "no video": 1, "equal to another row": 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"where": ("motion>=0.25",)}, 5),
        ({"where": ("motion<0.1", "seed != 4")}, 9),
        ({"where": ("prompt=prompt 3",)}, 1),
        ({"where": ("flags=jump",)}, 3),
        ({"where": ("flags!=jump",)}, 27),
        ({"unflagged": True}, 27),
    ],
)
def test_conditions_on_any_column_choose(output, options, expected):
    assert len(select(output, replace(PARQUET, **options)).rows) == expected


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("motion", "is no condition such as"),
        ("speed>1", "there is no column 'speed'"),
        ("motion>fast", "motion cannot be compared with 'fast': it is"),
        ("flags>jump", "flags is a list"),
        ("motion>99", "there is nothing to export"),
    ],
)
def test_wrong_conditions_are_said(output, where, reason):
    with pytest.raises(ExportError, match=reason):
        select(output, replace(PARQUET, where=(where,)))


def test_splits_share_no_prompt_and_stay_as_the_output_grows(output):
    options = replace(PARQUET, splits={"train": 8, "test": 2})
    rows = select(output, options).rows
    split_of = {}
    for prompt, split in zip(rows["prompt"].to_pylist(), rows["dataset_split"].to_pylist(), strict=True):
        assert split_of.setdefault(" ".join(prompt.lower().split()), split) == split
    assert len(split_of) == WHOLE / 2
    assert set(split_of.values()) == {"train", "test"}
    fewer = select(output, replace(options, where=("seed<10",))).rows
    assert fewer["dataset_split"].to_pylist() == rows["dataset_split"].to_pylist()[:10]


def test_a_column_may_say_the_splits(output):
    rows = select(output, replace(PARQUET, split_column="id")).rows
    assert rows["dataset_split"].to_pylist() == rows["id"].to_pylist()
    with pytest.raises(ExportError, match="is no word"):
        select(output, replace(PARQUET, split_column="uri"))


def test_of_videos_that_look_alike_the_first_is_kept(output):
    output.put("thumbnails/row007.webp", thumbnail(2))
    selection = select(output, replace(PARQUET, near=2))
    assert selection.left_out["nearly equal to another video"] == 1
    assert "row007" not in selection.rows["id"].to_pylist()


def test_hashes_are_compared_up_to_their_distance():
    hashes = [0, 0b11, 0b111, 1 << 63 | 1 << 5, None, None, (1 << 64) - 1]
    assert _first_of_alike(hashes, 2) == [True, False, True, False, True, True, True]
    assert _first_of_alike(hashes, 0) == [True] * 7


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_shards_have_at_most_their_size_and_go_on_where_they_stopped(output, target, kind):
    options = replace(PARQUET, kind=kind, shard_mb=0.0005, splits={"train": 1, "test": 1})
    selection = select(output, options)
    planned = shards(selection, options)
    assert (
        sorted(name for shard in planned for name in shard.rows["id"].to_pylist()) == selection.rows["id"].to_pylist()
    )
    assert all(len(shard.rows) == 1 or sum(shard.rows["bytes"].to_pylist()) <= 500 for shard in planned)
    first = next(export(output, target, selection, options))
    before = target.modified(first.name)
    assert [shard.name for shard in export(output, target, selection, options)] == [shard.name for shard in planned]
    assert target.modified(first.name) == before
    made = {name: target.get(name) for name in target.list() if "data" in name or name.endswith("tar")}
    again = Storage(str(target.uri) + "-again")
    list(export(output, again, selection, options))
    assert {name: again.get(name) for name in made} == made


def test_another_export_into_the_same_place_is_refused(output, target):
    selection = select(output, PARQUET)
    list(export(output, target, selection, PARQUET))
    with pytest.raises(RecordError, match="use another output"):
        list(export(output, target, selection, replace(PARQUET, license="mit")))


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("include_sources", [False, True])
def test_the_files_of_the_input_are_exported_only_if_asked_for(tmp_path, output, kind, include_sources):
    sources = {"position": "s3://internal/t.parquet:1", "image_uri": "s3://internal/a.png"}
    output.put("metadata/part-y.parquet", as_parquet(pa.Table.from_pylist([row(1, run="z", **sources)], LEDGER_SCHEMA)))
    flags = ["--to", kind, "--near", "none", "--where", "position=s3://internal/t.parquet:1"]
    flags += ["--include-sources"] * include_sources
    made = Storage(str(tmp_path / "made"))
    assert cli.main(["export", output.uri, made.uri, *flags]) == 0
    [shard] = [name for name in made.list() if name.endswith((".parquet", ".tar"))]
    assert (b"s3://internal/a.png" in made.get(shard)) == include_sources
    assert (b"position" in made.get(shard)) == include_sources


def test_datasets_loads_it(output, target, tmp_path):
    import datasets

    options = replace(PARQUET, splits={"train": 8, "test": 2}, license="cc-by-4.0")
    list(export(output, target, select(output, options), options))
    loaded = datasets.load_dataset(str(tmp_path / "dataset"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == Counter(
        select(output, options).rows["dataset_split"].to_pylist()
    )
    assert isinstance(loaded["train"].features["video"], datasets.Video)
    raw = loaded["train"].cast_column("video", datasets.Video(decode=False))[0]
    number = raw["seed"]
    assert raw["video"]["bytes"] == b"video %d" % number * (number + 1)
    assert json.loads(raw["seconds"]) == {"encode": 0.1, "sample": 2.0}
    text = target.get("README.md").decode()
    assert "license: cc-by-4.0" in text
    assert "30 videos of 15 prompts" in text
    assert "| motion | 0 | 0.15 | 0.29 |" in text


def test_webdataset_reads_it(output, target, tmp_path):
    from webdataset.tariterators import group_by_keys, tar_file_expander  # of WebDataset, which leaves files open

    options = replace(PARQUET, kind="webdataset")
    list(export(output, target, select(output, options), options))
    with (tmp_path / "dataset" / "train-000000.tar").open("rb") as shard:
        found = list(group_by_keys(tar_file_expander([{"url": shard.name, "stream": shard}])))
    assert len(found) == WHOLE
    for sample in found:
        record = json.loads(sample["json"])
        assert sample["mp4"] == b"video %d" % record["seed"] * (record["seed"] + 1)
        assert record["prompt"].lower().startswith("prompt")


def test_the_command_says_what_it_left_out(output, tmp_path, capsys):
    assert (
        cli.main(["export", str(tmp_path / "out"), str(tmp_path / "made"), "--to", "webdataset", "--split", "train=9"])
        == 0
    )
    said = capsys.readouterr().out
    assert "left out, 1 x: failed" in said
    assert "videos in file://" in said


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--where", "speed>1"], "there is no column 'speed'"),
        (["--split", "train"], "is not NAME=SHARE"),
        (["--split", "../up=1"], "is not NAME=SHARE"),
        (["--license", "a: b"], "license"),
        (["--to", "zip"], "webdataset"),
    ],
)
def test_a_wrong_export_exits_2(output, tmp_path, capsys, flags, reason):
    try:
        code = cli.main(["export", str(tmp_path / "out"), str(tmp_path / "made"), *flags])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert reason in capsys.readouterr().err


def test_an_output_without_a_ledger_exits_2(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path / "nothing"), str(tmp_path / "made")]) == 2
    assert "there is no ledger" in capsys.readouterr().err
