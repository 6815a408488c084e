"""The Pyramid Flow video model: text- and image-to-video, numerically equal to the published one.

A name is imported on first use, so that `import pyramid_flow` alone loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyramid_flow.checkpoints.checkpoint import Checkpoint
    from pyramid_flow.checkpoints.diffusers_models import CausalVideoVAE, PyramidDiffusionMMDiT, PyramidFluxTransformer
    from pyramid_flow.errors import CheckpointError, InvalidValueError, NonFiniteError, PyramidFlowError, ShapeError
    from pyramid_flow.flops import RenderFlops, render_flops
    from pyramid_flow.pipeline import PyramidFlowOutput, PyramidFlowPipeline
    from pyramid_flow.presets import LatentStatistics, Preset
    from pyramid_flow.sampling.noise import NoiseSource, SeededNoise
    from pyramid_flow.sampling.params import SamplingParams
    from pyramid_flow.sampling.sampler import StepInfo, generate_latents
    from pyramid_flow.sampling.schedule import Level, PyramidSchedule
    from pyramid_flow.text.embedding import TextEmbedding
    from pyramid_flow.text.encoder import TextEncoder
    from pyramid_flow.transformer.model import PyramidTransformer

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

_PUBLIC_NAMES = {
    "checkpoints.checkpoint": ("Checkpoint",),
    "checkpoints.diffusers_models": ("CausalVideoVAE", "PyramidDiffusionMMDiT", "PyramidFluxTransformer"),
    "errors": ("CheckpointError", "InvalidValueError", "NonFiniteError", "PyramidFlowError", "ShapeError"),
    "flops": ("RenderFlops", "render_flops"),
    "sampling.noise": ("NoiseSource", "SeededNoise"),
    "sampling.params": ("SamplingParams",),
    "pipeline": ("PyramidFlowOutput", "PyramidFlowPipeline"),
    "presets": ("LatentStatistics", "Preset"),
    "sampling.sampler": ("StepInfo", "generate_latents"),
    "sampling.schedule": ("Level", "PyramidSchedule"),
    "text.embedding": ("TextEmbedding",),
    "text.encoder": ("TextEncoder",),
    "transformer.model": ("PyramidTransformer",),
}
"""By module."""

_MODULES = {name: module for module, names in _PUBLIC_NAMES.items() for name in names}

if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name: str) -> object:
        """Import a public name on first use (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
