"""The files that start clusters have the fields and types that Ray, KubeRay, Kubernetes and the clouds publish."""

import json
import re
import subprocess
import sys
from pathlib import Path

import botocore.session
import jsonschema
import kubernetes_validate
import pytest
import yaml
from botocore.validate import ParamValidator
from ray._private.label_utils import validate_node_label_syntax, validate_node_labels
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.manifests import CLUSTERS, DEPLOY, KUBERAY, LAUNCHER, Value, cluster_of, documents, groups, loaded
from tests.deploy.scheduler import autoscaling

SCHEMAS = Path(__file__).parent
KUBERNETES = "1.33"


@pytest.mark.parametrize("path", LAUNCHER.values(), ids=LAUNCHER)
def test_cluster_files_fit_rays_launcher(path):
    config = loaded(path)
    validate_config(prepare_config(config))
    for kind in config["available_node_types"].values():
        validate_node_labels(kind["labels"])
        validate_node_label_syntax(kind["labels"])


def test_nodes_fit_the_api_of_aws():
    fields = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in loaded(LAUNCHER["aws"])["available_node_types"].values():
        report = ParamValidator().validate({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, fields)
        assert report.generate_report() == ""


def test_nodes_fit_the_api_of_google():
    fields = json.loads((SCHEMAS / "compute.json").read_text())
    for kind in loaded(LAUNCHER["gcp"])["available_node_types"].values():
        jsonschema.validate(kind["node_config"], fields)


def test_policies_of_the_docs_fit_iam():
    from moto.iam.policy_validation import IAMPolicyDocumentValidator, IAMTrustPolicyDocumentValidator

    shown = dict(re.findall(r"cat > (\w+)\.json <<'EOF'\n(.*?)\nEOF", (DEPLOY / "README.md").read_text(), re.DOTALL))
    IAMTrustPolicyDocumentValidator(shown.pop("trust")).validate()
    assert set(shown) == {"bucket", "nodes"}
    for policy in shown.values():
        IAMPolicyDocumentValidator(policy).validate()


@pytest.mark.parametrize("path", KUBERAY.values(), ids=KUBERAY)
def test_manifests_fit_kuberay_and_kubernetes(path):
    fields = json.loads((SCHEMAS / "kuberay.json").read_text())
    for document in documents(path):
        if document["apiVersion"] == "ray.io/v1":
            jsonschema.validate(document, fields)
            for pod in _pods(cluster_of(path.stem)):
                kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


def _pods(cluster: Value) -> list[Value]:
    """Return the pods that KubeRay makes of a cluster, with the head's sidecar as one of its own."""
    sidecar = {"name": "autoscaler", "resources": cluster["autoscalerOptions"]["resources"]}
    templates = [*(group["template"] for group in groups(cluster)), {"spec": {"containers": [sidecar]}}]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template} for template in templates]


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_fit_rays_autoscaler(name):
    for kind in autoscaling(cluster_of(name))["available_node_types"].values():
        validate_node_labels(kind["labels"])


@pytest.mark.integration
def test_the_service_fits_ray_serve_and_has_our_settings():
    from ray.serve.schema import ServeDeploySchema

    from jobs.commands.serve import config_file
    from jobs.settings import ServeSettings
    from pipeline.serving.app import ServiceConfig

    ours = yaml.safe_load(loaded(KUBERAY["rayservice"])["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(ours)
    [api] = ours["applications"]
    settings, config = ServeSettings(**ours["http_options"]), ServiceConfig.model_validate(api["args"])
    api["args"] = config.model_dump(mode="json")
    assert ours == yaml.safe_load(config_file(settings, config))


@pytest.mark.integration
def test_hadolint_accepts_the_dockerfile():
    command = [Path(sys.executable).parent / "hadolint", "--no-color", DEPLOY / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
