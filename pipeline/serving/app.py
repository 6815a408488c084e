"""The service as an application of Ray Serve: interface, dispatcher and stages, each with replicas of its own."""

import ipaddress
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from pipeline.batch.planner import StageSpec
from pipeline.monitoring.logs import log_as_json
from pipeline.serving.http.access import Service
from pipeline.serving.http.api import create_app
from pipeline.serving.http.keys import Keys
from pipeline.serving.http.links import Links
from pipeline.serving.queue.dispatcher import DispatchSettings
from pipeline.serving.queue.store import QueueLimits, Store
from pipeline.serving.queue.webhooks import Webhook
from pipeline.serving.replicas import DecodeReplica, DispatcherReplica, SampleReplica, StageReplica
from pipeline.serving.streaming.live import LiveDecode
from pipeline.stages import STAGES
from pipeline.stages.encode import Encode
from pipeline.stages.model import ModelConfig
from pipeline.stages.publish import Publish
from pipeline.storage.storage import Storage
from pipeline.storage.weights import open_checkpoint
from pipeline.tables.images import NO_IMAGES
from pyramid_flow.memory.modes import Memory
from pyramid_flow.vae.tile import Tile

UPSCALE_S = 5.0
"""How long more must wait than the samplers work on until there is another one."""

ONE_REPLICA_PER_SESSION = RequestRouterConfig(
    request_router_class=ConsistentHashRouter,  # type: ignore[arg-type]
    request_router_kwargs={"num_fallback_replicas": 0},
)
"""Of the decoder, which keeps what it has shown; Serve's multiplexing never forgets a request with a model id."""

OWN_LOG = {"enable_access_log": False}
"""Of the interface, which logs its requests itself."""


class ServiceConfig(BaseModel):
    """What a service is made of; plain values, so that it can be written into a config file of Serve's.

    keys: names by the hashes of API keys; None = everyone who reaches `host`, the address that Serve listens on, which
    then must be this machine's own, and only with `allow_anonymous`; image_hosts: from which pictures are fetched;
    replicas: of each stage, the sampler's at most, if `min_samplers` is fewer: so few again after `scale_down_s`
    seconds without work; gpus: of a replica of each stage. render_s: the longest that a batch may take; webhook_url: is
    told the end of each video; redirect_downloads: clients read files of videos from the object store by signed URLs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "toy"
    variant: str | None = None
    lora: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    database: str
    output: str
    keys: dict[str, str] | None = None
    allow_anonymous: bool = False
    host: str | None = None
    redirect_downloads: bool = False
    image_hosts: tuple[str, ...] = ()
    replicas: dict[str, int] = dict.fromkeys(STAGES, 1)
    min_samplers: int | None = None
    scale_down_s: float = 600.0
    gpus: dict[str, float] = {}
    gpus_per_clip: int = 1
    places: dict[str, dict[str, str]] = {}
    threads: int = 1
    batch_size: int = 4
    tile: Tile = "auto"
    cache_gib: float | None = None
    memory: Memory = "auto"
    decode_window: int = 1
    max_live: int = 4
    max_queued: int = 1000
    max_unfinished: int = 100
    max_per_minute: int = 60
    max_kept: int = 10_000
    max_attempts: int = 3
    retention_s: float = 86400.0
    render_s: float = 1800.0
    webhook_url: str | None = None

    @model_validator(mode="after")
    def _is_closed(self) -> Self:
        if self.keys is None and not (self.allow_anonymous and is_loopback(self.host)):
            raise ValueError(
                "without keys, everyone who reaches the service can use it: "
                "set keys, or allow_anonymous: true and host: 127.0.0.1"
            )
        return self

    @property
    def limits(self) -> QueueLimits:
        """What may wait."""
        return QueueLimits(self.max_queued, self.max_unfinished, self.max_per_minute, self.max_kept)


def build(
    config: ServiceConfig, webhook_secret: str | None = None, stages: Mapping[str, StageSpec] | None = None
) -> Application:
    """Return the application, for `serve.run`.

    webhook_secret: messages to the webhook are signed with it; stages: others in place of all of the model's, by
    name. Raises ValueError if there is a webhook and no secret.
    """
    if config.webhook_url and not webhook_secret:
        raise ValueError("a webhook needs a secret to sign its messages with")
    replicas = _model_stages(config)
    for name, spec in (stages or {}).items():
        replicas[name] = _stage(config, name, StageReplica).bind(spec, config.render_s)
    dispatcher = _deployment(DispatcherReplica, "dispatcher", graceful_shutdown_timeout_s=30).bind(
        config.database,
        config.retention_s,
        config.output,
        DispatchSettings(config.batch_size, config.max_attempts),
        Webhook(config.webhook_url, webhook_secret) if config.webhook_url and webhook_secret else None,
        replicas,
    )

    links = Links()  # drawn once, for all replicas

    def interface() -> FastAPI:
        log_as_json(deployment="api")
        return create_app(_service(config, links))

    ingress = _deployment(serve.ingress(interface)(), "api", max_ongoing_requests=1000, logging_config=OWN_LOG)
    application: Application = ingress.bind(dispatcher)
    return application


def is_loopback(host: str | None) -> bool:
    """Whether an address to listen at is reached from this machine only."""
    with suppress(ValueError):
        return ipaddress.ip_address(host or "").is_loopback
    return host == "localhost"


def _deployment(replica: type, name: str, **options: Any) -> Any:  # noqa: ANN401 - as Serve's
    actor = {"num_cpus": 0} | options.pop("ray_actor_options", {})
    return serve.deployment(replica, name=name, ray_actor_options=actor, **options)


def _model_stages(config: ServiceConfig) -> dict[str, Application]:
    model = ModelConfig(
        path=config.model,
        variant=config.variant,
        device=config.device,
        dtype=config.dtype,
        threads=config.threads,
        lora=config.lora,
        memory=config.memory,
        cache_gib=config.cache_gib,
        gpus_per_clip=config.gpus_per_clip,
    )
    places = {"database": config.database, "output": config.output}
    frames = {"window": config.decode_window, "tile": config.tile, "encoder_threads": config.threads}
    live = {"max_live": config.max_live}
    encode = StageSpec(Encode, {"model": model, "image_root": NO_IMAGES.url, "image_hosts": frozenset()})
    decode = StageSpec(LiveDecode, {"model": model} | frames | live | places)
    publish = StageSpec(Publish, {"output": config.output, "node": "serve"})
    stages = {
        "encode": _stage(config, "encode", StageReplica).bind(encode, config.render_s),
        "decode": _stage(config, "decode", DecodeReplica, request_router_config=ONE_REPLICA_PER_SESSION).bind(
            decode, config.render_s
        ),
        "publish": _stage(config, "publish", StageReplica).bind(publish, config.render_s),
    }
    sample = _stage(config, "sample", SampleReplica)
    return stages | {"sample": sample.bind(model, config.database, stages["decode"], config.render_s)}


def _stage(config: ServiceConfig, name: str, replica: type, **options: Any) -> Any:  # noqa: ANN401 - as Serve's
    """Return a stage's deployment: what a replica does not work on yet waits outside, and survives its death."""
    return _deployment(
        replica,
        name,
        ray_actor_options={"num_gpus": config.gpus.get(name, 0), "label_selector": config.places.get(name, {})},
        max_ongoing_requests=1,
        graceful_shutdown_timeout_s=config.render_s,
        health_check_timeout_s=60,
        **_size(config, name),
        **options,
    )


def _size(config: ServiceConfig, name: str) -> Mapping[str, Any]:
    most = config.replicas[name]
    least = most if config.min_samplers is None else min(config.min_samplers, most)
    if name != "sample" or least == most:
        return {"num_replicas": most}
    scaling = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=1,
        upscale_delay_s=UPSCALE_S,
        downscale_delay_s=config.scale_down_s,
    )
    return {"autoscaling_config": scaling}


def _service(config: ServiceConfig, links: Links) -> Service:
    checkpoint = open_checkpoint(config.model, config.variant, config.lora)
    return Service(
        store=Store(config.database, limits=config.limits, retention_s=config.retention_s),
        storage=Storage(config.output),
        preset=checkpoint.preset,
        model=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        images=replace(NO_IMAGES, allowed_hosts=frozenset(config.image_hosts)),
        keys=None if config.keys is None else Keys(config.keys),
        nodes=_metrics_urls,
        names_requests=False,  # Serve's proxy does
        links=links,
        redirects=config.redirect_downloads,
    )


def _metrics_urls() -> Sequence[str]:
    nodes = (node for node in ray.nodes() if node["Alive"])
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
