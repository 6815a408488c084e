"""Settings of the jobs that make a table of prompts and render it, and of those that make datasets of outputs."""

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator
from pydantic_settings import CliPositionalArg, CliSuppress, SettingsConfigDict

from jobs.settings.base import STORED_MODEL, JobSettings
from jobs.settings.render import RenderSettings
from pipeline.datasets.export import Kind
from pipeline.datasets.prompts import check_field
from pipeline.request import MAX_COPIES


class MadeTableSettings(RenderSettings):
    """Base of the settings of jobs that render a table of their own making."""

    input: CliSuppress[list[str]] = Field([], description="the table, once it is made")
    only_table: bool = Field(False, description="write OUTPUT/prompts.parquet, and stop")

    @field_validator("input")
    @classmethod
    def _made(cls, value: list[str]) -> list[str]:
        if value:
            raise ValueError("is what this command makes, and cannot be set")
        return value


class GenerateSettings(MadeTableSettings):
    """Make a table of prompts from a recipe, and render it.

    The recipe is a YAML file: templates, values with weights, count, seed, seeds_per_prompt, held_out, fields (see the
    README). The table is OUTPUT/prompts.parquet; --only-table stops there, --dry-run after the plan. The same command
    goes on where it stopped; another recipe for the same OUTPUT is refused.

    Exit codes: those of render.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render dataset generate")

    recipe: CliPositionalArg[Path] = Field(description="YAML file that says what the prompts are")
    model: str = Field("toy", min_length=1, description=STORED_MODEL)


class VBenchSettings(MadeTableSettings):
    """Render a suite of prompts for VBench: the videos PROMPT-0.mp4, PROMPT-1.mp4, ... of each prompt in one folder.

    The seed of each is its number. --only-table stops after OUTPUT/prompts.parquet, --dry-run after the plan. The same
    command goes on where it stopped; another suite for the same OUTPUT is refused.

    Exit codes: those of render.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render dataset vbench")

    suite: CliPositionalArg[Path] = Field(
        description="text file with a prompt per line, or .json file with a list of prompts or of {prompt_en: ...}"
    )
    samples: Annotated[int, Field(ge=1, le=MAX_COPIES)] = Field(5, description="videos of each prompt")
    field: list[str] = Field(
        [], description="NAME=VALUE: a field of every request, such as num_frames=121 or quality=high; may be repeated"
    )
    videos: Path | None = Field(
        None, description="folder for the named videos, links where there can be any (default: OUTPUT/vbench)"
    )

    @field_validator("field")
    @classmethod
    def _fields(cls, value: list[str]) -> list[str]:
        for name, option in _assigned(value).items():
            check_field(name, [option])
        return value

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of every request."""
        return _assigned(self.field)


def _assigned(given: list[str]) -> dict[str, Any]:
    """Return values by name, of texts such as "num_frames=9"; raises ValueError for others."""
    pairs = [text.partition("=") for text in given]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"{name!r} is not NAME=VALUE")
    try:
        return {name: yaml.safe_load(text) for name, _, text in pairs}
    except yaml.YAMLError as error:
        raise ValueError(f"a value cannot be read: {' '.join(str(error).split())}") from error


class ExportSettings(JobSettings):
    """Make a dataset of an output: shards of WebDataset or Parquet, and a card.

    Parquet loads with `datasets.load_dataset(DATASET)`. Rows that failed, stills, and rows equal to others are left
    out; so are videos nearly equal to an earlier one. The same command goes on where it stopped; another export into
    the same DATASET is refused.

    Exit codes: 0 done, 1 the store failed (run it again), 2 the export is wrong, 130 interrupted.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render export")

    output: CliPositionalArg[str] = Field(min_length=1, description="folder or URL that render writes to")
    dataset: CliPositionalArg[str] = Field(min_length=1, description="folder or URL for the dataset")
    to: Kind = Field("parquet", description="webdataset: tar files of mp4 and json; parquet: one row per video")
    where: list[str] = Field(
        [],
        description="condition on a column of the ledger, such as 'motion>0.01' or 'flags!=jump'; may be repeated",
    )
    unflagged: bool = Field(False, description="leave out rows with any flag")
    split: list[str] = Field(
        [], description="NAME=SHARE of the prompts; may be repeated (default: train=1); no prompt is in two of them"
    )
    split_column: str | None = Field(None, description="take each row's split from this column instead")
    near: Annotated[int, Field(ge=0, le=16)] | None = Field(
        2,
        description="leave out videos whose perceptual hash differs by so few of 64 bits from another's; or none",
    )
    shard_mb: Annotated[float, Field(gt=0)] = Field(256, description="megabytes of video in a shard, at most")
    license: str = Field("other", pattern=r"^[\w.-]+$", description="what the card says, such as cc-by-4.0")
    include_sources: bool = Field(
        False, description="export the columns position and image_uri, which name the files of the input"
    )

    @field_validator("near", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        return None if value == "none" else value

    @property
    def shares(self) -> dict[str, float] | None:
        """Share of each split, by name; None if none is named."""
        return dict(_share(text) for text in self.split) or None

    @field_validator("split")
    @classmethod
    def _shares_of_names(cls, value: list[str]) -> list[str]:
        for text in value:
            _share(text)
        return value


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    if not re.fullmatch(r"\w+", name, re.ASCII) or not re.fullmatch(r"\d*\.?\d+", share) or not float(share):
        raise ValueError(f"{text!r} is not NAME=SHARE, such as train=0.9")
    return name, float(share)
