"""The JSON file that every benchmark leaves behind: what was measured, of which commit, how and on what."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def write_result(name: str, figures: Mapping[str, object], argv: Sequence[str], part: str = "") -> Path:
    """Write benchmarks/results/{name}.json, or {name}_{part}.json, and return its path.

    figures: whatever JSON can hold, with units in its keys. argv: the arguments after the module's name.
    """
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *argv])
    result = {"commit": commit(), "command": command, "machine": machine(), "figures": figures}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}_{part}.json" if part else f"{name}.json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def commit() -> str:
    """The commit that is checked out, with "-dirty" if anything but the results differs from it."""
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return _git("rev-parse", "HEAD") + ("-dirty" if changes else "")


def machine() -> dict[str, object]:
    """What the figures depend on, and nothing that names a host or its folders."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
