"""What all settings share: a YAML file and flags become one validated, frozen value."""

import argparse
import os
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic_settings
import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource, SettingsConfigDict

from pipeline.storage.redaction import recorded
from pipeline.storage.urls import host_name
from pyramid_flow.vae.tile import Tile

EXIT_BROKEN, EXIT_WRONG_JOB, EXIT_INTERRUPTED = 1, 2, 130
OWN_CLUSTER = "local"
LORA = (
    "adapter of the transformer in the format of peft: PATH, or PATH=WEIGHT (what follows the last = is the weight); "
    "may be repeated"
)
VARIANT = '"384p", "768p", "image" or a folder name, if there are several'
MODEL = 'checkpoint folder in the published layout, "miniflux" or "sd3" once fetched, or "toy" for the bundled model'
STORED_MODEL = MODEL + "; or the URL of such a folder in an object store, of which every node keeps a copy"

MEMORY = (
    "full: all weights stay on the device; offload: a part's while it works; sequential: a layer's, slowest; "
    "auto: the first that fits into the memory that is free"
)
TILE = "side of a VAE tile in pixels, or none; auto: none on a CPU, else the largest that fits into the memory left"
CACHE = (
    "GiB of device memory that a sampler may use to remember what it computed of earlier frames; 0 = none, slower; "
    "auto: half of what is free"
)
GPUS_PER_CLIP = (
    "GPUs of one node that share every clip: not more clips, but each of them sooner (without GPUs: processes)"
)
PLACE = (
    "STAGE:KEY=VALUE: run a stage's workers on nodes with this label only, such as "
    "sample:ray.io/accelerator-type=H100; stages are {}; may be repeated"
)
SMALLEST_TILE, TILE_MULTIPLE = 64, 32

Count = Annotated[int, Field(ge=1)]
Hosts = Annotated[list[str], AfterValidator(lambda hosts: [host_name(host) for host in hosts])]


def _tile(value: object) -> object:
    if value is None or value in ("auto", "none"):
        return "auto" if value == "auto" else None
    if not str(value).isdecimal() or int(str(value)) < SMALLEST_TILE or int(str(value)) % TILE_MULTIPLE:
        raise ValueError(f"must be a multiple of {TILE_MULTIPLE} from {SMALLEST_TILE} on, or auto, or none")
    return value


TileSide = Annotated[Tile, BeforeValidator(_tile)]
CacheGiB = Annotated[float, Field(ge=0)] | Literal["auto"]


def labels_by_stage(given: Sequence[str], stages: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the labels of each stage's nodes, of values such as "sample:zone=a"; raises ValueError for others."""
    labels: dict[str, dict[str, str]] = {}
    for text in given:
        match = re.fullmatch(r"([a-z]+):([\w./-]+)=([\w.-]+)", text, re.ASCII)
        if match is None or match[1] not in stages:
            raise ValueError(f"{text!r} is not STAGE:KEY=VALUE with a stage of {', '.join(stages)}")
        labels.setdefault(match[1], {})[match[2]] = match[3]
    return labels


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
        """Take no setting from a variable of its name: a stray HEIGHT or MODEL must not change a job."""
        return (init_settings,)

    def record(self) -> dict[str, Any]:
        """Return the settings as records may keep them: URLs without what signs them."""
        return {name: _recorded(value) for name, value in self.model_dump(mode="json").items()}


def _recorded(value: Any) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, str):
        return recorded(value)
    if isinstance(value, list):
        return [_recorded(part) for part in value]
    if isinstance(value, dict):
        return {name: _recorded(part) for name, part in value.items()}
    return value


class ClusterSettings(JobSettings):
    """Base of the settings of jobs that run on Ray."""

    address: str = Field(
        default_factory=lambda: os.environ.get("RAY_ADDRESS") or OWN_CLUSTER,
        description='a running Ray cluster, such as "auto", or "local" for one of its own (default: RAY_ADDRESS, '
        "which is set in a submitted job, else local)",
    )

    @property
    def own_cluster(self) -> bool:
        """Whether the job starts a Ray cluster of its own on this machine."""
        return self.address == OWN_CLUSTER


Settings = TypeVar("Settings", bound=JobSettings)


def parse(cls: type[Settings], argv: Sequence[str]) -> Settings:
    """Parse flags over the YAML file that --config names; on a wrong setting print one message and exit with 2."""
    try:
        values = _yaml_values(_config_path(argv))
        _check_names(cls, values)
        return CliApp.run(cls, cli_args=list(argv), **values)
    except (ValidationError, SettingsError, pydantic_settings.SettingsError) as error:
        print(f"{cls.model_config.get('cli_prog_name')}: {_message(cls, error)}", file=sys.stderr)
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
        hint = suggestion(unknown[0], cls.model_fields) or f"; there are: {', '.join(cls.model_fields)}"
        raise SettingsError(f"config has no setting {unknown[0]!r}{hint}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a question for a misspelt name, such as `; did you mean --input?`, or nothing if no name is like it."""
    [nearest, *_] = [*get_close_matches(name, list(known), n=1, cutoff=0.7), ""]
    return f"; did you mean {nearest}?" if nearest else ""


def _message(cls: type[JobSettings], error: ValidationError | SettingsError | pydantic_settings.SettingsError) -> str:
    """Say in one line what is wrong first."""
    if not isinstance(error, ValidationError):
        message = " ".join(str(error).removeprefix("error parsing CLI: ").split())
        flag = re.search(r"unrecognized arguments:.*?(--[\w-]+)", message)
        flags = [f"--{name.replace('_', '-')}" for name in cls.model_fields]
        return message + (suggestion(flag[1], flags) if flag else "")
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]).replace("_", "-")
    if first["type"] == "missing":
        return f"--{name} is missing (see --help)"
    return f"{name} {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
