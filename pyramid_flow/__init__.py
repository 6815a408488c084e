"""The Pyramid Flow video model: text- and image-to-video, numerically equal to the published one."""

from pyramid_flow.checkpoint import Checkpoint
from pyramid_flow.errors import CheckpointError, InvalidValueError, NonFiniteError, PyramidFlowError, ShapeError
from pyramid_flow.flops import RenderFlops, render_flops
from pyramid_flow.noise import NoiseSource, SeededNoise
from pyramid_flow.params import SamplingParams
from pyramid_flow.pipeline import PyramidFlowOutput, PyramidFlowPipeline
from pyramid_flow.presets import LatentStatistics, Preset
from pyramid_flow.sampling import StepInfo, generate_latents
from pyramid_flow.schedule import Level, PyramidSchedule
from pyramid_flow.text import TextEmbedding, TextEncoder
from pyramid_flow.transformer import PyramidTransformer
from pyramid_flow.transformer_flux import PyramidFluxTransformer
from pyramid_flow.transformer_mmdit import PyramidDiffusionMMDiT
from pyramid_flow.vae import CausalVideoVAE

__all__ = [
    "CausalVideoVAE",
    "Checkpoint",
    "CheckpointError",
    "InvalidValueError",
    "LatentStatistics",
    "Level",
    "NoiseSource",
    "NonFiniteError",
    "Preset",
    "PyramidDiffusionMMDiT",
    "PyramidFlowError",
    "PyramidFlowOutput",
    "PyramidFlowPipeline",
    "PyramidFluxTransformer",
    "PyramidSchedule",
    "PyramidTransformer",
    "RenderFlops",
    "SamplingParams",
    "SeededNoise",
    "ShapeError",
    "StepInfo",
    "TextEmbedding",
    "TextEncoder",
    "generate_latents",
    "render_flops",
]
