"""Both transformers: parity, exact handling of prompts of different length, and causality in time."""

import pytest
import torch
from torch import Tensor

from pyramid_flow import InvalidValueError, PyramidDiffusionMMDiT, PyramidFluxTransformer, ShapeError, TextEmbedding
from pyramid_flow.sampling.pyramid import history_level
from pyramid_flow.transformer.layers import RMSNorm
from pyramid_flow.transformer.mmdit import sincos_positions
from tests.pyramid_flow.goldens import (
    POOLED_DIMS,
    assert_forward_equal,
    manifest,
    parameters,
    randn,
    random_text,
    rows,
    tensors,
    tiny_transformer,
)

CLASSES = {"miniflux": PyramidFluxTransformer, "sd3": PyramidDiffusionMMDiT}
GOLDENS = {"miniflux": "flux_forward", "sd3": "mmdit_forward"}
CASES = [(family, case["case"]) for family, golden in GOLDENS.items() for case in parameters(golden)["cases"]]


@pytest.fixture(params=CLASSES)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def evaluate(family: str, history: list[Tensor], latents: Tensor, timestep: Tensor, text: TextEmbedding) -> Tensor:
    transformer = tiny_transformer(family)
    text_state = transformer.embed_text(text)
    history_state = transformer.embed_history(history, latents.shape, text_state)
    return transformer(latents, transformer.condition(timestep, text_state), text_state, history_state)


def random_frames(unit: int, level: int, batch: int, seed: int = 0) -> list[Tensor]:
    """History and current frame of a unit at a level, oldest first; level 0 has 2 x 4 latent cells."""
    levels = [history_level(unit - j, level) for j in range(unit)] + [level]
    return [randn(batch, 16, 1, 2 * 2**held, 4 * 2**held, seed=seed + j) for j, held in enumerate(levels)]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_forward_matches_golden(family, case):
    golden = tensors(GOLDENS[family])
    data = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
    clips = [data[f"clip{i}"] for i in range(sum(key.startswith("clip") for key in data))]
    text = TextEmbedding(
        data["encoder_hidden_states"], data["encoder_attention_mask"].bool(), data["pooled_projections"]
    )
    assert_forward_equal(evaluate(family, clips[:-1], clips[-1], data["timestep"], text), data["output"])


@pytest.mark.parametrize("by_default", [True, False])
def test_full_size_model_is_the_published_one(family, by_default):
    published = manifest(f"diffusion_transformer ({family})")
    config = {} if by_default else {key: value for key, value in published["config"].items() if key[0] != "_"}
    with torch.device("meta"):
        full = CLASSES[family](**config)
    shapes = {name: list(tensor.shape) for name, tensor in full.state_dict().items()}
    assert shapes == {name: shape for name, (shape, _) in published["tensors"].items()}
    assert sum(parameter.numel() for parameter in full.parameters()) == published["parameters"]
    assert published["config"]["_class_name"] == type(full).__name__


@pytest.mark.parametrize(("family", "eps"), [("miniflux", 1e-6), ("sd3", 1e-5)])
def test_each_family_has_its_own_eps_in_the_norms_of_queries_and_keys(family, eps):
    norms = [module for module in tiny_transformer(family).modules() if isinstance(module, RMSNorm)]
    assert {norm.eps for norm in norms} == {eps}


@pytest.mark.parametrize(("unit", "level"), [(0, 2), (2, 1), (3, 2)])
def test_prompts_of_any_length_in_one_batch_equal_each_alone(family, unit, level):
    positive, negative = random_text([3, 40, 128], family=family), random_text([17, 1, 64], seed=10, family=family)
    text = TextEmbedding(
        tokens=torch.cat([torch.nn.functional.pad(negative.tokens, (0, 0, 0, 64), value=1e4), positive.tokens]),
        mask=torch.cat([torch.nn.functional.pad(negative.mask, (0, 64)), positive.mask]),
        pooled=torch.cat([negative.pooled, positive.pooled]),
    )
    frames, timestep = random_frames(unit, level, batch=6), torch.tensor([1.0, 300, 999, 500, 20, 700])
    together = evaluate(family, frames[:-1], frames[-1], timestep, text)
    for row in range(6):
        *history, current = [frame[row : row + 1] for frame in frames]
        alone = evaluate(family, history, current, timestep[row : row + 1], rows(text, row))
        assert_forward_equal(together[row : row + 1], alone)
    swapped = evaluate(family, frames[:-1], frames[-1], timestep, rows(text, 1, 0, 2, 3, 4, 5))
    assert (swapped[:2] - together[:2]).abs().max() > 1e-3  # so the prompts do matter


def test_pads_never_matter(family):
    text = random_text([5, 9], family=family)
    frames, timestep = random_frames(2, 1, batch=2), torch.tensor([500.0, 500.0])
    other = TextEmbedding(text.tokens.masked_fill(~text.mask[..., None], -3.0), text.mask, text.pooled)
    expected = evaluate(family, frames[:-1], frames[-1], timestep, text)
    assert torch.equal(evaluate(family, frames[:-1], frames[-1], timestep, other), expected)


def test_a_prompt_without_valid_tokens_works(family):
    text = TextEmbedding(randn(1, 4, 32), torch.zeros(1, 4, dtype=torch.bool), randn(1, POOLED_DIMS[family]))
    frames = random_frames(1, 1, batch=1)
    output = evaluate(family, frames[:-1], frames[-1], torch.tensor([500.0]), text)
    assert output.isfinite().all()
    two = TextEmbedding(randn(2, 4, 32), torch.tensor([[False] * 4, [True] * 4]), text.pooled.expand(2, -1))
    both = evaluate(family, [frame.expand(2, -1, -1, -1, -1) for frame in frames[:-1]], *doubled(frames[-1]), two)
    assert_forward_equal(both[:1], output)


def doubled(current: Tensor) -> tuple[Tensor, Tensor]:
    return current.expand(2, -1, -1, -1, -1), torch.tensor([500.0, 500.0])


def keys_of_every_block(family: str, frames: list[Tensor], text: TextEmbedding) -> list[Tensor]:
    """The keys before normalisation, [B, text + image tokens, D], of every block in turn."""
    transformer = tiny_transformer(family)
    outputs: list[Tensor] = []
    double = [block.attn for block in transformer.transformer_blocks]
    projections = [projection for attn in double for projection in (attn.to_k, attn.add_k_proj)]
    projections += [block.attn.to_k for block in getattr(transformer, "single_transformer_blocks", [])]
    handles = [each.register_forward_hook(lambda module, args, out: outputs.append(out)) for each in projections]
    try:
        evaluate(family, frames[:-1], frames[-1], torch.full((len(text),), 500.0), text)
    finally:
        for handle in handles:
            handle.remove()
    assert len(outputs) == len(projections)
    joint = [torch.cat([outputs[i + 1], outputs[i]], dim=1) for i in range(0, 2 * len(double), 2)]  # text is second
    return joint + outputs[2 * len(double) :]


@pytest.mark.parametrize(("unit", "level"), [(0, 1), (1, 0), (3, 0), (3, 1), (4, 2)])
def test_earlier_tokens_do_not_depend_on_later_frames(family, unit, level):
    text = random_text([6, 6], family=family)
    frames = random_frames(unit, level, batch=2)
    counts = [frame.shape[-2] // 2 * (frame.shape[-1] // 2) for frame in frames]
    before = keys_of_every_block(family, frames, text)
    for j in range(unit + 1):
        changed = [frame + 1 if i == j else frame for i, frame in enumerate(frames)]
        after = keys_of_every_block(family, changed, text)
        start = 6 + sum(counts[:j]) if j else 0  # text and frame 0 see each other
        for depth, (keys, others) in enumerate(zip(before, after, strict=True)):
            differs = (keys - others).abs().amax(dim=(0, 2))
            assert (differs[:start] == 0).all()
            if depth:
                assert (differs[start:] > 1e-5).all()


@pytest.mark.parametrize("unit", [0, 2])
def test_inputs_are_never_modified(family, unit):
    text, frames = random_text([3, 5], family=family), random_frames(unit, 1, batch=2)
    timestep = torch.tensor([500.0, 20.0])
    given = [text.tokens, text.mask, text.pooled, *frames, timestep]
    kept = [tensor.clone() for tensor in given]
    evaluate(family, frames[:-1], frames[-1], timestep, text)
    assert all(torch.equal(tensor, before) for tensor, before in zip(given, kept, strict=True))


def test_states_can_be_used_again(family):
    transformer, frames = tiny_transformer(family), random_frames(2, 1, batch=1)
    text = transformer.embed_text(random_text([4], family=family))
    history = transformer.embed_history(frames[:-1], frames[-1].shape, text)
    conditioning = transformer.condition(torch.tensor([500.0]), text)
    first = transformer(frames[-1], conditioning, text, history)
    transformer(frames[-1] + 1, transformer.condition(torch.tensor([20.0]), text), text, history)
    assert torch.equal(transformer(frames[-1], conditioning, text, history), first)


def test_bfloat16_is_close_and_keeps_its_dtype(family):
    transformer = CLASSES[family].from_config(tiny_transformer(family).config).bfloat16()
    transformer.load_state_dict(tiny_transformer(family).state_dict())
    text, frames = random_text([4], family=family), random_frames(2, 1, batch=1)
    state = transformer.embed_text(text)
    history = transformer.embed_history(frames[:-1], frames[-1].shape, state)
    output = transformer(frames[-1], transformer.condition(torch.tensor([500.0]), state), state, history)
    expected = evaluate(family, frames[:-1], frames[-1], torch.tensor([500.0]), text)
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() / expected.norm() < 0.05


def embed(family: str, history: list[tuple[int, ...]], current: tuple[int, ...], batch: int = 2) -> None:
    transformer = tiny_transformer(family)
    text = transformer.embed_text(random_text([4] * batch, family=family))
    transformer.embed_history([randn(*shape) for shape in history], current, text)


@pytest.mark.parametrize(
    ("history", "current", "message"),
    [
        ([], (2, 8, 1, 4, 8), r"current frame .*\[(B|2),16,1,h,w\].*, got \[2, 8, 1, 4, 8\]"),
        ([], (2, 16, 2, 4, 8), r"current frame .*\[(B|2),16,1,h,w\].*, got \[2, 16, 2, 4, 8\]"),
        ([], (2, 16, 1, 3, 8), r"current frame .*even h and w.*, got \[2, 16, 1, 3, 8\]"),
        ([], (2, 16, 4, 8), r"current frame .*, got \[2, 16, 4, 8\]"),
        ([], (3, 16, 1, 4, 8), r"must have shape \[2.*, got \[3, 16, 1, 4, 8\]"),
        ([(1, 16, 1, 2, 4)], (2, 16, 1, 4, 8), r"history clip .*\[2,16,T,h,w\].*, got \[1, 16, 1, 2, 4\]"),
        ([(2, 16, 2, 4)], (2, 16, 1, 4, 8), r"history clip .*\[2,16,T,h,w\].*, got \[2, 16, 2, 4\]"),
        ([(2, 16, 1, 2, 3)], (2, 16, 1, 4, 8), r"history clip .*, got \[2, 16, 1, 2, 3\]"),
    ],
)
def test_wrong_history_shapes_are_refused(family, history, current, message):
    with pytest.raises(ShapeError, match=message):
        embed(family, history, current)


@pytest.mark.parametrize(
    ("latents", "timestep", "message"),
    [
        ((2, 16, 1, 8, 4), (2,), r"latents must have shape .*2, ?16, ?1, ?4, ?8.*, got \[2, 16, 1, 8, 4\]"),
        ((1, 16, 1, 4, 8), (2,), r"latents must have shape .*2, ?16, ?1, ?4, ?8.*, got \[1, 16, 1, 4, 8\]"),
        ((2, 16, 1, 2, 4), (2,), r"latents must have shape .*2, ?16, ?1, ?4, ?8.*, got \[2, 16, 1, 2, 4\]"),
        ((2, 16, 1, 4, 8), (), r"timestep must have shape \[2\], got \[\]"),
        ((2, 16, 1, 4, 8), (3,), r"timestep must have shape \[2\], got \[3\]"),
    ],
)
def test_wrong_latents_are_refused(family, latents, timestep, message):
    transformer = tiny_transformer(family)
    text = transformer.embed_text(random_text([4, 4], family=family))
    history = transformer.embed_history([], (2, 16, 1, 4, 8), text)
    with pytest.raises(ShapeError, match=message):
        transformer(randn(*latents), transformer.condition(torch.ones(timestep), text), text, history)


@pytest.mark.parametrize(
    ("family", "tokens", "pooled", "message"),
    [
        ("miniflux", (2, 5, 31), (2, 16), r"text tokens must have shape \[B,L,32\], got \[2, 5, 31\]"),
        ("miniflux", (2, 5, 32), (2, 8), r"pooled text must have shape \[B,16\], got \[2, 8\]"),
        ("sd3", (2, 5, 31), (2, 32), r"text tokens must have shape \[B,L,32\], got \[2, 5, 31\]"),
        ("sd3", (2, 5, 32), (2, 16), r"pooled text must have shape \[B,32\], got \[2, 16\]"),
    ],
)
def test_wrong_text_shapes_are_refused(family, tokens, pooled, message):
    text = TextEmbedding(randn(*tokens), torch.ones(tokens[:2], dtype=torch.bool), randn(*pooled))
    with pytest.raises(ShapeError, match=message):
        tiny_transformer(family).embed_text(text)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("miniflux", {"use_temporal_causal": False}, "use_temporal_causal False is not supported, only True is"),
        ("miniflux", {"interp_condition_pos": False}, "interp_condition_pos False is not supported"),
        ("miniflux", {"axes_dims_rope": (16, 24, 16)}, r"axes_dims_rope \(16, 24, 16\) does not sum to head size 64"),
        ("sd3", {"use_temporal_causal": False}, "use_temporal_causal False is not supported"),
        ("sd3", {"interp_condition_pos": False}, "interp_condition_pos False is not supported"),
        ("sd3", {"use_t5_mask": False}, "use_t5_mask False is not supported, only True is"),
        ("sd3", {"add_temp_pos_embed": False}, "add_temp_pos_embed False is not supported"),
        ("sd3", {"temp_pos_embed_type": "sincos"}, "temp_pos_embed_type 'sincos' is not supported, only 'rope' is"),
        ("sd3", {"pos_embed_type": None}, "pos_embed_type None is not supported, only 'sincos' is"),
        ("sd3", {"qk_norm": None}, "qk_norm None is not supported, only 'rms_norm' is"),
        ("sd3", {"patch_size": 4}, "patch_size 4 is not supported, only 2 is"),
        ("sd3", {"caption_projection_dim": 1024}, "caption_projection_dim 1024 is not 24 heads x 64"),
    ],
)
def test_unsupported_configs_are_refused(family, config, message):
    with torch.device("meta"), pytest.raises(InvalidValueError, match=message):
        CLASSES[family](**config)


def test_only_the_current_frame_asks_in_the_last_block(family):
    asking: list[int] = []
    transformer = tiny_transformer(family)
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]
    queries = [block.attn.to_q for block in blocks] + [
        block.attn.add_q_proj for block in transformer.transformer_blocks
    ]
    handles = [each.register_forward_hook(lambda module, args, out: asking.append(out.shape[1])) for each in queries]
    frames = random_frames(2, 1, batch=1)
    try:
        evaluate(family, frames[:-1], frames[-1], torch.tensor([500.0]), random_text([3], family=family))
    finally:
        for handle in handles:
            handle.remove()
    assert asking[-1] == 8
    assert all(count > 8 or count == 3 for count in asking[:-1])
    assert asking.count(3) == len(transformer.transformer_blocks) - (family == "sd3")


# Positions of the SD3 family


def test_trained_positions_are_the_sincos_ones():
    table = tiny_transformer("sd3").pos_embed
    assert (sincos_positions(32, table.side, extent=8) - table.pos_embed).abs().max() < 1e-7


def test_frames_beyond_the_positions_are_refused():
    transformer = tiny_transformer("sd3")
    text = transformer.embed_text(random_text([4], family="sd3"))
    transformer.embed_history([], (1, 16, 1, 48, 48), text)
    with pytest.raises(InvalidValueError, match="current frame 25 x 4 is more than the 24 x 24 patches"):
        transformer.embed_history([], (1, 16, 1, 50, 8), text)


def test_positions_of_a_coarser_frame_are_those_of_its_patches_centres():
    """Positions that rise linearly have, at the centre of a coarser patch, the mean of the cells that it covers."""
    embedding = tiny_transformer("sd3").pos_embed
    rising = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 32, 4, 8)
    still = torch.zeros(1, 16, 1, 4, 8)
    tokens = embedding(still, rising) - embedding.proj.bias
    expected = torch.tensor([0.5, 2.5, 4.5, 6.5]).repeat(2)
    assert_forward_equal(tokens, expected[None, :, None].expand(1, 8, 32))
