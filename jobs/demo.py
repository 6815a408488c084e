"""The demo: render the sample table with the bundled model (`pyramid-render demo`)."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jobs import render
from jobs.settings import DemoSettings, parse

SAMPLE_TABLE = Path(__file__).parent / "sample" / "prompts.parquet"
BAD_ROWS = 1  # the table holds one on purpose


def main(argv: Sequence[str] | None = None) -> int:
    """Render the sample table; returns the exit code of the render."""
    settings = parse(DemoSettings, sys.argv[1:] if argv is None else argv)
    arguments = ["--input", str(SAMPLE_TABLE), "--output", settings.output, "--model", "toy"]
    return render.main([*arguments, "--device", "cpu", "--allow-failed", str(BAD_ROWS)])


if __name__ == "__main__":
    sys.exit(main())
