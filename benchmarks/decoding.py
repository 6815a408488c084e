"""How fast is decoding, beside the published algorithm in plain PyTorch?

Decodes random latents with a random VAE of middle size, by the plain algorithm of tests/pyramid_flow/plain_vae.py
(window 1) and by the product in several windows, and both in tiles, on all cores of a machine that does nothing else.
Every round runs all of them in turn; seconds are medians, a ratio is the median of the ratios within a round. A ratio
counts if the plain algorithm reaches at least 80 % of the product's FLOP/s: then it is the work that differs. Memory is
the peak beyond what was there before the decoding, see `benchmarks.decode_memory`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.decode_memory import CHANNELS, LATENT_SIZE, build_model, memory_bytes, peak_memory_bytes
from benchmarks.report import ROOT, write_result
from tests.pyramid_flow.plain_vae import PlainDecoder

GOAL_RATIO = 1.5
LEAST_RATE = 0.8
TILE = 256
PLAIN, PLAIN_TILED = "plain", f"plain, tiles of {TILE}"
Decode = Callable[[Tensor], Tensor]


def decoders(device: torch.device, windows: Sequence[int]) -> dict[str, Decode]:
    vae = build_model(device)
    plain = PlainDecoder(vae)
    product = {f"window {window}": partial(vae.decode, window=window) for window in windows}
    tiled = {
        PLAIN_TILED: partial(plain.decode, tile=TILE),
        f"window 1, tiles of {TILE}": partial(vae.decode, window=1, tile=TILE),
    }
    return {PLAIN: plain.decode, **product, "all at once": vae.decode, **tiled}


def gflop(decode: Decode, latents: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        decode(latents)
    return counter.get_total_flops() / 1e9


def timed(decode: Decode, latents: Tensor) -> tuple[float, float]:
    """Return the seconds of decoding, and the MiB at its peak beyond those before."""
    before = memory_bytes(latents.device)
    start = time.perf_counter()
    decode(latents).flatten()[0].item()  # which waits for the device
    return time.perf_counter() - start, (peak_memory_bytes(latents.device) - before) / 2**20


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per way of decoding."""
    shape = (1, 16, 1 + (arguments.frames - 1) // 8, *LATENT_SIZE)
    device = torch.device(arguments.device)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    contestants = decoders(device, arguments.windows)
    work = {name: gflop(run, latents) for name, run in contestants.items()}  # which warms them up
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append({name: timed(run, latents) for name, run in contestants.items()})
        print("  ".join(f"{name} {taken:.1f} s" for name, (taken, _) in rounds[-1].items()), flush=True)
    return [row(name, work[name], rounds) for name in contestants]


def row(name: str, work: float, rounds: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, Any]:
    baseline = PLAIN_TILED if "tiles" in name else PLAIN
    seconds = median(each[name][0] for each in rounds)
    return {
        "decoder": name,
        "seconds": round(seconds, 2),
        "gflop": round(work),
        "gflop_per_s": round(work / seconds, 1),
        "ratio": round(median(each[baseline][0] / each[name][0] for each in rounds), 2),
        "peak_extra_mib": round(median(each[name][1] for each in rounds)),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=57, help="frames of the video, 1 + 8k (%(default)s)")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4], help="latents per chunk (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times that everything is run (%(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device to decode on (%(default)s)")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    rows = measure(arguments)
    print(f"{'decoder':<24} {'seconds':>8} {'GFLOP':>7} {'GFLOP/s':>8} {'ratio':>6} {'peak MiB':>9}")
    for row in rows:
        print(
            f"{row['decoder']:<24} {row['seconds']:>8.2f} {row['gflop']:>7.0f} {row['gflop_per_s']:>8.1f} "
            f"{row['ratio']:>6.2f} {row['peak_extra_mib']:>9.0f}"
        )
    plain, ours = rows[:2]
    rate = plain["gflop_per_s"] / ours["gflop_per_s"]
    met = ours["ratio"] >= GOAL_RATIO and rate >= LEAST_RATE
    print(f"{PLAIN} reaches {rate:.0%} of the FLOP/s of {ours['decoder']} (at least {LEAST_RATE:.0%} to count)")
    print(f"ratio {ours['ratio']:.2f}, the goal is {GOAL_RATIO}: {'met' if met else 'MISSED'}")
    model = {"channels": CHANNELS, "latent_size": LATENT_SIZE, "num_frames": arguments.frames, "dtype": "float32"}
    figures = {
        "goal_ratio": GOAL_RATIO,
        "plain_rate": round(rate, 3),
        "model": model,
        "rounds": arguments.rounds,
        "decoders": rows,
    }
    path = write_result("decoding", figures, sys.argv[1:])
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
