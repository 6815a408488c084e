"""Which nodes Ray's autoscaler would start: its own scheduler, asked for what a render job asks for."""

from collections.abc import Callable
from unittest.mock import Mock

from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from pipeline.batch.planner import ENCODER_SHARE, SAMPLER_SHARE
from pipeline.batch.runner import READ_CPUS
from tests.deploy.manifests import Value

SAMPLER, ENCODER, READER = {"GPU": SAMPLER_SHARE}, {"GPU": ENCODER_SHARE}, {"CPU": READ_CPUS}


def autoscaling(cluster: Value) -> Value:
    """Return the configuration that Ray's autoscaler derives from the specification of a KubeRay cluster."""
    metadata = {"name": "cluster", "namespace": "default"}
    return _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": cluster})


def starter(launcher: Value) -> Callable[..., dict[str, int]]:
    """Return what tells which nodes Ray's scheduler would start for some demand."""
    config = AutoscalingConfig(launcher, skip_content_hash=True)

    def start(*demand: dict[str, float], unavailable: str = "") -> dict[str, int]:
        requests = [ResourceRequestUtil.make(resources) for resources in demand]
        reply = ResourceDemandScheduler(Mock()).schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=config.get_node_type_configs(),
                max_num_nodes=config.get_max_num_nodes(),
                resource_requests=ResourceRequestUtil.group_by_count(requests),
                recoverable_resource_availabilities={unavailable: 0.0},
            )
        )
        return {launch.instance_type: launch.count for launch in reply.to_launch}

    return start
