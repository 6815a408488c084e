"""The command: its table of subcommands, its help, and its exit code for what it does not know."""

import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs import cli
from jobs.settings import DemoSettings, RenderSettings
from pipeline.storage.storage import Storage
from tests.pipeline.sample_ledgers import recorded, rows, written


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pyramid-render", *arguments])
    return cli.main()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_subcommand(monkeypatch, capsys, arguments):
    assert called(monkeypatch, *arguments) == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: pyramid-render")
    for name, command in cli.COMMANDS.items():
        assert name in output
        assert command.purpose in output


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    assert called(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == version("pyramid-render")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rendr", "; did you mean render?"),
        ("exprot", "; did you mean export?"),
        ("", ""),
        ("--nope", ""),
        ("jobs.commands.render", ""),
    ],
)
def test_an_unknown_subcommand_is_named(monkeypatch, capsys, name, hint):
    assert called(monkeypatch, name) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"pyramid-render: no command {name!r}{hint}\n")


def test_a_subcommand_runs_with_its_settings(monkeypatch):
    monkeypatch.setattr("jobs.commands.status.run", lambda settings: 40 + len(settings.output))
    assert called(monkeypatch, "status", "to") == 42


def test_every_subcommand_has_its_module_and_its_name():
    groups = {name: entry.commands for name, entry in cli.COMMANDS.items() if isinstance(entry, cli.Group)}
    flat = {name: entry for name, entry in cli.COMMANDS.items() if name not in groups}
    nested = {f"{name} {inner}": entry for name, commands in groups.items() for inner, entry in commands.items()}
    for name, command in (flat | nested).items():
        assert callable(import_module(command.module).run)
        assert command.settings.model_config["cli_prog_name"] == f"pyramid-render {name}"


@pytest.mark.parametrize(("name", "settings"), [("render", RenderSettings), ("demo", DemoSettings)])
def test_the_help_of_a_subcommand_explains_every_setting(monkeypatch, capsys, name, settings):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        called(monkeypatch, name, "--help")
    assert caught.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    assert output.startswith(f"usage: pyramid-render {name}")
    assert settings.__doc__.splitlines()[0] in output
    for field, info in settings.model_fields.items():
        assert f"--{field.replace('_', '-')}" in output
        assert info.description
        assert info.description in output


def test_the_help_of_render_explains_columns_and_exit_codes(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        called(monkeypatch, "render", "--help")
    output = capsys.readouterr().out
    assert all(
        code in output for code in ("0 every row", "1 the job broke", "2 the job is wrong", "3 some rows", "143")
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["render"], "--input is missing"),
        (["render", "--nope"], "--nope"),
        (["demo", "--nope"], "--nope"),
        (["demo", "--output", ""], "output ''"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(monkeypatch, capsys, arguments, word):
    with pytest.raises(SystemExit) as caught:
        called(monkeypatch, *arguments)
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pyramid-render {arguments[0]}: ")
    assert word in line


HEAVY = ("accelerate", "diffusers", "peft", "ray", "scipy", "torch", "transformers")
LOADED = f"""
import json, sys
from contextlib import redirect_stdout
from io import StringIO
from jobs import cli

def run(*arguments):
    with redirect_stdout(StringIO()):
        try:
            code = cli.main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    return code, [name for name in {HEAVY} if name in sys.modules]

found = {{}}
for name, entry in cli.COMMANDS.items():
    found[name] = run(name, "--help")
    for inner in getattr(entry, "commands", ()):
        found[f"{{name}} {{inner}}"] = run(name, inner, "--help")
for name in ("status", "report", "compact"):
    found[f"{{name}} OUTPUT"] = run(name, sys.argv[1])
print(json.dumps(found))
"""
"""Prints the exit code of every command and which heavy packages are loaded after it."""


def test_help_and_commands_that_only_read_the_ledger_load_no_heavy_package(tmp_path):
    storage = Storage(str(tmp_path))
    for run in ("1", "2"):
        recorded(storage, run, "finished", total=2, done=2, failed=0)
        written(storage, rows("a", run, run=run), run=run)
    command = [sys.executable, "-c", LOADED, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {*cli.COMMANDS, "dataset encode", "status OUTPUT", "report OUTPUT", "compact OUTPUT"} <= found.keys()
    assert {name: outcome for name, outcome in found.items() if outcome != [0, []]} == {}
    assert len(storage.list("metadata")) == 1
    assert storage.exists("report.html")
