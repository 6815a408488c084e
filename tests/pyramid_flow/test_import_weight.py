"""Imports stay light: public names load on first use, values need no torch, and `inspect` needs torch alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyramid_flow

ROOT = Path(__file__).parents[2]
MODELS = {"accelerate", "diffusers", "peft", "scipy", "torchvision", "transformers"}
VALUES = (
    "errors",
    "images.decoding",
    "checkpoints.layout",
    "memory.modes",
    "parallel.config",
    "sampling.params",
    "presets",
    "checkpoints.published",
    "sampling.schedule",
    "vae.tile",
    "training.lora",
    "checkpoints.user_cache",
)
PRINT = "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"


def loaded_packages(code: str, cache: Path) -> list[set[str]]:
    """Run code in a new process; returns the words of each line that it prints."""
    env = {**os.environ, "HF_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_the_package_loads_no_library_and_its_values_no_torch(tmp_path):
    imports = "".join(f"import pyramid_flow.{module}\n" for module in VALUES)
    package, values = loaded_packages(f"import pyramid_flow\n{PRINT}{imports}{PRINT}", tmp_path)
    assert "pyramid_flow" in package
    assert not package & (MODELS | {"numpy", "PIL", "torch"})
    assert "numpy" in values
    assert not values & (MODELS | {"torch"})


@pytest.mark.integration
def test_inspect_loads_torch_but_no_model_library(tmp_path):
    code = f"from jobs.cli import main\nassert main(['inspect', 'toy']) == 0\n{PRINT}"
    *_, packages = loaded_packages(code, tmp_path)
    assert "torch" in packages
    assert not packages & (MODELS | {"ray"})


def test_public_names_are_listed_before_they_are_used():
    assert set(pyramid_flow.__all__) <= set(dir(pyramid_flow))
    assert set(pyramid_flow.__all__) == set(pyramid_flow._MODULES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pyramid_flow' has no attribute 'Unknown'"):
        pyramid_flow.Unknown  # noqa: B018
