"""How soon can a video be seen, and what does it cost it?

A service with the bundled model on a Ray cluster of this machine, asked by one client for one video after another, in
turn:

one frame: a video of the first unit only, through the same service: its sampling and decoding alone.
followed:  a whole video, whose stream is read from the start.
plain:     the same video, which nobody follows.

The goals: the first fragment of a followed video comes within 1.2 times the seconds of one frame, and all of it within
1.1 times those of a plain one. Seconds are those from the request to the last byte that counts, medians of all rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import httpx2 as httpx

from benchmarks.report import ROOT, write_result
from benchmarks.service import PORT, service, serving

FIRST_GOAL, WHOLE_GOAL = 1.2, 1.1
POLL_S = 0.05
PROMPT = "a large red circle moves slowly left on a dark background"


def main() -> None:
    arguments = parse_arguments()
    seconds: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(serving(service(Path(folder)), cpus=8))
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=600))
        for number in range(arguments.rounds + 1):  # the first one warms up
            for name, value in one_round(client, arguments.num_frames).items():
                if number:
                    seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = medians["followed, first fragment"] / medians["one frame"]
    whole = medians["followed, whole"] / medians["plain"]
    print(f"\n{'seconds from the request':>26} {'median':>8} {'least':>8} {'most':>8}")
    for name, values in seconds.items():
        print(f"{name:>26} {medians[name]:>8.2f} {min(values):>8.2f} {max(values):>8.2f}")
    print(
        f"first fragment: {first:.2f} of one frame alone ({'met' if first <= FIRST_GOAL else 'MISSED'}: {FIRST_GOAL})"
    )
    print(f"whole video: {whole:.2f} of a plain one ({'met' if whole <= WHOLE_GOAL else 'MISSED'}: {WHOLE_GOAL})")
    figures = {
        "rounds": arguments.rounds,
        "num_frames": arguments.num_frames,
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "first_fragment_of_one_frame": round(first, 3),
        "followed_of_plain": round(whole, 3),
    }
    path = write_result("first_fragment", figures, sys.argv[1:])
    print(f"wrote {path.relative_to(ROOT)}")


def one_round(client: httpx.Client, num_frames: int) -> dict[str, float]:
    """Ask for each kind of video; returns seconds by name."""
    found = {"one frame": ended_s(client, num_frames=1)}
    found["followed, first fragment"], found["followed, whole"] = streamed_s(client, num_frames)
    return found | {"plain": ended_s(client, num_frames=num_frames)}


def ask(client: httpx.Client, num_frames: int) -> str:
    answer = client.post("/v1/videos", json={"prompt": PROMPT, "seed": 1, "num_frames": num_frames})
    answer.raise_for_status()
    return f"/v1/videos/{answer.json()['id']}"


def ended_s(client: httpx.Client, *, num_frames: int) -> float:
    """Return the seconds until a video is finished."""
    began = time.monotonic()
    wait(client, ask(client, num_frames))
    return time.monotonic() - began


def streamed_s(client: httpx.Client, num_frames: int) -> tuple[float, float]:
    """Return the seconds until the first fragment of a video has come, and until it is finished."""
    began = time.monotonic()
    path = ask(client, num_frames)
    with client.stream("GET", f"{path}/stream") as answer:
        parts = answer.iter_raw()
        next(parts)
        first = time.monotonic() - began
        for _ in parts:
            pass
    wait(client, path)
    return first, time.monotonic() - began


def wait(client: httpx.Client, path: str) -> None:
    while (status := client.get(path).json()["status"]) != "completed":
        assert status in ("queued", "in_progress"), status
        time.sleep(POLL_S)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="after one that warms up (%(default)s)")
    parser.add_argument("--num-frames", type=int, default=33, help="of the whole video (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
