"""The demo: write a tiny random checkpoint, then render the sample table with it (`pyramid-render demo`)."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from jobs import render
from jobs.settings import DemoSettings, parse
from pyramid_flow.toy import write_random_checkpoint

SAMPLE_TABLE = Path(__file__).parent / "sample" / "prompts.parquet"
BAD_ROWS = 1  # the table holds one on purpose

logger = logging.getLogger("pyramid-render")


def main(argv: Sequence[str] | None = None) -> int:
    """Render the sample table; returns the exit code of the render."""
    settings = parse(DemoSettings, sys.argv[1:] if argv is None else argv)
    model = Path(settings.output) / "model"
    if not model.exists():
        disable_progress_bar()  # the checkpoint is tiny
        write_random_checkpoint(model)
    arguments = ["--input", str(SAMPLE_TABLE), "--output", settings.output, "--model", str(model)]
    return render.main([*arguments, "--device", "cpu", "--allow-failed", str(BAD_ROWS)])


if __name__ == "__main__":
    sys.exit(main())
