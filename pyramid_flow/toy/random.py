"""A tiny checkpoint with random weights in the published miniFLUX layout, written by code."""

import json
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from pyramid_flow.checkpoint import PRESET_FILE, TRANSFORMER_PREFIX
from pyramid_flow.text import MAX_TOKENS, POOLED_MAX_TOKENS
from pyramid_flow.transformer_flux import PyramidFluxTransformer
from pyramid_flow.vae import CausalVideoVAE

VARIANT = "tiny"
TEXT_DIM, POOLED_DIM = 32, 16
CHANNELS = (8, 8, 16, 16)
PRESET = {
    "sizes": [[128, 128], [64, 128], [128, 64], [64, 64]],
    "max_num_frames": 49,
    "num_inference_steps": [4, 4, 4],
    "video_num_inference_steps": [2, 2, 2],
    "prompt_suffix": "",
    "negative_prompt": "",
}


def write_random_checkpoint(folder: Path, seed: int = 0) -> None:
    """Write the checkpoint (about 2 MB) to `folder`; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _transformer().save_pretrained(folder / f"{TRANSFORMER_PREFIX}{VARIANT}")
        _vae().save_pretrained(folder / "causal_video_vae")
        _write_clip(folder)
        _write_t5(folder)
    (folder / PRESET_FILE).write_text(json.dumps(PRESET, indent=2) + "\n")


def _transformer() -> PyramidFluxTransformer:
    transformer: PyramidFluxTransformer = PyramidFluxTransformer(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        axes_dims_rope=(4, 6, 6),
    )
    return transformer


def _vae() -> CausalVideoVAE:
    vae: CausalVideoVAE = CausalVideoVAE(
        encoder_block_out_channels=CHANNELS,
        decoder_block_out_channels=CHANNELS,
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_norm_num_groups=4,
        decoder_norm_num_groups=4,
    )
    nn.init.normal_(vae.decoder.conv_out.conv.weight, std=0.1)  # colours instead of mid-grey
    return vae


def _write_clip(folder: Path) -> None:
    """Write a CLIP-like encoder whose byte-level tokenizer knows single characters only."""
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=POOLED_MAX_TOKENS).save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=POOLED_DIM,
        intermediate_size=2 * POOLED_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def _write_t5(folder: Path) -> None:
    """Write a T5-like encoder whose unigram tokenizer knows the printable ASCII characters."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS).save_pretrained(folder / "tokenizer_2")
    config = T5Config(
        vocab_size=len(vocab),
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=2 * TEXT_DIM,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")
