"""The manifests: KubeRay's and Kubernetes' published fields, what Ray's autoscaler, Serve and we make of them."""

import json
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray._private.label_utils import validate_node_labels
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from jobs.serve import config_file, page_config
from jobs.settings import ServeSettings
from pipeline.serving.app import PageConfig, ServiceConfig
from tests.deploy.manifests import KUBERAY, ROOT, Value, changed, documents, loaded
from tests.deploy.scheduler import READER, SAMPLER, starter

FIELDS = json.loads((Path(__file__).parent / "kuberay.json").read_text())
KUBERNETES = "1.33"
CLUSTERS = {"raycluster": "spec", "rayjob": "spec.rayClusterSpec", "rayservice": "spec.rayClusterConfig"}


@pytest.fixture(params=CLUSTERS)
def cluster(request) -> Value:
    """The specification of a manifest's cluster."""
    value = loaded(KUBERAY[request.param])
    for key in CLUSTERS[request.param].split("."):
        value = value[key]
    return value


def groups(cluster: Value) -> list[Value]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def containers(value: Value) -> Iterator[Value]:
    """Yield every container in a manifest."""
    if isinstance(value, dict):
        yield from value.get("containers", [])
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from containers(part)


def check(manifest: Value) -> None:
    """Raise ValidationError if a field is not one of KubeRay's or Kubernetes', or has another type."""
    if manifest["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, FIELDS)
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    sidecar = {"name": "autoscaler", "resources": cluster["autoscalerOptions"]["resources"]}
    for template in (*(group["template"] for group in groups(cluster)), {"spec": {"containers": [sidecar]}}):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", KUBERAY.values(), ids=KUBERAY)
def test_every_field_is_one_of_the_published_ones(path):
    for document in documents(path):
        check(document)


GPU = "spec.workerGroupSpecs.1"
POD = f"{GPU}.template.spec"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec.rayversion", "2.60.0"),
        ("spec.authOptions.mode", "password"),
        ("spec.headGroupSpec.replicas", 1),
        (f"{GPU}.maxReplicas", "8"),
        (f"{GPU}.maxReplicas", 0.5),
        (f"{GPU}.rayStartParams", {"num-cpus": 0}),
        (f"{GPU}.spot", True),
        (f"{GPU}.template.spec.container", []),
        (f"{POD}.tolerations.0.effects", "NoSchedule"),
        (f"{POD}.containers.0.livenessProb", {}),
        (f"{POD}.containers.0.livenessProbe.httpGet.url", "/"),
        (f"{POD}.containers.0.livenessProbe.periodSeconds", "10"),
        (f"{POD}.containers.0.envFrom.0.secretRef.key", "name"),
        (f"{POD}.volumes.0.emptyDir.medum", "Memory"),
        ("spec.autoscalerOptions.resources.limit", {}),
    ],
)
def test_another_field_or_type_is_found(place, value):
    manifest = changed(loaded(KUBERAY["raycluster"]), place, value)
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("rayjob", "spec.retries", 3),
        ("rayjob", "spec.submissionMode", "ByHand"),
        ("rayjob", "spec.rayClusterSpec.rayversion", "2.60.0"),
        ("rayservice", "spec.serveConfig", ""),
        ("rayservice", "spec.serveConfigV2", {}),
    ],
)
def test_another_field_of_a_job_or_a_service_is_found(name, place, value):
    with pytest.raises(jsonschema.ValidationError):
        check(changed(loaded(KUBERAY[name]), place, value))


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


def autoscaling(cluster: Value) -> Value:
    """Return what the autoscaler in the head's sidecar makes of the cluster; it validates that by Ray's schema."""
    metadata = {"name": "cluster", "namespace": "default"}
    return _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": cluster})


def test_rays_autoscaler_reads_resources_and_labels(cluster):
    types = autoscaling(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert {name: kind["resources"].get("GPU", 0) for name, kind in types.items() if name.startswith("gpu")} == {
        "gpu": 1,
        "gpu-spot": 1,
    }
    for kind in types.values():
        validate_node_labels(kind["labels"])


def test_a_job_gets_spot_pods_first(cluster):
    config = autoscaling(cluster)
    for kind in config["available_node_types"].values():
        kind["min_workers"] = 0
    assert starter(config)(SAMPLER, SAMPLER) == {"gpu-spot": 2}


def test_a_cluster_for_jobs_starts_from_nothing():
    start = starter(autoscaling(loaded(KUBERAY["raycluster"])["spec"]))
    assert start() == {}
    assert start(READER) == {"cpu": 1}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (f"{GPU}.labels", {"market": "spot nodes"}),
        (f"{POD}.containers.0.resources", {"limits": {"cpu": "some"}}),
        (f"{POD}.containers.0.resources", {}),
    ],
)
def test_rays_autoscaler_refuses_other_labels_and_resources(place, value):
    manifest = changed(loaded(KUBERAY["raycluster"]), place, value)
    with pytest.raises(Exception, match=r".+"):  # Ray's are of several types
        autoscaling(manifest["spec"])


def test_the_service_is_one_that_pyramid_render_serve_prints():
    text = loaded(KUBERAY["rayservice"])["spec"]["serveConfigV2"]
    ServeDeploySchema.model_validate(yaml.safe_load(text))
    ours = yaml.safe_load(text)
    api, page = ours["applications"]
    settings, config = ServeSettings(**ours["http_options"]), ServiceConfig.model_validate(api["args"])
    assert PageConfig.model_validate(page["args"]) == page_config(settings, config)
    api["args"] = config.model_dump(mode="json")
    assert ours == yaml.safe_load(config_file(settings, config))


@pytest.mark.parametrize(("place", "value"), [("models", "toy"), ("replicas", 4), ("gpus", {"sample": "half"})])
def test_a_setting_that_the_service_does_not_have_is_found(place, value):
    args = yaml.safe_load(loaded(KUBERAY["rayservice"])["spec"]["serveConfigV2"])["applications"][0]["args"]
    with pytest.raises(ValueError, match=place):
        ServiceConfig.model_validate(changed(args, place, value))


def test_the_service_fits_and_asks_for_keys():
    spec = loaded(KUBERAY["rayservice"])["spec"]
    api, _ = yaml.safe_load(spec["serveConfigV2"])["applications"]
    config = ServiceConfig.model_validate(api["args"])
    most = sum(group["maxReplicas"] for group in spec["rayClusterConfig"]["workerGroupSpecs"])
    assert sum(config.gpus.values()) <= 1  # what runs without work, on the one GPU that is always there
    assert config.replicas["sample"] <= most
    assert config.keys is not None
    assert not {config.database.partition(":")[0], config.output.partition(":")[0]} & {"sqlite", "file"}
