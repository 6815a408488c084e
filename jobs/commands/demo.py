"""The demo: render the sample table with the bundled model (`pyramid-render demo`)."""

from pathlib import Path

from jobs.commands import render
from jobs.settings import DemoSettings, RenderSettings, parse

SAMPLE_TABLE = Path(__file__).parents[1] / "sample" / "prompts.parquet"
BAD_ROWS = 1  # the table holds one on purpose


def run(settings: DemoSettings) -> int:
    """Render the sample table; returns the exit code of the render."""
    arguments = ["--input", str(SAMPLE_TABLE), "--output", settings.output, "--model", "toy"]
    arguments += ["--device", "cpu", "--allow-failed", str(BAD_ROWS)]
    return render.run(parse(RenderSettings, arguments))
