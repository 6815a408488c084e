"""The `pyramid-render` command: a table of subcommands, each loaded only when it is called."""

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "render": ("jobs.render", "render a table of prompts to videos"),
    "status": ("jobs.status", "say how far the jobs of an output are"),
    "report": ("jobs.report", "write report.html: gallery, timeline, failures, costs"),
    "compact": ("jobs.compact", "merge the parts of an output's ledger, list files that no row names"),
    "dataset": ("jobs.dataset", "make prompts from a recipe and render them, a suite for VBench, tables to train on"),
    "export": ("jobs.export", "make a dataset of an output: WebDataset or Parquet, with a card"),
    "serve": ("jobs.serve", "answer the Videos API: videos by HTTP"),
    "fetch": ("jobs.fetch", "download a published checkpoint"),
    "inspect": ("jobs.describe", "say what a checkpoint is and how much memory it needs"),
    "demo": ("jobs.demo", "render the sample table with the bundled model"),
}


def main() -> int:
    """Run the subcommand named first; returns its exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage("pyramid-render", _purposes()))
        return 0
    if name == "--version":
        print(version("pyramid-render"))
        return 0
    if name not in COMMANDS:
        print(f"pyramid-render: no command {name!r}\n\n{usage('pyramid-render', _purposes())}", file=sys.stderr)
        return 2
    code: int = import_module(COMMANDS[name][0]).main(arguments)
    return code


def usage(program: str, purposes: Mapping[str, str]) -> str:
    """Return the help of a program with subcommands."""
    lines = [f"  {name:<8} {purpose}" for name, purpose in purposes.items()]
    return "\n".join([f"usage: {program} COMMAND [--help | options]", "", *lines])


def _purposes() -> dict[str, str]:
    return {name: purpose for name, (_, purpose) in COMMANDS.items()}


if __name__ == "__main__":
    sys.exit(main())
