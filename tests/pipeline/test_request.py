"""The request: an id that depends on what is asked and nothing else, and one clear line for every broken rule."""

import hashlib
import random
import re
from dataclasses import replace

import pytest

from pipeline.request import (
    MAX_NUM_FRAMES,
    MAX_SEED,
    MAX_SIDE,
    NUM_LEVELS,
    RenderRequest,
    RequestError,
    ResolvedRequest,
    derived_seed,
    hash_of,
    sampling_params,
)
from pyramid_flow import Preset, PyramidFlowError
from pyramid_flow.presets import QUALITY_PRESETS

PRESET = Preset(sizes=((384, 640), (640, 384)), max_num_frames=121)
NAN, INFINITY = float("nan"), float("inf")
FULL = {
    "prompt": "a fox",
    "negative_prompt": "blurry",
    "image": "frames/a.png",
    "height": 384,
    "width": 640,
    "num_frames": 25,
    "fps": 12,
    "num_inference_steps": [4, 5, 6],
    "video_num_inference_steps": 3,
    "guidance_scale": 6.5,
    "video_guidance_scale": 4.5,
    "seed": 11,
}
NEWER = {
    "image_fit": "pad",
    "image_format": "webp",
    "guidance_decay": 0.5,
    "min_guidance_scale": 1.5,
    "quality": "draft",
    "skip_last_step": False,
    "guided_share": [1.0, 0.5, 0.25],
}
"""Fields that requests had none of at first."""


def parsed(**values: object) -> RenderRequest:
    return RenderRequest.parse({"prompt": "a fox", **values})


def resolved(**values: object) -> ResolvedRequest:
    request = parsed(**values)
    return request.resolve(PRESET, request.id or request.content_hash)


def test_the_hash_does_not_depend_on_the_order_of_the_fields():
    names = list(FULL)
    hashes = set()
    for seed in range(20):
        random.Random(seed).shuffle(names)
        hashes.add(RenderRequest.parse({name: FULL[name] for name in names}).content_hash)
    assert len(hashes) == 1
    assert re.fullmatch("[0-9a-f]{32}", hashes.pop())


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("prompt", "a fox "),
        ("negative_prompt", ""),
        ("image", "frames/b.png"),
        ("height", 640),
        ("width", 384),
        ("num_frames", 33),
        ("fps", 24),
        ("num_inference_steps", [4, 5, 7]),
        ("video_num_inference_steps", 4),
        ("guidance_scale", 0.0),
        ("video_guidance_scale", 4.25),
        ("seed", 0),
    ],
)
def test_the_hash_depends_on_every_field_that_is_asked_for(field, other):
    base = RenderRequest.parse(FULL).content_hash
    assert RenderRequest.parse({**FULL, field: other}).content_hash != base
    assert field == "prompt" or RenderRequest.parse({**FULL, field: None}).content_hash != base


@pytest.mark.parametrize("field", NEWER)
def test_the_hash_depends_on_every_newer_field_too(field):
    others = {name: value for name, value in NEWER.items() if name != field}
    hashes = {RenderRequest.parse({**FULL, **values}).content_hash for values in ({}, others, NEWER)}
    assert len(hashes) == 3


@pytest.mark.parametrize("values", [{"id": "mine"}, {"num_videos_per_prompt": 7}, {"seed": None}, {"image": None}])
def test_the_hash_ignores_the_id_the_number_of_copies_and_nulls(values):
    assert parsed(**values).content_hash == parsed().content_hash


@pytest.mark.parametrize(
    ("field", "one", "same"),
    [
        ("guidance_scale", 7, 7.0),
        ("guidance_scale", -0.0, 0.0),
        ("height", 384.0, 384),
        ("num_inference_steps", (4, 5, 6), [4, 5, 6]),
        ("seed", 1.0, 1),
    ],
)
def test_equal_values_of_another_type_ask_for_the_same(field, one, same):
    assert parsed(**{field: one}).content_hash == parsed(**{field: same}).content_hash


def test_a_default_that_is_spelled_out_is_another_request_with_the_same_resolution():
    plain, spelled = resolved(seed=1), resolved(seed=1, height=384, width=640, guidance_scale=PRESET.guidance_scale)
    assert plain.id != spelled.id
    assert plain.model_dump(exclude={"id"}) == spelled.model_dump(exclude={"id"})


def test_image_bytes_count_by_their_content_and_uris_by_their_text():
    data = b"\x89PNG"
    assert parsed(image=data).content_hash == parsed(image=bytes(data)).content_hash
    uri = hashlib.sha256(data).hexdigest()
    assert len({parsed(image=image).content_hash for image in (data, b"other", uri, "a.png", None)}) == 5
    from_bytes, from_uri = resolved(image=data), resolved(image="a.png")
    assert (from_bytes.has_image, from_bytes.image_uri, from_bytes.image_sha256) == (True, None, uri)
    assert (from_uri.has_image, from_uri.image_uri, from_uri.image_sha256) == (True, "a.png", None)


def test_the_hash_survives_new_fields_without_a_value():
    # a change here makes every finished row render again
    assert parsed().content_hash == hash_of({"prompt": "a fox"}) == "48b66f8b435fba65fa9ddd3d959a5e79"
    assert RenderRequest.parse(FULL).content_hash == "eb3dc552880ec1c49c56bb7e2d54f3ed"
    assert set(RenderRequest.model_fields) == {*FULL, *NEWER, "id", "num_videos_per_prompt"}


def test_a_seed_is_taken_or_derived_from_the_id_alone():
    assert resolved(seed=0).seed == 0
    assert resolved(seed=MAX_SEED).seed == MAX_SEED
    assert resolved(id="x").seed == derived_seed("x") == resolved(id="x", prompt="another", height=640, width=384).seed
    assert resolved(id="x").seed != resolved(id="y").seed
    assert resolved().seed == derived_seed(parsed().content_hash)
    assert all(0 <= derived_seed(str(number)) < 2**32 for number in range(1000))


def test_copies_differ_in_id_and_seed_only():
    base = resolved(id="x", seed=10)
    copies = [base.copy_of(number) for number in range(3)]
    assert [copy.id for copy in copies] == ["x-0", "x-1", "x-2"]
    assert [copy.seed for copy in copies] == [10, 11, 12]
    assert len({str(copy.model_dump(exclude={"id", "seed"})) for copy in copies}) == 1
    assert 0 <= resolved(id="x", seed=MAX_SEED).copy_of(1).seed <= MAX_SEED


def test_rerolls_differ_in_their_seed_only_which_follows_from_the_id():
    base = resolved(id="x", seed=10)
    rerolls = [base.rerolled(number) for number in range(3)]
    assert rerolls[0] == base
    assert len({reroll.seed for reroll in [*rerolls, base.copy_of(1), resolved(id="y").rerolled(1)]}) == 5
    assert [reroll.model_copy(update={"seed": 10}) for reroll in rerolls] == [base] * 3
    assert resolved(id="x", seed=11).rerolled(1).seed == rerolls[1].seed


def test_what_is_left_out_comes_from_the_preset():
    text, image = resolved(), resolved(image="a.png")
    assert (text.height, text.width, text.num_frames, text.fps) == (384, 640, 121, 24)
    assert text.num_inference_steps == PRESET.num_inference_steps
    assert text.negative_prompt == PRESET.negative_prompt
    assert text.video_guidance_scale == PRESET.video_guidance_scale
    assert image.video_guidance_scale == PRESET.image_to_video_guidance_scale
    assert resolved(negative_prompt="", guidance_scale=0).negative_prompt == ""
    assert resolved(guidance_scale=0, video_guidance_scale=0).video_guidance_scale == 0


def test_stills_have_a_format_and_videos_none():
    assert resolved(num_frames=1).image_format == "png"
    still = resolved(num_frames=1, image_format="webp")
    assert (still.image_format, still.media_type) == ("webp", "image/webp")
    video = resolved(num_frames=9, image_format="webp")
    assert (video.image_format, video.media_type) == (None, "video/mp4")
    request = parsed()
    assert request.resolve(Preset(max_num_frames=1), "x").media_type == "image/png"


def test_images_have_a_fit_and_rows_without_one_none():
    assert resolved(image="a.png").image_fit == "crop"
    assert resolved(image="a.png", image_fit="pad").image_fit == "pad"
    assert resolved(image_fit="pad").image_fit is None


def test_guidance_is_constant_unless_a_decay_is_given():
    assert (resolved().guidance_decay, resolved().min_guidance_scale) == (None, 2.0)
    decaying = resolved(guidance_decay=0, min_guidance_scale=0)
    assert (decaying.guidance_decay, decaying.min_guidance_scale) == (0, 0)


def test_a_request_that_was_resolved_without_the_newer_fields_is_what_it_was():
    kept = {name: value for name, value in resolved(num_frames=1).model_dump().items() if name not in NEWER}
    request = ResolvedRequest.model_validate(kept)
    assert request.media_type == "video/mp4"
    assert request.guidance_decay is None
    assert (request.quality, request.skip_last_step, request.guided_share) == ("standard", False, 1.0)


def test_a_quality_decides_what_is_not_given():
    usual = resolved()
    assert (usual.quality, usual.skip_last_step, usual.guided_share) == ("standard", False, 1.0)
    assert usual.num_inference_steps == PRESET.num_inference_steps
    for quality, effort in QUALITY_PRESETS.items():
        chosen = resolved(quality=quality)
        assert chosen.quality == quality
        assert chosen.num_inference_steps == PRESET.at(quality).num_inference_steps
        assert (chosen.skip_last_step, chosen.guided_share) == (effort.skip_last_step, effort.guided_share)
        own = resolved(
            quality=quality, num_inference_steps=7, skip_last_step=not effort.skip_last_step, guided_share=0.3
        )
        assert (own.num_inference_steps, own.skip_last_step, own.guided_share) == (7, not effort.skip_last_step, 0.3)


@pytest.mark.parametrize("text", ["true", "1"])
def test_a_flag_may_come_as_text(text):
    assert parsed(skip_last_step=text).skip_last_step is True


BAD = [
    ("prompt", None, "string"),
    ("prompt", 5, "string"),
    ("prompt", ["a"], "string"),
    ("prompt", {"a": 1}, "string"),
    ("prompt", True, "boolean"),
    ("prompt", "", "is empty"),
    ("prompt", " \t\n\u00a0", "is empty"),
    ("prompt", " " * 10**6, "is empty"),
    ("prompt", b"\xff", "string"),
    ("prompt", "half \ud83d", "Unicode"),
    ("negative_prompt", 5, "string"),
    ("negative_prompt", "\udfff", "Unicode"),
    ("id", "", "letters"),
    ("id", 5, "string"),
    ("id", "..", "letters"),
    ("id", "../a", "letters"),
    ("id", "a/b", "letters"),
    ("id", "a\\b", "letters"),
    ("id", "C:a", "letters"),
    ("id", ".hidden", "letters"),
    ("id", "-rf", "letters"),
    ("id", "é", "letters"),
    ("id", "１", "letters"),
    ("id", "a b", "letters"),
    ("id", "a\n", "letters"),
    ("id", "a\0", "letters"),
    ("id", "a" * 129, "letters"),
    ("id", "\ud800", "Unicode"),
    ("image", 5, "bytes"),
    ("image", "", "is empty"),
    ("image", b"", "is empty"),
    ("image", {"bytes": b"x", "path": None}, "bytes"),
    ("height", 0, "multiple of 64"),
    ("height", -64, "multiple of 64"),
    ("height", 700, "multiple of 64: the nearest are 640 and 704"),
    ("height", True, "boolean"),
    ("height", 64.5, "integer"),
    ("height", NAN, "finite"),
    ("height", INFINITY, "finite"),
    ("height", "tall", "integer"),
    ("height", [64], "integer"),
    ("height", MAX_SIDE + 64, str(MAX_SIDE)),
    ("width", 64 * 10**40, str(MAX_SIDE)),
    ("width", -1, "multiple of 64"),
    ("num_frames", 0, "8k"),
    ("num_frames", 24, "8k: the nearest are 17 and 25"),
    ("num_frames", True, "boolean"),
    ("num_frames", MAX_NUM_FRAMES + 8, str(MAX_NUM_FRAMES)),
    ("fps", 0, "1"),
    ("fps", 121, "120"),
    ("fps", NAN, "finite"),
    ("num_inference_steps", 0, "between"),
    ("num_inference_steps", 201, "between"),
    ("num_inference_steps", True, "boolean"),
    ("num_inference_steps", 4.5, "integer"),
    ("num_inference_steps", [4, 4, 4.5], "integer"),
    ("num_inference_steps", [4, 4, None], "integer"),
    ("num_inference_steps", [4, True, 4], "boolean"),
    ("num_inference_steps", [4, 4, 0], "between"),
    ("num_inference_steps", [], ""),
    ("num_inference_steps", [4, 4], str(NUM_LEVELS)),
    ("video_num_inference_steps", [4, 4, 4, 4], str(NUM_LEVELS)),
    ("video_num_inference_steps", [1] * 10_000, str(NUM_LEVELS)),
    ("guidance_scale", NAN, "finite"),
    ("guidance_scale", -INFINITY, "finite"),
    ("guidance_scale", -0.5, "between 0 and 30"),
    ("guidance_scale", 30.5, "between 0 and 30"),
    ("guidance_scale", True, "boolean"),
    ("guidance_scale", [1.0], "number"),
    ("guidance_scale", 10**400, "number"),
    ("guidance_scale", "high", "number"),
    ("video_guidance_scale", 31, "between 0 and 30"),
    ("guidance_decay", 31, "between 0 and 30"),
    ("guidance_decay", NAN, "finite"),
    ("min_guidance_scale", -1, "between 0 and 30"),
    ("quality", "best", "'draft', 'standard' or 'high'"),
    ("quality", True, "boolean"),
    ("skip_last_step", "maybe", "boolean"),
    ("guided_share", 1.5, "between 0 and 1"),
    ("guided_share", [1.0, -0.5, 1.0], "between 0 and 1"),
    ("guided_share", [1.0], str(NUM_LEVELS)),
    ("guided_share", NAN, "finite"),
    ("guided_share", True, "boolean"),
    ("image_fit", "stretch", "'crop' or 'pad'"),
    ("image_fit", True, "boolean"),
    ("image_format", "jpg", "'png' or 'webp'"),
    ("image_format", 5, "'png' or 'webp'"),
    ("seed", -1, "0"),
    ("seed", 2**63, str(MAX_SEED)),
    ("seed", 10**400, str(MAX_SEED)),
    ("seed", 1.5, "integer"),
    ("seed", INFINITY, "finite"),
    ("seed", False, "boolean"),
    ("num_videos_per_prompt", 0, "1"),
    ("num_videos_per_prompt", 1001, "1000"),
    ("num_videos_per_prompt", True, "boolean"),
    ("color", "red", "not permitted"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD)
def test_every_broken_rule_is_one_short_line_with_field_value_and_rule(field, value, rule):
    with pytest.raises(RequestError) as caught:
        parsed(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} ")
    assert rule in message
    assert message.isprintable()
    assert len(message) < 250
    shown = [repr(value), ascii(value), repr(tuple(value)) if isinstance(value, list) else ""]
    assert message.removeprefix(f"{field} ").startswith(tuple(text[:10] for text in shown if text))
    assert isinstance(caught.value, PyramidFlowError)


def test_a_request_without_a_prompt_says_so():
    with pytest.raises(RequestError, match=r"^prompt is missing$"):
        RenderRequest.parse({})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "nul \0 and bell \a"),
        ("prompt", "Füchse, 狐, 🦊, \u202eright to left"),
        ("prompt", "x" * 10**6),
        ("id", "a" * 128),
        ("id", "A.b_c-9"),
        ("id", "a..b"),
        ("height", MAX_SIDE),
        ("num_frames", 1),
        ("num_frames", MAX_NUM_FRAMES),
        ("num_inference_steps", 1),
        ("num_inference_steps", [200, 1, 200]),
        ("guidance_scale", 0),
        ("guidance_scale", 30),
        ("seed", MAX_SEED),
        ("num_videos_per_prompt", 1000),
    ],
)
def test_the_edges_of_the_rules_are_fine(field, value):
    request = parsed(**{field: value})
    given = getattr(request, field)
    assert (list(given) if isinstance(given, tuple) else given) == value
    assert request.resolve(PRESET, "x", allow_untrained=True)


@pytest.mark.parametrize("values", [{"height": 448}, {"height": 640, "width": 640}, {"num_frames": 129}])
def test_only_untrained_sizes_and_lengths_need_leave(values):
    request = parsed(**values)
    with pytest.raises(RequestError, match="trained") as caught:
        request.resolve(PRESET, "x")
    assert str(caught.value).isprintable()
    lifted = request.resolve(PRESET, "x", allow_untrained=True)
    assert {name: getattr(lifted, name) for name in values} == values
    assert resolved(num_frames=1).num_frames == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 448}, "height x width 448x640 is not a trained size, which is 384x640 or 640x384"),
        (
            {"height": 768, "width": 1280},
            "768x1280 is not a trained size, which is 384x640 or 640x384; "
            "the published variant 768p was trained for it",
        ),
        ({"height": 1024, "width": 1024}, "the published variant image of miniflux was trained for it"),
        ({"num_frames": 129}, "num_frames 129 is more than the trained 121; the published variant 768p was trained"),
        ({"num_frames": 249}, "num_frames 249 is more than the trained 121"),
    ],
)
def test_what_is_not_trained_says_what_is(values, message):
    with pytest.raises(RequestError) as caught:
        resolved(**values)
    assert message in str(caught.value)


def test_unusual_guidance_is_noted_and_rendered():
    assert resolved().warnings(PRESET) == []
    [warning] = resolved(guidance_scale=20).warnings(PRESET)
    assert warning.startswith("guidance_scale 20 ")
    assert len(resolved(guidance_scale=0, video_guidance_scale=0.5).warnings(PRESET)) == 2
    narrow = replace(PRESET, guidance_range=(7.0, 9.0))
    assert resolved(guidance_scale=9).warnings(narrow) == []
    assert resolved(guidance_scale=6.5).warnings(narrow) == ["guidance_scale 6.5 is outside the recommended 7 to 9"]


def test_rows_of_one_shape_have_common_sampling_parameters():
    one = resolved(guidance_scale=3, seed=1, guidance_decay=0.5, min_guidance_scale=1)
    two = resolved(prompt="b", guidance_scale=8, fps=12, seed=2)
    assert one.shape == two.shape
    params = sampling_params([one, two])
    assert params.guidance_scale == (3, 8)
    assert (params.guidance_decay, params.min_guidance_scale) == ((0.5, None), (1, 2))
    others = [
        {"height": 640, "width": 384},
        {"num_frames": 1},
        {"num_inference_steps": 4},
        {"video_num_inference_steps": [1, 2, 3]},
        {"image": "a.png"},
        {"guidance_scale": 0},
        {"skip_last_step": True},
        {"guided_share": 0.5},
    ]
    assert len({resolved(**values).shape for values in [{}, *others]}) == len(others) + 1


def test_a_resolved_request_survives_json():
    request = resolved(**FULL, **NEWER)
    assert ResolvedRequest.model_validate_json(request.model_dump_json()) == request
