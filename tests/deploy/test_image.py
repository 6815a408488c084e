"""The Dockerfile, as far as that can be told without building an image."""

import re
import subprocess
import sys
import tomllib

import pytest

from tests.deploy.manifests import DEPLOY, ROOT

DOCKERFILE = DEPLOY / "Dockerfile"


@pytest.mark.integration
def test_its_requirements_are_those_of_the_package(tmp_path):
    [script] = re.findall(r'python -c "(.*?)" >', DOCKERFILE.read_text().replace("\\\n", ""), re.DOTALL)
    script = script.replace("/tmp/pyproject.toml", str(ROOT / "pyproject.toml"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert done.stdout.splitlines() == [
        *project["dependencies"],
        *(name for extra in ("s3", "postgres", "train", "c2pa") for name in extras[extra]),
    ]


def test_it_runs_without_root_and_tells_its_home():
    text = DOCKERFILE.read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["1000"]
    assert re.search(r"^ENV HOME=/home/ray\b", text, re.MULTILINE)  # Ray's launcher would mount the token into /root


def test_what_comes_into_the_build_is_what_the_package_is_made_of():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        *wheel["packages"],
    }
