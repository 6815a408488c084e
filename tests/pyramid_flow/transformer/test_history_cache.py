"""The history cache: equal to no cache and to the published algorithm, whatever is sampled; its rule and its memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyramid_flow import (
    PyramidFluxTransformer,
    PyramidSchedule,
    SamplingParams,
    SeededNoise,
    TextEmbedding,
    generate_latents,
)
from pyramid_flow.sampling import sampler
from pyramid_flow.transformer import history_cache
from pyramid_flow.transformer.history_cache import CacheShape, HistoryCache, cached_frames, fitting_levels
from tests.pyramid_flow.goldens import assert_run_equal, randn, random_text, rows, tiny_transformer
from tests.pyramid_flow.plain_sampler import plain_latents

SCHEDULE = PyramidSchedule()
LEVELS = range(len(SCHEDULE.levels))
PARAMS = SamplingParams(64, 64, 41, (1, 2, 1), (2, 1, 2), guidance_scale=4.0, video_guidance_scale=3.0)
"""With 6 units, the last two of which read the cache of every level."""
SHAPE = CacheShape(num_blocks=3, num_heads=2, head_dim=4, text_tokens=10, frame_tokens=5, num_units=6)


def sample(family: str, text: TextEmbedding, params: SamplingParams = PARAMS, **options: object) -> Tensor:
    """Sample with as many seeds as prompts; negative prompts differ in length from all others."""
    negative = options.pop("negative", random_text([7], seed=50, family=family))
    noise = SeededNoise(options.pop("seeds", range(len(text))))
    return generate_latents(tiny_transformer(family), SCHEDULE, text, negative, params, noise, **options)


@pytest.fixture(params=["miniflux", "sd3"])
def family(request):
    return request.param


CASES = {  # changed parameters, lengths of the prompts, image or none, cached levels
    "not guided": ({"guidance_scale": 0.0, "num_inference_steps": 2}, [4, 20], False, [1, 2]),
    "from an image": ({"width": 128, "num_frames": 33}, [13], True, [0, 1, 2]),
    "partly guided": (
        {"height": 128, "num_frames": 33, "guided_share": 0.5, "skip_last_step": True},
        [28],
        False,
        [0, 2],
    ),
    "a batch": ({"guided_share": 0.5, "video_num_inference_steps": 1}, [13, 18, 4], True, [0, 1, 2]),
    "too short for level 2": ({"num_frames": 25}, [9], False, [0, 1, 2]),
}


@pytest.mark.parametrize(
    ("family", "case"), [*(("miniflux", case) for case in CASES), ("sd3", "from an image"), ("sd3", "a batch")]
)
def test_a_cache_changes_nothing_beyond_rounding(family, case):
    changes, lengths, has_image, levels = CASES[case]
    params, text = replace(PARAMS, **changes), random_text(lengths, family=family)
    image = randn(len(lengths), 16, 1, params.height // 8, params.width // 8) if has_image else None
    expected = sample(family, text, params, image_latent=image, cache=False)
    assert_run_equal(sample(family, text, params, image_latent=image, cache=levels), expected)


@pytest.mark.parametrize("has_image", [False, True])
def test_the_sampler_equals_the_published_algorithm(has_image):
    text, negative = random_text([12, 30]), random_text([20, 20], seed=9)
    padded = TextEmbedding(*(torch.nn.functional.pad(part, pads) for part, pads in parts(negative, 10)))
    image = randn(2, 16, 1, 8, 8) if has_image else None
    expected = plain_latents(tiny_transformer(), text, padded, PARAMS, SeededNoise([0, 1]), image)
    assert_run_equal(sample("miniflux", text, negative=negative, image_latent=image, cache=True), expected)


def parts(text: TextEmbedding, missing: int) -> list[tuple[Tensor, tuple[int, ...]]]:
    return [(text.tokens, (0, 0, 0, missing)), (text.mask, (0, missing)), (text.pooled, (0, 0))]


def test_a_cached_row_does_not_depend_on_its_batch(family):
    text = random_text([3, 25, 11], family=family)
    together = sample(family, text, cache=True)
    for row in range(3):
        assert_run_equal(together[row : row + 1], sample(family, rows(text, row), seeds=[row], cache=True))


@pytest.mark.parametrize(
    ("family", "stop", "share", "has_image"),
    [
        ("miniflux", (2, 0, 0), 1.0, False),
        ("miniflux", (3, 2, 0), (1.0, 0.5, 0.0), True),
        ("miniflux", (4, 1, 0), (1.0, 0.5, 0.0), False),
        ("miniflux", (5, 0, 1), 1.0, True),
        ("sd3", (4, 1, 0), (1.0, 0.5, 0.0), True),
    ],
)
def test_rows_that_leave_take_their_keys_along(family, stop, share, has_image):
    text, params = random_text([3, 25, 11], family=family), replace(PARAMS, guided_share=share)
    image = randn(3, 16, 1, 8, 8) if has_image else None

    def on_step(info):
        return torch.tensor([True, (info.unit, info.level, info.step) < stop, True])

    left = sample(family, text, params, image_latent=image, cache=True, on_step=on_step)
    stayed = None if image is None else image[[0, 2]]
    expected = sample(family, rows(text, 0, 2), params, seeds=[0, 2], image_latent=stayed, cache=True)
    assert_run_equal(left, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_reading_one_unit_early_would_be_seen(level, monkeypatch):
    """The trap of the specification: text sees frame 0, which is not at level 0 yet when unit `level` is sampled."""
    text, params = random_text([9]), replace(PARAMS, num_inference_steps=PARAMS.video_num_inference_steps)
    expected = sample("miniflux", text, params, cache=False)
    assert_run_equal(sample("miniflux", text, params, cache=[level]), expected)

    class Early(HistoryCache):
        """Takes from the unit before the text and frames 0 ... u-s-1, the last of which was at another level there."""

        def num_frames(self, unit, at):
            return unit - at if at in self.levels and unit > at else 0

        def step(self, unit, at, step, rows):
            monkeypatch.setattr(history_cache, "cached_frames", lambda unit, at: max(unit - at, 0))
            monkeypatch.setattr(history_cache, "frames_at_level_0", lambda unit, at: max(unit - at + 1, 0))
            return super().step(unit, at, step, rows)

    monkeypatch.setattr(sampler, "HistoryCache", Early)
    assert (sample("miniflux", text, params, cache=[level]) - expected).norm() / expected.norm() > 1e-3


def test_what_is_evaluated_shrinks_to_the_rule(monkeypatch):
    """From unit s+2 on: the frame that has just reached level 0, those above it, the current one, and no text."""
    evaluated = {}
    embed = PyramidFluxTransformer.embed_history

    def embed_history(self, history, current, text, num_cached):
        state = embed(self, history, current, text, num_cached)
        level = {4: 0, 8: 1, 16: 2}[current[-1]] if current[-1] > 2 else 0
        evaluated[len(history), level] = (state.tokens.shape[1], state.has_text)
        return state

    monkeypatch.setattr(PyramidFluxTransformer, "embed_history", embed_history)
    params = replace(PARAMS, height=128, width=128)
    sample("miniflux", random_text([9]), params, cache=True)
    above = {0: 0, 1: 16, 2: 16 + 64}
    for (unit, level), (tokens, has_text) in evaluated.items():
        if unit >= level + 2:
            assert (tokens, has_text) == (4 + above[level], False)
        else:
            assert has_text
    assert len(evaluated) == 6 * 3


# Memory


@pytest.mark.parametrize(
    ("unit", "level", "frames"), [(0, 0, 0), (1, 0, 0), (2, 0, 1), (3, 2, 0), (4, 2, 1), (9, 1, 7)]
)
def test_frames_are_found_from_the_second_unit_after_the_level_on(unit, level, frames):
    assert cached_frames(unit, level) == frames


def test_a_level_has_room_for_what_the_last_unit_reads():
    assert [SHAPE.capacity(level) for level in LEVELS] == [10 + 4 * 5, 10 + 3 * 5, 10 + 2 * 5]
    assert replace(SHAPE, num_units=2).capacity(0) == 0
    assert SHAPE.step(0, rows=7) == (3, 2, 7, 2, 30, 4)
    assert SHAPE.level_bytes(0, rows=7, dtype=torch.bfloat16) == 3 * 2 * 7 * 2 * 30 * 4 * 2


def test_the_lowest_levels_are_cached_first():
    sizes = [SHAPE.level_bytes(level, 2, torch.float32) for level in LEVELS]
    assert sizes == sorted(sizes, reverse=True)
    chosen = [fitting_levels(SHAPE, [2, 2, 2], torch.float32, budget) for budget in (0, sizes[0], sum(sizes[:2]), 1e9)]
    assert chosen == [frozenset(), {0}, {0, 1}, {0, 1, 2}]
    assert fitting_levels(SHAPE, [2, 2, 2], torch.float32, sizes[2]) == {2}
    assert fitting_levels(replace(SHAPE, num_units=3), [2, 2, 2], torch.float32, 1e9) == {0}


@pytest.mark.parametrize(("gib", "levels"), [(0.0, set()), (1.0, {0, 1, 2}), (None, {0, 1, 2})])
def test_auto_takes_what_fits(gib, levels):
    text = random_text([9])
    budget = None if gib is None else gib * 2**30
    held = sampler.plan_cache(tiny_transformer(), SCHEDULE, PARAMS, text, text, cache_bytes=budget)
    assert held.levels == levels


def test_no_more_memory_is_taken_than_was_counted_and_it_is_taken_once(monkeypatch):
    text, taken = random_text([9]), []
    held = sampler.plan_cache(tiny_transformer(), SCHEDULE, PARAMS, text, text, cache=True)
    counted = sum(held.shape.level_bytes(level.index, rows_of(level), torch.float32) for level in SCHEDULE.levels)
    step = HistoryCache.step

    def noted(self, *arguments):
        found = step(self, *arguments)
        taken.append({key: stored.data_ptr() for key, stored in self._stored.items()})
        sizes.append(sum(stored.nbytes for stored in self._stored.values()))
        return found

    sizes: list[int] = []
    monkeypatch.setattr(HistoryCache, "step", noted)
    sample("miniflux", text, cache=True)
    assert max(sizes) == counted
    assert all(taken[-1][key] == pointer for earlier in taken for key, pointer in earlier.items())


def rows_of(level) -> int:
    return sum(1 + step.guided for step in PARAMS.steps(1, level))


def test_it_can_be_stored_in_bfloat16_at_a_loss(family):
    text = random_text([9], family=family)
    expected = sample(family, text, cache=False)
    stored = sample(family, text, cache=True, cache_dtype=torch.bfloat16)
    assert 1e-5 < (stored - expected).norm() / expected.norm() < 0.02


def test_nothing_is_kept_between_calls():
    text, other = random_text([9]), random_text([9], seed=7)
    first = sample("miniflux", text, cache=True)
    sample("miniflux", other, cache=True)
    assert torch.equal(sample("miniflux", text, cache=True), first)
