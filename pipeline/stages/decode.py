"""Decode: latents to an mp4 and a thumbnail strip; frames go into the encoder chunk by chunk."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.request import ResolvedRequest
from pipeline.rows import Item, as_tensor
from pipeline.stages.stage import ModelConfig, Stage, release_memory
from pipeline.video import ThumbnailStrip, VideoWriter
from pyramid_flow.pixels import decode_frames

logger = logging.getLogger(__name__)

VIDEO, THUMBNAIL = "video", "thumbnail"
SMALLER_TILES = (512, 256)
"""Sides in pixels of the tiles that are tried after the device ran out of memory."""


class Decode(Stage):
    """Replaces a row's `latents` by the files `video` (mp4) and `thumbnail` (webp), as uint8 tensors.

    window: latents per chunk; tile: side of a VAE tile in pixels, None = no tiling; encoder_threads: of ffmpeg. Frames
    never leave the worker, and its memory is that of a chunk.
    """

    name = "decode"

    def __init__(self, model: ModelConfig, window: int, tile: int | None, encoder_threads: int) -> None:
        checkpoint = model.open()
        self.window, self.tile, self.encoder_threads = window, tile, encoder_threads
        self.statistics = checkpoint.preset.statistics
        self.model_name = checkpoint.name
        self.vae = checkpoint.load_vae(model.torch_dtype, model.device)

    def process(self, items: Sequence[Item]) -> list[Item]:
        """Decode the rows one after another."""
        return [self._decoded(item, self.tile) for item in items]

    def tags(self, request: ResolvedRequest) -> dict[str, str]:
        """Return the container tags of a video."""
        return {"prompt": request.prompt, "seed": str(request.seed), "model": self.model_name, "render_id": request.id}

    def _decoded(self, item: Item, tile: int | None) -> Item:
        try:
            return self._decoded_with(item, tile)
        except torch.OutOfMemoryError:
            smaller = next((side for side in SMALLER_TILES if tile is None or side < tile), None)
            if smaller is None:
                raise
        logger.warning("decode: row %s does not fit into memory, trying tiles of %d pixels", item.row.id, smaller)
        release_memory()
        return self._decoded(item, smaller)

    def _decoded_with(self, item: Item, tile: int | None) -> Item:
        request = item.request
        strip = ThumbnailStrip(request.num_frames)
        frames = 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            with VideoWriter(
                path,
                width=request.width,
                height=request.height,
                fps=request.fps,
                tags=self.tags(request),
                threads=self.encoder_threads,
            ) as writer:
                chunks = decode_frames(
                    self.vae, item.tensors["latents"], self.statistics, window=self.window, tile=tile
                )
                for chunk in chunks:
                    writer.write(chunk[0].numpy())
                    strip.add(chunk[0].numpy())
                    frames += chunk.shape[1]
            tensors = {VIDEO: as_tensor(path.read_bytes()), THUMBNAIL: as_tensor(strip.webp())}
        return item.with_tensors(tensors, frames=frames, tiling=tile)
