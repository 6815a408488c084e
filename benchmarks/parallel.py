"""What does it bring to render one clip on several devices, and what do they tell each other?

bytes: what a process of the published miniFLUX model sends per step, from formulas, and how fast clips become if links
and devices are as stated. cpu: seconds of a random model of middle size in 1 and more processes of one thread,
which talk by gloo, on a machine that does nothing else; the bytes that the first process sends are counted, and must be
those of the formulas.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.report import ROOT, write_result
from benchmarks.sampling import (
    CLIPS,
    LEVELS,
    MIDDLE,
    MIDDLE_CLIP,
    SCHEDULE,
    TEXT_TOKENS,
    frames_of,
    random_model,
    random_text,
)
from pyramid_flow import (
    Checkpoint,
    PyramidFluxTransformer,
    SamplingParams,
    SeededNoise,
    TextEmbedding,
    generate_latents,
)
from pyramid_flow.flops import sampling_flops
from pyramid_flow.parallel.config import ParallelConfig, parallel_config
from pyramid_flow.parallel.processes import ParallelSampler
from pyramid_flow.transformer.history_cache import cached_frames
from tests.pyramid_flow.goldens import TINY_MINIFLUX

PUBLISHED_SPEEDUP = {4: 2.2}


@dataclass(frozen=True)
class Assumed:
    """Of the prediction; none of it was measured here.

    device_flops: what one device does per second; link_bytes: what it sends per second to the others of its node, all
    together; exchange_s: of each exchange, however short.
    """

    device_flops: float = 400e12
    link_bytes: float = 300e9
    exchange_s: float = 30e-6


# Bytes


@dataclass(frozen=True)
class Sent:
    """By one process for a clip: bytes to others, exchanges and evaluations."""

    bytes: int
    exchanges: int
    evaluations: int


def sent(
    model: PyramidFluxTransformer, params: SamplingParams, config: ParallelConfig, text_tokens: int, itemsize: int
) -> Sent:
    """Return what the first process sends for a guided clip with a full history cache."""
    dim, num_blocks, patch = model.proj_out.in_features, len(model.blocks), model.proj_out.out_features
    rows = 2 // config.cfg_degree
    total = exchanges = evaluations = 0
    for unit in range(params.num_units):
        for level in LEVELS:
            steps, frames = len(params.steps(unit, SCHEDULE.levels[level])), frames_of(params, unit, level)
            known = cached_frames(unit, level)
            streams = [0 if known else text_tokens, sum(frames[known:-1]), frames[-1]]
            own, current = sum(share(each, config) for each in streams), share(frames[-1], config)
            asking = [(sum(streams), own)] * (num_blocks - 1) + [(frames[-1], current)]
            others = config.ulysses_degree - 1
            tokens = sum((queries + 2 * own) * others + all_queries - queries for all_queries, queries in asking)
            step = rows * (tokens * dim // config.ulysses_degree + current * patch * others) * itemsize
            branch = 4 * frames[-1] * patch * (config.cfg_degree - 1)  # float32
            total += steps * ((step if others else 0) + branch)
            exchanges += steps * ((2 * num_blocks + 1) * (others > 0) + config.cfg_degree - 1)
            evaluations += steps
    return Sent(total, exchanges, evaluations)


def share(tokens: int, config: ParallelConfig) -> int:
    """Return how many of so many tokens the first process holds."""
    return tokens // config.ulysses_degree


def measure_bytes(assumed: Assumed) -> dict[str, Any]:
    with torch.device("meta"):
        model = PyramidFluxTransformer()
    print(f"sent by one process per step, bfloat16, prompts of {TEXT_TOKENS} tokens; predicted with {assumed}")
    print(f"{'clip':<12}{'GPUs':>5}{'ways':>8}{'MB a step':>11}{'GB a clip':>11}{'times as fast':>15}")
    rows = []
    for clip, params in CLIPS.items():
        work = sum(sampling_flops(model, params, has_image=False, text_tokens=TEXT_TOKENS))
        for size in (2, 4, 6, 10, 12):
            config = parallel_config(size, model.config["num_attention_heads"])
            told = sent(model, params, config, TEXT_TOKENS, itemsize=2)
            alone = work / assumed.device_flops
            talking = told.bytes / assumed.link_bytes + told.exchanges * assumed.exchange_s
            row = {
                "clip": clip,
                "gpus": size,
                "guidance_ways": config.cfg_degree,
                "sequence_ways": config.ulysses_degree,
                "bytes_per_step": told.bytes / told.evaluations,
                "bytes_per_clip": told.bytes,
                "alone_s": alone,
                "predicted_speedup": alone / (alone / size + talking),
            }
            rows.append(row)
            print(
                f"{clip:<12}{size:>5}{config.cfg_degree:>5} x {config.ulysses_degree}"
                f"{row['bytes_per_step'] / 1e6:>10.1f}"
                f"{told.bytes / 1e9:>11.1f}{row['predicted_speedup']:>15.2f}"
            )
    return {"assumed": asdict(assumed), "published_speedup": PUBLISHED_SPEEDUP, "clips": rows}


# Seconds on a CPU


def measure_cpu(sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = middle_checkpoint(Path(folder) / "middle")
        transformer = checkpoint.load_transformer(torch.float32, "cpu")
        prompts = [random_text(transformer, 1, TEXT_TOKENS, torch.device("cpu"), seed) for seed in (0, 1)]
        alone = run(transformer, prompts, rounds, generate_latents)
        print(f"{'processes':>9}{'ways':>8}{'seconds':>9}{'times as fast':>15}{'MB a step':>11}  differs by")
        for size in sizes:
            sampler = ParallelSampler(checkpoint, torch.float32, "cpu", size, threads=1)
            with closing(sampler) as team, counting() as told:
                together = run(transformer, prompts, rounds, team.generate)
            config = team.parallel.config
            expected = sent(transformer, MIDDLE_CLIP, config, TEXT_TOKENS, itemsize=4)
            if sum(told) != rounds * expected.bytes:
                raise RuntimeError(f"sent {sum(told)} bytes, not {rounds * expected.bytes}")
            speedup = median(alone.seconds) / median(together.seconds)
            differs = float((together.latents - alone.latents).norm() / alone.latents.norm())
            per_step = expected.bytes / expected.evaluations
            print(
                f"{size:>9}{config.cfg_degree:>5} x {config.ulysses_degree}"
                f"{median(together.seconds):>8.2f}{speedup:>15.2f}"
                f"{per_step / 1e6:>11.2f}{differs:>12.1e}"
            )
            rows.append(
                {
                    "processes": size,
                    "guidance_ways": config.cfg_degree,
                    "sequence_ways": config.ulysses_degree,
                    "seconds": together.seconds,
                    "speedup": speedup,
                    "bytes_per_step": per_step,
                    "differs": differs,
                }
            )
    return {"alone_s": alone.seconds, "together": rows}


@dataclass(frozen=True)
class Run:
    """Seconds of each round, and the latents of the last."""

    seconds: list[float]
    latents: Tensor


def run(
    transformer: PyramidFluxTransformer, prompts: Sequence[TextEmbedding], rounds: int, generate: Callable[..., Tensor]
) -> Run:
    seconds, latents = [], torch.empty(0)
    for _ in range(rounds):
        started = time.perf_counter()
        latents = generate(transformer, SCHEDULE, *prompts, MIDDLE_CLIP, SeededNoise([0]), cache=True)
        seconds.append(time.perf_counter() - started)
    return Run(seconds, latents)


def middle_checkpoint(folder: Path) -> Checkpoint:
    """Write a checkpoint whose transformer is the one of middle size; nothing else of it is used."""
    shutil.copytree(TINY_MINIFLUX, folder)
    checkpoint = Checkpoint.open(folder)
    random_model(torch.device("cpu"), torch.float32, **MIDDLE).save_pretrained(checkpoint.transformer_folder)
    return checkpoint


@contextmanager
def counting() -> Iterator[list[int]]:
    """Yield a list to which every exchange adds the bytes that this process sends to others."""
    told: list[int] = []
    exchange, gather = dist.all_to_all_single, dist.all_gather

    def all_to_all_single(
        received: Tensor, given: Tensor, out: list[int], into: list[int], *, group: dist.ProcessGroup
    ) -> None:
        told.append(sum(into) - into[group.rank()])
        exchange(received, given, out, into, group=group)

    def all_gather(received: list[Tensor], given: Tensor, *, group: dist.ProcessGroup) -> None:
        told.append(given.nbytes * (group.size() - 1))
        gather(received, given, group=group)

    with patch.multiple(dist, all_to_all_single=all_to_all_single, all_gather=all_gather):
        yield told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["bytes", "cpu"], default=["bytes", "cpu"])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3, 4], help="of the CPU's part (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of the CPU's part (%(default)s)")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if "bytes" in arguments.parts:
        figures["bytes"] = measure_bytes(Assumed())
    if "cpu" in arguments.parts:
        figures["cpu"] = measure_cpu(arguments.processes, arguments.rounds)
    path = write_result("parallel", figures, sys.argv[1:])
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
