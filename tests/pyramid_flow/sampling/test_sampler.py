"""The sampler: parity of whole runs, rows that do not depend on their batch, and what `on_step` may do."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from pyramid_flow import (
    InvalidValueError,
    LatentStatistics,
    PyramidSchedule,
    SamplingParams,
    SeededNoise,
    ShapeError,
    StepInfo,
    TextEmbedding,
    generate_latents,
)
from pyramid_flow.pixels import encode_image, image_latent, image_pixels
from pyramid_flow.sampling.schedule import MAX_STEPS
from pyramid_flow.text.embedding import concatenate
from tests.pyramid_flow.goldens import (
    RecordedNoise,
    assert_run_equal,
    parameters,
    randn,
    random_text,
    rows,
    tensors,
    text_embedding,
    tiny_transformer,
    tiny_vae,
)

SCHEDULE = PyramidSchedule()
PARAMS = SamplingParams(64, 128, 17, (2, 1, 1), (1, 2, 1), guidance_scale=4.0, video_guidance_scale=3.0)
NEGATIVE = random_text([3], seed=50)


def generate(
    text: TextEmbedding,
    seeds: Sequence[int],
    params: SamplingParams = PARAMS,
    negative: TextEmbedding | None = NEGATIVE,
    image: Tensor | None = None,
    on_step: Callable[[StepInfo], Tensor | None] | None = None,
) -> Tensor:
    noise = SeededNoise(seeds)
    return generate_latents(
        tiny_transformer(), SCHEDULE, text, negative, params, noise, image_latent=image, on_step=on_step
    )


def golden_params(run: str) -> SamplingParams:
    golden = parameters(run)
    return SamplingParams(
        height=golden["height"],
        width=golden["width"],
        num_frames=golden["frames"],
        num_inference_steps=golden["num_inference_steps"],
        video_num_inference_steps=golden["video_num_inference_steps"],
        guidance_scale=golden["guidance_scale"],
        video_guidance_scale=golden["video_guidance_scale"],
    )


def positions(params: SamplingParams, first_unit: int = 0) -> list[tuple[int, int, int]]:
    """(unit, level, step) of every evaluation, in order."""
    return [
        (unit, level, step)
        for unit in range(first_unit, 1 + (params.num_frames - 1) // 8)
        for level in range(3)
        for step in range((params.num_inference_steps if unit == 0 else params.video_num_inference_steps)[level])
    ]


# Parity


@pytest.mark.parametrize(("family", "run"), [("miniflux", "t2v_flux"), ("sd3", "t2v_mmdit")])
def test_text_to_video_matches_golden(family, run):
    data = tensors(run)
    noise = RecordedNoise(data)
    latents = generate_latents(
        tiny_transformer(family),
        SCHEDULE,
        text_embedding(data),
        text_embedding(data, "negative_"),
        golden_params(run),
        noise,
    )
    assert_run_equal(latents, data["latents"])
    assert noise.exhausted


def test_image_to_video_matches_golden():
    data = tensors("i2v_flux")
    noise, params = RecordedNoise(data), golden_params("i2v_flux")
    image = Image.fromarray(data["input_image"].numpy())
    posterior = encode_image(tiny_vae(), image_pixels(image, params.height, params.width))
    first = image_latent(posterior, noise.posterior(posterior.mean.shape), LatentStatistics())
    latents = generate_latents(
        tiny_transformer(),
        SCHEDULE,
        text_embedding(data),
        text_embedding(data, "negative_"),
        params,
        noise,
        image_latent=first,
    )
    assert_run_equal(latents, data["latents"])
    assert noise.exhausted


# Rows


@pytest.mark.parametrize("has_image", [False, True])
def test_a_row_does_not_depend_on_its_batch(has_image):
    text, seeds = random_text([3, 40, 11]), [7, 8, 7]
    image = randn(3, 16, 1, 8, 16) if has_image else None
    negative = random_text([5, 9, 1], seed=20)
    together = generate(text, seeds, negative=negative, image=image)
    for row, seed in enumerate(seeds):
        one = None if image is None else image[row : row + 1]
        alone = generate(rows(text, row), [seed], negative=rows(negative, row), image=one)
        assert_run_equal(together[row : row + 1], alone)


def test_one_negative_prompt_serves_all_rows():
    text = random_text([3, 6])
    expected = generate(text, [1, 2], negative=concatenate([NEGATIVE, NEGATIVE]))
    assert torch.equal(generate(text, [1, 2]), expected)


def test_each_row_has_its_own_guidance():
    text = random_text([3, 6])
    each = dataclasses.replace(PARAMS, guidance_scale=(2.0, 7.0), video_guidance_scale=[5.0, 1.5])
    together = generate(text, [1, 2], each)
    for row, (first, later) in enumerate([(2.0, 5.0), (7.0, 1.5)]):
        own = dataclasses.replace(PARAMS, guidance_scale=first, video_guidance_scale=later)
        assert_run_equal(together[row : row + 1], generate(rows(text, row), [row + 1], own))


@pytest.mark.parametrize(
    ("decay", "expected"),
    [(None, [7, 4, 4, 4, 4]), (1.5, [7, 5.5, 4, 3, 3]), (0, [7, 7, 7, 7, 7]), (30, [7, 3, 3, 3, 3])],
)
def test_a_guidance_that_decays_falls_by_unit_to_its_least(decay, expected):
    params = dataclasses.replace(
        PARAMS, guidance_scale=7.0, video_guidance_scale=4.0, guidance_decay=decay, min_guidance_scale=3.0
    )
    assert [params.scale(unit, 2).flatten().tolist() for unit in range(5)] == [[scale] * 2 for scale in expected]


def test_the_least_guidance_is_2_unless_another_is_asked_for():
    params = SamplingParams(64, 64, 25, guidance_scale=3.0, guidance_decay=0.75)
    assert [params.scale(unit, 1).item() for unit in range(4)] == [3, 2.25, 2, 2]


def test_rows_with_and_without_decay_and_of_any_negative_prompt_share_a_batch():
    text, negative, seeds = random_text([3, 6, 4]), random_text([5, 2, 9], seed=20), [1, 2, 3]
    decays, least = (None, 1.0, 0.0), (2.0, 3.5, 2.0)
    together = generate(
        text, seeds, dataclasses.replace(PARAMS, guidance_decay=decays, min_guidance_scale=least), negative
    )
    for row in range(3):
        own = dataclasses.replace(PARAMS, guidance_decay=decays[row], min_guidance_scale=least[row])
        alone = generate(rows(text, row), seeds[row : row + 1], own, rows(negative, row))
        assert_run_equal(together[row : row + 1], alone)
    constant = generate(text, seeds, PARAMS, negative)
    assert_run_equal(together[:1], constant[:1])
    assert all((together[row] - constant[row]).abs().max() > 1e-3 for row in (1, 2))


def test_a_decay_equals_the_constant_scales_it_stands_for():
    text, two_units = random_text([4]), dataclasses.replace(PARAMS, num_frames=9)
    decaying = dataclasses.replace(two_units, guidance_scale=5.0, guidance_decay=1.25, min_guidance_scale=0.0)
    constant = dataclasses.replace(two_units, guidance_scale=5.0, video_guidance_scale=3.75)
    assert torch.equal(generate(text, [0], decaying), generate(text, [0], constant))
    image = randn(1, 16, 1, 8, 16)
    assert torch.equal(generate(text, [0], decaying, image=image), generate(text, [0], constant, image=image))


def test_only_the_first_unit_of_text_to_video_uses_the_first_settings():
    text, image = random_text([4]), randn(1, 16, 1, 8, 16)
    base = generate(text, [0])
    for changed in (
        dataclasses.replace(PARAMS, guidance_scale=9.0),
        dataclasses.replace(PARAMS, num_inference_steps=(3, 1, 1)),
    ):
        assert (generate(text, [0], changed)[:, :, 0] - base[:, :, 0]).abs().max() > 1e-3
        assert torch.equal(generate(text, [0], changed, image=image), generate(text, [0], image=image))
    later = dataclasses.replace(PARAMS, video_guidance_scale=9.0)
    differs = (generate(text, [0], later) - base).abs().amax(dim=(0, 1, 3, 4))
    assert differs[0] == 0
    assert (differs[1:] > 1e-3).all()


def test_guidance_of_1_is_the_positive_branch_alone_and_0_needs_no_negative():
    text = random_text([4])
    off = dataclasses.replace(PARAMS, guidance_scale=0, video_guidance_scale=5.0)
    one = dataclasses.replace(PARAMS, guidance_scale=1, video_guidance_scale=1)
    alone = generate(text, [0], off, negative=None)
    assert_run_equal(generate(text, [0], one), alone)
    assert torch.equal(generate(text, [0], off, negative=NEGATIVE), alone)


# Choices that save work


def test_a_skipped_last_step_moves_little():
    text, params = random_text([4]), dataclasses.replace(PARAMS, num_inference_steps=3, video_num_inference_steps=2)
    heard: list[StepInfo] = []
    short = generate(text, [0], dataclasses.replace(params, skip_last_step=True), on_step=heard.append)
    expected = generate(text, [0], params)
    assert 1e-5 < ((short - expected).norm() / expected.norm()).item() < 1e-2
    assert [(info.unit, info.num_steps) for info in heard if info.level == 1] == [(0, 2), (0, 2), (1, 1), (2, 1)]


def test_a_share_of_the_steps_is_guided_from_the_first_one_on():
    params = dataclasses.replace(PARAMS, num_inference_steps=4, video_num_inference_steps=3, guided_share=(1, 0.5, 0))
    flags = [[[step.guided for step in params.steps(unit, level)] for level in SCHEDULE.levels] for unit in (0, 1)]
    assert flags[0] == [[True] * 4, [True, True, False, False], [False] * 4]
    assert flags[1] == [[True] * 3, [True, True, False], [False] * 3]
    odd = dataclasses.replace(params, num_inference_steps=25, guided_share=0.28)  # 7.000000000000001 in floats
    assert sum(step.guided for step in odd.steps(0, SCHEDULE.levels[0])) == 7
    unguided = dataclasses.replace(params, guidance_scale=0)
    assert not any(step.guided for unit in (0, 1) for level in SCHEDULE.levels for step in unguided.steps(unit, level))


def test_steps_without_guidance_take_the_positive_branch_alone():
    text, rows_evaluated = random_text([4, 6]), []
    handle = tiny_transformer().register_forward_pre_hook(lambda module, args: rows_evaluated.append(len(args[0])))
    try:
        partly = generate(text, [0, 1], dataclasses.replace(PARAMS, guided_share=(1.0, 0.5, 0.0)))
    finally:
        handle.remove()
    steps = [step for unit in range(3) for level in SCHEDULE.levels for step in PARAMS.steps(unit, level)]
    assert len(rows_evaluated) == len(steps)
    assert rows_evaluated == [4, 4, 4, 2] + [4, 4, 2, 2] * 2
    off = dataclasses.replace(PARAMS, guidance_scale=0)
    assert_run_equal(generate(text, [0, 1], dataclasses.replace(PARAMS, guided_share=0)), generate(text, [0, 1], off))
    assert (partly - generate(text, [0, 1])).abs().max() > 1e-3


def test_an_integer_means_that_many_steps_at_every_level():
    text = random_text([4])
    spelled = dataclasses.replace(PARAMS, num_inference_steps=(2, 2, 2), video_num_inference_steps=[1, 1, 1])
    short = dataclasses.replace(PARAMS, num_inference_steps=2, video_num_inference_steps=1)
    assert torch.equal(generate(text, [0], short), generate(text, [0], spelled))


def test_one_frame_is_a_still_image():
    one = generate(random_text([4]), [0], dataclasses.replace(PARAMS, num_frames=1))
    assert one.shape == (1, 16, 1, 8, 16)
    assert one.isfinite().all()


# Image to video


def test_the_image_latent_is_the_first_frame():
    text, image = random_text([4]), randn(1, 16, 1, 8, 16)
    latents = generate(text, [0], image=image)
    assert latents.shape == (1, 16, 3, 8, 16)
    assert torch.equal(latents[:, :, :1], image)
    other = generate(text, [0], image=image + 0.1)
    assert (other[:, :, 1:] - latents[:, :, 1:]).abs().max() > 1e-3
    still = generate(text, [0], dataclasses.replace(PARAMS, num_frames=1), image=image)
    assert torch.equal(still, image)
    still += 1
    assert torch.equal(latents[:, :, :1], image)


def test_inputs_are_never_modified():
    text, negative, image = random_text([3, 5]), random_text([4, 2], seed=9), randn(2, 16, 1, 8, 16)
    given = [*vars(text).values(), *vars(negative).values(), image]
    kept = [tensor.clone() for tensor in given]
    generate(text, [0, 1], negative=negative, image=image)
    assert all(torch.equal(tensor, before) for tensor, before in zip(given, kept, strict=True))


def test_no_gradients_are_recorded():
    image = randn(1, 16, 1, 8, 16).requires_grad_()
    assert not generate(random_text([4]), [0], image=image).requires_grad


# on_step


@pytest.mark.parametrize("has_image", [False, True])
def test_on_step_hears_of_every_evaluation_in_order(has_image):
    infos: list[StepInfo] = []
    image = randn(2, 16, 1, 8, 16) if has_image else None
    latents = generate(random_text([4, 5]), [0, 1], image=image, on_step=infos.append)
    assert [(info.unit, info.level, info.step) for info in infos] == positions(PARAMS, first_unit=int(has_image))
    for info in infos:
        assert info.num_units == 3
        assert (
            info.num_steps == (PARAMS.num_inference_steps, PARAMS.video_num_inference_steps)[info.unit > 0][info.level]
        )
        assert info.latents.shape == (2, 16, 1, 2 * 2**info.level, 4 * 2**info.level)
        assert info.rows == (0, 1)
    last = [info for info in infos if info.level == 2 and info.step == info.num_steps - 1]
    assert torch.equal(torch.cat([info.latents for info in last], dim=2), latents[:, :, int(has_image) :])


def dropper(at: tuple[int, int, int], mask: list[bool], heard: list[StepInfo]) -> Callable[[StepInfo], Tensor | None]:
    def on_step(info: StepInfo) -> Tensor | None:
        heard.append(info)
        return torch.tensor(mask) if (info.unit, info.level, info.step) == at else None

    return on_step


@pytest.mark.parametrize(
    ("at", "has_image"),
    [((0, 0, 0), False), ((0, 2, 0), False), ((1, 1, 1), False), ((2, 2, 0), False), ((1, 0, 0), True)],
)
def test_dropped_rows_leave_at_once_and_the_others_stay_the_same(at, has_image):
    text = random_text([3, 12, 6])
    image = randn(3, 16, 1, 8, 16) if has_image else None
    params = dataclasses.replace(PARAMS, guidance_scale=(2.0, 3.0, 4.0), video_guidance_scale=(5.0, 6.0, 7.0))
    heard: list[StepInfo] = []
    whole = generate(text, [1, 2, 3], params, image=image)
    kept = generate(text, [1, 2, 3], params, image=image, on_step=dropper(at, [True, False, True], heard))
    assert_run_equal(kept, whole[[0, 2]])
    before = [(info.unit, info.level, info.step) for info in heard].index(at) + 1
    assert {info.rows for info in heard[:before]} == {(0, 1, 2)}
    assert {info.rows for info in heard[before:]} <= {(0, 2)}
    assert all(len(info.latents) == len(info.rows) for info in heard)
    assert len(heard) == len(positions(params, first_unit=int(has_image)))


def test_dropped_rows_are_not_evaluated_and_cannot_come_back():
    batches: list[int] = []
    handle = tiny_transformer().register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))

    def on_step(info: StepInfo) -> Tensor:
        return torch.tensor([True, (info.unit, info.level, info.step) != (0, 1, 0), True])

    try:
        latents = generate(random_text([3, 4, 5]), [1, 2, 3], on_step=on_step)
    finally:
        handle.remove()
    assert batches == [6] * 3 + [4] * 9
    assert len(latents) == 2


def test_dropping_all_rows_stops_at_once():
    heard: list[StepInfo] = []
    calls: list[int] = []
    handle = tiny_transformer().register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        latents = generate(random_text([3, 4]), [1, 2], on_step=dropper((1, 1, 0), [False, False], heard))
    finally:
        handle.remove()
    expected = positions(PARAMS).index((1, 1, 0)) + 1
    assert len(heard) == len(calls) == expected
    assert latents.shape == (0, 16, 3, 8, 16)


@pytest.mark.parametrize("mask", [torch.ones(1), torch.ones(3), torch.ones(2, 1), torch.tensor(True)])
def test_masks_of_another_shape_are_refused(mask):
    with pytest.raises(ShapeError, match=r"on_step's mask must have shape \[2\], got"):
        generate(random_text([3, 4]), [1, 2], on_step=lambda info: mask.bool())


# Errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 96}, "height 96 is not a multiple of 64: the nearest are 64 and 128$"),
        ({"width": 700}, "width 700 is not a multiple of 64: the nearest are 640 and 704$"),
        ({"width": 0}, "width 0 is not a multiple of 64: the least is 64$"),
        ({"width": 63}, "width 63 .* the least is 64$"),
        ({"height": -64}, "height -64 is not a multiple of 64: the least is 64$"),
        ({"height": float("nan")}, "height nan"),
        ({"num_frames": 120}, r"num_frames 120 is not 1 \+ 8k: the nearest are 113 and 121$"),
        ({"num_frames": 2}, r"num_frames 2 .* the nearest are 1 and 9$"),
        ({"num_frames": 0}, "num_frames 0 .* the least is 1$"),
        ({"num_frames": -7}, "num_frames -7 .* the least is 1$"),
        ({"num_inference_steps": 0}, f"num_inference_steps 0 is not between 1 and {MAX_STEPS}"),
        ({"num_inference_steps": (5, 0, 5)}, r"num_inference_steps \(5, 0, 5\)"),
        ({"num_inference_steps": ()}, "num_inference_steps"),
        ({"video_num_inference_steps": MAX_STEPS + 1}, "video_num_inference_steps 201"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan is not between 0 and 30"),
        ({"guidance_scale": (4.0, float("nan"))}, "guidance_scale"),
        ({"guidance_scale": ()}, "guidance_scale"),
        ({"guidance_scale": -1.0}, r"guidance_scale -1.0"),
        ({"guidance_scale": (0.0, 5.0)}, "guidance_scale .* is on for some rows of the batch only"),
        ({"video_guidance_scale": 31}, "video_guidance_scale 31"),
        ({"guidance_decay": -0.5}, "guidance_decay -0.5 is not between 0 and 30"),
        ({"guidance_decay": (None, float("nan"))}, "guidance_decay nan"),
        ({"min_guidance_scale": 31}, "min_guidance_scale 31"),
        ({"skip_last_step": "false"}, "skip_last_step 'false' is neither True nor False"),
        ({"guided_share": 1.1}, "guided_share 1.1 is not between 0 and 1"),
        ({"guided_share": (1.0, 0.5, -1.0)}, "guided_share"),
        ({"video_guidance_scale": float("inf")}, "video_guidance_scale inf"),
    ],
)
def test_values_that_cannot_be_sampled_are_refused(values, message):
    with pytest.raises(InvalidValueError, match=message):
        SamplingParams(**{"height": 64, "width": 64, "num_frames": 9, **values})


@pytest.mark.parametrize("cache", ["all", [3], [-1], None, 1])
def test_other_levels_than_there_are_cannot_be_cached(cache):
    noise = SeededNoise([0])
    with pytest.raises(InvalidValueError, match=r"cache .* is not auto, True, False or some of the 3 levels"):
        generate_latents(tiny_transformer(), SCHEDULE, random_text([4]), NEGATIVE, PARAMS, noise, cache=cache)


@pytest.mark.parametrize("name", ["num_inference_steps", "video_num_inference_steps", "guided_share"])
@pytest.mark.parametrize("steps", [(1, 1), (1, 1, 1, 1)])
def test_one_step_count_per_level_is_needed(name, steps):
    calls: list[StepInfo] = []
    with pytest.raises(InvalidValueError, match=rf"^{name} .*{len(steps) * '1, '}".removesuffix(", ")):
        generate(random_text([3]), [0], dataclasses.replace(PARAMS, **{name: steps}), on_step=calls.append)
    assert not calls


@pytest.mark.parametrize("name", ["guidance_scale", "video_guidance_scale", "guidance_decay", "min_guidance_scale"])
@pytest.mark.parametrize("has_image", [False, True])
def test_one_guidance_scale_per_row_is_needed(name, has_image):
    calls: list[StepInfo] = []
    image = randn(2, 16, 1, 8, 16) if has_image else None
    params = dataclasses.replace(PARAMS, **{name: (1.0, 2.0, 3.0)})
    with pytest.raises(InvalidValueError, match=rf"^{name} .*1.0, 2.0, 3.0.* 2 rows"):
        generate(random_text([3, 4]), [0, 1], params, image=image, on_step=calls.append)
    assert not calls


def test_guidance_needs_a_negative_prompt():
    with pytest.raises(InvalidValueError, match="negative None is needed while guidance_scale is above 0"):
        generate(random_text([3]), [0], negative=None)


def test_negative_rows_must_fit():
    with pytest.raises(ShapeError, match=r"negative text must have shape \[1 or 2,L,D\], got \[3, 4, 32\]"):
        generate(random_text([3, 2]), [0, 1], negative=random_text([4, 4, 4]))


def test_negative_features_must_fit():
    negative = TextEmbedding(randn(1, 4, 31), torch.ones(1, 4, dtype=torch.bool), randn(1, 16))
    with pytest.raises(ShapeError, match=r"got \[1, 4, 31\]"):
        generate(random_text([3]), [0], negative=negative)


@pytest.mark.parametrize("shape", [(1, 16, 1, 8, 16), (2, 16, 2, 8, 16), (2, 16, 1, 16, 8), (2, 4, 1, 8, 16)])
def test_image_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeError, match=r"image_latent must have shape \[2, 16, 1, 8, 16\], got \[\d, "):
        generate(random_text([3, 2]), [0, 1], image=randn(*shape))


def test_params_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PARAMS.height = 128
