"""A service on a Ray cluster of this machine, for measurements."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import serve

from pipeline.batch import runner
from pipeline.batch.planner import Resources, StageSpec
from pipeline.serving.app import ServiceConfig, build

PORT = 18447
APPLICATION = "load"


def service(folder: Path, **values: Any) -> ServiceConfig:  # noqa: ANN401 - as ServiceConfig's
    """Return a service that refuses nobody."""
    places = {"database": f"sqlite:///{folder}/videos.db", "output": str(folder / "out")}
    limits = dict.fromkeys(("max_unfinished", "max_per_minute", "max_queued", "max_kept"), 10**6)
    return ServiceConfig(allow_anonymous=True, host="127.0.0.1", **places, **limits, **values)


@contextmanager
def serving(config: ServiceConfig, cpus: int, stages: Mapping[str, StageSpec] | None = None) -> Iterator[None]:
    """Run a service on a cluster of this machine's."""
    with runner.session(None, Resources(cpus, gpus=0)):
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(build(config, stages=stages), name=APPLICATION, route_prefix="/")
        try:
            yield
        finally:
            serve.shutdown()
