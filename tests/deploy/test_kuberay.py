"""The manifests for Kubernetes: images, users, resources, labels and costs."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import version

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


@pytest.mark.parametrize("path", KUBERAY.values(), ids=KUBERAY)
def test_every_container_is_of_our_image_without_rights_and_gets_what_it_asks_for(path):
    found = [one for document in documents(path) for one in containers(document)]
    assert found
    for one in found:
        assert one["image"] == f"registry.example.com/pyramid-render:{version('pyramid-render')}"
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
    api, _ = yaml.safe_load(spec["serveConfigV2"])["applications"]
    args = api["args"]
    most = sum(group["maxReplicas"] for group in spec["rayClusterConfig"]["workerGroupSpecs"])
    assert sum(args["gpus"].values()) <= 1  # what runs without work, on the one GPU that is always there
    assert args["replicas"]["sample"] <= most
    assert args["keys"] is not None
    assert not {args["database"].partition(":")[0], args["output"].partition(":")[0]} & {"sqlite", "file"}
