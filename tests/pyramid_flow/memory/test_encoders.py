"""Memory of text encoders: the estimate from a config equals the count on the real classes, or is slightly above."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, CLIPTextConfig, CLIPTextModel, PreTrainedConfig, T5Config, T5EncoderModel

from pyramid_flow import CheckpointError
from pyramid_flow.checkpoints.checkpoint import BUNDLED
from pyramid_flow.memory.encoders import PROMPTS, encoder_peak
from pyramid_flow.memory.usage import live_peak
from pyramid_flow.text.embedding import MAX_TOKENS, POOLED_MAX_TOKENS
from tests.pyramid_flow.goldens import TINY_MINIFLUX, TINY_SD3

LAYERS = 2
"""Enough for the peak: all layers have the same sizes, and each frees its tensors before the next one."""


def t5(**sizes: object) -> T5Config:
    return T5Config(vocab_size=32128, num_layers=LAYERS, **sizes)


def clip(**sizes: object) -> CLIPTextConfig:
    return CLIPTextConfig(num_hidden_layers=LAYERS, **sizes)


PUBLISHED = {
    "T5-XXL": t5(d_model=4096, d_kv=64, d_ff=10240, num_heads=64, feed_forward_proj="gated-gelu"),
    "CLIP-L": clip(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    "CLIP-G": clip(hidden_size=1280, intermediate_size=5120, num_attention_heads=20, hidden_act="gelu"),
}
OTHERS = {
    "wide heads": t5(d_model=512, d_kv=128, d_ff=16, num_heads=8, feed_forward_proj="gated-gelu"),
    "narrow heads": t5(d_model=512, d_kv=16, d_ff=16, num_heads=8, feed_forward_proj="gated-gelu"),
    "not gated": t5(d_model=512, d_kv=64, d_ff=2048, num_heads=8, feed_forward_proj="relu"),
    "gated SiLU": t5(d_model=512, d_kv=64, d_ff=2048, num_heads=8, feed_forward_proj="gated-silu"),
    "CLIP with a narrow feed-forward": clip(hidden_size=512, intermediate_size=64, num_attention_heads=8),
}
STORED = {
    f"{root.name}/{folder.name}": AutoConfig.from_pretrained(folder)
    for root in (BUNDLED["toy"], TINY_MINIFLUX, TINY_SD3)
    for folder in sorted(root.glob("text_encoder*"))
}
CONFIGS = PUBLISHED | OTHERS | STORED


@torch.no_grad()
def counted(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    is_t5 = isinstance(config, T5Config)
    with torch.device("meta"):
        encoder = (T5EncoderModel if is_t5 else CLIPTextModel)(config).eval().to(dtype)
    num_tokens = MAX_TOKENS if is_t5 else POOLED_MAX_TOKENS
    with live_peak() as peak:
        encoder(input_ids=torch.empty(PROMPTS, num_tokens, dtype=torch.long, device="meta"))
    return peak.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_estimate_is_the_count_or_at_most_a_tenth_above(tmp_path, config, dtype):
    config.save_pretrained(tmp_path)
    expected = counted(config, dtype)
    assert expected <= encoder_peak(tmp_path, dtype.itemsize) <= 1.1 * expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "a text encoder of type 'bert'; supported are 't5' and 'clip_text_model'"),
        ({}, "a text encoder of type None"),
        ({"model_type": "t5", "d_model": "wide"}, "d_model is 'wide', expected a positive integer"),
        ({"model_type": "clip_text_model", "hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
    ],
)
def test_a_config_that_describes_no_encoder_is_refused(tmp_path: Path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        encoder_peak(tmp_path, 2)


def test_a_missing_size_is_the_default_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert encoder_peak(tmp_path, 4) == counted(T5Config(num_layers=LAYERS), torch.float32)
