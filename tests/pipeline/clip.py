"""A CLIP model with random weights in the folder layout of transformers, with the words of the bundled model."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

import pyramid_flow.toy

SIDE = 32


def small_clip(folder: Path) -> str:
    """Write one; returns the folder."""
    words = AutoTokenizer.from_pretrained(Path(pyramid_flow.toy.__file__).parent / "weights" / "tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id, "pad_token_id": words.pad_token_id}
    config = CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(words), "max_position_embeddings": 16},
        vision_config={**small, "image_size": SIDE, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
