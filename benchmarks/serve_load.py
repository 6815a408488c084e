"""Does the service keep the samplers as busy as they can be, and does it hold out?

A service on a Ray cluster of this machine, and its clients in a process of their own: each asks for a video, polls it
as often as it is told to (`openai-poll-after-ms`), and asks for the next one when it has ended. CPU seconds are told by
what the processes are: clients, proxy, interface, dispatcher, stages, Ray's own; on a machine with few cores they take
them from one another.

sleep: stages that cost no CPU, of which sampling sleeps. First the deployments of the stages are driven by themselves,
with as many batches at once as the dispatcher keeps there: the bare pipeline. Then clients ask for as many videos.
Videos per second are those between the first beginning and the last end of sampling; the goal is 90 % of the bare
pipeline's. Accept is the time of the request that asks for a video.

model: the bundled model, for some minutes. No video may be lost, no answer may be a 5xx, and what a process keeps may
not grow by more than 1 MiB per minute. What it keeps is the least that is resident within a minute: what it takes for a
batch comes and goes, up to 180 MiB in the decoder, and makes a line through all moments a matter of luck. The slope is
that of a straight line through all but the first third.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from aiohttp import ClientError, ClientSession, ClientTimeout
from ray import serve

from benchmarks.report import ROOT, write_result
from benchmarks.service import APPLICATION, PORT, service, serving
from benchmarks.simulated import STAGES, Event, Site, Work, read_events, span_s
from pipeline.batch.planner import StageSpec
from pipeline.request import RenderRequest
from pipeline.rows import Batch, Item, RenderRow
from pipeline.serving.replicas import RemoteStages
from pyramid_flow import Checkpoint

GOAL, GROWTH_GOAL_MIB = 0.9, 1.0
QUICK = {"num_frames": "9", "num_inference_steps": "2", "video_num_inference_steps": "1"}
RAMP_S = 10.0
REQUEST_S, WAIT_S = 60.0, 600.0
WATCH_S, KEPT_MINUTES = 2.0, 1.0
KINDS = {
    "proxy": r"ray::ProxyActor",
    "controller": r"ray::ServeController",
    **{name: rf"ray::ServeReplica:{APPLICATION}:{name}" for name in ("api", "dispatcher", *STAGES)},
    "clients": r"benchmarks\.serve_load --clients-job",
}


@dataclass
class Clients:
    """What clients met: seconds of their requests by kind, answers by status, and videos by how they ended."""

    url: str
    fields: dict[str, str]
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: Counter[str] = field(default_factory=Counter)
    videos: Counter[str] = field(default_factory=Counter)

    async def run(self, clients: int, videos: int | None, minutes: float) -> None:
        """Let clients ask until each has had its videos, or the time is over; what was asked for is waited for."""
        timeout = ClientTimeout(REQUEST_S)
        until = time.monotonic() + 60 * minutes
        async with ClientSession(self.url, timeout=timeout) as session:
            await asyncio.gather(*(self._client(session, number, videos, until) for number in range(clients)))

    async def _client(self, session: ClientSession, number: int, videos: int | None, until: float) -> None:
        await asyncio.sleep(random.uniform(0, RAMP_S))
        made = 0
        while made < videos if videos else time.monotonic() < until:
            self.videos[await self._video(session, f"client {number}, take {made}")] += 1
            made += 1

    async def _video(self, session: ClientSession, prompt: str) -> str:
        """Ask for a video; returns its last status, or "refused", or "lost"."""
        video, wait_s = await self._ask(session, "POST", "/v1/videos", data={"prompt": prompt, **self.fields})
        if video is None:
            await asyncio.sleep(wait_s)
            return "refused"
        deadline = time.monotonic() + WAIT_S
        while video["status"] in ("queued", "in_progress"):
            if time.monotonic() > deadline:
                return "lost"
            await asyncio.sleep(wait_s)
            shown, wait_s = await self._ask(session, "GET", f"/v1/videos/{video['id']}")
            video = shown or video
        return str(video["status"])

    async def _ask(
        self, session: ClientSession, method: str, path: str, data: Mapping[str, str] | None = None
    ) -> tuple[Any, float]:
        """Send a request; returns what came, None if it was an error, and when to ask again."""
        began = time.monotonic()
        try:
            async with session.request(method, path, data=data) as answer:
                content = await answer.json()
        except (ClientError, TimeoutError) as error:
            self.statuses[type(error).__name__] += 1
            return None, 1.0
        self.seconds["accept" if method == "POST" else "poll"].append(time.monotonic() - began)
        self.statuses[str(answer.status)] += 1
        if answer.status != 200:
            return None, float(answer.headers.get("Retry-After", 1))
        return content, float(answer.headers.get("openai-poll-after-ms", 1000)) / 1000

    def figures(self) -> dict[str, Any]:
        """Return what is told of it."""
        latencies = {
            f"{kind}_{name}_ms": round(1000 * float(np.percentile(seconds, share)), 1)
            for kind, seconds in self.seconds.items()
            for name, share in (("p50", 50), ("p95", 95), ("max", 100))
        }
        return {"videos": dict(self.videos), "answers": dict(self.statuses), **latencies}


@dataclass
class Watched:
    """CPU seconds and resident MiB of the processes of this machine's service, by what they are."""

    over: threading.Event = field(default_factory=threading.Event)
    cpu_s: dict[int, tuple[str, float]] = field(default_factory=dict)
    mib: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def look(self) -> None:
        """Note how things are."""
        mib: dict[str, float] = defaultdict(float)
        kinds: dict[int, str] = {}
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            try:
                kind, parent = kind_of(process), process.ppid()
                times, memory = process.cpu_times(), process.memory_info()
            except psutil.Error:  # it has ended
                continue
            kinds[process.pid] = kind
            if kind in KINDS and kinds.get(parent) == kind:
                continue  # it is about to be ffmpeg, and shows its parent's memory until then
            self.cpu_s[process.pid] = (kind, times.user + times.system)
            mib[kind] += memory.rss / 2**20
        self.mib.append((time.monotonic(), mib))

    def cpu(self) -> Counter[str]:
        """Return CPU seconds so far."""
        found: Counter[str] = Counter()
        for kind, seconds in self.cpu_s.values():
            found[kind] += seconds
        return found


def kind_of(process: psutil.Process) -> str:
    """Return what a process is."""
    command = " ".join(process.cmdline())
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, command)), "ray")


@contextmanager
def watching(figures: dict[str, Any]) -> Iterator[None]:
    """Watch the processes meanwhile, and put what was seen into the figures."""
    watched = Watched()
    watched.look()
    before, began = watched.cpu(), time.monotonic()

    def watch() -> None:
        while not watched.over.wait(WATCH_S):
            watched.look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        watched.over.set()
        thread.join()
        watched.look()
    used, seconds = watched.cpu() - before, time.monotonic() - began
    figures["seconds"] = round(seconds, 1)
    figures["cpu_s"] = {kind: round(value, 1) for kind, value in used.most_common()}
    figures["cpu_share_of_a_core"] = {kind: round(value / seconds, 3) for kind, value in used.most_common()}
    figures["memory"] = {kind: memory(watched.mib, kind) for kind in watched.mib[-1][1] if kind in KINDS}


def memory(samples: Sequence[tuple[float, Mapping[str, float]]], kind: str) -> dict[str, float]:
    """Return MiB of a kind of process: the first, what it keeps once settled and at last, the most, and its growth."""
    moments, mib = np.array([(moment, mib[kind]) for moment, mib in samples if kind in mib]).T
    minutes = (moments - moments[0]) / 60
    each, starts = np.unique(minutes // KEPT_MINUTES, return_index=True)
    kept = np.minimum.reduceat(mib, starts)
    told = {
        "first_mib": mib[0],
        "settled_mib": kept[len(kept) // 3],
        "last_mib": kept[-1],
        "most_mib": mib.max(),
        "mib_per_minute": slope(each * KEPT_MINUTES, kept),
        "of_all_moments_mib_per_minute": slope(minutes, mib),
    }
    return {name: round(float(value), 2) for name, value in told.items()}


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Return that of a straight line through all but the first third."""
    third = len(x) // 3
    return float(np.polyfit(x[third:], y[third:], 1)[0]) if len(x) - third > 1 else 0.0


def ask(clients: int, *, videos: int | None = None, minutes: float = 0.0, **fields: str) -> dict[str, Any]:
    """Let clients ask, in a process of their own."""
    job = json.dumps({"clients": clients, "videos": videos, "minutes": minutes, "fields": fields})
    command = [sys.executable, "-m", "benchmarks.serve_load", "--clients-job", job]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def be_clients(job: Mapping[str, Any]) -> dict[str, Any]:
    """Be the clients' process."""
    clients = Clients(f"http://127.0.0.1:{PORT}", job["fields"])
    asyncio.run(clients.run(job["clients"], job["videos"], job["minutes"]))
    return clients.figures()


def sleep(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare the service with its stages by themselves."""
    works = {"sample": Work(arguments.sample_s)}
    events = folder / "events"
    events.mkdir()
    site = Site(str(events), len(STAGES) - 1 + arguments.samplers, 0.0)
    stages = {name: StageSpec(stage, {"work": works.get(name, Work()), "site": site}) for name, stage in STAGES.items()}
    replicas = dict.fromkeys(STAGES, 1) | {"sample": arguments.samplers}
    config = service(folder, replicas=replicas, batch_size=arguments.batch_size)
    figures: dict[str, Any] = {"clients": arguments.clients, "goal_share": GOAL}
    with serving(config, arguments.samplers + 8, stages):
        videos = arguments.clients * arguments.videos_per_client
        asyncio.run(drive(videos // arguments.batch_size, arguments.batch_size, arguments.samplers))
        bare = read_events(events, "sample")
        with watching(figures):
            figures |= ask(arguments.clients, videos=arguments.videos_per_client)
        served = read_events(events, "sample")[len(bare) :]
    rates = {name: rate(calls) for name, calls in (("bare", bare), ("served", served))}
    share = rates["served"] / rates["bare"]
    figures |= {f"{name}_videos_per_s": round(value, 3) for name, value in rates.items()}
    figures |= {
        "share_of_bare": round(share, 4),
        "ideal_videos_per_s": round(arguments.samplers / arguments.sample_s, 3),
        "mean_batch": round(sum(call.rows for call in served) / len(served), 2),
    }
    print(f"\n{'videos/s':>10} {'bare':>8} {'ideal':>8} {'share':>7} {'mean batch':>11}")
    print(
        f"{rates['served']:>10.2f} {rates['bare']:>8.2f} {figures['ideal_videos_per_s']:>8.2f} {share:>7.1%} "
        f"{figures['mean_batch']:>11}"
    )
    print(f"the goal is {GOAL:.0%} of the bare pipeline: {'met' if share >= GOAL else 'MISSED'}")
    show(figures)
    return figures


async def drive(batches: int, batch_size: int, samplers: int) -> None:
    """Pass batches through the stages' deployments, twice as many at once as there are samplers."""
    stages = RemoteStages({name: serve.get_deployment_handle(name, APPLICATION) for name in STAGES})
    room = asyncio.Semaphore(2 * samplers)
    preset = Checkpoint.open("toy").preset

    async def one(number: int) -> None:
        async with room:
            ids = [f"{number}-{place}" for place in range(batch_size)]
            requests = {name: RenderRequest(prompt=name).resolve(preset, name) for name in ids}
            rows = (RenderRow(id=name, position=name, prompt=name, request=requests[name]) for name in ids)
            await stages.render(Batch(tuple(Item(row, {}) for row in rows), pa.table({"video": ids})))

    await asyncio.gather(*(one(number) for number in range(batches)))


def rate(calls: Sequence[Event]) -> float:
    """Return videos per second."""
    return sum(call.rows for call in calls) / span_s(calls)


def model(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Let the bundled model work for some minutes."""
    figures: dict[str, Any] = {"clients": arguments.model_clients, "minutes": arguments.minutes}
    with serving(service(folder), cpus=8), watching(figures):
        figures |= ask(arguments.model_clients, minutes=arguments.minutes, **QUICK)
    answers, videos = figures["answers"], figures["videos"]
    figures["lost_videos"] = sum(count for status, count in videos.items() if status not in ("completed", "refused"))
    figures["failed_requests"] = sum(count for status, count in answers.items() if not status.startswith(("2", "4")))
    print(f"\nvideos: {videos}; answers: {answers}")
    is_sound = not figures["lost_videos"] and not figures["failed_requests"]
    print(f"the goal is that none is lost and no request fails: {'met' if is_sound else 'MISSED'}")
    slopes = {kind: found["mib_per_minute"] for kind, found in figures["memory"].items()}
    growing = [kind for kind, slope in slopes.items() if slope > GROWTH_GOAL_MIB]
    figures["growing"] = growing
    print(f"the goal is that no process grows: {'MISSED by ' + ', '.join(growing) if growing else 'met'}")
    show(figures)
    return figures


def show(figures: Mapping[str, Any]) -> None:
    for kind in ("accept", "poll"):
        print(f"{kind}: " + ", ".join(f"{name} {figures[f'{kind}_{name}_ms']} ms" for name in ("p50", "p95", "max")))
    print(f"{'':>11} {'CPU s':>8} {'of a core':>10} {'settled MiB':>12} {'last MiB':>9} {'most MiB':>9} {'MiB/min':>8}")
    for kind, seconds in figures["cpu_s"].items():
        mib = figures["memory"].get(kind, {})
        told = [f"{mib.get(name, ''):>{width}}" for name, width in MEMORY_COLUMNS.items()]
        print(f"{kind:>11} {seconds:>8} {figures['cpu_share_of_a_core'][kind]:>10.1%} {' '.join(told)}", flush=True)


MEMORY_COLUMNS = {"settled_mib": 12, "last_mib": 9, "most_mib": 9, "mib_per_minute": 8}
PARTS = {"sleep": sleep, "model": model}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    parser.add_argument("--clients", type=int, default=200, help="of sleep (%(default)s)")
    parser.add_argument("--videos-per-client", type=int, default=4, help="of sleep (%(default)s)")
    parser.add_argument("--samplers", type=int, default=4, help="of sleep (%(default)s)")
    parser.add_argument("--sample-s", type=float, default=0.5, help="seconds of sampling a video (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="of sleep (%(default)s)")
    parser.add_argument("--model-clients", type=int, default=8, help="of model (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of model (%(default)s)")
    parser.add_argument("--clients-job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.clients_job:
        print(json.dumps(be_clients(arguments.clients_job)))
        return
    settings = {name: value for name, value in vars(arguments).items() if name not in ("parts", "clients_job")}
    for name in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            figures = {"settings": settings, name: PARTS[name](arguments, Path(folder))}
        path = write_result("serve_load", figures, sys.argv[1:], part=name)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
