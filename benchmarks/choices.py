"""What do choices that save work cost? Scores of the bundled model's judge against the work that is left.

The exact savings are there too, whose scores must be those of none at all. Every choice renders the same prompts with
the same seeds; work is counted for the published miniFLUX model at 768p and 5 s.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.report import ROOT, write_result
from benchmarks.toy_quality import BATCH, judged, scenes, scores, videos
from pyramid_flow import PyramidFlowPipeline, PyramidFluxTransformer, SamplingParams
from pyramid_flow.flops import sampling_flops
from pyramid_flow.presets import PRESETS, QUALITY_PRESETS

CLIP = PRESETS["miniflux"]["768p"]
SHOWN = ("colour", "shape", "size", "direction", "speed", "background", "all")


@dataclass(frozen=True)
class Choice:
    """What is asked of the pipeline, and in which dtype the model is; is_exact: nothing is given away."""

    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    is_exact: bool = False

    @property
    def flops(self) -> int:
        """Of a published clip."""
        quality = self.options.get("quality", "standard")
        preset, effort = CLIP.at(quality), QUALITY_PRESETS[quality]
        params = SamplingParams(
            *preset.sizes[0],
            121,
            preset.num_inference_steps,
            preset.video_num_inference_steps,
            skip_last_step=self.options.get("skip_last_step", effort.skip_last_step),
            guided_share=self.options.get("guided_share", effort.guided_share),
        )
        cached = () if self.options.get("cache") is False else (0, 1, 2)
        with torch.device("meta"):
            model = PyramidFluxTransformer()
        return sum(sampling_flops(model, params, has_image=False, cached=cached))


CHOICES = {
    "no cache": Choice({"cache": False}, is_exact=True),
    "standard": Choice({"cache": True}, is_exact=True),
    "bfloat16": Choice(dtype=torch.bfloat16),
    "skip_last_step": Choice({"skip_last_step": True}),
    "guided_share 0.5": Choice({"guided_share": 0.5}),
    "guided_share 1, 1, 0.5": Choice({"guided_share": (1.0, 1.0, 0.5)}),
    "guided_share 1, 1, 0": Choice({"guided_share": (1.0, 1.0, 0.0)}),
    "guided_share 1, 0.5, 0": Choice({"guided_share": (1.0, 0.5, 0.0)}),
    "draft": Choice({"quality": "draft"}),
    "high": Choice({"quality": "high"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=13 * BATCH, help="number of prompts (%(default)s)")
    arguments = parser.parse_args()
    asked, usual, rows = scenes(arguments.prompts, ["medium", "large"]), CHOICES["standard"].flops, {}
    print(f"{'':<24}{'work':>6}{'seconds':>9}" + "".join(f"{name:>12}" for name in SHOWN))
    for name, choice in CHOICES.items():
        pipe = PyramidFlowPipeline.from_pretrained("toy", torch_dtype=choice.dtype)
        started = time.process_time()
        found = scores(judged(asked, videos(pipe, asked, **choice.options)))
        taken, work = time.process_time() - started, choice.flops / usual
        rows[name] = {"work": round(work, 3), "cpu_seconds": round(taken, 1), "scores": found}
        shown = "".join(f"{found[each]:>12.1%}" for each in SHOWN)
        print(f"{name:<24}{work:>6.2f}{taken:>9.0f}{shown}", flush=True)
    exact = [row["scores"] for name, row in rows.items() if CHOICES[name].is_exact]
    same = all(found == exact[0] for found in exact)
    print(f"the exact savings change no score: {'met' if same else 'MISSED'}")
    path = write_result(
        "choices", {"prompts": arguments.prompts, "choices": rows, "exact_are_equal": same}, sys.argv[1:]
    )
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
