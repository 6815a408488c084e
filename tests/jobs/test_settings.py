"""Settings: flags win over YAML, nothing else counts, and every mistake is one line and exit code 2."""

import os
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from jobs.settings import DemoSettings, RenderSettings, ServeSettings, parse
from pipeline.media.quality import STANDARD, Thresholds
from pipeline.request import RenderRequest

NEEDED = ["--input", "in.parquet", "--output", "out", "--model", "model"]
VALUES = {"input": ["in.parquet"], "output": "out", "model": "model"}


def parsed(*flags: str) -> RenderSettings:
    return parse(RenderSettings, [*NEEDED, *flags])


def made(**values: object) -> RenderSettings:
    """Return settings without a command line: rules of a single field need none."""
    return RenderSettings(**VALUES, **values)


def from_yaml(folder: Path, values: object, *flags: str) -> RenderSettings:
    file = folder / "job.yaml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return parse(RenderSettings, ["--config", str(file), *flags])


def the_line(capsys: pytest.CaptureFixture[str], caught: pytest.ExceptionInfo[SystemExit]) -> str:
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.endswith("\n")
    [line] = output.err.splitlines()
    assert line.startswith("pyramid-render render: ")
    return line


def test_the_help_and_the_readme_name_every_column():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    words = re.findall(r"\w+", str(RenderSettings.__doc__))
    for name in RenderRequest.model_fields:
        assert name in words
        assert f"`{name}`" in readme


def test_defaults_are_those_of_the_help():
    settings = parsed()
    assert (settings.input, settings.output, settings.model) == (["in.parquet"], "out", "model")
    assert (settings.batch_size, settings.device, settings.dtype, settings.dry_run) == (4, "auto", "auto", False)
    assert (settings.ledger_rows, settings.ledger_seconds, settings.workers) == (1000, 30, {})


def test_limits_of_flags_are_shares():
    assert parsed().thresholds == STANDARD
    limits = ("--black-below", "0.1", "--white-above", "1", "--flat-below", "0", "--frozen-below", "0.01")
    assert parsed(*limits, "--jump-above", "0.5").thresholds == Thresholds(0.1, 1, 0, 0.01, 0.5)
    with pytest.raises(SystemExit):
        parsed("--black-below", "20")


def test_flags_win_over_the_file(tmp_path):
    file = {**VALUES, "batch_size": 2, "dry_run": True, "tile": 256, "allow_failed": "3"}
    assert from_yaml(tmp_path, file).model_dump(include=set(file)) == file
    settings = from_yaml(tmp_path, file, "--batch-size", "9", "--no-dry-run", "--output", "other", "--input", "b")
    assert (settings.batch_size, settings.dry_run, settings.output, settings.input) == (9, False, "other", ["b"])
    assert (settings.tile, settings.allow_failed) == (256, "3")


def test_needed_settings_may_be_split_between_file_and_flags(tmp_path):
    assert from_yaml(tmp_path, {"input": ["a"], "output": "o"}, "--model", "m").model == "m"
    assert from_yaml(tmp_path, "", *NEEDED).output == "out"


def test_inputs_may_be_repeated_and_the_last_of_other_flags_wins():
    assert parsed("--input", "b.parquet").input == ["in.parquet", "b.parquet"]
    assert parsed("--batch-size", "2", "--batch-size=3").batch_size == 3


@pytest.mark.parametrize(("given", "tile"), [("auto", "auto"), ("none", None), ("96", 96)])
def test_a_tile_is_auto_or_none_or_a_side(tmp_path, given, tile):
    assert parsed("--tile", given).tile == parse(ServeSettings, ["--tile", given]).tile == tile
    assert from_yaml(tmp_path, {**VALUES, "tile": tile}).tile == tile
    assert (parsed().tile, parsed().memory) == ("auto", "auto")


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parsed().batch_size = 5


def test_no_environment_variable_changes_a_setting(monkeypatch, tmp_path):
    expected = parsed().model_dump()
    monkeypatch.chdir(tmp_path)
    lines = []
    for name in RenderSettings.model_fields:
        for spelled in (name, name.upper(), f"PYRAMID_RENDER_{name.upper()}"):
            monkeypatch.setenv(spelled, "77")
            lines.append(f"{spelled}=77")
    (tmp_path / ".env").write_text("\n".join(lines))
    assert parsed().model_dump() == expected
    assert os.environ["BATCH_SIZE"] == "77"
    assert parse(DemoSettings, []).output == "outputs/demo"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", "x"], ["batch-size 'x'", "integer"]),
        (["--batch-size", "0"], ["batch-size '0'", "greater than or equal to 1"]),
        (["--batch-size", "2.5"], ["batch-size '2.5'"]),
        (["--batch-size", "a\nb"], ["batch-size 'a\\nb'"]),
        (["--batch-size"], ["--batch-size", "expected one argument"]),
        (["--sample-workers", "0"], ["sample-workers"]),
        (["--allow-image-host", "*.example"], ["allow-image-host", "*.example"]),
        (["--allow-image-host", "https://a.example"], ["allow-image-host", "https://a.example"]),
        (["--sample-gpus", "1.5"], ["sample-gpus"]),
        (["--layout", "other"], ["layout"]),
        (["--gpus", "-1"], ["gpus '-1'"]),
        (["--device", "tpu"], ["device 'tpu'", "'cuda'"]),
        (["--dtype", "float16"], ["dtype 'float16'", "'bfloat16'"]),
        (["--tile", "32"], ["tile '32'", "64"]),
        (["--tile", "100"], ["tile '100'", "must be a multiple of 32"]),
        (["--tile", "some"], ["tile 'some'", "or auto, or none"]),
        (["--memory", "some"], ["memory 'some'", "'auto', 'full', 'offload' or 'sequential'"]),
        (["--ledger-seconds", "0"], ["ledger-seconds '0'"]),
        (["--ledger-seconds", "nan"], ["ledger-seconds 'nan'"]),
        (["--output", ""], ["output ''"]),
        (["--nope", "3"], ["--nope"]),
        (["--imput", "x"], ["--imput", "did you mean --input?"]),
        (["--allow-fail", "3"], ["did you mean --allow-failed?"]),
        (["--out", "x"], ["--out"]),
        (["--batch_size", "3"], ["--batch_size"]),
        (["--dry-run=false"], ["--dry-run"]),
        (["extra"], ["extra"]),
        (["--config"], ["--config", "expected one argument"]),
        (["--config", "/nowhere/job.yaml"], ["/nowhere/job.yaml", "No such file"]),
        (["--config", ""], ["config"]),
        (["--input", "{not json}"], ["input"]),
        (["--allow-failed=1.5"], ["allow-failed '1.5'", "must be a count or a percentage"]),
        (["--shard", "0/4"], ["shard '0/4'", "i/n with 1 <= i <= n"]),
        (["--place", "sample"], ["is not STAGE:KEY=VALUE with a stage of encode, sample, publish"]),
    ],
)
def test_wrong_flags_are_one_line(capsys, flags, words):
    with pytest.raises(SystemExit) as caught:
        parsed(*flags)
    line = the_line(capsys, caught)
    assert all(word in line for word in words)
    assert "Value error" not in line


@pytest.mark.parametrize("missing", ["input", "output", "model"])
def test_a_missing_setting_is_named_as_a_flag(capsys, tmp_path, missing):
    with pytest.raises(SystemExit) as caught:
        from_yaml(tmp_path, {name: value for name, value in VALUES.items() if name != missing})
    assert f"--{missing} is missing" in the_line(capsys, caught)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nope: 2", ["'nope'", "batch_size"]),
        ("batch-size: 2", ["'batch-size'; did you mean batch_size?"]),
        ("workers: 2", ["'workers'"]),
        ("cli_args: [a]", ["'cli_args'"]),
        ("model_cls: x", ["'model_cls'"]),
        ("model_config: {}", ["'model_config'"]),
        ("_env_file: x", ["'_env_file'"]),
        ("1: 2", ["not a mapping"]),
        ("- input", ["not a mapping"]),
        ("just text", ["not a mapping"]),
        ("batch_size: x", ["batch-size 'x'"]),
        ("batch_size: 2.5", ["batch-size 2.5"]),
        ("batch_size:", ["batch-size None"]),
        ("input: a", ["input 'a'", "list"]),
        ("input: []", ["input []"]),
        ("input: [1]", ["input.0 1"]),
        ("variant: 384", ["variant 384"]),
        ("tile: 100", ["tile 100", "multiple of 32"]),
        ("dry_run: perhaps", ["dry-run 'perhaps'"]),
        ("x: [", ["cannot be read"]),
        ("x: !!python/object:os.system {}", ["cannot be read"]),
    ],
)
def test_wrong_files_are_one_line(capsys, tmp_path, text, words):
    values = yaml.safe_dump({name: value for name, value in VALUES.items() if not text.startswith(f"{name}:")})
    with pytest.raises(SystemExit) as caught:
        from_yaml(tmp_path, text if text.startswith(("-", "just")) else f"{values}{text}")
    line = the_line(capsys, caught)
    assert all(word in line for word in words)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"output: \xff", b"\0"])
def test_files_that_are_no_text_are_one_line(capsys, tmp_path, data):
    (tmp_path / "job.yaml").write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        parse(RenderSettings, ["--config", str(tmp_path / "job.yaml")])
    assert "cannot be read" in the_line(capsys, caught)


@pytest.mark.parametrize(
    ("allowed", "failed", "tolerated"),
    [
        ("0", 0, True),
        ("0", 1, False),
        ("10", 10, True),
        ("10", 11, False),
        ("5%", 10, True),
        ("5%", 11, False),
        ("0.5%", 1, True),
        ("0.5%", 2, False),
        (".5%", 1, True),
        ("0%", 1, False),
        ("100%", 200, True),
    ],
)
def test_tolerated_failures_are_a_count_or_a_share_of_all_rows(allowed, failed, tolerated):
    assert made(allow_failed=allowed).tolerates(failed, 200) is tolerated
    assert made(allow_failed=allowed).tolerates(0, 0)


@pytest.mark.parametrize(
    "allowed", ["", "%", "-1", "1.5", "1e3", "nan", "nan%", " 5", "5 %", "5%%", ".", ".%", "²", "１"]
)
def test_other_tolerances_are_refused(allowed):
    with pytest.raises(ValidationError, match="must be a count or a percentage"):
        made(allow_failed=allowed)


def test_a_tolerance_may_be_a_number_in_the_file(tmp_path):
    assert from_yaml(tmp_path, {**VALUES, "allow_failed": 5}).tolerates(5, 200)
    assert from_yaml(tmp_path, {**VALUES, "allow_failed": "5%"}).tolerates(10, 200)


def test_pinned_pools_are_named_by_stage():
    assert parsed("--sample-workers", "3", "--publish-workers", "2").workers == {"sample": 3, "publish": 2}


def test_settings_survive_the_job_record():
    settings = parsed("--tile", "256", "--allow-failed", "5%")
    again = RenderSettings(**settings.model_dump(mode="json"))
    assert again == settings


def test_a_job_runs_where_it_is_told_or_where_ray_is(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert parsed().own_cluster
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert (parsed().address, parsed().own_cluster) == ("10.0.0.1:6379", False)
    assert parsed("--address", "local").own_cluster
    assert parsed("--address", "auto").address == "auto"


@pytest.mark.parametrize(("shard", "expected"), [("1/1", (1, 1)), ("2/4", (2, 4)), ("12/12", (12, 12))])
def test_a_shard_is_one_of_several(shard, expected):
    assert made(shard=shard).shard_of == expected
    assert made().shard_of == (1, 1)


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "1/0", "1/4/2", "a/b", "1 / 4"])
def test_other_shards_are_refused(shard):
    with pytest.raises(ValidationError, match="i/n with 1 <= i <= n"):
        made(shard=shard)


def test_places_are_labels_by_stage():
    given = ["sample:ray.io/accelerator-type=H100", "publish:pool=cpu", "sample:zone=a-1"]
    assert parsed(*(part for place in given for part in ("--place", place))).places == {
        "sample": {"ray.io/accelerator-type": "H100", "zone": "a-1"},
        "publish": {"pool": "cpu"},
    }


@pytest.mark.parametrize("place", ["sample", "decode:zone=a", "sample:zone", "sample:zone=", "sample:zone=in(a,b)"])
def test_other_places_are_refused(place):
    with pytest.raises(ValidationError, match="is not STAGE:KEY=VALUE with a stage of encode, sample, publish"):
        made(place=[place])


def test_pinned_shares_of_gpus_are_named_by_stage():
    assert parsed("--sample-gpus", "1", "--encode-gpus", "0.2").gpu_shares == {"sample": 1.0, "encode": 0.2}
    assert parsed().gpu_shares == {}


def test_hosts_of_images_may_be_repeated():
    assert parsed("--allow-image-host", "a.example", "--allow-image-host", "b.example").allow_image_host == [
        "a.example",
        "b.example",
    ]
    assert parsed().allow_image_host == []


def test_a_record_of_settings_holds_nothing_that_signs_a_url():
    signed = "https://me:s3cr3t@h/t.parquet?X-Amz-Signature=s3cr3t"
    settings = RenderSettings(**{**VALUES, "input": [signed, "a.parquet"]}, image_root="https://h/a?sig=s3cr3t")
    record = settings.record()
    assert record["input"] == ["https://***@h/t.parquet?***", "a.parquet"]
    assert record["image_root"] == "https://h/a?***"
    assert settings.input[0] == signed
