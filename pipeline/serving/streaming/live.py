"""The video while it is made: finished units go from the sampler to a decoder, which stores them as fragments."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime

import torch
from torch import Tensor

from pipeline.media.fragments import encode_fragment, join_fragments
from pipeline.media.video import ThumbnailStrip
from pipeline.monitoring.metrics import ServiceMetrics
from pipeline.request import sampling_params
from pipeline.rows import Item, as_tensor
from pipeline.serving.http.files import fragment_path, fragments_folder
from pipeline.serving.queue.records import Claim
from pipeline.serving.queue.store import Store
from pipeline.stages import FILE, THUMBNAIL
from pipeline.stages.decode import Decode
from pipeline.stages.model import ModelConfig
from pipeline.storage.storage import Storage
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.memory.placement import release_memory
from pyramid_flow.pixels import as_uint8
from pyramid_flow.vae.model import VAEState
from pyramid_flow.vae.tile import Tile

logger = logging.getLogger(__name__)

Show = Callable[[Item, int], int]
"""Is given an item whose latents begin with unit number so-and-so; returns the number of the unit to send next."""


class ClaimLostError(PyramidFlowError):
    """Nobody waits for what is being shown any more."""


class Relay:
    """Hands the finished units of a batch to a decoder beside the sampler, which does not wait.

    A decoder that has lost what it had, or is another one, wants unit 0 next, and is given all of them again. What is
    not shown costs the video nothing.
    """

    def __init__(self, show: Show, executor: Executor) -> None:
        self.show, self.executor = show, executor
        self.units: dict[str, list[Tensor]] = {}
        self.next: dict[str, int] = {}

    def __call__(self, item: Item, units: Sequence[Tensor]) -> None:
        """Hand on further units [1,16,1,h,w] of a row."""
        self.units.setdefault(item.row.id, []).extend(unit.cpu() for unit in units)
        self.executor.submit(self._send, item)

    def _send(self, item: Item) -> None:
        units, start = list(self.units[item.row.id]), self.next.get(item.row.id, 0)
        if start >= len(units):
            return  # they went with those of an earlier call
        try:
            wanted = self.show(_with_units(item, units[start:]), start)
            if wanted < start:
                wanted = self.show(_with_units(item, units), 0)
            self.next[item.row.id] = wanted
        except Exception as error:  # noqa: BLE001 - whatever it was, the next unit may do better
            logger.warning("not shown: %s", error, extra={"videos": [item.row.position]})


def _with_units(item: Item, units: Sequence[Tensor]) -> Item:
    return Item(item.row, {"latents": torch.cat(list(units), dim=2)})


class LiveVideo:
    """One video in the decoder: its fragments so far, and what its next unit needs of those before."""

    def __init__(self, item: Item, decode: "LiveDecode") -> None:
        self.request, self.claim, self.decode = item.request, Claim.of_row(item.row.id), decode
        self.started_at = item.row.started_at or datetime.now(UTC)
        self.strip = ThumbnailStrip(self.request.num_frames)
        self.fragments: list[bytes] = []
        self.num_frames = 0
        self.tile: int | None = None
        self._state: VAEState | None = None

    @torch.no_grad()
    def add(self, latents: Tensor) -> None:
        """Decode and store the next units, normalised [1,16,n,h,w], each as one fragment.

        Raises ClaimLostError if nobody waits for them any more.
        """
        if not self.fragments:
            self.tile = self.decode.tile_for(self.request)
        for unit in latents.split(1, dim=2):
            index = len(self.fragments)
            raw = self.decode.statistics.denormalize(unit.float(), index)
            pixels, self._state = self.decode.vae.decode_chunk(raw, self._state, tile=self.tile)
            frames = as_uint8(pixels)[0].cpu().numpy()
            threads = self.decode.encoder_threads
            fragment = encode_fragment(frames, index, self.num_frames, self.request.fps, threads=threads)
            self.decode.storage.put(fragment_path(self.claim, index), fragment)
            self.fragments.append(fragment)
            self.num_frames += len(frames)
            self.strip.add(frames)
            if not self.decode.store.show(self.claim, len(self.fragments)):
                self._forget()
                raise ClaimLostError(f"{self.claim.id} is not waited for any more")
            if index == 0:
                self.decode.metrics.first_fragment((datetime.now(UTC) - self.started_at).total_seconds())

    def files(self) -> dict[str, Tensor]:
        """Return the finished files of a video whose units are all here."""
        video = join_fragments(self.fragments, self.decode.tags(self.request))
        return {FILE: as_tensor(video), THUMBNAIL: as_tensor(self.strip.webp())}

    def _forget(self) -> None:
        """Leave nothing behind of a claim that was lost; a finished video's fragments are still read."""
        job = self.decode.store.get(self.claim.id)
        if job is None or job.fence != self.claim.fence:
            for path in self.decode.storage.list(f"{fragments_folder(self.claim.id)}/{self.claim.fence}"):
                self.decode.storage.delete(path)


class LiveDecode(Decode):
    """Decodes followed videos unit by unit, most of them before the sampler has made all; the others as ever.

    max_live: videos whose state is kept between their units, at most; further ones are shown when they are sampled.
    """

    def __init__(
        self,
        model: ModelConfig,
        window: int,
        tile: Tile,
        encoder_threads: int,
        max_live: int,
        database: str,
        output: str,
    ) -> None:
        super().__init__(model, window, tile, encoder_threads)
        self.max_live = max_live
        self.store, self.storage, self.metrics = Store(database), Storage(output), ServiceMetrics()
        self.videos: dict[str, LiveVideo] = {}

    def show(self, item: Item, start: int) -> int:
        """Decode units of a video from number `start`; returns the number of the one that is wanted next.

        That is 0 if those before `start` are not known here, and beyond the last for a video that cannot be shown now.
        """
        none_wanted = sampling_params([item.request]).num_units
        if item.row.id not in self.videos:
            self._drop_lost()
            if len(self.videos) >= self.max_live:
                return none_wanted
            if start:
                return 0
        video = self.videos.setdefault(item.row.id, LiveVideo(item, self))
        if start > len(video.fragments):  # another decoder had the video meanwhile
            return 0
        try:
            with self.placement.working(self.vae):
                video.add(item.tensors["latents"][:, :, len(video.fragments) - start :])
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - it is decoded once more at its end, where a fault is its own
            logger.warning("%s is not shown: %s", item.row.id, error)
            self.videos.pop(item.row.id)
            return none_wanted
        return len(video.fragments)

    def process(self, items: Sequence[Item]) -> list[Item]:
        """Decode what is left of the rows, one after another."""
        self._drop_lost()
        followed = {claim.row_id for claim in self.store.followed([Claim.of_row(item.row.id) for item in items])}
        with self.placement.working(self.vae):
            return [self._finished(item) if item.row.id in followed else self._unseen(item) for item in items]

    def _drop_lost(self) -> None:
        """Forget videos that nobody makes any more, and with them the device's memory that they hold."""
        held = {claim.row_id for claim in self.store.followed([Claim.of_row(row_id) for row_id in self.videos])}
        self.videos = {row_id: video for row_id, video in self.videos.items() if row_id in held}

    def _unseen(self, item: Item) -> Item:
        return self._decoded(item, self.tile_for(item.request))

    def _decoded(self, item: Item, tile: int | None) -> Item:
        try:
            return self._decoded_with(item, tile)
        except torch.OutOfMemoryError:
            self.videos.clear()  # they are decoded once more
        release_memory()
        return super()._decoded(item, tile)

    def _finished(self, item: Item) -> Item:
        video = self.videos.pop(item.row.id, None) or LiveVideo(item, self)
        try:
            video.add(item.tensors["latents"][:, :, len(video.fragments) :])
        except ClaimLostError:
            return item.with_tensors({}, skipped=True)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - another way may do
            logger.warning("%s is not shown to its end: %s", item.row.id, error)
        else:
            return item.with_tensors(video.files(), frames=video.num_frames, tiling=video.tile)
        del video  # and with it what it holds of the device's memory
        return self._unseen(item)
