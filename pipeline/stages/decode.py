"""Decode: latents to an mp4 or a picture and a thumbnail strip; frames go into the encoder chunk by chunk."""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.media.image_text import ImageTextModel, PickedFrames
from pipeline.media.quality import STANDARD, QualityMeter, Thresholds
from pipeline.media.still import encode_still
from pipeline.media.video import Frames, ThumbnailStrip, VideoWriter
from pipeline.request import UNTOLD, ResolvedRequest
from pipeline.rows import Item, as_tensor
from pipeline.stages import DECODE, FILE, THUMBNAIL
from pipeline.stages.model import ModelConfig
from pipeline.stages.stage import Stage
from pyramid_flow import Checkpoint, SamplingParams
from pyramid_flow.memory.placement import free_bytes, release_memory
from pyramid_flow.memory.planner import SMALLER_TILES, fitting_tile
from pyramid_flow.memory.usage import VAE, part_memory
from pyramid_flow.pixels import decode_frames
from pyramid_flow.vae.tile import Tile

logger = logging.getLogger(__name__)

COUNTED_SHAPES = 256


class FrameObserver(Protocol):
    """Sees the frames of a video while they stream by."""

    def add(self, frames: Frames) -> None:
        """Take the next chunk: uint8 RGB, [n, height, width, 3]."""


class Decode(Stage):
    """Replaces a row's `latents` by the files `file` (mp4, or png or webp of a still) and `thumbnail` (webp), as uint8.

    window: latents per chunk; tile: side of a VAE tile in pixels, None = no tiling, auto = none on a CPU, else the
    largest that fits into the memory that is free; encoder_threads: of ffmpeg; thresholds: of the flags, which the row
    gets with the figures of its frames; image_text: folder of a CLIP model, for two figures more. Frames never leave
    the worker, and its memory is that of a chunk, and of eight frames for such a model.
    """

    name = DECODE

    def __init__(
        self,
        model: ModelConfig,
        window: int,
        tile: Tile,
        encoder_threads: int,
        thresholds: Thresholds = STANDARD,
        image_text: str | None = None,
    ) -> None:
        checkpoint = model.open()
        self.window, self.tile, self.encoder_threads, self.thresholds = window, tile, encoder_threads, thresholds
        self.statistics = checkpoint.preset.statistics
        told = {"model_fingerprint": model.fingerprint} if model.fingerprint else {}
        self.facts = {"model": checkpoint.name} | told
        self.placement = model.placement(checkpoint, (VAE,))
        self.vae = self.placement.place(checkpoint.load_vae(model.torch_dtype, "cpu"))
        device = self.placement.device
        self.image_text = ImageTextModel(image_text, device, model.torch_dtype) if image_text else None
        self._activations = lru_cache(COUNTED_SHAPES)(partial(_activations, checkpoint, model.torch_dtype, window))

    def process(self, items: Sequence[Item]) -> list[Item]:
        """Decode the rows one after another."""
        with self.placement.working(self.vae):
            return [self._decoded(item, self.tile_for(item.request)) for item in items]

    def tile_for(self, request: ResolvedRequest) -> int | None:
        """Return the tile to decode a request with, while the VAE is ready to work."""
        if self.tile != "auto":
            return self.tile
        if self.placement.device.type == "cpu":
            return None
        needed = partial(self._activations, request.height, request.width, request.num_frames)
        return fitting_tile(needed, free_bytes(self.placement.device))

    def tags(self, request: ResolvedRequest) -> dict[str, str]:
        """Return the container tags of a video or a still."""
        own = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "seed": str(request.seed)}
        settings = request.model_dump_json(exclude={"id", *own, *UNTOLD}, exclude_none=True)
        return own | {"render_id": request.id, "settings": settings} | self.facts

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
        strip, meter = ThumbnailStrip(request.num_frames), QualityMeter()
        picked = PickedFrames(request.num_frames)
        watchers: list[FrameObserver] = [strip, meter, *([picked] if self.image_text else [])]
        chunks = self._chunks(item.tensors["latents"], tile, watchers)
        if request.image_format:
            [[frame]] = chunks
            file = encode_still(frame, request.image_format, self.tags(request))
        else:
            file = self._video(request, chunks)
        tensors = {FILE: as_tensor(file), THUMBNAIL: as_tensor(strip.webp())}
        figures = meter.figures()
        if self.image_text:
            figures = replace(figures, **self._scores(item, picked))
        quality = {**asdict(figures), "flags": self.thresholds.flags(figures)}
        return item.with_tensors(tensors, frames=strip.num_seen, tiling=tile, **quality)

    def _scores(self, item: Item, picked: PickedFrames) -> dict[str, float]:
        """Return the figures by the image-text model; none if it fails, since the video is done."""
        assert self.image_text
        try:
            return self.image_text.scores(item.request.prompt, picked.frames)
        except torch.AcceleratorError:
            raise  # the device is of no use any more
        except Exception as error:  # noqa: BLE001 - recorded
            logger.warning("decode: row %s has no scores: %s: %s", item.row.id, type(error).__name__, error)
            return {}

    def _chunks(self, latents: Tensor, tile: int | None, watchers: Sequence[FrameObserver]) -> Iterator[Frames]:
        """Yield the decoded frames chunk by chunk, once all that watch have seen them."""
        for chunk in decode_frames(self.vae, latents, self.statistics, window=self.window, tile=tile):
            frames = chunk[0].numpy()
            for watcher in watchers:
                watcher.add(frames)
            yield frames

    def _video(self, request: ResolvedRequest, chunks: Iterable[Frames]) -> bytes:
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
                for chunk in chunks:
                    writer.write(chunk)
            return path.read_bytes()


def _activations(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    window: int,
    height: int,
    width: int,
    num_frames: int,
    tile: int | None,
) -> int:
    params = SamplingParams(height, width, num_frames)
    return part_memory(checkpoint, dtype, params, window=window, tile=tile, parts=(VAE,))[VAE].activations
