"""cluster.yaml and its twin: image, roles, machines, costs and labels."""

import json

import pytest
from ray.autoscaler._private.util import prepare_config

from tests.deploy.manifests import DEPLOY, LAUNCHER, Value, loaded
from tests.deploy.scheduler import ENCODER, READER, SAMPLER, starter

WORKERS = ("cpu", "gpu", "gpu-spot")
INSTANCES = {"m7i.2xlarge": {"CPU": 8}, "g6e.2xlarge": {"CPU": 8, "GPU": 1}}
"""What AWS publishes about the instance types of the workers."""


@pytest.fixture(params=LAUNCHER)
def launcher(request) -> Value:
    return loaded(LAUNCHER[request.param])


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


def test_the_token_is_asked_for_and_mounted(launcher):
    assert launcher["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]


def test_weights_are_mounted_read_only(launcher):
    assert "--volume /home/ubuntu/models:/models:ro" in launcher["docker"]["run_options"]
    assert any(command.endswith(" /home/ubuntu/models") for command in launcher["initialization_commands"])


def test_the_twins_differ_in_what_the_clouds_call_things_only():
    own = ("provider", "initialization_commands", "available_node_types")
    aws, gcp = ({key: value for key, value in loaded(path).items() if key not in own} for path in LAUNCHER.values())
    assert aws == gcp


def test_a_job_gets_spot_gpus_one_per_sampler(launcher):
    start = starter(launcher)
    assert start() == {}
    assert start(READER, READER) == {"cpu": 1}
    assert start(*[SAMPLER] * 4, ENCODER)["gpu-spot"] == 4
    assert "gpu" not in start(*[SAMPLER] * 4, ENCODER)


def test_where_spot_nodes_cannot_be_had_others_are(launcher):
    assert starter(launcher)(SAMPLER, SAMPLER, unavailable="gpu-spot") == {"gpu": 2}


def test_nodes_on_aws_have_least_rights_and_leave_nothing():
    types = loaded(LAUNCHER["aws"])["available_node_types"]
    for name, kind in types.items():
        node = kind["node_config"]
        profile = "pyramid-render-head" if name == "head" else "pyramid-render-worker"
        assert node["IamInstanceProfile"] == {"Name": profile}
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert [disk["Ebs"]["DeleteOnTermination"] for disk in node["BlockDeviceMappings"]] == [True]
        assert node.get("InstanceMarketOptions", {}).get("MarketType") == ("spot" if name == "gpu-spot" else None)
    assert f"for name in pyramid-render-head {profile}; do" in (DEPLOY / "README.md").read_text()


def test_resources_are_those_of_the_instance_types():
    types = loaded(LAUNCHER["aws"])["available_node_types"]
    for name in WORKERS:
        assert types[name]["resources"] == INSTANCES[types[name]["node_config"]["InstanceType"]], name


def test_nodes_on_google_leave_nothing():
    types = loaded(LAUNCHER["gcp"])["available_node_types"]
    for name, kind in types.items():
        assert [disk["autoDelete"] for disk in kind["node_config"]["disks"]] == [True]
        model = kind["node_config"].get("scheduling", {}).get("provisioningModel")
        assert model == ("SPOT" if name == "gpu-spot" else None)
