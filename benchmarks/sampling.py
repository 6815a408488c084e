"""How much work is sampling, and how fast is it?

flops: PFLOP per clip of the published miniFLUX transformer, with every saving in turn, from formulas that are checked
against `torch.utils.flop_counter` on the meta device. cpu: seconds of a random model of middle size, on all cores of a
machine that does nothing else, against the published algorithm (tests/pyramid_flow/plain_sampler.py), the two in
turns; the ratio counts only if the published algorithm computes at 80 % of the product's speed. device: seconds,
memory and utilisation by level of the full-size model with random weights on an accelerator; --tiny tries that part
anywhere.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import ROOT, write_result
from pyramid_flow import (
    CausalVideoVAE,
    LatentStatistics,
    PyramidFluxTransformer,
    PyramidSchedule,
    SamplingParams,
    SeededNoise,
    StepInfo,
    TextEmbedding,
    generate_latents,
)
from pyramid_flow.flops import sampling_flops
from pyramid_flow.pixels import decode_frames
from pyramid_flow.sampling.pyramid import history_level
from pyramid_flow.sampling.sampler import plan_cache
from tests.pyramid_flow.plain_sampler import plain_latents

SCHEDULE = PyramidSchedule()
LEVELS = range(len(SCHEDULE.levels))
TEXT_TOKENS = 128
CLIPS = {
    "384p 5 s": SamplingParams(384, 640, 121),
    "768p 5 s": SamplingParams(768, 1280, 121),
    "768p 10 s": SamplingParams(768, 1280, 241),
}
GOALS_PFLOP = {"384p 5 s": 2.25, "768p 5 s": 11.8, "768p 10 s": 25.3}
MIDDLE = {"num_attention_heads": 6, "num_layers": 4, "num_single_layers": 8, "joint_attention_dim": 1024}
MIDDLE_CLIP = SamplingParams(192, 320, 57, (4, 4, 4), (3, 3, 3))
TINY = {"num_attention_heads": 2, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 64}
SPEEDUP_GOAL, FAIR_SPEED = 2.0, 0.8
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Of dense bfloat16 products, as the vendor says."""


# Work


@dataclass(frozen=True)
class Savings:
    """What an implementation leaves out; the defaults are the published algorithm's: nothing."""

    prefixes: bool = False
    last_block: bool = False
    once: bool = False
    cached: tuple[int, ...] = ()


STAGES = {
    "published": Savings(),
    "prefixes instead of a mask": Savings(prefixes=True),
    "last block for the current frame": Savings(prefixes=True, last_block=True),
    "nothing embedded or modulated twice": Savings(prefixes=True, last_block=True, once=True),
    "history cache at level 0": Savings(True, True, True, (0,)),
    "history cache at levels 0 and 1": Savings(True, True, True, (0, 1)),
    "history cache at all levels": Savings(True, True, True, (0, 1, 2)),
}


def clip_flops(model: PyramidFluxTransformer, params: SamplingParams, savings: Savings) -> int:
    """Count one guided clip with some of the savings."""
    dim, blocks = model.proj_out.in_features, len(model.blocks)
    text_dim, patch = model.context_embedder.in_features, model.proj_out.out_features
    pooled = 2 * dim * (model.time_text_embed.text_embedder.linear_1.in_features + dim)
    timestep = 2 * dim * (256 + dim)
    modulation = 2 * dim * dim * (12 * len(model.transformer_blocks) + 3 * len(model.single_transformer_blocks) + 2)
    prompt = pooled + 2 * text_dim * dim * TEXT_TOKENS
    total = 2 * prompt if savings.once else 0
    for unit in range(params.num_units):
        for level in SCHEDULE.levels:
            steps = 2 * len(params.steps(unit, level))
            frames, known = frames_of(params, unit, level.index), 0
            if level.index in savings.cached and unit > level.index + 1:
                known = unit - level.index - 1
            asking = [*([] if known else [TEXT_TOKENS + frames[0]]), *frames[known or 1 :]]
            before = TEXT_TOKENS + sum(frames[:known]) if known else 0
            ends = [before + sum(asking[: i + 1]) for i in range(len(asking))]
            tokens, keys, current = sum(asking), ends[-1], frames[-1]
            pairs = sum(a * end for a, end in zip(asking, ends, strict=True)) if savings.prefixes else tokens * keys
            full = blocks - savings.last_block
            work = full * (24 * dim**2 * tokens + 4 * dim * pairs)
            if savings.last_block:
                work += 4 * dim**2 * tokens + 20 * dim**2 * current + 4 * dim * current * keys
            history = tokens - current - (0 if known else TEXT_TOKENS)
            if savings.once:
                total += 2 * patch * dim * history
                work += 2 * 2 * patch * dim * current
                total += steps * (timestep + modulation) if unit <= 1 else 0
            else:
                work += prompt + timestep + modulation + 2 * patch * dim * (history + current)
                work += 2 * patch * dim * (history + current)  # the output, of which only the current frame is used
            total += steps * work
    return total


def frames_of(params: SamplingParams, unit: int, level: int) -> list[int]:
    """Return the tokens of every frame of a unit at a level, the current one last."""
    *_, height, width = params.latent_shape(1, 1)
    held = [*(history_level(unit - j, level) for j in range(unit)), level]
    return [(height >> (3 - each)) * (width >> (3 - each)) for each in held]


def check_formulas(model: PyramidFluxTransformer) -> None:
    """Compare the formulas with what is counted of both implementations, on the meta device, for a short clip."""
    params = replace(CLIPS["384p 5 s"], num_frames=41, num_inference_steps=(1, 1, 1), video_num_inference_steps=2)
    params = replace(params, video_num_inference_steps=(2, 1, 2))
    text, noise = random_text(model, 1, TEXT_TOKENS, torch.device("meta")), NoNoise()
    plain = count(lambda: plain_latents(model, text, text, params, noise))
    ours = count(lambda: generate_latents(model, SCHEDULE, text, text, params, noise, cache=True))
    expected = clip_flops(model, params, STAGES["published"]), clip_flops(model, params, [*STAGES.values()][-1])
    if (plain, ours) != expected or sum(sampling_flops(model, params, has_image=False)) != ours:
        raise RuntimeError(f"counted {plain} and {ours}, not {expected}")


def count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    flops: int = counter.get_total_flops()
    return flops


class NoNoise:
    """Shapes without values."""

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device="meta")

    block = posterior = initial


def measure_flops() -> dict[str, Any]:
    with torch.device("meta"):
        model = PyramidFluxTransformer()
    check_formulas(model)
    print("PFLOP per clip, 20 and 10 steps, guided, prompts of 128 tokens; formulas equal to what is counted on meta")
    table = {
        name: {clip: clip_flops(model, each, saved) / 1e15 for clip, each in CLIPS.items()}
        for name, saved in STAGES.items()
    }
    shorter = {clip: replace(params, skip_last_step=True) for clip, params in CLIPS.items()}
    table["the same, prompts of 40 tokens"] = {
        clip: sum(sampling_flops(model, params, has_image=False, text_tokens=40)) / 1e15
        for clip, params in CLIPS.items()
    }
    table["and skip_last_step (not exact)"] = {
        clip: sum(sampling_flops(model, params, has_image=False)) / 1e15 for clip, params in shorter.items()
    }
    for name, row in table.items():
        print(f"{name:<40}" + "".join(f"{value:>12.3f}" for value in row.values()))
    exact = table["history cache at all levels"]
    met = {clip: exact[clip] <= goal for clip, goal in GOALS_PFLOP.items()}
    print(f"goals {GOALS_PFLOP}: {'met' if all(met.values()) else f'MISSED {met}'}")
    return {"clips": [*CLIPS], "pflop": table, "goals_pflop": GOALS_PFLOP, "met": all(met.values())}


# Seconds on a CPU


def random_text(
    model: PyramidFluxTransformer, batch: int, tokens: int, device: torch.device, seed: int = 0
) -> TextEmbedding:
    """Prompts of `tokens` of 128 tokens, and the rest padding."""
    source = torch.Generator().manual_seed(seed)
    pooled_dim = model.time_text_embed.text_embedder.linear_1.in_features
    embedded = torch.randn(batch, TEXT_TOKENS, model.context_embedder.in_features, generator=source)
    mask = (torch.arange(TEXT_TOKENS) < tokens).expand(batch, -1)
    return TextEmbedding(embedded.to(device), mask, torch.randn(batch, pooled_dim, generator=source).to(device))


def random_model(device: torch.device, dtype: torch.dtype, **config: int) -> PyramidFluxTransformer:
    torch.manual_seed(0)
    with device:
        model = PyramidFluxTransformer(**config)
    return torch.nn.Module.to(model, dtype).eval().requires_grad_(False)


def measure_cpu(rounds: int, tokens: int) -> dict[str, Any]:
    """Time all in turns, with prompts of so many tokens, which the published algorithm pads to 128."""
    model = random_model(torch.device("cpu"), torch.float32, **MIDDLE)
    text, negative = (random_text(model, 1, tokens, torch.device("cpu"), seed) for seed in (0, 1))
    batch = SCHEDULE, text, negative, MIDDLE_CLIP
    runs: dict[str, Callable[[], Tensor]] = {
        "published": lambda: plain_latents(model, text, negative, MIDDLE_CLIP, SeededNoise([0])),
        "no cache": lambda: generate_latents(model, *batch, SeededNoise([0]), cache=False),
        "cache": lambda: generate_latents(model, *batch, SeededNoise([0]), cache=True),
    }
    ours = [
        sum(sampling_flops(model, MIDDLE_CLIP, has_image=False, text_tokens=tokens, cached=c)) for c in ((), LEVELS)
    ]
    work = dict(zip(runs, [clip_flops(model, MIDDLE_CLIP, Savings()), *ours], strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    latents: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            latents[name] = run()
            seconds[name].append(time.perf_counter() - started)
    figures: dict[str, Any] = {"prompt_tokens": tokens}
    for name, values in seconds.items():
        differs = (latents[name] - latents["published"]).norm() / latents["published"].norm()
        taken, speed = median(values), work[name] / median(values) / 1e9
        print(
            f"{name:<12}{taken:>8.2f} s{work[name] / 1e12:>8.3f} TFLOP{speed:>8.1f} GFLOP/s, differs by {differs:.1e}"
        )
        figures[name] = {"seconds": values, "tflop": work[name] / 1e12, "gflop_per_s": speed, "differs": float(differs)}
    ratio = figures["published"]["gflop_per_s"] / figures["cache"]["gflop_per_s"]
    speedup = median(p / c for p, c in zip(seconds["published"], seconds["cache"], strict=True))
    verdict = "met" if speedup >= SPEEDUP_GOAL and ratio >= FAIR_SPEED else "MISSED"
    print(f"{speedup:.2f} times as fast (goal {SPEEDUP_GOAL}), at {ratio:.0%} of its speed (at least 80 %): {verdict}")
    return figures | {"speedup": speedup, "published_speed_share": ratio, "goal": SPEEDUP_GOAL, "met": verdict == "met"}


# Seconds on an accelerator


def measure_device(device: torch.device, tiny: bool) -> dict[str, Any]:
    model = random_model(device, torch.bfloat16, **(TINY if tiny else {}))
    vae = (
        CausalVideoVAE(**({"decoder_block_out_channels": (32,) * 4} if tiny else {})).to(device, torch.bfloat16).eval()
    )
    clips = {"tiny": SamplingParams(64, 128, 33, 2, 1)} if tiny else CLIPS
    rows = []
    for clip, params in clips.items():
        for batch in (1, 4):
            rows.append({"clip": clip, "batch": batch} | measure_clip(model, vae, params, batch, device))
            print({name: value for name, value in rows[-1].items() if name != "profile"}, flush=True)
    return {"clips": rows}


def measure_clip(
    model: PyramidFluxTransformer, vae: CausalVideoVAE, params: SamplingParams, batch: int, device: torch.device
) -> dict[str, Any]:
    text, negative = (random_text(model, batch, TEXT_TOKENS, device) for _ in range(2))

    cached = plan_cache(model, SCHEDULE, params, text, negative).levels

    def sample(short: SamplingParams, on_step: Callable[[StepInfo], None] | None = None) -> Tensor:
        noise = SeededNoise(range(batch))
        return generate_latents(model, SCHEDULE, text, negative, short, noise, cache=cached, on_step=on_step)

    def decode(latents: Tensor) -> None:
        for row in latents.split(1):
            for _ in decode_frames(vae, row, LatentStatistics()):
                pass

    sample(replace(params, num_frames=17))  # warm up
    reset_peak(device)
    sampling, latents = timed(device, lambda: sample(params))
    decoding, _ = timed(device, lambda: decode(latents))
    first, _ = timed(device, lambda: decode(sample(replace(params, num_frames=9))))
    by_level = level_seconds(device, lambda on_step: sample(params, on_step))
    flops = [batch * each for each in sampling_flops(model, params, has_image=False, cached=cached)]
    peak = next((speed for name, speed in PEAK_FLOPS.items() if name in device_name(device)), None)
    return {
        "cached_levels": sorted(cached),
        "sampling_s": sampling,
        "decoding_s": decoding,
        "clip_s": (sampling + decoding) / batch,
        "first_9_frames_s": first,
        "level_s": by_level,
        "level_utilisation": [work / taken / peak for work, taken in zip(flops, by_level, strict=True)]
        if peak
        else None,
        "peak_gib": peak_gib(device),
        "profile": kernels(lambda: sample(replace(params, num_frames=33))),
    }


def timed(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    synchronise(device)
    started = time.perf_counter()
    result = run()
    synchronise(device)
    return time.perf_counter() - started, result


def level_seconds(device: torch.device, sample: Callable[[Callable[[StepInfo], None]], Any]) -> list[float]:
    """Sum the seconds of each level's steps, waiting for the device after each."""
    seconds, last = [0.0] * len(LEVELS), time.perf_counter()

    def on_step(info: StepInfo) -> None:
        nonlocal last
        synchronise(device)
        now = time.perf_counter()
        seconds[info.level] += now - last
        last = now

    sample(on_step)
    return seconds


def kernels(run: Callable[[], Any], most: int = 12) -> list[dict[str, Any]]:
    """Name what takes longest: on the device if there is one, with the attention kernels that ran."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiled:
        run()
    on_device = torch.cuda.is_available()
    events = sorted(profiled.key_averages(), key=lambda each: -_self_time(each, on_device))
    return [{"name": each.key, "ms": _self_time(each, on_device) / 1e3, "calls": each.count} for each in events[:most]]


def _self_time(event: Any, on_device: bool) -> float:  # noqa: ANN401 - torch does not name its type
    return float(event.self_device_time_total if on_device else event.self_cpu_time_total)


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device) / 2**30


def device_name(device: torch.device) -> str:
    return device.type if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["flops", "cpu", "device"], default=["flops", "cpu"])
    parser.add_argument("--rounds", type=int, default=3, help="of the CPU's part (%(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="of the CPU part's prompt (%(default)s)")
    parser.add_argument("--device", default="cuda", help="torch device of the device's part (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and clip for the device's part")
    return parser.parse_args()


def parts(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    if "flops" in arguments.parts:
        yield "flops", measure_flops()
    if "cpu" in arguments.parts:
        yield "cpu", measure_cpu(arguments.rounds, arguments.tokens)
    if "device" in arguments.parts:
        yield "device", measure_device(torch.device(arguments.device), arguments.tiny)


def main() -> None:
    figures = dict(parts(parse_arguments()))
    path = write_result("sampling", figures, sys.argv[1:])
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
