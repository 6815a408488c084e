"""Does the pyramid pay? The bundled architecture, trained twice for the same number of floating-point operations.

pyramid: pyramid flow matching, as published: three levels, and a history that grows coarser with age. full: ordinary
flow matching, which is the same code with one level: a frame is denoised at full size, and remembers all of history at
full size. Both begin with the same weights and see the same clips in the same order, in batches of the same size and of
clips as long, under the recipe of the bundled model (jobs/toy/transformer.yaml), and sample with the same number of
evaluations per frame. The recipe's warm-up and running mean, which are counted in steps, are those of the pyramid; the
other one, whose steps are fewer and larger, has them as long a share of its own.
Work is counted by `torch.utils.flop_counter`, forward and backward, so that a busy machine changes nothing.

Shown at shares of the work: the judge's scores of videos of held-out prompts, and the held-out loss, as the share of
the velocity's mean square that is left. The two have velocities of their own, so a loss tells how each of them learns;
the scores tell which makes better videos. It is one run of each, with a recipe that was found for the pyramid, and 64
videos tell a score to 6 points (standard error).

What is done is kept in --folder, and the same command goes on from there.
"""

import argparse
import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.report import ROOT, write_result
from benchmarks.toy_quality import NAMES, judged, scenes, scores, videos
from jobs import cli
from jobs.commands.train import prepare
from jobs.settings import TrainSettings, parse
from pipeline.batch import runner
from pipeline.batch.planner import Resources
from pipeline.storage.storage import Storage
from pipeline.training.clips import encoded, pixels_of
from pipeline.training.optimizer import OptimizerSettings, parameter_groups
from pipeline.training.record import check_record
from pipeline.training.state import Training, restore, save
from pipeline.training.tasks import TransformerTask
from pipeline.training.trainer import TrainJob, batches, train_step
from pyramid_flow import PyramidFlowPipeline, PyramidSchedule, SamplingParams
from pyramid_flow.flops import clip_shapes
from pyramid_flow.presets import PRESETS, Preset
from pyramid_flow.text.embedding import TextEmbedding
from pyramid_flow.toy.world import Scene
from pyramid_flow.training.draws import KeyedRandom
from pyramid_flow.training.objective import temporal_pyramid_sample, velocity_loss
from pyramid_flow.training.step import transformer_losses, velocity
from pyramid_flow.transformer.tokens import frame_tokens

RECIPE, PICTURE = ROOT / "jobs/toy/transformer.yaml", ROOT / "docs/images/pyramid_vs_full.png"
METHODS = {"pyramid": PyramidSchedule(), "full": PyramidSchedule(stage_range=(0.0, 1.0))}
COLOURS = {"pyramid": "tab:blue", "full": "tab:orange"}
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
KEEP_STEPS = 200
POINTS, FRAMES = "points.json", "frames.npy"
SHOWN_SCENES, SHOWN_FRAMES = 6, [0, 8, 16, 24, 32]


@dataclass(frozen=True)
class Heldout:
    """What is never trained on: scenes that are asked for, and other clips, normalised [B,C,T,h,w], with their text."""

    asked: list[Scene]
    latents: Tensor
    text: TextEmbedding


class Run:
    """The training of one method, as far as it has come.

    flops: of every step; points: by step, what was found there. What is kept lies in a folder per step.
    """

    def __init__(self, name: str, job: TrainJob, folder: Path, teraflop: float, recipe_steps: int | None) -> None:
        """Begin with weights and data that depend on the job's seed alone, or where the run stopped.

        recipe_steps: of a training for which the job's settings are meant, None = this one.
        """
        self.name, self.folder = name, folder / name
        torch.manual_seed(job.seed)
        task = job.make_task()
        assert isinstance(task, TransformerTask)
        task.schedule = METHODS[name]
        if len(task.schedule.levels) == 1:
            levels = (0,) * len(task.objective.levels)  # so that clips of as many lengths come in a step
            task.objective = replace(task.objective, levels=levels, level_weights=(1.0,))
        self.task = task
        self.flops = list(step_flops(task, job, teraflop * 1e12))
        settings = scaled(job.optimizer, len(self.flops) / (recipe_steps or len(self.flops)))
        self.job = replace(job, phases=(replace(job.phases[0], steps=len(self.flops)),), optimizer=settings)
        assert settings.ema_decay
        ema = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        optimizer = AdamW(parameter_groups(task.model, settings), lr=settings.lr, betas=settings.betas, fused=True)
        self.training = Training(task, task, optimizer, ema)
        self.points: dict[str, dict[str, Any]] = {}
        for kept in self._kept()[-1:]:
            restore(self.training, kept)
            self.points = json.loads((kept / POINTS).read_text())

    def _kept(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob(f"*/{POINTS}"))  # which is written last

    def keep(self) -> None:
        """Keep where the run is, and nothing before."""
        before, now = self._kept(), self.folder / f"{self.training.step:06d}"
        now.mkdir(parents=True, exist_ok=True)
        save(self.training, now)
        written = now / f"{POINTS}.part"
        written.write_text(json.dumps(self.points))
        written.rename(now / POINTS)
        for path in before:
            if path != now:
                shutil.rmtree(path)

    def train(self, measure: Callable[["Run"], dict[str, Any]]) -> None:
        """Train to the end, and measure at every share of the work."""
        spent = np.cumsum(self.flops)
        stops = {int(np.searchsorted(spent, share * spent[-1])) + 1 for share in SHARES}
        bar = tqdm(initial=self.training.step, total=len(self.flops), desc=self.name, unit=" steps")
        for phase, table, samples in batches(self.job, self.task.columns, self.training.step, 0, 1):
            shown = train_step(self.job, self.training, phase, table, samples)
            bar.set_postfix(loss=f"{shown['loss']:.4f}", refresh=False)
            bar.update()
            step = self.training.step
            if step in stops:
                done = {"teraflop": round(float(spent[step - 1]) / 1e12, 4), "samples": step * phase.batch_size}
                self.points[str(step)] = done | measure(self)
                print(f"\n{self.name} after {step} steps: {self.points[str(step)]}", flush=True)
            if step in stops or step % KEEP_STEPS == 0:
                self.keep()
        bar.close()


def scaled(settings: OptimizerSettings, share: float) -> OptimizerSettings:
    """Return settings for a training of so many times as many steps: what is counted in steps lasts as long a share."""
    assert settings.ema_decay
    decay = 1 - (1 - settings.ema_decay) / share
    return replace(settings, warmup_steps=round(settings.warmup_steps * share), ema_decay=decay)


def step_flops(task: TransformerTask, job: TrainJob, budget: float) -> Iterator[int]:
    """Yield the operations of one step after the other until they make up a budget.

    They are those of the step's levels and lengths, each of which is counted once, with the first rows of the table.
    """
    _, table, samples = next(batches(job, task.columns, 0, 0, 1))
    columns = task.objective.levels
    share = len(samples) // len(columns)
    rows = encoded(table.slice(0, share), task.num_units)

    @cache
    def count(level: int, length: int) -> int:
        only, draws = replace(task.objective, levels=(level,)), KeyedRandom(0, 0, range(share))
        own, lengths = range(share), [length]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no CPU's fused kernels
            losses = transformer_losses(
                task.model, task.schedule, rows.latents, rows.text, rows.empty, own, lengths, draws, only
            )
            losses.total.backward()
        task.model.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())

    spent = step = 0
    while spent < budget:
        flops = sum(count(level, length) for level, length in zip(columns, task.lengths(step), strict=True))
        spent, step = spent + flops, step + 1
        yield flops


@torch.no_grad()
def heldout(pipe: PyramidFlowPipeline, prompts: int, clips: int) -> Heldout:
    """Draw what is held out."""
    drawn, preset = scenes(prompts + clips, ["medium", "large"]), pipe.preset
    asked, others = drawn[:prompts], drawn[prompts:]
    pixels = [pixels_of(scene.render(preset.max_num_frames, preset.sizes[0][0])) for scene in others]
    latents = torch.cat([pipe.vae.encode_moments(clip[None]).mean for clip in pixels])
    text = pipe.text_encoder([scene.caption for scene in others])
    return Heldout(asked, preset.statistics.normalize(latents), text)


def measure(run: Run, pipe: PyramidFlowPipeline, preset: Preset, held: Heldout) -> dict[str, Any]:
    """Return the held-out loss and the judge's scores; keeps the frames of the first scenes."""
    pipe.transformer.load_state_dict(run.training.result.state_dict())
    pipe.schedule = run.task.schedule
    steps = preset.num_inference_steps, preset.video_num_inference_steps
    first, later = ((sum(each),) for each in steps) if len(pipe.schedule.levels) == 1 else steps
    pipe.preset = replace(preset, num_inference_steps=first, video_num_inference_steps=later)
    made = list(videos(pipe, held.asked))
    np.save(run.folder.parent / f"{run.name}-{FRAMES}", np.stack(made[:SHOWN_SCENES])[:, SHOWN_FRAMES])
    return {"unexplained": round(unexplained(run, pipe, held), 4), "scores": scores(judged(held.asked, iter(made)))}


@torch.no_grad()
def unexplained(run: Run, pipe: PyramidFlowPipeline, held: Heldout) -> float:
    """Return the mean squared error as a share of the velocity's mean square, over all lengths; mean of the levels."""
    shares, schedule = [], run.task.schedule
    for level in range(len(schedule.levels)):
        error = square = 0.0
        for length in range(1, run.task.num_units + 1):
            draws = KeyedRandom(1, length, range(len(held.latents)))
            sample = temporal_pyramid_sample(schedule, level, held.latents[:, :, :length], draws)
            error += float(velocity_loss(velocity(pipe.transformer, sample, held.text), sample.target).mean())
            square += float(sample.target.square().mean())
        shares.append(error / square)
    return float(np.mean(shares))


def most_tokens() -> dict[str, int]:
    """Return the video tokens of the longest evaluation of a published clip of 10 s at 768p: its last unit's."""
    preset = PRESETS["miniflux"]["768p"]
    params = SamplingParams(*preset.sizes[0], preset.max_num_frames)
    last = params.num_units - 1
    return {
        name: sum(frame_tokens(clip_shapes(params, last, len(schedule.levels) - 1, len(schedule.levels))))
        for name, schedule in METHODS.items()
    }


def draw(points: Mapping[str, list[dict[str, Any]]], held: Heldout, folder: Path, preset: Preset) -> None:
    """Draw scores and losses against the work, and frames of the first prompts beside the true ones."""
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    curves, strips = figure.subfigures(1, 2, width_ratios=[1, 1.6])
    scored, lost = curves.subplots(2, 1, sharex=True)
    for name, found in points.items():
        work = [point["teraflop"] for point in found]
        means = [float(np.mean([point["scores"][each] for each in NAMES])) for point in found]
        style = {"color": COLOURS[name], "marker": "o"}
        scored.plot(work, means, label=f"{name}: mean of six attributes", **style)
        scored.plot(work, [point["scores"]["all"] for point in found], "--", label=f"{name}: all of them", **style)
        lost.plot(work, [point["unexplained"] for point in found], label=name, **style)
    scored.set(title="the judge's scores, held-out prompts", ylim=(0, 1))
    lost.set(title="velocity left unexplained, held-out clips", xlabel="TFLOP of training", xlim=(0, None), ylim=(0, 1))
    for axes in (scored, lost):
        axes.grid(alpha=0.3)
        axes.legend()
    side = preset.sizes[0][0]
    shown = held.asked[:SHOWN_SCENES]
    true = np.stack([scene.render(preset.max_num_frames, side)[SHOWN_FRAMES] for scene in shown])
    made = {"true": true} | {name: np.load(folder / f"{name}-{FRAMES}") for name in points}
    for axes, (name, clips) in zip(strips.subplots(1, len(made)), made.items(), strict=True):
        axes.imshow(np.concatenate([np.concatenate(list(clip), axis=1) for clip in clips]))
        axes.set(title=f"{name}, frames {', '.join(map(str, SHOWN_FRAMES))}")
        axes.axis("off")
    figure.savefig(PICTURE, dpi=80)


def prepared(arguments: Namespace, folder: Path) -> TrainJob:
    """Make and encode the clips, unless they are there, and return the training of the bundled model on them."""
    clips, latents = folder / "clips.parquet", folder / "latents"
    if not (latents / "done").exists():
        world = ["--output", str(clips), "--count", str(arguments.clips), "--num-frames", "33", "--seed", "2"]
        encode = ["--input", str(clips), "--output", str(latents), "--model", "toy", "--workers", "2"]
        for command in (
            ["world", *world, "--side", "64", "--sizes", "medium", "--sizes", "large"],
            ["encode", *encode, "--dtype", "bfloat16"],
        ):
            if cli.main(["dataset", *command]):
                sys.exit(1)
        (latents / "done").touch()
    phases = json.dumps([{"data": [str(latents)], "steps": 1, "batch_size": arguments.batch_size}])
    options = ["--model", "toy", "--output", str(folder), "--phases", phases, "--seed", str(arguments.seed)]
    return prepare(parse(TrainSettings, ["--config", str(RECIPE), *options]))[1]


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teraflop", type=float, default=100.0, help="work of each training (%(default)s)")
    parser.add_argument("--clips", type=int, default=3000, help="clips to train on (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=48, help="samples of a step, 3n (%(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="videos that are judged each time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and noise (%(default)s)")
    parser.add_argument("--folder", default="outputs/pyramid_vs_full", help="where it is kept (%(default)s)")
    arguments = parser.parse_args()
    if arguments.batch_size % 3:
        parser.error("--batch-size is not a multiple of 3: all levels have as many samples")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    folder = Path(arguments.folder).absolute()
    check_record(Storage(str(folder)), "settings.json", {**vars(arguments), "folder": ""})
    tokens = most_tokens()
    print("video tokens of the last unit, 768p and 10 s: " + ", ".join(f"{n} {each}" for n, each in tokens.items()))
    job = prepared(arguments, folder)
    pipe = PyramidFlowPipeline.from_pretrained("toy", torch_dtype=torch.float32)
    preset, held = pipe.preset, heldout(pipe, arguments.prompts, 32)
    points: dict[str, list[dict[str, Any]]] = {}
    recipe_steps: int | None = None
    with runner.session(None, Resources(2, 0)):
        for name in METHODS:
            run = Run(name, job, folder, arguments.teraflop, recipe_steps)
            recipe_steps = recipe_steps or len(run.flops)
            run.train(partial(measure, pipe=pipe, preset=preset, held=held))
            points[name] = list(run.points.values())
    path = write_result(
        "pyramid_vs_full", {"settings": vars(arguments), "tokens": tokens, "points": points}, sys.argv[1:]
    )
    draw(points, held, folder, preset)
    print(f"wrote {path.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
