"""A Ray cluster of several nodes on this machine, in a process of its own, so that the tests' process stays clean.

`python -m tests.chaos.cluster` serves it: a request per line on the standard input, an answer per line on the output.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.util import get_node_ip_address

STOP_S = 60
RAY = (sys.executable, "-m", "ray.scripts.scripts")
PREEMPTION = "DRAIN_NODE_REASON_PREEMPTION"
SYSTEM = {
    # a node that is gone is noticed after some seconds instead of 20
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
    "worker_niceness": 0,  # a busy machine would starve the workers
}


@dataclass
class Nodes:
    """The cluster's nodes, by their ids in the order in which they came; without those that were removed.

    environment: of the cluster's processes; those that connect to it need the same.
    """

    process: subprocess.Popen[str]
    environment: dict[str, str]
    address: str = ""
    ids: list[str] = field(default_factory=list)

    def add(self, **resources: object) -> str:
        """Start a node with resources such as num_cpus and num_gpus, and labels; returns its id."""
        node = self._ask("add", **resources)["node"]
        self.ids.append(node)
        return node

    def remove(self, node: str) -> None:
        """Kill a node's processes without a warning."""
        self._ask("remove", node=node)
        self.ids.remove(node)

    def drain(self, node: str, seconds: int) -> None:
        """Announce, as a spot market does, that a node will be gone in so many seconds."""
        command = ["drain-node", "--address", self.address, "--node-id", node, "--reason", PREEMPTION]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run([*RAY, *command], env=self.environment, check=True, stdout=subprocess.DEVNULL)

    def _ask(self, verb: str, **arguments: object) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"verb": verb, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the cluster's process has ended"
        return dict(json.loads(line))


@contextmanager
def ray_cluster(log: Path, **head: float) -> Iterator[Nodes]:
    """Run a cluster whose first node, the head, has the given resources."""
    # not pytest's own folder: its name is too long for Ray's sockets
    folder = tempfile.mkdtemp(prefix="chaos-")
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder, "RAY_BACKEND_LOG_LEVEL": "fatal"}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        environment.pop(name, None)
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.cluster"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        nodes = Nodes(process, environment)
        first = nodes._ask("start", **head)
        nodes.address, nodes.ids = first["address"], [first["node"]]
        yield nodes
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def autoscaling_cluster(folder: Path, node: Mapping[str, int], most: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Run a head without resources and Ray's autoscaler over pretended machines, of which there are none at first.

    node: what each offers; most: how many there may be. Yields the cluster's address and its processes' environment.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    address = f"{get_node_ip_address()}:{port}"
    scratch = tempfile.mkdtemp(prefix="chaos-")
    config = fake_config(address, node, most)
    (folder / "autoscaler.json").write_text(json.dumps(config))
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": scratch, "RAY_BACKEND_LOG_LEVEL": "fatal"}
    environment = os.environ | quiet | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    command = [*RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=0", "--num-gpus=0"]
    command += [f"--autoscaling-config={folder / 'autoscaler.json'}", "--include-dashboard=false"]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield address, environment
    finally:
        family = [head, *psutil.Process(head.pid).children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def fake_config(address: str, node: Mapping[str, int], most: int) -> dict[str, object]:
    """Return the launcher's configuration of a cluster that exists in name only."""
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    lists += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude")
    nothing = {"node_config": {}, "min_workers": 0}
    return {name: [] for name in (*lists, "rsync_filter")} | {
        "cluster_name": "fake",
        "max_workers": most,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 10,
        "provider": {"type": "fake_multinode", "gcs_address": address},
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "available_node_types": {
            "head": nothing | {"resources": {"CPU": 0}, "max_workers": 0},
            "gpu": nothing | {"resources": dict(node), "max_workers": most},
        },
        "head_node_type": "head",
    }


def _stop(process: "subprocess.Popen[str]") -> None:
    try:
        process.communicate(timeout=STOP_S)  # the end of its input ends it
    except subprocess.TimeoutExpired:
        process.kill()  # Ray's processes die with their parent
        process.communicate()


def serve() -> None:
    """Answer requests until there are no more, then stop the cluster."""
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    nodes: dict[str, Any] = {}
    cluster = Cluster()
    for line in sys.stdin:
        request = json.loads(line)
        verb = request.pop("verb")
        if verb == "remove":
            cluster.remove_node(nodes.pop(request["node"]), allow_graceful=False)
            answer: dict[str, object] = {}
        else:
            head = {"include_dashboard": False, "dashboard_agent_listen_port": 0, "_system_config": SYSTEM}
            node = cluster.add_node(**request, **(head if verb == "start" else {}))
            nodes[node.node_id] = node
            answer = {"node": node.node_id, "address": cluster.address}
        print(json.dumps(answer), file=answers, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    serve()
