"""cluster.yaml and its twin: what Ray's launcher, its scheduler and the clouds' APIs make of them."""

import json
from collections import Counter
from collections.abc import Callable
from unittest.mock import Mock

import boto3
import jsonschema
import pytest
from botocore.exceptions import ParamValidationError
from moto import mock_aws
from ray._private.label_utils import validate_node_label_syntax, validate_node_labels
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from tests.deploy.manifests import LAUNCHER, Value, changed, loaded

COMPUTE = json.loads((LAUNCHER["gcp"].parents[2] / "tests/deploy/compute.json").read_text())
WORKERS = ("cpu", "gpu", "gpu-spot")


@pytest.fixture(params=LAUNCHER)
def launcher(request) -> Value:
    return loaded(LAUNCHER[request.param])


def test_ray_accepts_it(launcher):
    validate_config(prepare_config(launcher))


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("max_nodes", 3, "Additional properties are not allowed"),
        ("max_workers", "many", "is not of type 'integer'"),
        ("docker.images", "name", "Additional properties are not allowed"),
        ("available_node_types.gpu.spot", True, "Additional properties are not allowed"),
        ("available_node_types.gpu.resources.GPU", 0.5, "is not of type 'integer'"),
        ("available_node_types.gpu.resources.GPU", -1, "is less than the minimum"),
        ("available_node_types.gpu.labels.pool", 1, "is not of type 'string'"),
        ("available_node_types.gpu.min_workers", 13, "min_workers"),
        ("head_node_type", "boss", "head_node_type"),
        ("provider.type", "cloud", "cloud"),
    ],
)
def test_ray_refuses_what_is_wrong(launcher, place, value, reason):
    with pytest.raises(Exception, match=reason):  # Ray's are of several types
        validate_config(prepare_config(changed(launcher, place, value)))


def test_nothing_of_rays_defaults_is_installed(launcher):
    prepared = prepare_config(launcher)
    assert "pip install" not in json.dumps(prepared)
    assert prepared["docker"]["image"].startswith("registry.example.com/pyramid-render:")


def test_the_head_takes_no_work_and_the_rest_grows_from_nothing(launcher):
    types = launcher["available_node_types"]
    assert types[launcher["head_node_type"]]["resources"] == {"CPU": 0}
    assert {name: types[name]["min_workers"] for name in WORKERS} == dict.fromkeys(WORKERS, 0)
    assert sorted(types) == sorted([launcher["head_node_type"], *WORKERS])


def test_gpus_come_into_the_container_of_those_that_have_some(launcher):
    for name, kind in launcher["available_node_types"].items():
        options = kind.get("docker", {}).get("worker_run_options", [])
        assert ("--gpus=all" in options) == ("GPU" in kind["resources"]), name


def test_labels_are_such_as_ray_takes(launcher):
    for kind in launcher["available_node_types"].values():
        validate_node_labels(kind["labels"])
        validate_node_label_syntax(kind["labels"])


def test_the_token_is_asked_for_and_mounted(launcher):
    assert launcher["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]


def test_the_twins_differ_in_what_the_clouds_call_things_only():
    own = ("provider", "initialization_commands", "available_node_types")
    aws, gcp = ({key: value for key, value in loaded(path).items() if key not in own} for path in LAUNCHER.values())
    assert aws == gcp


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
        return dict(Counter({launch.instance_type: launch.count for launch in reply.to_launch}))

    return start


SAMPLER, ENCODER, READER = {"GPU": 0.55}, {"GPU": 0.2}, {"CPU": 0.25}  # as a render job asks for them


def test_a_job_gets_spot_gpus_one_per_sampler(launcher):
    start = starter(launcher)
    assert start() == {}
    assert start(READER, READER) == {"cpu": 1}
    assert start(*[SAMPLER] * 4, ENCODER)["gpu-spot"] == 4
    assert "gpu" not in start(*[SAMPLER] * 4, ENCODER)


def test_where_spot_nodes_cannot_be_had_others_are(launcher):
    assert starter(launcher)(SAMPLER, SAMPLER, unavailable="gpu-spot") == {"gpu": 2}


def test_never_more_nodes_than_said(launcher):
    assert sum(starter(launcher)(*[SAMPLER] * 50).values()) <= launcher["max_workers"] + 1


@pytest.fixture
def cloud(monkeypatch, tmp_path):
    """A simulated AWS, with the instance profiles that the docs say to make."""
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher keeps its ssh key there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    with mock_aws():
        for name in ("pyramid-render-head", "pyramid-render-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        yield


def test_a_simulated_aws_starts_a_node_of_each_type(cloud):
    config = AWSNodeProvider.bootstrap_config(prepare_config(loaded(LAUNCHER["aws"])))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)
    client = boto3.client("ec2", config["provider"]["region"])
    nodes = {}
    for instance in (one for group in client.describe_instances()["Reservations"] for one in group["Instances"]):
        tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
        nodes[tags["ray-user-node-type"]] = instance
    assert set(nodes) == {"head", *WORKERS}
    for name, node in nodes.items():
        profile = "pyramid-render-head" if name == "head" else "pyramid-render-worker"
        assert node["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
        assert node.get("InstanceLifecycle") == ("spot" if name == "gpu-spot" else None)
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert [disk["Ebs"]["DeleteOnTermination"] for disk in node["BlockDeviceMappings"]] == [True]
        [offered] = client.describe_instance_types(InstanceTypes=[node["InstanceType"]])["InstanceTypes"]
        resources = config["available_node_types"][name]["resources"]
        gpus = sum(gpu["Count"] for gpu in offered.get("GpuInfo", {}).get("Gpus", []))
        assert resources.get("GPU", 0) == gpus
        assert resources["CPU"] == (0 if name == "head" else offered["VCpuInfo"]["DefaultVCpus"])


def test_aws_refuses_a_field_that_it_does_not_have(cloud):
    config = changed(loaded(LAUNCHER["aws"]), "available_node_types.gpu.node_config.SpotPrice", "1")
    config = AWSNodeProvider.bootstrap_config(prepare_config(config))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    with pytest.raises(ParamValidationError, match="SpotPrice"):
        provider.create_node(config["available_node_types"]["gpu"]["node_config"], {}, 1)


def test_google_has_every_field():
    types = loaded(LAUNCHER["gcp"])["available_node_types"]
    for kind in types.values():
        jsonschema.validate(kind["node_config"], COMPUTE)
        assert [disk["autoDelete"] for disk in kind["node_config"]["disks"]] == [True]
    assert types["gpu-spot"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "provisioningModel" not in types["gpu"]["node_config"]["scheduling"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("machine", "n2-standard-4"),
        ("machineType", 4),
        ("disks.0.initializeParams.diskSizeGb", 250),
        ("disks.0.size", "250"),
        ("scheduling.provisioningModel", "CHEAP"),
        ("serviceAccounts.0.scopes", "cloud-platform"),
    ],
)
def test_google_lacks_other_fields_and_types(place, value):
    kind = loaded(LAUNCHER["gcp"])["available_node_types"]["gpu-spot"]["node_config"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(kind, place, value), COMPUTE)
