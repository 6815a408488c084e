"""Settings of the jobs that get a checkpoint and look into it."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from jobs.settings.base import MODEL, JobSettings


class FetchSettings(JobSettings):
    """Download a published checkpoint from the Hugging Face Hub; afterwards its name stands for it in --model.

    Only what is needed comes, and safetensors only: never pickled weights. Files that have come whole are kept when it
    is interrupted, so running it again goes on with the others. HF_ENDPOINT, HF_TOKEN, HF_HOME and the like mean what
    they mean to huggingface_hub.

    Exit codes: 0 it is there, 1 it broke (run it again to resume), 2 it cannot be fetched as asked, 130 interrupted.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render fetch")

    name: CliPositionalArg[Literal["miniflux", "sd3"]] = Field(description="which checkpoint: miniflux or sd3")
    variant: list[str] = Field([], description='only this one, such as "384p" (default: all); may be repeated')
    output: Path | None = Field(None, description="folder for the files (default: the Hub's cache, below HF_HOME)")
    revision: str = Field("main", min_length=1, description="branch, tag or commit of the repository")


class InspectSettings(JobSettings):
    """Say what a checkpoint is: family, variants, parameters, fingerprints, and the memory it needs.

    Reads the headers of the weights; only a fingerprint that is not remembered takes reading them whole.

    Exit codes: 0 said, 2 there is no such checkpoint or it is damaged, 130 interrupted.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render inspect")

    model: CliPositionalArg[str] = Field(min_length=1, description=MODEL)
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the weights when loaded")
    tile: int | None = Field(
        None, ge=64, multiple_of=32, description="side of a VAE tile in pixels (default: no tiling)"
    )
    json_: bool = Field(False, alias="json", description="print JSON for machines")
