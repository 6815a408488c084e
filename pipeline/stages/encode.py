"""Encode: prompts to text embeddings, input images to the posterior of their latent."""

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.request import ResolvedRequest
from pipeline.rows import Item, as_bytes
from pipeline.stages import ENCODE
from pipeline.stages.model import ModelConfig
from pipeline.stages.stage import Stage
from pipeline.tables.batching import IMAGE
from pipeline.tables.images import ImageRoot
from pyramid_flow import TextEmbedding
from pyramid_flow.images.decoding import open_image
from pyramid_flow.memory.usage import VAE
from pyramid_flow.pixels import encode_image, image_pixels

CACHED_PROMPTS = 256


class Encode(Stage):
    """Adds the tensors `text.*`, `negative.*` (guided rows) and `posterior.*` (rows with an image)."""

    name = ENCODE

    def __init__(self, model: ModelConfig, image_root: str, image_hosts: frozenset[str]) -> None:
        checkpoint = model.open()
        self.preset = checkpoint.preset
        self.placement = model.placement(checkpoint, (*checkpoint.text_layout.encoders, VAE))
        self.text_encoder = self.placement.place(checkpoint.load_text_encoder(model.torch_dtype, "cpu"))
        self.vae = self.placement.place(checkpoint.load_vae(model.torch_dtype, "cpu"))
        self.images = ImageRoot(image_root, image_hosts)
        self._embedding = lru_cache(CACHED_PROMPTS)(self._encode)

    def process(self, items: Sequence[Item]) -> list[Item]:
        """Encode all prompts, then all images; equal prompts are encoded once per worker."""
        started = datetime.now(UTC)
        with self.placement.working(self.text_encoder):
            texts = [self._texts(item.request) for item in items]
        has_images = any(item.request.has_image for item in items)
        with self.placement.working(self.vae) if has_images else nullcontext():
            posteriors = [self._posterior(item) for item in items]
        return [
            item.with_tensors(
                text | posterior,
                prompt_truncated=self.text_encoder.is_truncated(self._prompt(item.request)),
                started_at=started,
                image_source=None,
            )
            for item, text, posterior in zip(items, texts, posteriors, strict=True)
        ]

    def _prompt(self, request: ResolvedRequest) -> str:
        return request.prompt + self.preset.prompt_suffix

    def _texts(self, request: ResolvedRequest) -> dict[str, Tensor]:
        tensors = _named("text", self._embedding(self._prompt(request)))
        if request.guidance_scale > 0:
            tensors |= _named("negative", self._embedding(request.negative_prompt))
        return tensors

    def _posterior(self, item: Item) -> dict[str, Tensor]:
        request = item.request
        if not request.has_image:
            return {}
        data = as_bytes(item.tensors[IMAGE]) if IMAGE in item.tensors else self.images.read(str(item.row.image_source))
        pixels = image_pixels(open_image(data), request.height, request.width, request.image_fit or "crop")
        posterior = encode_image(self.vae, pixels)
        return {"posterior.mean": posterior.mean, "posterior.logvar": posterior.logvar}

    def _encode(self, prompt: str) -> TextEmbedding:
        padded: TextEmbedding = self.text_encoder([prompt])
        text = padded.trimmed().to(torch.device("cpu"))
        return TextEmbedding(text.tokens.clone(), text.mask.clone(), text.pooled.clone())  # views would keep all of it


def _named(prefix: str, text: TextEmbedding) -> dict[str, Tensor]:
    return {f"{prefix}.tokens": text.tokens, f"{prefix}.mask": text.mask, f"{prefix}.pooled": text.pooled}
