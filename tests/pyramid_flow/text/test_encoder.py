"""Text encoders: parity with the published ones, both forms of the CLIP tensor names, and damaged folders."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyramid_flow import CheckpointError, TextEncoder
from pyramid_flow.checkpoints.layout import TEXT_LAYOUTS
from pyramid_flow.text.embedding import MAX_TOKENS, concatenate
from tests.pyramid_flow.goldens import (
    POOLED_DIMS,
    TINY,
    assert_forward_equal,
    parameters,
    tensors,
    text_embedding,
    tiny_text_encoder,
)

PROMPTS = parameters("text_miniflux")
PREFIX = "text_model."
ENCODERS = [(family, encoder) for family, layout in TEXT_LAYOUTS.items() for encoder in layout.encoders]
FOLDERS = [(family, name) for family, layout in TEXT_LAYOUTS.items() for name in (*layout.encoders, *layout.tokenizers)]


@pytest.fixture(params=TEXT_LAYOUTS)
def family(request):
    return request.param


def copied_checkpoint(
    family: str, folder: Path, part: str, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Path:
    """Copy the text side of a tiny checkpoint with the tensors of one part edited."""
    for copied, name in FOLDERS:
        if copied == family:
            shutil.copytree(TINY[family] / name, folder / name)
    file = folder / part / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return folder


def load(family: str, folder: Path) -> TextEncoder:
    return TextEncoder.from_pretrained(folder, TEXT_LAYOUTS[family], torch.float32)


@pytest.mark.parametrize("batched", [False, True])
def test_embeddings_match_golden(family, batched):
    prompts = parameters(f"text_{family}")
    golden = [text_embedding(tensors(f"text_{family}"), f"{i}.") for i in range(len(prompts))]
    encoder = tiny_text_encoder(family)
    encoded = encoder(prompts) if batched else concatenate([encoder([prompt]) for prompt in prompts])
    assert encoded.tokens.shape == (len(prompts), MAX_TOKENS, 32)
    assert encoded.pooled.shape == (len(prompts), POOLED_DIMS[family])
    for row, expected in enumerate(golden):
        assert torch.equal(encoded.mask[row], expected.mask[0])
        assert_forward_equal(encoded.tokens[row][encoded.mask[row]], expected.tokens[0][expected.mask[0]])
        assert_forward_equal(encoded.pooled[row], expected.pooled[0])


def test_the_layouts_are_the_published_ones():
    assert TEXT_LAYOUTS["miniflux"].encoders == ("text_encoder", "text_encoder_2")
    assert TEXT_LAYOUTS["miniflux"].tokenizers == ("tokenizer", "tokenizer_2")
    assert TEXT_LAYOUTS["sd3"].encoders == ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert TEXT_LAYOUTS["sd3"].tokenizers == ("tokenizer", "tokenizer_2", "tokenizer_3")


@pytest.mark.parametrize("prefixed", [False, True])
def test_both_forms_of_clip_names_load(family, tmp_path, prefixed):
    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
        return {name if "projection" in name else PREFIX * prefixed + name: weight for name, weight in bare.items()}

    encoder = load(family, copied_checkpoint(family, tmp_path, "text_encoder", rename))
    assert torch.equal(encoder(PROMPTS).pooled, tiny_text_encoder(family)(PROMPTS).pooled)


@pytest.mark.parametrize(("family", "part"), ENCODERS)
def test_a_missing_tensor_is_named(tmp_path, family, part):
    def drop(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: weight for name, weight in weights.items() if "final_layer_norm.weight" not in name}

    with pytest.raises(CheckpointError, match=rf"{part} .*final_layer_norm.weight"):
        load(family, copied_checkpoint(family, tmp_path, part, drop))


@pytest.mark.parametrize(("family", "part"), ENCODERS)
def test_a_misshapen_tensor_is_named(tmp_path, family, part):
    def cut(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v[:7].clone() if "final_layer_norm.weight" in k else v for k, v in weights.items()}

    with pytest.raises(CheckpointError, match=rf"{part} .*final_layer_norm.weight"):
        load(family, copied_checkpoint(family, tmp_path, part, cut))


@pytest.mark.parametrize(("family", "missing"), FOLDERS)
def test_a_missing_folder_is_named(tmp_path, family, missing):
    copied_checkpoint(family, tmp_path, "text_encoder", dict)
    shutil.rmtree(tmp_path / missing)
    with pytest.raises(CheckpointError, match=rf"no folder .*/{missing}$"):
        load(family, tmp_path)


@pytest.mark.parametrize(
    "missing",
    [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "tokenizer_2/tokenizer.json",
    ],
)
def test_an_incomplete_folder_is_named(tmp_path, missing):
    copied_checkpoint("miniflux", tmp_path, "text_encoder", dict)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=Path(missing).parent.name):
        load("miniflux", tmp_path)


def test_truncation_is_told_for_exactly_what_is_cut():
    encoder = tiny_text_encoder()
    text = "word " * 200
    lengths = {len(encoder.t5_tokenizer(text[:end])["input_ids"]): end for end in range(len(text))}
    fits, cut = text[: lengths[MAX_TOKENS]], text[: lengths[MAX_TOKENS + 1]]
    assert not encoder.is_truncated(fits)
    assert encoder.is_truncated(cut)
    assert not encoder.is_truncated("")
    assert encoder([fits]).mask.all()
    assert torch.equal(encoder([cut + " more"]).tokens, encoder([cut + " words here"]).tokens)


def test_encoding_is_the_same_in_any_batch(family):
    encoder = tiny_text_encoder(family)
    together = encoder(["one", "a much longer prompt than the other one"])
    alone = encoder(["one"])
    assert_forward_equal(together.tokens[:1][alone.mask], alone.tokens[alone.mask])
    assert_forward_equal(together.pooled[:1], alone.pooled)
