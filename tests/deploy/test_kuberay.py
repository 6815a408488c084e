"""The manifests for Kubernetes: images, users, resources, labels and costs."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from ipaddress import ip_address, ip_network

import pytest
import yaml

from tests.deploy.manifests import CLUSTERS, KUBERAY, ROOT, Value, cluster_of, documents, groups, loaded
from tests.deploy.scheduler import READER, SAMPLER, autoscaling, starter


@pytest.fixture(params=CLUSTERS)
def cluster(request) -> Value:
    return cluster_of(request.param)


def containers(value: Value) -> Iterator[Value]:
    """Yield every container in a manifest."""
    if isinstance(value, dict):
        yield from value.get("containers", [])
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from containers(part)


def test_a_job_has_the_cluster_that_raycluster_explains():
    assert loaded(KUBERAY["rayjob"])["spec"]["rayClusterSpec"] == loaded(KUBERAY["raycluster"])["spec"]


def test_a_failed_job_is_tried_again_and_costs_end_with_it():
    spec = loaded(KUBERAY["rayjob"])["spec"]
    assert "--allow-failed" in spec["entrypoint"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert min(spec["backoffLimit"], spec["ttlSecondsAfterFinished"], spec["activeDeadlineSeconds"]) > 0


@pytest.mark.parametrize("path", [path for name, path in KUBERAY.items() if name != "networkpolicy"])
def test_every_container_is_of_our_image_without_rights_and_gets_what_it_asks_for(path):
    found = [one for document in documents(path) for one in containers(document)]
    assert found
    for one in found:
        assert one["image"] == f"registry.example.com/pyramid-render:{version('pyramid-render')}@sha256:DIGEST"
        assert one["resources"]["requests"] == one["resources"]["limits"]
        assert one["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_a_cluster_asks_for_a_token_has_rays_version_and_its_sidecar_gets_what_it_asks_for(cluster):
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == version("ray")
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"ray[data,serve]=={cluster['rayVersion'].rpartition('.')[0]}.*" in requirements
    sidecar = cluster["autoscalerOptions"]["resources"]
    assert sidecar["requests"] == sidecar["limits"]


def test_pods_run_as_the_images_user_with_shared_memory_probes_and_secrets_by_name(cluster):
    for group in groups(cluster):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert container["envFrom"] == [{"secretRef": {"name": "pyramid-render-secrets"}}]
        for probe in ("readinessProbe", "livenessProbe"):
            port = container[probe]["httpGet"]["port"]
            assert port == 52365 or port in {named["name"] for named in container["ports"]}


def test_the_head_takes_no_work_and_gpus_are_whole_and_behind_their_taint(cluster):
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    with_gpu = []
    for group in groups(cluster):
        pod = group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        tolerated = {taint["key"] for taint in pod.get("tolerations", [])}
        assert ("nvidia.com/gpu" in tolerated) == ("nvidia.com/gpu" in limits)
        assert ("cloud.google.com/gke-spot" in tolerated) == (group["labels"].get("market") == "spot")
        assert ("nodeSelector" in pod) == (group["labels"].get("market") == "spot")
        if "nvidia.com/gpu" in limits:
            assert limits["nvidia.com/gpu"] == 1
            with_gpu.append(group["groupName"])
    assert sorted(with_gpu) == ["gpu", "gpu-spot"]


@pytest.mark.parametrize("name", ["raycluster", "rayservice"])
def test_spot_pods_are_started_first(name):
    spec = cluster_of(name)
    for group in spec["workerGroupSpecs"]:
        group["minReplicas"] = 0
    start = starter(autoscaling(spec))
    assert start(SAMPLER, SAMPLER) == {"gpu-spot": 2}


def test_a_cluster_for_jobs_starts_from_nothing():
    spec = cluster_of("raycluster")
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0, 0, 0]
    start = starter(autoscaling(spec))
    assert start(READER) == {"cpu": 1}


def test_the_service_fits_and_asks_for_keys():
    spec = loaded(KUBERAY["rayservice"])["spec"]
    [api] = yaml.safe_load(spec["serveConfigV2"])["applications"]
    args = api["args"]
    most = sum(group["maxReplicas"] for group in spec["rayClusterConfig"]["workerGroupSpecs"])
    assert sum(args["gpus"].values()) <= 1  # what runs without work, on the one GPU that is always there
    assert args["replicas"]["sample"] <= most
    assert args["keys"] is not None
    assert not {args["database"].partition(":")[0], args["output"].partition(":")[0]} & {"sqlite", "file"}


POLICIES = {policy["metadata"]["name"]: policy["spec"] for policy in documents(KUBERAY["networkpolicy"])}


def policy_of(pod: Value) -> Value:
    """Return the one policy that selects a pod."""
    labels = pod["metadata"]["labels"].items()
    [spec] = [one for one in POLICIES.values() if one["podSelector"]["matchLabels"].items() <= labels]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    return spec


def ports(rule: Value) -> set[int]:
    return {port["port"] for port in rule.get("ports", ())}


def test_ports_of_ray_are_open_within_a_cluster_only(cluster):
    for group in groups(cluster):
        policy = policy_of(group["template"])
        own = [{"podSelector": policy["podSelector"]}]
        assert {"from": own} in policy["ingress"]
        assert {"to": own} in policy["egress"]
        others = [rule for rule in policy["ingress"] if rule != {"from": own}]
        assert all(rule["from"] and ports(rule) and ports(rule) <= {8000, 8080, 8265} for rule in others)
        assert not any("ipBlock" in peer for rule in others for peer in rule["from"])


def test_others_reach_the_api_of_the_service_only():
    rules = POLICIES["pyramid-service"]["ingress"]
    from_anywhere = [rule for rule in rules if "ingress" in str(rule["from"])]
    assert [ports(rule) for rule in from_anywhere] == [{8000}]
    serve = cluster_of("rayservice")["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["ports"]
    assert {"name": "serve", "containerPort": 8000} in serve
    dashboards = [rule for rule in rules if 8265 in ports(rule)]
    assert [rule["from"][0]["podSelector"]["matchLabels"] for rule in dashboards] == [
        {"app.kubernetes.io/name": "kuberay-operator"}
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_pods_reach_names_the_bucket_and_the_database_but_no_private_network(name):
    rules = POLICIES[name]["egress"]
    assert {53} in [ports(rule) for rule in rules]
    assert ({5432} in [ports(rule) for rule in rules]) == (name == "pyramid-service")
    blocks = [peer["ipBlock"] for rule in rules for peer in rule["to"] if "ipBlock" in peer]
    open_blocks = [block for block in blocks if ip_network(block["cidr"]).num_addresses > 1]
    assert {block["cidr"] for block in open_blocks} == {"0.0.0.0/0", "2000::/3"}
    [public] = [block for block in open_blocks if block["cidr"] == "0.0.0.0/0"]
    closed = [ip_network(network) for network in public["except"]]
    for address in ("10.1.2.3", "172.31.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1"):
        assert any(ip_address(address) in network for network in closed)
    assert all(ports(rule) for rule in rules if any("ipBlock" in peer for peer in rule["to"]))


def test_the_job_that_copies_the_weights_is_reached_by_nobody():
    [job] = [one for one in documents(KUBERAY["models"]) if one["kind"] == "Job"]
    assert "ingress" not in policy_of(job["spec"]["template"])
