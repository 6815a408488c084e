"""Does the bundled model make what the prompt says? Scores by the judge, which sees pixels only.

200 prompts of combinations that were never trained on, seeds 0 to 199, one video each, no retries. With them: the same
videos against other videos' prompts (chance), image-to-video from true first frames, what the VAE alone makes of true
clips (no video can be better), and the same with new random weights in place of the trained transformer.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.report import ROOT, write_result
from pyramid_flow import PyramidFlowPipeline
from pyramid_flow.toy.judge import NONE, Attributes, judge
from pyramid_flow.toy.world import Frames, Scene, draw_scene
from pyramid_flow.training.step import initialise_transformer

NAMES = ("colour", "shape", "size", "direction", "speed", "background")
PLACE_DISTANCE = 0.05  # share of the side
BATCH = 8


@dataclass(frozen=True)
class Judged:
    """A scene that was asked for, and what the judge saw."""

    scene: Scene
    seen: Attributes


def scenes(count: int, sizes: Sequence[str]) -> list[Scene]:
    """Draw the scenes that are asked for."""
    return [draw_scene(Random(f"quality {number}"), tuple(sizes), held_out=True) for number in range(count)]


def videos(
    pipe: PyramidFlowPipeline,
    asked: Sequence[Scene],
    *,
    from_image: bool = False,
    **options: Any,  # noqa: ANN401 - of the pipeline
) -> Iterator[Frames]:
    """Render a video of each scene; from_image: from its true first frame."""
    side = pipe.preset.sizes[0][0]
    step = 1 if from_image else BATCH
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        image = Image.fromarray(part[0].render(1, side)[0]) if from_image else None
        seeds = list(range(start, start + len(part)))
        yield from pipe([scene.caption for scene in part], image=image, seed=seeds, **options).frames


def reconstructions(pipe: PyramidFlowPipeline, asked: Sequence[Scene]) -> Iterator[Frames]:
    """Encode and decode the true clips."""
    for scene in asked:
        clip = torch.from_numpy(scene.render(pipe.preset.max_num_frames, pipe.preset.sizes[0][0]))
        pixels = clip.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            decoded = pipe.vae.decode(pipe.vae.encode_moments(pixels).mean).float().clamp(-1, 1)[0]
        yield ((decoded.permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()


def judged(asked: Sequence[Scene], made: Iterator[Frames], sheet: Path | None = None) -> list[Judged]:
    """Judge videos, and draw strips of the first 24 of them."""
    found, strips = [], []
    for number, (scene, frames) in enumerate(zip(asked, made, strict=True), start=1):
        found.append(Judged(scene, judge(frames)))
        strips.append(np.concatenate(list(frames[:: max(1, (len(frames) - 1) // 4)]), axis=1))
        print(f"\r{number} of {len(asked)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if sheet:
        columns = [np.concatenate(strips[start:24:2]) for start in (0, 1)]
        Image.fromarray(np.concatenate(columns, axis=1)).save(sheet)
    return found


def scores(rows: Sequence[Judged]) -> dict[str, float]:
    """Return the share of the videos in which each attribute is right, and other shares."""
    is_right = {name: [getattr(row.seen, name) == getattr(row.scene, name) for row in rows] for name in NAMES}
    is_right["one_piece"] = [row.seen.pieces == 1 for row in rows]
    is_right["all"] = [all(values) for values in zip(*is_right.values(), strict=True)]
    is_right["frozen"] = [row.seen.direction == NONE for row in rows]
    return {name: round(float(np.mean(values)), 4) for name, values in is_right.items()}


def shuffled(rows: Sequence[Judged]) -> list[Judged]:
    """Return the videos with other videos' scenes."""
    return [replace(row, scene=other.scene) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]


def image_scores(rows: Sequence[Judged], side: int) -> dict[str, float]:
    """Return how often the image's colour, shape and place are kept, the motion is as told, and all of it."""
    kept = defaultdict(list)
    for row in rows:
        true = judge(row.scene.render(1, side))
        kept["colour"].append(row.seen.colour == row.scene.colour)
        kept["shape"].append(row.seen.shape == row.scene.shape)
        kept["place"].append(_near(row.seen.place, true.place))
        kept["motion"].append(row.seen.direction == row.scene.direction)
    kept["all"] = [all(values) for values in zip(*kept.values(), strict=True)]
    return {name: round(float(np.mean(values)), 4) for name, values in kept.items()}


def _near(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    return one is not None and other is not None and float(np.hypot(*np.subtract(one, other))) <= PLACE_DISTANCE


def confusion(rows: Sequence[Judged]) -> dict[str, dict[str, dict[str, int]]]:
    """Return, per attribute and name asked for, how often each name was seen."""
    found: dict[str, dict[str, Counter[str]]] = {name: defaultdict(Counter) for name in NAMES}
    for row in rows:
        for name in NAMES:
            found[name][getattr(row.scene, name)][getattr(row.seen, name)] += 1
    return {name: {asked: dict(seen) for asked, seen in sorted(table.items())} for name, table in found.items()}


def measure(pipe: PyramidFlowPipeline, asked: Sequence[Scene], folder: Path) -> dict[str, object]:
    """Measure everything."""
    side = pipe.preset.sizes[0][0]
    rows = judged(asked, videos(pipe, asked), folder / "toy_quality.png")
    figures: dict[str, object] = {}

    def note(name: str, values: dict[str, float]) -> None:
        figures[name] = values
        print(f"{name:<16} " + "  ".join(f"{key} {value:.1%}" for key, value in values.items()), flush=True)

    note("text to video", scores(rows))
    note("other prompts", scores(shuffled(rows)))
    note("image to video", image_scores(judged(asked, videos(pipe, asked, from_image=True)), side))
    note("VAE alone", scores(judged(asked, reconstructions(pipe, asked))))
    torch.manual_seed(0)
    initialise_transformer(pipe.transformer)
    note("random weights", scores(judged(asked[: 2 * BATCH], videos(pipe, asked[: 2 * BATCH]))))
    return figures | {"confusion": confusion(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--prompts", type=int, default=200, help="number of prompts (%(default)s)")
    parser.add_argument("--sizes", nargs="+", default=["medium", "large"], help="sizes asked for (%(default)s)")
    arguments = parser.parse_args()
    pipe = PyramidFlowPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
    asked = scenes(arguments.prompts, arguments.sizes)
    figures = {"settings": vars(arguments)} | measure(pipe, asked, ROOT / "benchmarks" / "results")
    path = write_result("toy_quality", figures, sys.argv[1:])
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
