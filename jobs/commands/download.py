"""Download a published checkpoint (`pyramid-render fetch miniflux`), so that its name stands for it in --model."""

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import cast

from huggingface_hub import DryRunFileInfo, HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from jobs.settings import EXIT_BROKEN, EXIT_INTERRUPTED, EXIT_WRONG_JOB, FetchSettings
from pyramid_flow.checkpoints.checkpoint import Checkpoint
from pyramid_flow.checkpoints.layout import TRANSFORMER_PREFIX, needed_files
from pyramid_flow.checkpoints.published import REPOSITORIES, record_fetched
from pyramid_flow.checkpoints.weight_files import stored_tensors
from pyramid_flow.errors import CheckpointError, PyramidFlowError

HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""Base of the errors of whichever HTTP client huggingface_hub uses."""

logger = logging.getLogger(__name__)


class FetchError(PyramidFlowError):
    """The checkpoint cannot be fetched as asked."""


class UnreachableError(PyramidFlowError):
    """The Hub does not answer."""


def run(settings: FetchSettings) -> int:
    """Fetch the checkpoint and print its folder; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line per request
    try:
        folder = fetch(settings)
    except UnreachableError as error:
        return _ended(EXIT_BROKEN, str(error))
    except PyramidFlowError as error:
        return _ended(EXIT_WRONG_JOB, str(error))
    except (HTTP_ERROR, OSError) as error:
        return _ended(EXIT_BROKEN, f"{_one_line(error)}; what came whole is kept, run it again to resume")
    except KeyboardInterrupt:
        return _ended(EXIT_INTERRUPTED, "interrupted; what came whole is kept, run it again to resume")
    print(folder)
    return 0


def fetch(settings: FetchSettings) -> Path:
    """Download what is missing and let the name stand for the folder, which is returned.

    Raises FetchError for what cannot be had, UnreachableError, and later errors of connection and disk as they come.
    """
    hub, repository = HfApi(library_name="pyramid-render"), REPOSITORIES[settings.name]
    commit, names = _listing(hub, repository, settings.revision)
    files = needed_files(names, settings.variant)
    wanted = [_described(hub, repository, commit, file, settings.output) for file in files]
    _check_space(wanted, settings.output)
    for file in files:
        path = hub.hf_hub_download(repository, file, revision=commit, local_dir=settings.output)
    folder = Path(path).parents[len(PurePosixPath(file).parts) - 1].absolute()
    _check_whole(folder, files, repository)
    for part in {file.partition("/")[0] for file in files if file.startswith(TRANSFORMER_PREFIX)}:
        Checkpoint.open(folder, part).check()
    record_fetched(settings.name, folder)
    return folder


def _listing(hub: HfApi, repository: str, revision: str) -> tuple[str, list[str]]:
    """Return the commit that a revision means now, and the names of its files."""
    try:
        info = hub.model_info(repository, revision=revision)
    except GatedRepoError as error:
        raise FetchError(
            f"{repository} is open only to accounts with access: set HF_TOKEN to a token of one"
        ) from error
    except RevisionNotFoundError as error:
        raise FetchError(f"{repository} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise FetchError(f"{hub.endpoint} has no repository {repository}") from error
    except (HTTP_ERROR, OSError) as error:
        raise UnreachableError(
            f"{hub.endpoint} cannot be reached ({_one_line(error)}): bring a copy of {repository} made elsewhere, "
            "with its folders causal_video_vae, diffusion_transformer_*, text_encoder* and tokenizer* side by side in "
            "one folder, and give that folder to --model"
        ) from error
    return str(info.sha), [file.rfilename for file in info.siblings or ()]


def _described(hub: HfApi, repository: str, commit: str, file: str, output: Path | None) -> DryRunFileInfo:
    return hub.hf_hub_download(repository, file, revision=commit, local_dir=output, dry_run=True)


def _check_space(files: Sequence[DryRunFileInfo], output: Path | None) -> None:
    target = output or Path(constants.HF_HUB_CACHE)
    missing = [file.file_size or 0 for file in files if file.will_download or (output and _is_missing(file))]
    existing = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if sum(missing) > free:
        raise FetchError(f"{target} has {_gb(free)} free, but {_gb(sum(missing))} are to come: give another --output")
    logger.info("fetching %d of %d files, %s, into %s", len(missing), len(files), _gb(sum(missing)), target)


def _is_missing(file: DryRunFileInfo) -> bool:
    return not Path(file.local_path).exists()  # it may be copied from the cache, which takes space too


def _check_whole(folder: Path, files: Sequence[str], repository: str) -> None:
    for part in sorted({file.partition("/")[0] for file in files if file.endswith("/config.json")}):
        try:
            stored_tensors(folder / part)
        except CheckpointError as error:
            raise FetchError(
                f"{error}: as {repository} has none, convert its pickled weights (docs/model.md says how), put the "
                "file there and run this again"
            ) from error


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": ")


def _ended(code: int, message: str) -> int:
    print(f"pyramid-render fetch: {message}", file=sys.stderr)
    return code
