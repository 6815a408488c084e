"""`pyramid-render dataset`: tables by a recipe or a suite, kept and rendered; what is wrong is one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import cli
from jobs.settings import GenerateSettings, RenderSettings, VBenchSettings
from pipeline.datasets.prompts import Recipe, make_table
from pipeline.ledger import ledger
from pipeline.ledger.ledger import LedgerWriter
from pipeline.rows import LEDGER_SCHEMA
from pipeline.storage.storage import Storage
from pipeline.tables.worklist import RowRules, candidates
from pyramid_flow import Checkpoint
from pyramid_flow.toy.world import Scene

ROOT = Path(__file__).parents[3]
RECIPE = {"templates": ["a {colour} fox"], "values": {"colour": ["red", "blue", "white"]}, "count": 2}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return written(tmp_path / "recipe.yaml", RECIPE)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "suite.txt").write_text("a red circle\na blue square\n")
    return tmp_path / "suite.txt"


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[RenderSettings]:
    """Take the settings of renders instead of rendering."""
    taken: list[RenderSettings] = []
    monkeypatch.setattr("jobs.commands.render.run", lambda settings: taken.append(settings) or 0)
    return taken


def written(path: Path, recipe: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def readme_recipe() -> str:
    [text] = re.findall(r"```yaml\n(# shapes.yaml\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return text


def exit_code(*arguments: object) -> int:
    try:
        return cli.main(["dataset", *[str(argument) for argument in arguments]])
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_subcommand(capsys, arguments):
    assert cli.main(["dataset", *arguments]) == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: pyramid-render dataset COMMAND")
    assert all(f"  {name}" in output and command.purpose in output for name, command in cli.DATASET.items())
    assert list(cli.DATASET) == ["generate", "vbench", "world", "encode"]


def test_unknown_commands_are_refused(capsys):
    assert cli.main(["dataset", "mend"]) == 2
    assert capsys.readouterr().err.startswith("pyramid-render dataset: no command 'mend'\n")


@pytest.mark.parametrize(("name", "settings"), [("generate", GenerateSettings), ("vbench", VBenchSettings)])
def test_a_subcommand_has_every_flag_of_render_but_the_input(monkeypatch, capsys, name, settings):
    monkeypatch.setenv("COLUMNS", "200")
    assert exit_code(name, "--help") == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: pyramid-render dataset {name}")
    assert "--input" not in output
    for field in set(settings.model_fields) - {"input", "recipe", "suite"}:
        assert f"--{field.replace('_', '-')}" in output
    assert set(RenderSettings.model_fields) <= set(settings.model_fields)


def test_a_recipe_becomes_a_table_that_is_rendered_with_the_flags_given(recipe, rendered, tmp_path, caplog):
    caplog.set_level("INFO")
    flags = ["--output", tmp_path / "out", "--batch-size", 2, "--dry-run", "--device", "cpu"]
    assert exit_code("generate", recipe, *flags) == 0
    [settings] = rendered
    assert (settings.batch_size, settings.dry_run, settings.device, settings.model) == (2, True, "cpu", "toy")
    assert settings.input == [f"file://{tmp_path}/out/prompts.parquet"]
    assert pq.read_table(tmp_path / "out" / "prompts.parquet").equals(make_table(Recipe.read(recipe)))
    assert "2 different prompts of 3 combinations, 2 rows: 2 train" in caplog.text


def test_the_table_alone_needs_no_model(recipe, rendered, tmp_path, capsys):
    assert exit_code("generate", recipe, "--output", tmp_path / "out", "--only-table", "--model", "nowhere") == 0
    assert capsys.readouterr().out == f"file://{tmp_path}/out/prompts.parquet\n"
    assert not rendered
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["prompts.json", "prompts.parquet"]


def test_the_same_recipe_goes_on_with_its_table_and_another_is_refused(recipe, rendered, tmp_path, caplog):
    command = ["generate", recipe, "--output", tmp_path / "out"]
    table = tmp_path / "out" / "prompts.parquet"
    assert exit_code(*command) == 0
    made = table.stat()
    assert exit_code(*command) == 0
    assert table.stat().st_mtime_ns == made.st_mtime_ns
    table.unlink()  # as after an end between record and table
    assert exit_code(*command) == 0
    assert table.exists()
    written(recipe, {**RECIPE, "count": 3})
    assert exit_code(*command) == 2
    assert "prompts.json says count 2, not 3: use another output" in caplog.text
    assert len(rendered) == 3


def test_a_default_that_is_written_out_is_the_same_recipe(recipe, rendered, tmp_path):
    assert exit_code("generate", recipe, "--output", tmp_path / "out") == 0
    written(recipe, {**RECIPE, "seed": 0, "held_out": []})
    assert exit_code("generate", recipe, "--output", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate"], "RECIPE"),
        (["generate", "RECIPE"], "--output is missing"),
        (["generate", "RECIPE", "--output", "OUT", "--input", "x"], "input ['x']: is what this command makes"),
        (["generate", "absent.yaml", "--output", "OUT"], "absent.yaml cannot be read"),
        (["vbench", "SUITE", "--output", "OUT"], "--model is missing"),
        (["vbench", "SUITE", "--output", "OUT", "--model", "toy", "--samples", "0"], "samples '0'"),
        (["vbench", "SUITE", "--output", "OUT", "--model", "toy", "--field", "x"], "'x' is not NAME=VALUE"),
        (["vbench", "SUITE", "--output", "OUT", "--model", "toy", "--field", "seed=1"], "seed is no field"),
        (["vbench", "SUITE", "--output", "OUT", "--model", "toy", "--field", "num_frames=10"], "num_frames 10"),
        (["vbench", "SUITE", "--output", "OUT", "--model", "toy", "--field", "fps=["], "cannot be read"),
        (["vbench", "SUITE", "--output", "memory://suite", "--model", "toy"], "--videos must say where"),
        (["vbench", "RECIPE", "--output", "OUT", "--model", "nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(recipe, suite, tmp_path, capsys, caplog, arguments, words):
    places = {"RECIPE": recipe, "SUITE": suite, "OUT": tmp_path / "out"}
    assert exit_code(*(places.get(argument, argument) for argument in arguments)) == 2
    [line] = [line for line in (capsys.readouterr().err + caplog.text).splitlines() if words in line]
    assert "pyramid-render" in line


def test_a_wrong_recipe_leaves_nothing_behind(recipe, tmp_path, caplog):
    written(recipe, {**RECIPE, "templates": ["a {color} fox"]})
    assert exit_code("generate", recipe, "--output", tmp_path / "out") == 2
    assert "templates: {color} is not among the values, which are colour" in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_suite_is_rendered_and_gathered_again(suite, rendered, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    command = ["vbench", suite, "--output", out, "--model", "toy", "--samples", 2, "--field", "num_frames=9"]
    storage = Storage(str(out))

    def finish(run: str, samples: list[tuple[str, int, str]]) -> None:
        rows = [
            {"id": f"{prompt}{sample}", "prompt": prompt, "run": run, "sample": sample, "uri": f"videos/{run}{sample}"}
            | {"status": status, "media_type": "video/mp4"}
            for prompt, sample, status in samples
        ]
        for row in rows:
            storage.put(row["uri"], run.encode())
        writer = LedgerWriter(storage, run)
        writer.append(pa.Table.from_pylist(rows, LEDGER_SCHEMA.append(pa.field("sample", pa.int64()))))
        writer.flush()

    finish("1", [("a red circle", 0, "succeeded"), ("a red circle", 1, "failed"), ("no such prompt", 0, "succeeded")])
    assert exit_code(*command) == 0
    assert [file.name for file in (out / "vbench").iterdir()] == ["a red circle-0.mp4"]
    assert f"1 of 4 videos of the suite are in {out}/vbench" in capsys.readouterr().out
    finish("2", [("a red circle", 1, "succeeded")])
    assert exit_code(*command) == 0
    assert sorted(file.name for file in (out / "vbench").iterdir()) == ["a red circle-0.mp4", "a red circle-1.mp4"]
    assert len(pq.read_table(out / "prompts.parquet")) == 4
    suite.write_text("a red circle")
    assert exit_code(*command) == 2
    assert "use another output" in caplog.text
    assert len(rendered) == 2


def test_a_folder_that_cannot_take_the_videos_is_one_line(suite, rendered, tmp_path, caplog):
    (tmp_path / "taken").write_text("a file")
    flags = ["--output", tmp_path / "out", "--model", "toy", "--videos", tmp_path / "taken"]
    assert exit_code("vbench", suite, *flags) == 2
    assert "cannot take the videos" in caplog.text


def test_the_readmes_recipe_is_what_the_bundled_model_renders(tmp_path):
    (tmp_path / "shapes.yaml").write_text(readme_recipe())
    made = Recipe.read(tmp_path / "shapes.yaml")
    rows, rules = make_table(made).to_pylist(), RowRules(Checkpoint.open("toy").preset)
    assert len(rows) == 24
    assert {row["split"] for row in rows} == {"train", "held_out"}
    for row in rows:
        scene = Scene(**{name: row[name] for name in made.values}, start=(0.5, 0.5))
        assert row["prompt"] == scene.caption
        [candidate] = candidates({name: row[name] for name in ("prompt", "seed", *made.fields)}, "table:0", rules)
        assert candidate.row.error is None


@pytest.mark.ray
@pytest.mark.integration
@pytest.mark.timeout(900)
def test_recipe_and_suite_become_videos(suite, tmp_path, capsys):
    def run(*arguments: object) -> str:
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        command = [sys.executable, "-m", "jobs.cli", "dataset", *map(str, arguments), "--device", "cpu"]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    (tmp_path / "shapes.yaml").write_text(readme_recipe())
    made = ["generate", tmp_path / "shapes.yaml", "--output", tmp_path / "shapes", "--model", "toy"]
    assert "24 of 24 rows succeeded; this run took 24 rows" in run(*made)
    assert exit_code(*made, "--device", "cpu") == 0
    assert "24 of 24 rows succeeded; this run took 0 rows" in capsys.readouterr().out
    rows = ledger.read(Storage(str(tmp_path / "shapes")), ["prompt", "colour", "split", "group"]).to_pylist()
    assert all(row["colour"] in row["prompt"] for row in rows)
    assert {row["split"] for row in rows} == {"train", "held_out"}

    fields = ["--field", "num_frames=9", "--field", "quality=draft"]
    run("vbench", suite, "--output", tmp_path / "suite", "--model", "toy", *fields)
    names = {f"{prompt}-{i}.mp4" for prompt in ("a red circle", "a blue square") for i in range(5)}
    videos = list((tmp_path / "suite" / "vbench").iterdir())
    assert {video.name for video in videos} == names
    assert len({video.read_bytes() for video in videos}) == 10
