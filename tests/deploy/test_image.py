"""The Dockerfile, as far as that can be told without building an image."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.manifests import DEPLOY, ROOT

DOCKERFILE = DEPLOY / "Dockerfile"


LOCKS = [DEPLOY / "requirements.lock", DEPLOY / "torch.lock"]
HASH = r"    --hash=sha256:[0-9a-f]{64}"
LINE = re.compile(rf"[a-z0-9][a-z0-9._-]*==[0-9][A-Za-z0-9.]* \\\n(?:{HASH} \\\n)*{HASH}\n")
"""A version without a local suffix such as +cpu, and its hashes."""


def locked() -> dict[str, Version]:
    names = re.findall(r"^([a-z0-9._-]+)==(\S+)", "".join(path.read_text() for path in LOCKS), re.MULTILINE)
    return {name: Version(version) for name, version in names}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_file_holds_versions_and_hashes_and_nothing_else(path):
    assert LINE.sub("", path.read_text()) == ""


def test_the_lock_files_hold_what_the_package_and_the_image_require():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [name for extra in ("s3", "postgres", "train", "c2pa") for name in project["optional-dependencies"][extra]]
    wanted += [line.partition(" #")[0] for line in (DEPLOY / "requirements.in").read_text().splitlines()]
    versions = locked()
    for requirement in map(Requirement, (line for line in [*project["dependencies"], *wanted] if line[0] != "#")):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_everything_is_installed_by_its_hash_but_torch_for_a_cpu():
    installs = re.findall(r"pip install [^&;\n]*", DOCKERFILE.read_text().replace("\\\n", ""))
    assert all("--no-deps" in line for line in installs)
    checked = [line for line in installs if "--require-hashes" in line]
    assert sorted(line.rsplit("/", 1)[1].strip() for line in checked) == ["requirements.lock", "torch.lock"]
    for_a_cpu, ours = [line for line in installs if line not in checked]
    assert "/whl/cpu" in for_a_cpu
    assert "--no-build-isolation /src" in ours


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
        "docs/deploy/*.lock",
        *wheel["packages"],
    }
