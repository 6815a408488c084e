"""Encode: prompts to text embeddings, input images to the posterior of their latent."""

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.batching import IMAGE
from pipeline.images import ImageRoot
from pipeline.rows import Item, as_bytes
from pipeline.stages.stage import ModelConfig, Stage
from pyramid_flow import TextEmbedding
from pyramid_flow.pixels import encode_image, image_pixels, open_image

CACHED_PROMPTS = 256


class Encode(Stage):
    """Adds the tensors `text.*`, `negative.*` (guided rows) and `posterior.*` (rows with an image)."""

    name = "encode"

    def __init__(self, model: ModelConfig, image_root: str, image_hosts: frozenset[str]) -> None:
        checkpoint = model.open()
        self.preset = checkpoint.preset
        self.text_encoder = checkpoint.load_text_encoder(model.torch_dtype, model.device)
        self.vae = checkpoint.load_vae(model.torch_dtype, model.device)
        self.images = ImageRoot(image_root, image_hosts)
        self._embedding = lru_cache(CACHED_PROMPTS)(self._encode)

    def process(self, items: Sequence[Item]) -> list[Item]:
        """Encode each row; equal prompts are encoded once per worker."""
        return [self._item(item) for item in items]

    def _item(self, item: Item) -> Item:
        started = datetime.now(UTC)
        request = item.request
        prompt = request.prompt + self.preset.prompt_suffix
        tensors = _named("text", self._embedding(prompt))
        if request.guidance_scale > 0:
            tensors |= _named("negative", self._embedding(request.negative_prompt))
        if request.has_image:
            data = as_bytes(item.tensors[IMAGE]) if IMAGE in item.tensors else self.images.read(str(request.image_uri))
            pixels = image_pixels(open_image(data), request.height, request.width, request.image_fit or "crop")
            posterior = encode_image(self.vae, pixels)
            tensors |= {"posterior.mean": posterior.mean, "posterior.logvar": posterior.logvar}
        truncated = self.text_encoder.is_truncated(prompt)
        return item.with_tensors(tensors, prompt_truncated=truncated, started_at=started)

    def _encode(self, prompt: str) -> TextEmbedding:
        text: TextEmbedding = self.text_encoder([prompt])
        return text.trimmed().to(torch.device("cpu"))


def _named(prefix: str, text: TextEmbedding) -> dict[str, Tensor]:
    return {f"{prefix}.tokens": text.tokens, f"{prefix}.mask": text.mask, f"{prefix}.pooled": text.pooled}
