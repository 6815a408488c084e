"""Sampling by several processes: equal to one, whoever shares what; and what becomes of a process that is lost."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from pyramid_flow import (
    Checkpoint,
    InvalidValueError,
    PyramidSchedule,
    PyramidTransformer,
    SamplingParams,
    SeededNoise,
    TextEmbedding,
    generate_latents,
)
from pyramid_flow.parallel.config import ParallelConfig, parallel_config, possible_configs
from pyramid_flow.parallel.processes import ParallelError, ParallelSampler
from pyramid_flow.parallel.sampler import SINGLE_PROCESS, Parallel
from pyramid_flow.sampling.sampler import plan_cache
from tests.pyramid_flow.goldens import TINY, assert_run_equal, randn

SCHEDULE = PyramidSchedule()
PARAMS = SamplingParams(64, 128, 41, (1, 2, 1), (2, 1, 2), guidance_scale=4.0, video_guidance_scale=3.0)


def test_branches_are_split_before_heads():
    assert possible_configs(30) == {
        1: ParallelConfig(1, 1),
        2: ParallelConfig(2, 1),
        3: ParallelConfig(1, 3),
        4: ParallelConfig(2, 2),
        5: ParallelConfig(1, 5),
        6: ParallelConfig(2, 3),
        10: ParallelConfig(2, 5),
        12: ParallelConfig(2, 6),
        15: ParallelConfig(1, 15),
        20: ParallelConfig(2, 10),
        30: ParallelConfig(2, 15),
        60: ParallelConfig(2, 30),
    }


@pytest.mark.parametrize("size", [0, 7, 8, 61])
def test_an_impossible_number_is_answered_with_the_possible_ones(size):
    with pytest.raises(InvalidValueError, match=r"possible are 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60$"):
        parallel_config(size, 30)


MODELS = {"miniflux": TINY["miniflux"], "sd3": TINY["sd3"], "toy": "toy"}
TEAMS = [
    ("miniflux", 2),  # branches apart
    ("toy", 3),  # three shares of tokens and heads
    ("sd3", 4),  # both
    pytest.param(("sd3", 2), marks=pytest.mark.slow),
    pytest.param(("miniflux", 4), marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Samplers:
    """A team, and the transformer of its first process."""

    team: ParallelSampler
    transformer: PyramidTransformer

    def both(self, params: SamplingParams, cache: Collection[int], **options) -> tuple[Tensor, Tensor]:
        """Sample together and alone."""
        text, negative = (random_prompts(self.transformer, each, seed) for each, seed in (([9, 30, 2], 0), ([7], 1)))
        image = options.pop("image_latent", None)
        made = [
            generate(
                self.transformer,
                SCHEDULE,
                text,
                negative if params.guided else None,
                params,
                SeededNoise(range(len(text))),
                image_latent=image,
                cache=cache,
                **options,
            )
            for generate in (self.team.generate, generate_latents)
        ]
        return made[0], made[1]


def random_prompts(transformer: PyramidTransformer, lengths: Sequence[int], seed: int) -> TextEmbedding:
    source = torch.Generator().manual_seed(seed)
    features, pooled = (transformer.config[f"{name}_dim"] for name in ("joint_attention", "pooled_projection"))
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(len(lengths), longest, features, generator=source)
    return TextEmbedding(tokens, mask, torch.randn(len(lengths), pooled, generator=source))


@pytest.fixture(scope="module", params=TEAMS, ids=lambda param: f"{param[0]} {param[1]}")
def samplers(request) -> Iterator[Samplers]:
    name, size = request.param
    checkpoint = Checkpoint.open(MODELS[name])
    team = ParallelSampler(checkpoint, torch.float32, "cpu", size, threads=1)
    yield Samplers(team, checkpoint.load_transformer(torch.float32, "cpu"))
    team.close()


@pytest.mark.integration
@pytest.mark.parametrize("cache", [(), (0, 2), (0, 1, 2)], ids=["no cache", "some levels", "all levels"])
def test_together_equals_alone(samplers, cache):
    assert_run_equal(*samplers.both(PARAMS, cache))


@pytest.mark.integration
@pytest.mark.parametrize(
    "changes",
    [
        {"guided_share": (1.0, 0.5, 0.0)},
        {"guidance_scale": 0.0, "video_guidance_scale": 0.0},
        {"guidance_scale": (1.0, 4.0, 7.0), "skip_last_step": True},
    ],
    ids=["partly guided", "not guided", "guided by row"],
)
def test_together_equals_alone_however_guided(samplers, changes):
    assert_run_equal(*samplers.both(replace(PARAMS, **changes), (0, 1, 2)))


@pytest.mark.integration
def test_together_equals_alone_from_an_image(samplers):
    assert_run_equal(*samplers.both(PARAMS, (0, 1), image_latent=randn(3, 16, 1, 8, 16)))


@pytest.mark.integration
def test_together_equals_alone_when_rows_leave(samplers):
    def on_step(info):
        return torch.tensor([True, (info.unit, info.level, info.step) < (3, 1, 1), info.unit < 2])

    together, alone = samplers.both(PARAMS, (0, 1, 2), on_step=on_step)
    assert len(together) == 1
    assert_run_equal(together, alone)
    together, alone = samplers.both(PARAMS, (0, 1, 2), on_step=lambda info: torch.tensor([info.unit < 1] * 3))
    assert len(together) == len(alone) == 0


@pytest.mark.integration
def test_a_wrong_argument_is_refused_and_the_team_goes_on(samplers):
    with pytest.raises(InvalidValueError, match="cache"):
        samplers.both(PARAMS, (0, 7))
    assert_run_equal(*samplers.both(replace(PARAMS, num_frames=1), ()))


@pytest.mark.integration
def test_a_cache_is_shared_by_branches_and_heads(samplers):
    transformer, parallel = samplers.transformer, samplers.team.parallel
    text = random_prompts(transformer, [9], 0)

    def stored(parallel: Parallel) -> int:
        cache = plan_cache(transformer, SCHEDULE, PARAMS, text, text, True, parallel=parallel)
        rows = 2 // parallel.config.cfg_degree
        return sum(cache.shape.level_bytes(level, rows, torch.float32) for level in cache.levels)

    assert stored(SINGLE_PROCESS) == parallel.config.size * stored(parallel)


LOSING = """
    import os, signal, sys, threading, time
    import torch
    from pyramid_flow import Checkpoint
    from pyramid_flow.parallel.processes import ParallelSampler

    if __name__ == "__main__":
        team = ParallelSampler(Checkpoint.open(sys.argv[1]), torch.float32, "cpu", 2, threads=1)
        [child] = team._children
        print(child.pid, flush=True)
        time.sleep(60)
"""


@pytest.fixture
def process(tmp_path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process with a team, and its child's id."""
    script = tmp_path / "losing.py"
    script.write_text(textwrap.dedent(LOSING))
    command = [sys.executable, str(script), str(TINY["miniflux"])]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        yield parent, int(parent.stdout.readline())
        parent.kill()


@pytest.mark.integration
def test_a_lost_child_ends_its_parent(process):
    parent, child = process
    os.kill(child, signal.SIGKILL)
    assert parent.wait(10) == 1


@pytest.mark.integration
def test_children_end_with_a_parent_that_is_killed(process):
    parent, child_id = process
    child = psutil.Process(child_id)
    parent.kill()
    parent.wait(10)
    child.wait(10)  # raises TimeoutExpired if it lives


@pytest.mark.integration
def test_a_child_that_cannot_load_the_model_is_an_error(tmp_path):
    shutil.copytree(TINY["miniflux"], tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    checkpoint.empty_transformer()
    for file in checkpoint.transformer_folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ParallelError, match="sampler 1 ended with exit code 1 while it loaded the model"):
        ParallelSampler(checkpoint, torch.float32, "cpu", 2, threads=1)
