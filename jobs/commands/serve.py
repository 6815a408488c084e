"""Serve the Videos API on Ray Serve (`pyramid-render serve`)."""

import base64
import binascii
import logging
import sys
import threading

import ray
import torch
import yaml
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client
from sqlalchemy.engine import URL, make_url
from yarl import URL as WebURL

from jobs.settings import EXIT_BROKEN, EXIT_WRONG_JOB, ServeSettings, webhook_secret
from jobs.signals import Signals
from pipeline.batch import runner
from pipeline.batch.planner import PlanError, Resources
from pipeline.serving.app import ServiceConfig, build, is_loopback
from pipeline.serving.http.keys import Keys, hashed, new_key
from pipeline.serving.queue.store import Store
from pipeline.storage.storage import Storage
from pipeline.storage.weights import is_stored, open_checkpoint
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.parallel.config import parallel_config

APPLICATION = "pyramid-render"
MIN_SECRET_BYTES = 24

logger = logging.getLogger("pyramid-render")


class ServeError(PyramidFlowError):
    """The service cannot start as it was asked for."""


def run(settings: ServeSettings) -> int:
    """Serve until a signal comes; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if settings.new_key:
        key = new_key()
        print(f"{key}\n{settings.new_key}:{hashed(key)}")
        return 0
    try:
        config = prepare(settings)
    except PyramidFlowError as error:
        logger.error("pyramid-render serve: %s", error)
        return EXIT_WRONG_JOB
    if settings.print_config:
        print(config_file(settings, config), end="")
        return 0
    own = settings.own_cluster
    resources = Resources(1 + config.threads, torch.cuda.device_count())
    signals = Signals()
    try:
        with runner.session(None if own else settings.address, resources if own else None):
            signals.install()
            return _serve(settings, config, signals)
    except (ServeError, PlanError) as error:
        logger.error("pyramid-render serve: %s", error)
        return EXIT_WRONG_JOB
    except KeyboardInterrupt:
        return signals.exit_code
    except Exception as error:  # noqa: BLE001 - the replicas' logs have the traceback
        logger.error("the service broke: %s: %s", type(error).__name__, error)
        return EXIT_BROKEN


def prepare(settings: ServeSettings) -> ServiceConfig:
    """Check everything that can be checked before a cluster is used; raises a PyramidFlowError."""
    checkpoint = open_checkpoint(settings.model, settings.variant, tuple(settings.lora))
    checkpoint.check()
    parallel_config(settings.gpus_per_clip, checkpoint.num_attention_heads)
    device = "cuda" if settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available()) else "cpu"
    dtype = settings.dtype if settings.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    _check_webhook(settings.webhook_url)
    storage = Storage(settings.output)
    output = storage.uri
    database = settings.database or _database_in(output)
    storage.probe()
    Store(database).close()
    sampler = settings.sample_gpus if settings.gpus_per_clip == 1 else settings.gpus_per_clip
    shares = {"encode": settings.encode_gpus, "sample": sampler, "decode": settings.decode_gpus}
    return ServiceConfig(
        model=settings.model if is_stored(settings.model) else checkpoint.path,
        variant=checkpoint.variant,
        lora=checkpoint.lora,
        device=device,
        dtype=dtype,
        database=database,
        output=output,
        keys=_keys(settings),
        allow_anonymous=settings.own_cluster and is_loopback(settings.host),
        host=settings.host,
        redirect_downloads=_redirects(settings, storage),
        image_hosts=tuple(settings.allow_image_host),
        replicas={
            "encode": settings.encode_replicas,
            "sample": settings.sample_replicas,
            "decode": settings.decode_replicas,
            "publish": 1,
        },
        min_samplers=settings.min_sample_replicas,
        scale_down_s=settings.scale_down_s,
        gpus=shares if device == "cuda" else {},
        gpus_per_clip=settings.gpus_per_clip,
        places=settings.places,
        threads=settings.threads,
        tile=settings.tile,
        cache_gib=None if settings.cache_gib == "auto" else settings.cache_gib,
        memory=settings.memory,
        decode_window=settings.decode_window,
        max_live=settings.max_live,
        render_s=settings.render_s,
        batch_size=settings.batch_size,
        max_queued=settings.max_queued,
        max_unfinished=settings.max_unfinished,
        max_per_minute=settings.max_per_minute,
        max_kept=settings.max_kept,
        max_attempts=settings.max_attempts,
        retention_s=3600 * settings.retention_h,
        webhook_url=settings.webhook_url,
    )


def application(config: ServiceConfig) -> Application:
    """Return the service for the cluster it is to run on; `serve run` and `serve deploy` call it too.

    Raises ServeError if the cluster cannot run it.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    local = [name for name, url in (("database", config.database), ("output", config.output)) if _is_local(url)]
    if local and len(nodes) > 1:
        raise ServeError(f"the {' and the '.join(local)} must be reachable from all {len(nodes)} nodes of the cluster")
    if config.keys is None and not is_loopback(_listening_host()):
        raise ServeError(f"Serve listens on {_listening_host()}: without keys, http_options must have host 127.0.0.1")
    return build(config, webhook_secret())


def _listening_host() -> str | None:
    """Return the address that Serve listens on, which Ray tells by no public function."""
    client = _get_global_client()
    return None if client is None else client.http_config.host


def _redirects(settings: ServeSettings, storage: Storage) -> bool:
    if settings.redirect_downloads and storage.signed_url("probe", 1) is None:
        raise ServeError(f"output {storage.uri} cannot sign URLs: --redirect-downloads needs an object store that can")
    return settings.redirect_downloads


def _database_in(output: str) -> str:
    if not _is_local(output):
        raise ServeError(f"output {output} is no folder of this machine: say where the --database is")
    return f"sqlite:///{output.removeprefix('file://')}/videos.db"


def _check_webhook(url: str | None) -> None:
    if url is None:
        return
    try:
        asked = WebURL(url)
    except ValueError as error:
        raise ServeError(f"webhook_url {url!r} is no URL: {error}") from error
    if asked.scheme not in ("http", "https") or not asked.host:
        raise ServeError(f"webhook_url {url!r} is no http(s) URL")
    try:
        key = base64.b64decode((webhook_secret() or "").removeprefix("whsec_"), validate=True)
    except binascii.Error as error:
        raise ServeError("PYRAMID_RENDER_WEBHOOK_SECRET is not in base64") from error
    if len(key) < MIN_SECRET_BYTES:
        raise ServeError(f"a webhook needs PYRAMID_RENDER_WEBHOOK_SECRET, base64 of {MIN_SECRET_BYTES} bytes or more")


def _keys(settings: ServeSettings) -> dict[str, str] | None:
    """Return who may ask, None = everyone, which is for one's own machine only."""
    text = settings.api_keys or ""
    if settings.keys_file:
        try:
            text += "\n" + settings.keys_file.read_text()
        except OSError as error:
            raise ServeError(f"the file of keys cannot be read: {error}") from error
    names = dict(Keys.parse(text).names)
    loopback = is_loopback(settings.host) and settings.own_cluster
    if not settings.auth and not loopback:
        raise ServeError(f"--no-auth would let everyone who reaches {settings.host} render: it is for 127.0.0.1 only")
    if not names and not loopback:
        raise ServeError("API keys are needed: --new-key NAME makes one, --keys-file FILE says which are good")
    return names if settings.auth and names else None


def config_file(settings: ServeSettings, config: ServiceConfig) -> str:
    """Return the service as a file for `serve deploy`."""
    http = {"host": settings.host, "port": settings.port}
    args = config.model_dump(mode="json") | {"database": _without_password(config.database)}
    application = {
        "name": APPLICATION,
        "import_path": "jobs.commands.serve:application",
        "route_prefix": "/",
        "args": args,
    }
    return yaml.safe_dump({"http_options": http, "applications": [application]}, sort_keys=False)


def _without_password(database: str) -> str:
    """Return a database URL that may be written down; PostgreSQL reads the password from PGPASSWORD."""
    url = make_url(database)
    secrets = [name for name in url.query if "password" in name.lower()]
    if url.password is None and not secrets:
        return database
    logger.warning("left out the password of the database: set PGPASSWORD in the cluster's environment")
    return URL.create(**url.difference_update_query(secrets)._asdict() | {"password": None}).render_as_string()


def _serve(settings: ServeSettings, config: ServiceConfig, signals: Signals) -> int:
    needed = sum(count * config.gpus.get(name, 0) for name, count in config.replicas.items())
    if settings.own_cluster and needed > torch.cuda.device_count():
        raise ServeError(f"the replicas need {needed:g} GPUs, and there are {torch.cuda.device_count()}")
    stop = threading.Event()
    serve.start(http_options={"host": settings.host, "port": settings.port})
    try:
        serve.run(application(config), name=APPLICATION, route_prefix="/")
        signals.on_signal = stop.set
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        url = WebURL.build(scheme="http", host=host, port=settings.port).origin()
        logger.info("%s serves at %s/v1/videos, its page is %s/", config.model, url, url)
        stop.wait()
        logger.info("stopping: what is being made waits for the next start")
    finally:
        if settings.own_cluster:
            serve.shutdown()
        else:
            serve.delete(APPLICATION)
    return signals.exit_code


def _is_local(url: str) -> bool:
    return url.startswith("file://") or (":" in url and make_url(url).get_backend_name() == "sqlite")
