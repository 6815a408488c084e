"""Imports run one way: the model knows nothing of the farm, the farm nothing of its entry points."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FARM_ONLY = {"ray", "pyarrow", "fsspec", "pydantic", "pydantic_settings", "pipeline", "jobs"}
MAY_IMPORT_RAY = {
    "pipeline/batch/runner.py",
    "pipeline/batch/quarantine.py",
    "pipeline/monitoring/metrics.py",
    "pipeline/serving/app.py",
    "pipeline/serving/replicas.py",
    "pipeline/training/encode.py",
    "pipeline/training/trainer.py",
}
FILES = (path for package in ("pyramid_flow", "pipeline") for path in ROOT.glob(f"{package}/**/*.py"))
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in FILES)


def imported_packages(source: str) -> Iterator[str]:
    """Top-level package of every import, wherever it stands; a relative one counts as the own package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def forbidden(path: str) -> set[str]:
    if path.startswith("pyramid_flow/"):
        return FARM_ONLY
    return {"jobs"} if path in MAY_IMPORT_RAY else {"jobs", "ray"}


def test_both_packages_are_looked_at():
    assert {"pyramid_flow/sampling/sampler.py", "pipeline/storage/storage.py"} <= set(SOURCES)


def test_no_import_goes_the_wrong_way():
    found = {path: forbidden(path) & set(imported_packages((ROOT / path).read_text())) for path in SOURCES}
    assert {path: packages for path, packages in found.items() if packages} == {}


MAX_ENTRIES = 16
"""Modules and folders in a package: what one glance takes in."""


def test_no_folder_is_crowded_and_each_says_what_belongs_there():
    packages = [
        path.parent
        for package in ("pyramid_flow", "pipeline", "jobs")
        for path in ROOT.glob(f"{package}/**/__init__.py")
    ]
    for package in packages:
        entries = {path.name for path in package.iterdir()} - {"__init__.py", "__pycache__"}
        assert len(entries) <= MAX_ENTRIES, package
        assert ast.get_docstring(ast.parse((package / "__init__.py").read_text())), package


ORDER = (
    {"request", "storage"},
    {"media"},
    {"rows"},
    {"ledger", "monitoring", "stages", "tables"},
    {"batch", "reports", "datasets", "training", "serving"},
)
"""Topics of `pipeline`: each imports those of earlier lines, and of its own."""


def test_imports_between_topics_go_one_way():
    rank = {topic: number for number, topics in enumerate(ORDER) for topic in topics}
    wrong = set()
    for path in ROOT.glob("pipeline/**/*.py"):
        own = path.relative_to(ROOT / "pipeline").with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline."):
                other = (node.module or "").split(".")[1]
                if own != "__init__" and rank[other] > rank[own]:
                    wrong.add((own, other, path.name))
    assert wrong == set()


def test_imports_are_found_wherever_they_stand():
    source = "import os, ray.data\nif x:\n  import pyarrow as p\ndef f():\n  from jobs.cli import x\nfrom . import y"
    assert set(imported_packages(source)) == {"os", "ray", "jobs", "pyarrow"}


BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""
LOAD_ALL = """
import pyramid_flow, pyramid_flow.toy

for name in pyramid_flow.__all__:
    getattr(pyramid_flow, name)
print("imported")
import ray
"""


@pytest.mark.integration
def test_the_model_works_without_the_farm():
    blocked = {"ray", "pyarrow", "pydantic", "pydantic_settings", "pipeline", "jobs"}  # diffusers itself needs fsspec
    code = BLOCK.format(blocked=blocked) + LOAD_ALL
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n"
    assert done.stderr.rstrip().endswith("ModuleNotFoundError: ray is blocked")


def test_every_public_name_can_be_imported():
    import pyramid_flow

    assert sorted(pyramid_flow.__all__) == pyramid_flow.__all__
    assert all(hasattr(pyramid_flow, name) for name in pyramid_flow.__all__)
