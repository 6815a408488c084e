"""The `pyramid-render` command: parses the settings of a subcommand, then loads its module and runs it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

from jobs import settings
from jobs.settings import EXIT_WRONG_JOB, JobSettings, parse
from jobs.settings.base import suggestion


@dataclass(frozen=True)
class Command:
    """A subcommand. Its module has `run(settings) -> exit code` and loads only once the settings are valid."""

    module: str
    settings: type[JobSettings]
    purpose: str


@dataclass(frozen=True)
class Group:
    """Subcommands under a name of their own."""

    purpose: str
    commands: Mapping[str, Command]


DATASET = {
    "generate": Command(
        "jobs.commands.dataset", settings.GenerateSettings, "make a table of prompts from a recipe, and render it"
    ),
    "vbench": Command("jobs.commands.dataset", settings.VBenchSettings, "render a suite of prompts for VBench"),
    "world": Command("jobs.commands.dataset", settings.WorldSettings, "draw clips of the toy's world"),
    "encode": Command(
        "jobs.commands.dataset", settings.EncodeSettings, "turn clips into latents and text embeddings, to train on"
    ),
}
COMMANDS: Mapping[str, Command | Group] = {
    "render": Command("jobs.commands.render", settings.RenderSettings, "render a table of prompts to videos"),
    "status": Command("jobs.commands.status", settings.StatusSettings, "say how far the jobs of an output are"),
    "report": Command(
        "jobs.commands.report", settings.ReportSettings, "write report.html: gallery, timeline, failures, costs"
    ),
    "compact": Command(
        "jobs.commands.compact",
        settings.CompactSettings,
        "merge the parts of an output's ledger, list files that no row names",
    ),
    "dataset": Group("make prompts from a recipe and render them, a suite for VBench, tables to train on", DATASET),
    "export": Command(
        "jobs.commands.export",
        settings.ExportSettings,
        "make a dataset of an output: WebDataset or Parquet, with a card",
    ),
    "train": Command("jobs.commands.train", settings.TrainSettings, "train the VAE or the transformer of a checkpoint"),
    "serve": Command("jobs.commands.serve", settings.ServeSettings, "answer the Videos API: videos by HTTP"),
    "fetch": Command("jobs.commands.download", settings.FetchSettings, "download a published checkpoint"),
    "inspect": Command(
        "jobs.commands.inspect_model", settings.InspectSettings, "say what a checkpoint is and how much memory it needs"
    ),
    "demo": Command("jobs.commands.demo", settings.DemoSettings, "render the sample table with the bundled model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand named first; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(version("pyramid-render"))
        return 0
    return _dispatch("pyramid-render", COMMANDS, arguments)


def _dispatch(program: str, commands: Mapping[str, Command | Group], arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_usage(program, commands))
        return 0
    if name not in commands:
        hint = suggestion(name, commands)
        print(f"{program}: no command {name!r}{hint}\n\n{_usage(program, commands)}", file=sys.stderr)
        return EXIT_WRONG_JOB
    command = commands[name]
    if isinstance(command, Group):
        return _dispatch(f"{program} {name}", command.commands, rest)
    values = parse(command.settings, rest)
    code: int = import_module(command.module).run(values)
    return code


def _usage(program: str, commands: Mapping[str, Command | Group]) -> str:
    lines = [f"  {name:<8} {command.purpose}" for name, command in commands.items()]
    return "\n".join([f"usage: {program} COMMAND [--help | options]", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
