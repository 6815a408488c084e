"""The bundled model before its training: its architecture, in the published layout, with random weights.

`python -m pyramid_flow.toy.blank FOLDER` writes it.
"""

import sys
from pathlib import Path

import torch

from pyramid_flow.checkpoints.checkpoint import write_preset
from pyramid_flow.checkpoints.diffusers_models import CausalVideoVAE, PyramidFluxTransformer
from pyramid_flow.checkpoints.layout import TRANSFORMER_PREFIX
from pyramid_flow.toy.text import write_clip, write_t5
from pyramid_flow.toy.world import held_out_captions

VARIANT = "toy"
TEXT_DIM = 64
HEADS, HEAD_DIM, ROPE_AXES = 6, 32, (8, 12, 12)
JOINT_BLOCKS, SINGLE_BLOCKS = 2, 6
CHANNELS, GROUPS = (16, 32, 64, 64), 4
PRESET = {
    "sizes": [[64, 64]],
    "max_num_frames": 33,
    "num_inference_steps": [10, 10, 10],
    "video_num_inference_steps": [5, 5, 5],
    "guidance_scale": 4.0,
    "video_guidance_scale": 3.0,
    "image_to_video_guidance_scale": 3.0,
    "prompt_suffix": "",
    "negative_prompt": "",
}


def write_blank_toy(folder: Path, seed: int = 0) -> None:
    """Write the untrained model to `folder`; the same seed gives the same weights."""
    words = sorted({word for caption in held_out_captions() for word in caption.split()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _transformer().save_pretrained(folder / f"{TRANSFORMER_PREFIX}{VARIANT}")
        _vae().save_pretrained(folder / "causal_video_vae")
        write_clip(folder, words, TEXT_DIM, num_layers=2)
        write_t5(folder, words, TEXT_DIM, num_layers=2)
    write_preset(folder, PRESET)


def _transformer() -> PyramidFluxTransformer:
    transformer: PyramidFluxTransformer = PyramidFluxTransformer(
        num_layers=JOINT_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=ROPE_AXES,
    )
    return transformer


def _vae() -> CausalVideoVAE:
    vae: CausalVideoVAE = CausalVideoVAE(
        encoder_block_out_channels=CHANNELS,
        decoder_block_out_channels=CHANNELS,
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_norm_num_groups=GROUPS,
        decoder_norm_num_groups=GROUPS,
    )
    return vae


if __name__ == "__main__":
    write_blank_toy(Path(sys.argv[1]))
