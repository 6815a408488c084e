"""The files that start clusters, as data."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs/deploy"
LAUNCHER = {"aws": ROOT / "cluster.yaml", "gcp": DEPLOY / "gcp.yaml"}
KUBERAY = {path.stem: path for path in sorted((DEPLOY / "kuberay").glob("*.yaml"))}
CLUSTERS = {"raycluster": "spec", "rayjob": "spec.rayClusterSpec", "rayservice": "spec.rayClusterConfig"}
SHIPPED = [ROOT / "cluster.yaml", ROOT / ".dockerignore", *sorted(path for path in DEPLOY.rglob("*") if path.is_file())]

Value = Any  # what a YAML file holds


def loaded(path: Path) -> Value:
    """Return what a file with one document holds."""
    return yaml.safe_load(path.read_text())


def documents(path: Path) -> list[Value]:
    """Return what the documents of a file hold."""
    return list(yaml.safe_load_all(path.read_text()))


def cluster_of(name: str) -> Value:
    """Return the specification of a manifest's cluster."""
    value = loaded(KUBERAY[name])
    for key in CLUSTERS[name].split("."):
        value = value[key]
    return value


def groups(cluster: Value) -> list[Value]:
    """Return the groups of a cluster's pods, the head's first."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def texts(value: Value) -> Iterator[str]:
    """Yield every text in a value."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            yield from texts(part)
    elif isinstance(value, str):
        yield value


def commands(path: Path, program: str) -> list[list[str]]:
    """Return the arguments of every call of a program in a file: in code, in texts, with flags between backticks."""
    text = path.read_text()
    pieces = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    pieces += [span for span in re.findall(r"`([^`\n]*)`", text) if " --" in span]
    if path.suffix == ".yaml":
        pieces += [piece for document in documents(path) for piece in texts(document)]
    lines = [line for piece in pieces for line in piece.replace("\\\n", " ").splitlines()]
    return [call for line in lines for call in _calls(line, program) if call]


def _calls(line: str, program: str) -> Iterator[list[str]]:
    if program not in line:
        return
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.wordchars += "$%:,=@{}[]"
    call: list[str] | None = None
    for word in [*words, ";"]:
        if set(word) <= set("();<>|&") and call is not None:
            yield call
            call = None
        elif call is not None:
            call.append(word)
        elif word == program:
            call = []
