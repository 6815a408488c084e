"""Settings of the jobs: a YAML file and flags become one validated, frozen value."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic_settings
import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, PydanticBaseSettingsSource, SettingsConfigDict

EXIT_WRONG_JOB = 2

Count = Annotated[int, Field(ge=1)]


class SettingsError(Exception):
    """The job is wrong; said in one message before anything is loaded."""


class JobSettings(BaseSettings):
    """Base of all settings: flags win over the YAML file, and unknown names are errors."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_enforce_required=False,
        cli_exit_on_error=False,
    )

    config: Path | None = Field(None, description="YAML file with any of these settings; flags win over it")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take nothing from environment variables: a stray HEIGHT or MODEL must not change a job."""
        return (init_settings,)


class DemoSettings(JobSettings):
    """Render the sample table with a tiny random model on this machine's CPU: the videos are coloured noise."""

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render demo")

    output: str = Field("outputs/demo", min_length=1, description="folder for the model, videos, ledger and gallery")


class StatusSettings(JobSettings):
    """Say how far the jobs of an output are: rows done, rate, time left, failures by reason."""

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render status")

    output: CliPositionalArg[str] = Field(min_length=1, description="folder or URL that render writes to")


class RenderSettings(JobSettings):
    """Render a table of prompts to videos.

    The input's columns are the fields of a request: prompt (required), id, negative_prompt, image (bytes or a URI),
    height, width, num_frames, fps, num_inference_steps, video_num_inference_steps, guidance_scale,
    video_guidance_scale, seed, num_videos_per_prompt. Other columns are carried through to the ledger. Running the
    same command again renders only what is missing.

    Exit codes: 0 every row succeeded, 1 the job broke (run it again to resume), 2 the job is wrong, 3 some rows
    failed, 130 or 143 interrupted.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render render")

    input: list[str] = Field(
        min_length=1, description=".parquet, .csv, .jsonl files or folders, local or URLs; may be repeated"
    )
    output: str = Field(min_length=1, description="folder or URL (s3://, gs://, ...) for videos, ledger and gallery")
    model: str = Field(min_length=1, description="checkpoint folder in the published layout")
    variant: str | None = Field(None, description='"384p", "768p", "image" or a folder name, if there are several')
    image_root: str | None = Field(None, description="image URIs must lie below it (default: the input's folder)")
    allow_untrained: bool = Field(False, description="accept sizes and lengths the model was not trained for")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = cuda if there is a GPU")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto = float32 on cpu, else bfloat16")
    address: str | None = Field(None, description='a running Ray cluster, such as "auto" (default: one of its own)')
    gpus: Annotated[int, Field(ge=0)] | None = Field(None, description="GPUs to plan for (default: those there are)")
    batch_size: Count = Field(4, description="rows of one shape sampled together, at most")
    encode_workers: Count | None = Field(None, description="pin the number of encode workers")
    sample_workers: Count | None = Field(None, description="pin the number of sample workers")
    decode_workers: Count | None = Field(None, description="pin the number of decode workers")
    publish_workers: Count | None = Field(None, description="pin the number of publish workers")
    decode_window: Count = Field(1, description="latent frames decoded at a time")
    tile: int | None = Field(None, ge=64, description="side of a VAE tile in pixels (default: no tiling)")
    ledger_rows: Count = Field(1000, description="write a ledger part after this many rows")
    ledger_seconds: Annotated[float, Field(gt=0)] = Field(30, description="or after this many seconds")
    max_attempts: Count = Field(3, description="give a row up after its worker died this often while it ran alone")
    row_timeout_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="end a worker whose row takes longer than this in one stage (default: no limit)"
    )
    max_failures: Count = Field(20, description="end the job after so many failures in a row that are no row's fault")
    grace_s: Annotated[float, Field(ge=0)] = Field(
        60, description="seconds an interrupted job waits for rows in flight"
    )
    retry_failed: bool = Field(False, description="render rows again that failed in an earlier run")
    allow_failed: str = Field(
        "0", coerce_numbers_to_str=True, description="exit 0 with up to this many failed rows: a count or a percentage"
    )
    dry_run: bool = Field(False, description="print the plan and stop")

    @field_validator("allow_failed")
    @classmethod
    def _count_or_percentage(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9]+|([0-9]+(\.[0-9]*)?|\.[0-9]+)%", value):
            raise ValueError("must be a count or a percentage, such as 10 or 5%")
        return value

    @field_validator("tile")
    @classmethod
    def _whole_latents(cls, value: int | None) -> int | None:
        if value is not None and value % 32:
            raise ValueError("must be a multiple of 32")
        return value

    @property
    def workers(self) -> dict[str, int]:
        """Pinned pool sizes by stage name."""
        stages = ("encode", "sample", "decode", "publish")
        pinned = {stage: getattr(self, f"{stage}_workers") for stage in stages}
        return {stage: count for stage, count in pinned.items() if count is not None}

    def tolerates(self, failed: int, total: int) -> bool:
        """Tell whether so many failed rows are fine."""
        if self.allow_failed.endswith("%"):
            return failed <= total * float(self.allow_failed[:-1]) / 100
        return failed <= int(self.allow_failed)


Settings = TypeVar("Settings", bound=JobSettings)


def parse(cls: type[Settings], argv: Sequence[str]) -> Settings:
    """Parse flags over the YAML file that --config names; on a wrong setting print one message and exit with 2."""
    try:
        values = _yaml_values(_config_path(argv))
        _check_names(cls, values)
        return CliApp.run(cls, cli_args=list(argv), **values)
    except (ValidationError, SettingsError, pydantic_settings.SettingsError) as error:
        print(f"{cls.model_config.get('cli_prog_name')}: {_message(error)}", file=sys.stderr)
        raise SystemExit(EXIT_WRONG_JOB) from error


def _config_path(argv: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        path: str | None = parser.parse_known_args(argv)[0].config
    except argparse.ArgumentError as error:
        raise SettingsError(str(error)) from error
    return path


def _yaml_values(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"config {path} cannot be read: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise SettingsError(f"config {path} is not a mapping of settings")
    return values


def _check_names(cls: type[JobSettings], values: dict[str, Any]) -> None:
    unknown = sorted(set(values) - set(cls.model_fields))
    if unknown:
        raise SettingsError(f"config has no setting {unknown[0]!r}; there are: {', '.join(cls.model_fields)}")


def _message(error: ValidationError | SettingsError | pydantic_settings.SettingsError) -> str:
    """Say in one line what is wrong first."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).removeprefix("error parsing CLI: ").split())
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]).replace("_", "-")
    if first["type"] == "missing":
        return f"--{name} is missing (see --help)"
    return f"{name} {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
