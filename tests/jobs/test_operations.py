"""The commands of docs/operations.md for every kind of job, as they stand, on a real head node."""

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.ledger import ledger
from pipeline.storage.storage import Storage
from tests.jobs.head import free_ports, head_node

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


def script() -> str:
    """Return the shell commands that begin with where the cluster is."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL)
    [found] = [block for block in blocks if block.startswith("export HEAD=")]
    return found


def test_every_kind_of_job_runs_as_its_commands_stand(tmp_path_factory):
    shared, [port] = tmp_path_factory.mktemp("shared"), free_ports(1)
    with head_node() as head:
        env = head.env | {"HEAD": f"http://127.0.0.1:{head.dashboard}", "SHARED": str(shared), "PORT": str(port)}
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", script()],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=850,
        )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for name in ("videos", "adapted"):
        assert ledger.read(Storage(str(shared / name)))["status"].to_pylist().count("succeeded") == 11
    assert (shared / "training" / "lora" / "adapter_model.safetensors").exists()
    assert '"status":"queued"' in done.stdout.replace(" ", "")
