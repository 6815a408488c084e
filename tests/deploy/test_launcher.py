"""cluster.yaml and its twin: what Ray's launcher, its scheduler and the clouds' APIs make of them."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import boto3
import jsonschema
import pytest
from botocore.exceptions import ClientError, ParamValidationError
from moto import mock_aws
from ray._private.label_utils import validate_node_label_syntax, validate_node_labels
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.command_runner import DockerCommandRunner
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.manifests import DEPLOY, LAUNCHER, Value, changed, loaded
from tests.deploy.scheduler import ENCODER, READER, SAMPLER, starter

COMPUTE = json.loads((Path(__file__).parent / "compute.json").read_text())
WORKERS = ("cpu", "gpu", "gpu-spot")
ROLES = ("pyramid-render-head", "pyramid-render-worker")


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


class Shell:
    """A node's shell that keeps what it is told, and answers questions about the image and the machine."""

    def __init__(self, home: str) -> None:
        self.answers = {
            "Config.Env": json.dumps([f"HOME={home}"]),
            "Runtimes": "map[nvidia:{nvidia-container-runtime}]",
            "meminfo": "MemAvailable: 60000000 kB",
        }
        self.told: list[str] = []

    def check_call(self, command: list[str], **_options: object) -> None:
        self.told.append(command[-1])

    def check_output(self, command: list[str], **_options: object) -> bytes:
        return next((answer for what, answer in self.answers.items() if what in command[-1]), "").encode()


def test_ray_starts_the_container_with_token_weights_gpus_and_shared_memory(launcher):
    [home] = re.findall(r"^ENV HOME=(\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    config, shell = prepare_config(launcher), Shell(home)
    docker = config["docker"] | launcher["available_node_types"]["gpu"]["docker"]
    runner = DockerCommandRunner(
        docker,
        log_prefix="",
        node_id="node",
        provider=Mock(**{"internal_ip.return_value": "192.0.2.1"}),
        auth_config=config["auth"],
        cluster_name=config["cluster_name"],
        process_runner=shell,
        use_internal_ip=True,
    )
    runner.run_init(as_head=False, file_mounts=config["file_mounts"], sync_run_yet=True)
    [start] = [command for command in shell.told if "docker run" in command]
    assert f":{home}/.ray/auth_token " in start
    assert "--volume /home/ubuntu/models:/models:ro" in start
    assert "--gpus=all" in start
    assert 10e9 < float(re.findall(r"--shm-size='\D*([0-9.]+)b'", start)[0]) < 30e9  # of 60 GB


@pytest.fixture
def cloud(monkeypatch, tmp_path):
    """A simulated AWS, with the instance profiles that the docs say to make."""
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher keeps its ssh key there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    with mock_aws():
        for name in ROLES:
            boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        yield


def test_aws_takes_the_policies_of_the_docs(cloud):
    shown = dict(re.findall(r"cat > (\w+)\.json <<'EOF'\n(.*?)\nEOF", (DEPLOY / "README.md").read_text(), re.DOTALL))
    assert set(shown) == {"trust", "bucket", "nodes"}
    client = boto3.client("iam")
    for role in ROLES:
        client.create_role(RoleName=role, AssumeRolePolicyDocument=shown["trust"])
        for policy in ("bucket", "nodes"):
            client.put_role_policy(RoleName=role, PolicyName=policy, PolicyDocument=shown[policy])
    with pytest.raises(ClientError, match="MalformedPolicyDocument"):
        client.put_role_policy(RoleName=role, PolicyName="wrong", PolicyDocument=shown["bucket"].replace("Effect", "E"))


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
